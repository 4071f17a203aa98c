// How far the features of pixels point in different directions. A warp owns a pixel at a time.
#include "kernel.cuh"

#define NORM_EPS 1e-10f

// 1 / (|x| + eps) of a pixel's features, in every lane; the length as well.
template <class T> __device__ __forceinline__ float2 inverse_length(const T *x, int channels) {
    float squares = 0.0f;
    for (int c = threadIdx.x % WARP; c < channels; c += WARP) squares += to_float(x[c]) * to_float(x[c]);
    float length = sqrtf(warp_sum(squares));
    return make_float2(1.0f / (length + NORM_EPS), length);
}

// sums[block] = the sum over the block's pixels of w (x / (|x| + eps) - y / (|y| + eps))^2.
template <class T>
__device__ void distances(const T *__restrict__ x, const T *__restrict__ y, const float *__restrict__ w,
                          double *__restrict__ sums, i64 pixels, int channels, double *scratch) {
    i64 warps = (i64)gridDim.x * blockDim.x / WARP;
    double sum = 0.0;
    for (i64 pixel = ((i64)blockIdx.x * blockDim.x + threadIdx.x) / WARP; pixel < pixels; pixel += warps) {
        const T *a = x + pixel * channels, *b = y + pixel * channels;
        float to_x = inverse_length(a, channels).x, to_y = inverse_length(b, channels).x, of_pixel = 0.0f;
        for (int c = threadIdx.x % WARP; c < channels; c += WARP) {
            float difference = to_float(a[c]) * to_x - to_float(b[c]) * to_y;
            of_pixel += w[c] * difference * difference;
        }
        sum += of_pixel;
    }
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

#define FEATURE_DISTANCES(T, suffix)                                                                                   \
    extern "C" __global__ void feature_distances_##suffix(const T *x, const T *y, const float *w, double *sums,        \
                                                          i64 pixels, int channels) {                                  \
        __shared__ double scratch[WARP];                                                                               \
        distances(x, y, w, sums, pixels, channels, scratch);                                                           \
    }                                                                                                                  \
    CU_KERNEL(feature_distances_##suffix)

FOR_FLOATS(FEATURE_DISTANCES)

// out[0] = the sum of all sums over the number of pixels. One block.
extern "C" __global__ void feature_distance_mean(const double *__restrict__ sums, float *__restrict__ out, int count,
                                                 i64 pixels) {
    __shared__ double scratch[WARP];
    double sum = 0.0;
    for (int i = threadIdx.x; i < count; i += blockDim.x) sum += sums[i];
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) *out = (float)(sum / pixels);
}
CU_KERNEL(feature_distance_mean)

// With n = |x|, e = 1e-10 and h = 2 g / pixels w (x / (n + e) - y / (|y| + e)): dx = h / (n + e) - (h . x) /
// (n (n + e)^2) x, and 0 where n is 0.
extern "C" __global__ void feature_distance_gradient(const float *__restrict__ g, const float *__restrict__ x,
                                                     const float *__restrict__ y, const float *__restrict__ w,
                                                     float *__restrict__ dx, i64 pixels, int channels) {
    i64 pixel = ((i64)blockIdx.x * blockDim.x + threadIdx.x) / WARP;
    if (pixel >= pixels) return;
    int lane = threadIdx.x % WARP;
    x += pixel * channels;
    y += pixel * channels;
    dx += pixel * channels;
    float2 of_x = inverse_length(x, channels);
    float to_y = inverse_length(y, channels).x, scale = (float)(2.0 * *g / pixels), along = 0.0f;
    if (of_x.y == 0.0f) {
        for (int c = lane; c < channels; c += WARP) dx[c] = 0.0f;
        return;
    }
    for (int c = lane; c < channels; c += WARP) along += scale * w[c] * (x[c] * of_x.x - y[c] * to_y) * x[c];
    along = warp_sum(along) * of_x.x / of_x.y;
    for (int c = lane; c < channels; c += WARP)
        dx[c] = (scale * w[c] * (x[c] * of_x.x - y[c] * to_y) - along * x[c]) * of_x.x;
}
CU_KERNEL(feature_distance_gradient)
