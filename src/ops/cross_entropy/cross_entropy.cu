// Softmax, loss and gradient by the logits. A block owns a row, which it reads once if there is shared memory for it.
#include "kernel.cuh"

// As in cuda.rs.
struct Rows {
    float *logits;
    const i64 *targets;
    const float *coefficients;
    float *losses;
    u8 *hits;
    int classes, in_shared, gradients;
    float smoothing;
};

// hot: cross_entropy_rows
extern "C" __global__ void cross_entropy_rows(Rows p) {
    DYN_SHARED(float, held);
    __shared__ float scratch[3][WARP];
    int row = blockIdx.x;
    float *logits = p.logits + (i64)row * p.classes, *weights = p.in_shared ? held : logits;
    i64 target = p.targets[row];
    bool is_class = target >= 0 && target < p.classes;
    // A target that is no class makes a loss that is no number.
    float of_target = is_class ? logits[target] : __uint_as_float(0x7fffffffu);
    float most = -INFINITY_F, sum = 0.0f;
#pragma unroll 4
    for (int v = threadIdx.x; v < p.classes; v += blockDim.x) {
        float l = logits[v];
        if (p.in_shared) weights[v] = l;
        most = fmaxf(most, l);
        sum += l;
    }
    most = block_max(most, scratch[0]);
    float mean = block_sum(sum, scratch[1]) / p.classes - most, total = 0.0f;
    bool is_beaten = !(of_target == most);
    for (int v = threadIdx.x; v < p.classes; v += blockDim.x) {
        if (weights[v] == most && v < target) is_beaten = true;
        float weight = expf(weights[v] - most);
        weights[v] = weight;
        total += weight;
    }
    is_beaten = __syncthreads_or(is_beaten);
    total = block_sum(total, scratch[2]);
    if (threadIdx.x == 0) {
        float own = of_target - most;
        p.losses[row] = logf(total) - fmaf(p.smoothing, mean - own, own);
        p.hits[row] = is_beaten ? 0 : 1;
    }
    if (!p.gradients) return;
    float coefficient = p.coefficients[row], factor = coefficient / total;
    float spread = coefficient * p.smoothing / p.classes, of_label = coefficient * (1.0f - p.smoothing);
    for (int v = threadIdx.x; v < p.classes; v += blockDim.x)
        logits[v] = fmaf(weights[v], factor, -spread) - (v == target ? of_label : 0.0f);
}
CU_KERNEL(cross_entropy_rows)

// The sum of losses times their coefficients. One block.
extern "C" __global__ void cross_entropy_loss(const float *__restrict__ losses, const float *__restrict__ coefficients,
                                              float *__restrict__ out, i64 count) {
    __shared__ double scratch[WARP];
    double sum = 0.0;
    for (i64 i = threadIdx.x; i < count; i += blockDim.x) sum += (double)losses[i] * (double)coefficients[i];
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) *out = (float)sum;
}
CU_KERNEL(cross_entropy_loss)

// x times the number at `by`.
extern "C" __global__ void scale_by_scalar(float *__restrict__ x, const float *__restrict__ by, i64 count) {
    float factor = *by;
    for (i64 i = thread_number(); i < count; i += (i64)gridDim.x * blockDim.x) x[i] *= factor;
}
CU_KERNEL(scale_by_scalar)
