// Numbers of one type as another. A thread converts one number.
#include "kernel.cuh"

template <class From, class To>
__device__ void convert(const From *__restrict__ from, To *__restrict__ to, i64 count) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) to[i] = from_float<To>(to_float(from[i]));
}

#define CONVERT(From, from_name, To, to_name)                                                                          \
    extern "C" __global__ void convert_from_##from_name##_to_##to_name(const From *from, To *to, i64 count) {          \
        convert(from, to, count);                                                                                      \
    }                                                                                                                  \
    CU_KERNEL(convert_from_##from_name##_to_##to_name)

#define TO_ALL(From, from_name)                                                                                        \
    CONVERT(From, from_name, float, f32) CONVERT(From, from_name, f16_t, f16) CONVERT(From, from_name, bf16_t, bf16)

FOR_FLOATS(TO_ALL)
