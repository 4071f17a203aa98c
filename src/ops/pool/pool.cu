// The mean over the pixels of an image, in two stages, and its gradient. A block owns 32 channels of a part of a
// sample's pixels.
#include "kernel.cuh"

#define CHANNELS 32
#define LINES 8

// [samples, pixels, C] -> [samples, parts, C]: the sums of each part, times `factor`. Blocks are numbered by sample
// and channels in x, by part in y.
template <class T, class Out>
__device__ void add_pixels(const T *__restrict__ x, Out *__restrict__ sums, i64 pixels, int channels, i64 part,
                           float factor) {
    __shared__ float lines[LINES][CHANNELS];
    int tiles = (channels + CHANNELS - 1) / CHANNELS, n = blockIdx.x / tiles;
    int c = blockIdx.x % tiles * CHANNELS + threadIdx.x;
    i64 first = blockIdx.y * part, end = min(pixels, first + part);
    x += (i64)n * pixels * channels;
    float sum = 0.0f;
    if (c < channels)
        for (i64 p = first + threadIdx.y; p < end; p += LINES) sum += to_float(x[p * channels + c]);
    lines[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && c < channels) {
        for (int line = 1; line < LINES; line++) sum += lines[line][threadIdx.x];
        sums[((i64)n * gridDim.y + blockIdx.y) * channels + c] = from_float<Out>(sum * factor);
    }
}

#define POOL(T, suffix)                                                                                                \
    extern "C" __global__ void pool_parts_##suffix(const T *x, float *sums, i64 pixels, int channels, i64 part) {      \
        add_pixels<T, float>(x, sums, pixels, channels, part, 1.0f);                                                   \
    }                                                                                                                  \
    CU_KERNEL(pool_parts_##suffix)                                                                                     \
    extern "C" __global__ void pool_means_##suffix(const float *sums, T *y, i64 parts, int channels, float factor) {   \
        add_pixels<float, T>(sums, y, parts, channels, parts, factor);                                                 \
    }                                                                                                                  \
    CU_KERNEL(pool_means_##suffix)

FOR_FLOATS(POOL)

// dx[n, pixel, c] = share g[n, c]. A thread owns an element.
extern "C" __global__ void pool_gradient(const float *__restrict__ g, float *__restrict__ dx, i64 count, i64 pixels,
                                         int channels, float share) {
    i64 i = thread_number();
    if (i >= count) return;
    i64 pixel = quotient(i, channels);
    dx[i] = g[pixel / pixels * channels + i - pixel * channels] * share;
}
CU_KERNEL(pool_gradient)
