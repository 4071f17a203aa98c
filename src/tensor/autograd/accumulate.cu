// The sum of gradients. A thread adds one number.
#include "kernel.cuh"

extern "C" __global__ void accumulate(float *__restrict__ sum, const float *__restrict__ added, i64 count) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) sum[i] += added[i];
}
CU_KERNEL(accumulate)
