// What the three libraries share. All of it is in libcuda.so.1; the other two are linked to it.
#pragma once
#include <stddef.h>

#define FAKE_API extern "C" __attribute__((visibility("default")))

// Every entry point that can fail starts with it: counts the call by its name, a string constant, and gives the code
// that was injected, or 0.
FAKE_API int cuemu_enter(const char *name);
// Counts objects that are alive; `kind` is a string constant.
FAKE_API void cuemu_count(const char *kind, long difference);
// Work for a stream: `run` is called when the stream comes to it, as often as a graph replays it, and `drop` when no
// more. Gives a CUresult.
FAKE_API int cuemu_enqueue(void *stream, int (*run)(void *), void (*drop)(void *), void *data);
// Whether the bytes lie inside one live allocation of device memory.
FAKE_API bool cuemu_inside(unsigned long long address, size_t bytes);
FAKE_API bool cuemu_has_context();
