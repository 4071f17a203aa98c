// Layer normalisation. A warp owns a row, which it reads three times: from the first cache but once.
#include "kernel.cuh"

#define ROWS_PER_BLOCK 8

// Mean and 1 / sqrt(var + eps) of a row, in every lane.
template <class T, int N> __device__ __forceinline__ float2 moments(const T *x, int channels, float eps) {
    int lane = threadIdx.x % WARP;
    float sum = 0.0f;
    for (int i = lane * N; i < channels; i += WARP * N) {
        Pack<T, N> v = load_pack<T, N>(x + i);
        for (int j = 0; j < N; j++) sum += to_float(v.at[j]);
    }
    float mean = warp_sum(sum) / channels;
    float squares = 0.0f;
    for (int i = lane * N; i < channels; i += WARP * N) {
        Pack<T, N> v = load_pack<T, N>(x + i);
        for (int j = 0; j < N; j++) {
            float d = to_float(v.at[j]) - mean;
            squares += d * d;
        }
    }
    return make_float2(mean, 1.0f / sqrtf(warp_sum(squares) / channels + eps));
}

// y = ((x - mean) inverse w + b) (1 + scale) + shift. Null: no such parameter.
template <class T, int N>
__device__ void normalize(const T *__restrict__ x, const float *weight, const float *bias, const float *scale,
                          const float *shift, T *__restrict__ y, i64 rows, int channels, float eps) {
    i64 row = (i64)blockIdx.x * ROWS_PER_BLOCK + threadIdx.x / WARP;
    if (row >= rows) return;
    x += row * channels;
    y += row * channels;
    float2 m = moments<T, N>(x, channels, eps);
    float factor = scale ? 1.0f + *scale : 1.0f, summand = shift ? *shift : 0.0f;
    for (int i = threadIdx.x % WARP * N; i < channels; i += WARP * N) {
        Pack<T, N> v = load_pack<T, N>(x + i);
        for (int j = 0; j < N; j++) {
            float normal = (to_float(v.at[j]) - m.x) * m.y;
            if (weight) normal = normal * weight[i + j] + bias[i + j];
            v.at[j] = from_float<T>(normal * factor + summand);
        }
        store_pack<T, N>(y + i, v);
    }
}

#define NORMALIZE(T, suffix)                                                                                           \
    extern "C" __global__ void layer_norm_##suffix(const T *x, const float *weight, const float *bias,                 \
                                                   const float *scale, const float *shift, T *y, i64 rows,             \
                                                   int channels, float eps) {                                          \
        const int wide = 16 / sizeof(T);                                                                               \
        if (channels % wide == 0 && is_aligned(x) && is_aligned(y))                                                    \
            normalize<T, wide>(x, weight, bias, scale, shift, y, rows, channels, eps);                                 \
        else                                                                                                           \
            normalize<T, 1>(x, weight, bias, scale, shift, y, rows, channels, eps);                                    \
    }                                                                                                                  \
    CU_KERNEL(layer_norm_##suffix)

FOR_FLOATS(NORMALIZE)

// With n = (x - mean) inverse and dn = g w: dx = f (dn - mean(dn) - n mean(dn n)), f = inverse (1 + scale). The row's
// mean and inverse are kept for the sums over rows. dx may be null: then only those are computed.
extern "C" __global__ void layer_norm_gradient(const float *__restrict__ x, const float *__restrict__ g,
                                               const float *weight, const float *scale, float *__restrict__ dx,
                                               float2 *__restrict__ kept, i64 rows, int channels, float eps) {
    i64 row = (i64)blockIdx.x * ROWS_PER_BLOCK + threadIdx.x / WARP;
    if (row >= rows) return;
    int lane = threadIdx.x % WARP;
    x += row * channels;
    g += row * channels;
    float2 m = moments<float, 1>(x, channels, eps);
    if (lane == 0) kept[row] = m;
    if (!dx) return;
    float sum = 0.0f, slope = 0.0f;
    for (int i = lane; i < channels; i += WARP) {
        float dn = weight ? g[i] * weight[i] : g[i];
        sum += dn;
        slope += dn * (x[i] - m.x) * m.y;
    }
    sum = warp_sum(sum) / channels;
    slope = warp_sum(slope) / channels;
    float factor = m.y * (scale ? 1.0f + *scale : 1.0f);
    for (int i = lane; i < channels; i += WARP) {
        float dn = weight ? g[i] * weight[i] : g[i];
        dx[row * channels + i] = factor * (dn - sum - (x[i] - m.x) * m.y * slope);
    }
}
CU_KERNEL(layer_norm_gradient)

#define COLUMNS 32
#define LINES 8

// Of each part of the rows, the sums over its rows of g n and of g: [parts, 2, C]. A block owns 32 columns of a part.
extern "C" __global__ void layer_norm_sums(const float *__restrict__ x, const float *__restrict__ g,
                                           const float2 *__restrict__ kept, float *__restrict__ sums, i64 rows,
                                           int channels, int rows_per_part) {
    __shared__ float of_weight[LINES][COLUMNS], of_bias[LINES][COLUMNS];
    int c = blockIdx.x * COLUMNS + threadIdx.x;
    i64 first = (i64)blockIdx.y * rows_per_part, end = min(rows, first + rows_per_part);
    float w = 0.0f, b = 0.0f;
    if (c < channels) {
        for (i64 row = first + threadIdx.y; row < end; row += LINES) {
            float2 m = kept[row];
            float gradient = g[row * channels + c];
            w += (x[row * channels + c] - m.x) * m.y * gradient;
            b += gradient;
        }
    }
    of_weight[threadIdx.y][threadIdx.x] = w;
    of_bias[threadIdx.y][threadIdx.x] = b;
    __syncthreads();
    if (threadIdx.y == 0 && c < channels) {
        for (int line = 1; line < LINES; line++) {
            w += of_weight[line][threadIdx.x];
            b += of_bias[line][threadIdx.x];
        }
        sums[((i64)blockIdx.y * 2) * channels + c] = w;
        sums[((i64)blockIdx.y * 2 + 1) * channels + c] = b;
    }
}
CU_KERNEL(layer_norm_sums)

// From [2, C], the sums of g n and of g: out[0] = the sum over channels of (g n) w + g b, the gradient of the scale;
// out[1] = that of g, the gradient of the shift; and both rows times (1 + scale). One block.
extern "C" __global__ void layer_norm_finish(float *sums, const float *weight, const float *bias, const float *scale,
                                             float *out, int channels) {
    __shared__ float scratch[2][WARP];
    float of_scale = 0.0f, of_shift = 0.0f, factor = scale ? 1.0f + *scale : 1.0f;
    for (int c = threadIdx.x; c < channels; c += blockDim.x) {
        float w = sums[c], b = sums[channels + c];
        of_scale += weight ? w * weight[c] + b * bias[c] : w;
        of_shift += b;
        sums[c] = w * factor;
        sums[channels + c] = b * factor;
    }
    of_scale = block_sum(of_scale, scratch[0]);
    of_shift = block_sum(of_shift, scratch[1]);
    if (threadIdx.x == 0) {
        out[0] = of_scale;
        out[1] = of_shift;
    }
}
CU_KERNEL(layer_norm_finish)
