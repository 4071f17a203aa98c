// AdamW's update, the moving average of weights, and the sum of squares. A thread owns every so-many-eth number.
#include "kernel.cuh"

// AdamWStep in mod.rs.
struct AdamWStep {
    float scale, b1, b2, decay, size, root, eps;
};

extern "C" __global__ void adamw(AdamWStep step, float *__restrict__ weights, float *__restrict__ first,
                                 float *__restrict__ second, const float *__restrict__ gradient, i64 count) {
    for (i64 i = thread_number(); i < count; i += (i64)gridDim.x * blockDim.x) {
        float g = gradient[i] * step.scale, m = first[i], v = second[i];
        m += (g - m) * (1.0f - step.b1);
        v = v * step.b2 + g * g * (1.0f - step.b2);
        first[i] = m;
        second[i] = v;
        weights[i] = weights[i] * step.decay - step.size * (m / (sqrtf(v) / step.root + step.eps));
    }
}
CU_KERNEL(adamw)

// average = decay average + (1 - decay) x
extern "C" __global__ void moving_average(float *__restrict__ average, const float *__restrict__ x, float decay,
                                          i64 count) {
    for (i64 i = thread_number(); i < count; i += (i64)gridDim.x * blockDim.x)
        average[i] = average[i] * decay + x[i] * (1.0f - decay);
}
CU_KERNEL(moving_average)

// running = running + (factor x - running) momentum
extern "C" __global__ void approach(float *__restrict__ running, const float *__restrict__ x, float factor,
                                    float momentum, i64 count) {
    for (i64 i = thread_number(); i < count; i += (i64)gridDim.x * blockDim.x)
        running[i] += (x[i] * factor - running[i]) * momentum;
}
CU_KERNEL(approach)

// Each block the sum of its part of the squares; squares_total adds them up in their order, in one block.
extern "C" __global__ void squares_of_parts(const float *__restrict__ x, double *__restrict__ sums, i64 count) {
    __shared__ double scratch[WARP];
    i64 per_block = (count + gridDim.x - 1) / gridDim.x, first = blockIdx.x * per_block;
    i64 end = min(count, first + per_block);
    double sum = 0.0;
    for (i64 i = first + threadIdx.x; i < end; i += blockDim.x) sum += (double)(x[i] * x[i]);
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}
CU_KERNEL(squares_of_parts)

extern "C" __global__ void squares_total(const double *__restrict__ sums, double *__restrict__ total, i64 count) {
    __shared__ double scratch[WARP];
    double sum = 0.0;
    for (i64 i = threadIdx.x; i < count; i += blockDim.x) sum += sums[i];
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) *total = sum;
}
CU_KERNEL(squares_total)
