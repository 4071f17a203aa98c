// Channels with mean 0 and variance 1 over the rows of each group, and the gradient through mean and variance. Sums and
// moments are double, and a thread owns those of a group and channel; what is applied to each element are a few floats
// of its channel.
#include "kernel.cuh"

// Sums of x and of x^2 [groups, 2, C] -> moments [2, groups, C], the mean and 1 / sqrt(variance + eps); statistics
// [2, groups, C], mean and variance; and coefficients [groups, 3, C], so that the result is (x - k0) k1 + k2. Weight
// and bias may be null: then they are 1 and 0.
extern "C" __global__ void standardise_moments(const double *__restrict__ sums, const float *weight, const float *bias,
                                               double *__restrict__ moments, float *__restrict__ statistics,
                                               float *__restrict__ coefficients, i64 entries, int channels,
                                               double count, double eps) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= entries) return;
    i64 group = i / channels;
    int c = i % channels;
    double mean = sums[2 * group * channels + c] / count;
    double variance = fmax(sums[(2 * group + 1) * channels + c] / count - mean * mean, 0.0);
    double inverse = 1.0 / sqrt(variance + eps);
    moments[i] = mean;
    moments[entries + i] = inverse;
    statistics[i] = (float)mean;
    statistics[entries + i] = (float)variance;
    float rounded = (float)mean;
    double scale = weight ? weight[c] * inverse : inverse;
    coefficients += 3 * group * channels + c;
    coefficients[0] = rounded;
    coefficients[channels] = (float)scale;
    coefficients[2 * channels] = (float)((rounded - mean) * scale + (bias ? bias[c] : 0.0));
}
CU_KERNEL(standardise_moments)

// Sums of g and of g x [groups, 2, C]: the second become those of g (x - mean) / deviation.
extern "C" __global__ void standardise_centre(double *__restrict__ sums, const double *__restrict__ moments,
                                              i64 entries, int channels) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= entries) return;
    sums += 2 * (i / channels) * channels + i % channels;
    sums[channels] = (sums[channels] - moments[i] * sums[0]) * moments[entries + i];
}
CU_KERNEL(standardise_centre)

// From centred sums, coefficients [groups, 4, C], so that the gradient of x is (x - k0) k1 + k2 + g k3.
extern "C" __global__ void standardise_slopes(const double *__restrict__ sums, const double *__restrict__ moments,
                                              const float *weight, float *__restrict__ coefficients, i64 entries,
                                              int channels, double count) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= entries) return;
    i64 group = i / channels;
    int c = i % channels;
    double mean = moments[i], inverse = moments[entries + i];
    double of_g = sums[2 * group * channels + c] / count, of_gy = sums[(2 * group + 1) * channels + c] / count;
    double scale = weight ? weight[c] * inverse : inverse, slope = -scale * of_gy * inverse;
    float rounded = (float)mean;
    coefficients += 4 * group * channels + c;
    coefficients[0] = rounded;
    coefficients[channels] = (float)slope;
    coefficients[2 * channels] = (float)((rounded - mean) * slope - scale * of_g);
    coefficients[3 * channels] = (float)scale;
}
CU_KERNEL(standardise_slopes)

// y = (x - k0) k1 + k2. A thread owns N neighbouring channels of a row.
template <class T, int N>
__device__ void standardise(const T *__restrict__ x, const float *__restrict__ coefficients, T *__restrict__ y,
                            i64 packs, i64 group_elements, int channels) {
    i64 i = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * N;
    if (i >= packs * N) return;
    const float *k = coefficients + i / group_elements * 3 * channels + i % channels;
    Pack<T, N> v = load_pack<T, N>(x + i);
    for (int j = 0; j < N; j++)
        v.at[j] = from_float<T>(fmaf(to_float(v.at[j]) - k[j], k[channels + j], k[2 * channels + j]));
    store_pack<T, N>(y + i, v);
}

// `wide`: whether threads own 4 channels each.
#define STANDARDISE(T, suffix)                                                                                         \
    extern "C" __global__ void standardise_##suffix(const T *x, const float *coefficients, T *y, i64 packs,            \
                                                    i64 group_elements, int channels, int wide) {                      \
        if (wide)                                                                                                      \
            standardise<T, 4>(x, coefficients, y, packs, group_elements, channels);                                    \
        else                                                                                                           \
            standardise<T, 1>(x, coefficients, y, packs, group_elements, channels);                                    \
    }                                                                                                                  \
    CU_KERNEL(standardise_##suffix)

FOR_FLOATS(STANDARDISE)

// (x - k0) k1 + k2 + g k3.
template <int N>
__device__ void gradient(const float *__restrict__ g, const float *__restrict__ x,
                         const float *__restrict__ coefficients, float *__restrict__ dx, i64 packs, i64 group_elements,
                         int channels) {
    i64 i = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * N;
    if (i >= packs * N) return;
    const float *k = coefficients + i / group_elements * 4 * channels + i % channels;
    Pack<float, N> v = load_pack<float, N>(x + i), of_y = load_pack<float, N>(g + i);
    for (int j = 0; j < N; j++) {
        float through_moments = fmaf(v.at[j] - k[j], k[channels + j], k[2 * channels + j]);
        v.at[j] = fmaf(of_y.at[j], k[3 * channels + j], through_moments);
    }
    store_pack<float, N>(dx + i, v);
}

extern "C" __global__ void standardise_gradient(const float *g, const float *x, const float *coefficients, float *dx,
                                                i64 packs, i64 group_elements, int channels, int wide) {
    if (wide)
        gradient<4>(g, x, coefficients, dx, packs, group_elements, channels);
    else
        gradient<1>(g, x, coefficients, dx, packs, group_elements, channels);
}
CU_KERNEL(standardise_gradient)
