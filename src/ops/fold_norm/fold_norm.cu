// A batch normalisation with fixed statistics as a scale and a shift. A thread owns a channel.
#include "kernel.cuh"

extern "C" __global__ void fold_norm(const float *weight, const float *bias, const float *mean, const float *variance,
                                     float *scale, float *shift, int channels, float eps) {
    int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= channels) return;
    float factor = weight[c] / sqrtf(variance[c] + eps);
    scale[c] = factor;
    shift[c] = bias[c] - mean[c] * factor;
}
CU_KERNEL(fold_norm)

// From the gradient of the shift that of the scale, -g mean, or from that of the scale that of the weight,
// g / sqrt(variance + eps).
extern "C" __global__ void fold_norm_gradient(const float *g, const float *mean, const float *variance, float *out,
                                              int channels, float eps, int of_scale) {
    int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c < channels) out[c] = of_scale ? -g[c] * mean[c] : g[c] / sqrtf(variance[c] + eps);
}
CU_KERNEL(fold_norm_gradient)
