// CUDA C++ on the CPU, for tests. The fake NVRTC puts this file before a kernel source and compiles both with g++.
//
// Blocks run one after another. Every thread of a block is a fiber, a warp is 32 neighbouring ones, and control passes
// between them only where they synchronise, in an order that the launch chooses. Mistakes that hardware lets pass end
// the process with a message: a barrier that not all threads reach, an exited lane in a mask, a deadlock.
#pragma once
#define CUEMU 1

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <math.h>
#include <stdlib.h>
#include <type_traits>
#include <utility>

// --- Keywords and built-in types --------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __maxnreg__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __grid_constant__
// One section for all, so that it can be filled with NaN when a block starts. GCC puts it elsewhere in templates.
#define __shared__ static __attribute__((section("cuemu_shared")))

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define CUEMU_VECTORS(T, N)                                                                                            \
    struct alignas(2 * sizeof(T)) N##2 {                                                                               \
        T x, y;                                                                                                        \
    };                                                                                                                 \
    struct alignas(4 * sizeof(T) > 16 ? 16 : 4 * sizeof(T)) N##4 {                                                     \
        T x, y, z, w;                                                                                                  \
    };                                                                                                                 \
    inline N##2 make_##N##2(T x, T y) { return {x, y}; }                                                               \
    inline N##4 make_##N##4(T x, T y, T z, T w) { return {x, y, z, w}; }
CUEMU_VECTORS(float, float)
CUEMU_VECTORS(double, double)
CUEMU_VECTORS(signed char, char)
CUEMU_VECTORS(unsigned char, uchar)
CUEMU_VECTORS(short, short)
CUEMU_VECTORS(unsigned short, ushort)
CUEMU_VECTORS(int, int)
CUEMU_VECTORS(unsigned, uint)
CUEMU_VECTORS(long long, longlong)
CUEMU_VECTORS(unsigned long long, ulonglong)

#include "cuemu/engine.h"
#include "cuemu/warp.h"
#include "cuemu/arithmetic.h"
#include "cuemu/tensor.h"

// --- What NVRTC lacks -------------------------------------------------------------------------------------------
// A kernel that leans on a host header must not compile here either. It may define these names itself.

#undef INFINITY
#undef NAN
#undef HUGE_VALF
#undef FLT_MAX
#undef M_PI
#define int8_t no_int8_t_in_nvrtc
#define int16_t no_int16_t_in_nvrtc
#define int32_t no_int32_t_in_nvrtc
#define int64_t no_int64_t_in_nvrtc
#define uint8_t no_uint8_t_in_nvrtc
#define uint16_t no_uint16_t_in_nvrtc
#define uint32_t no_uint32_t_in_nvrtc
#define uint64_t no_uint64_t_in_nvrtc
#define uintptr_t no_uintptr_t_in_nvrtc
#pragma GCC poison std
