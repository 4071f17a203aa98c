// The loss of telling two kinds apart, from numbers before the sigmoid.
#include "kernel.cuh"

// The mean of max(x, 0) - t x + ln(1 + e^-|x|). One block.
template <class T>
__device__ void mean_loss(const T *__restrict__ x, const float *targets, float *out, i64 count, i64 sample) {
    __shared__ double scratch[WARP];
    double sum = 0.0;
    for (i64 i = threadIdx.x; i < count; i += blockDim.x) {
        float v = to_float(x[i]);
        sum += fmaxf(v, 0.0f) - targets[i / sample] * v + log1pf(expf(-fabsf(v)));
    }
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) *out = (float)(sum / (double)count);
}

#define BINARY_CROSS_ENTROPY(T, suffix)                                                                                \
    extern "C" __global__ void binary_cross_entropy_##suffix(const T *x, const float *targets, float *out, i64 count,  \
                                                             i64 sample) {                                             \
        mean_loss(x, targets, out, count, sample);                                                                     \
    }                                                                                                                  \
    CU_KERNEL(binary_cross_entropy_##suffix)

FOR_FLOATS(BINARY_CROSS_ENTROPY)

// g (sigmoid(x) - t) / count. A thread owns an element.
extern "C" __global__ void binary_cross_entropy_gradient(const float *__restrict__ x, const float *targets,
                                                         const float *g, float *__restrict__ out, i64 count,
                                                         i64 sample) {
    i64 i = thread_number();
    if (i >= count) return;
    out[i] = *g / (float)count * (1.0f / (1.0f + expf(-x[i])) - targets[i / sample]);
}
CU_KERNEL(binary_cross_entropy_gradient)
