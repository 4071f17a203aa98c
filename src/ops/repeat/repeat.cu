// Each element several times in a row, and the sum over them. A thread owns an element of the result.
#include "kernel.cuh"

extern "C" __global__ void repeat_each(const float *__restrict__ x, float *__restrict__ out, i64 count, int times) {
    i64 i = thread_number();
    if (i < count) out[i] = x[quotient(i, times)];
}
CU_KERNEL(repeat_each)

extern "C" __global__ void repeat_each_gradient(const float *__restrict__ g, float *__restrict__ out, i64 count,
                                                int times) {
    i64 i = thread_number();
    if (i >= count) return;
    float sum = 0.0f;
    for (int j = 0; j < times; j++) sum += g[i * times + j];
    out[i] = sum;
}
CU_KERNEL(repeat_each_gradient)
