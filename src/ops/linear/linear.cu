// A factor of all numbers of a tensor. A thread owns one number.
#include "kernel.cuh"

// `from` and `to` may be the same.
template <class T> __device__ __forceinline__ void scale(const T *from, T *to, i64 count, float by) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) to[i] = from_float<T>(by * to_float(from[i]));
}

#define SCALE(T, suffix)                                                                                               \
    extern "C" __global__ void linear_scale_##suffix(const T *from, T *to, i64 count, float by) {                      \
        scale(from, to, count, by);                                                                                    \
    }                                                                                                                  \
    CU_KERNEL(linear_scale_##suffix)

FOR_FLOATS(SCALE)
