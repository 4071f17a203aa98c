// What the driver and a compiled kernel source know of each other.
#pragma once
#include <stddef.h>
#include <stdint.h>

struct CuemuKernel {
    const char *name;
    void (*call)(void **parameters);
    unsigned parameters;
    const size_t *sizes, *offsets; // of the parameters
    const CuemuKernel *next;
};

struct CuemuLaunch {
    const CuemuKernel *kernel;
    unsigned grid[3], block[3];
    size_t shared; // bytes of dynamic shared memory
    void **parameters;
    int order; // of threads, warps and blocks: 0 ascending, 1 descending, 2 random
    uint64_t seed;
    char *stacks; // one for each thread of a block, of CUEMU_STACK bytes
};

struct CuemuModule {
    const CuemuKernel *kernels;
    void (*run)(const CuemuLaunch &launch);
    size_t static_shared; // bytes
};

constexpr size_t CUEMU_STACK = 256 * 1024;
constexpr unsigned CUEMU_THREADS = 1024;

// A module exports this under the name cuemu_module.
using CuemuModuleFn = CuemuModule();
