// Losses of regression: sums over all elements in two stages, and their gradients by element.
#include "kernel.cuh"

// The weights of samples of `sample` elements; null: 1.
__device__ __forceinline__ float weight_of(const float *weights, i64 i, i64 sample) {
    if (!weights) return 1.0f;
    return weights[(i | sample) >> 32 ? i / sample : (i64)((u32)i / (u32)sample)];
}

// Each block the sum of its part of weight * difference^2, or weight * |difference|.
template <class T>
__device__ void sum_differences(const T *__restrict__ x, const T *__restrict__ target, const float *weights,
                                double *__restrict__ sums, i64 count, i64 sample, int absolute) {
    __shared__ double scratch[WARP];
    i64 per_block = (count + gridDim.x - 1) / gridDim.x, first = blockIdx.x * per_block;
    i64 end = min(count, first + per_block);
    double sum = 0.0;
    for (i64 i = first + threadIdx.x; i < end; i += blockDim.x) {
        double d = (double)to_float(x[i]) - (double)to_float(target[i]);
        sum += (absolute ? fabs(d) : d * d) * weight_of(weights, i, sample);
    }
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

#define SUM_DIFFERENCES(T, suffix)                                                                                     \
    extern "C" __global__ void sum_differences_##suffix(const T *x, const T *target, const float *weights,             \
                                                        double *sums, i64 count, i64 sample, int absolute) {           \
        sum_differences(x, target, weights, sums, count, sample, absolute);                                            \
    }                                                                                                                  \
    CU_KERNEL(sum_differences_##suffix)

FOR_FLOATS(SUM_DIFFERENCES)

// The sum of the parts over `divisor`. One block.
extern "C" __global__ void mean_of_sums(const double *__restrict__ sums, float *__restrict__ out, int parts,
                                        double divisor) {
    __shared__ double scratch[WARP];
    double sum = 0.0;
    for (int i = threadIdx.x; i < parts; i += blockDim.x) sum += sums[i];
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) *out = (float)(sum / divisor);
}
CU_KERNEL(mean_of_sums)

// g factor[sample] times the difference, or its sign. A thread owns an element.
extern "C" __global__ void differences_gradient(const float *__restrict__ x, const float *__restrict__ target,
                                                const float *factors, const float *g, float *__restrict__ out,
                                                i64 count, i64 sample, int absolute) {
    i64 i = thread_number();
    if (i >= count) return;
    float d = x[i] - target[i], factor = *g * weight_of(factors, i, sample);
    out[i] = !absolute ? factor * d : d > 0.0f ? factor : d < 0.0f ? -factor : 0.0f;
}
CU_KERNEL(differences_gradient)

#define TERMS 16

// As in cuda.rs.
struct Terms {
    const float *of[TERMS];
    float factors[TERMS];
    int count, adds;
};

// The sum of scalars times their factors, added to what is there if `adds`. One thread does it.
extern "C" __global__ void weighted_sum(Terms terms, float *out) {
    if (threadIdx.x != 0) return;
    double sum = terms.adds ? (double)*out : 0.0;
#pragma unroll
    for (int i = 0; i < TERMS; i++)
        if (i < terms.count) sum += (double)*terms.of[i] * (double)terms.factors[i];
    *out = (float)sum;
}
CU_KERNEL(weighted_sum)
