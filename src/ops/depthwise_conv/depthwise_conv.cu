// Depthwise convolution with what follows it.
//
// The kernel for 3 x 3: a block owns four neighbouring pixels of a row and a range of channels, which is all of them
// where they are normalised; a thread owns a few neighbouring channels of the four pixels. It reads 16 bytes at a
// time, each input once per row of the kernel, and keeps its weights and sums in registers: the result is written
// once.
//
// The kernel for all else: a warp owns a pixel, or a range of its channels, a lane one channel in 32.
#include "kernel.cuh"

// What follows: as in cuda.rs.
enum ThenCode { THEN_NONE = 0, THEN_LAYER_NORM = 1, THEN_RESIDUAL = 2, THEN_AFFINE = 3 };

struct Convolution {
    // x [N, H, W, from_x], skip [N, H, W, C G - from_x], weight [C, G, k, k], y [N, H', W', C]: of one type.
    const void *x, *skip, *weight;
    const float *bias;
    void *y;
    // The gain and the residual, of y's type, or scale and shift.
    const float *factor;
    const void *summand;
    i64 pixels;
    int height, width, out_height, out_width, channels, groups, from_x, kernel, stride, replicate;
    int then, activation;
    // Of the normalisation, or the slope of the activation.
    float number;
    // Channels of one warp of the kernel for all.
    int chunk;
};

// Where tap `offset` of output pixel `at` lies within `size` pixels; below 0: nowhere.
__device__ __forceinline__ int place(const Convolution &p, int at, int offset, int size) {
    int i = at * p.stride + offset - p.kernel / 2;
    if (p.replicate) return min(max(i, 0), size - 1);
    return i < size ? i : -1;
}

// What follows the convolution, but for the normalisation. `at` is the element of y, `c` its channel.
template <class T> __device__ __forceinline__ float follow(const Convolution &p, float v, i64 at, int c) {
    if (p.then == THEN_RESIDUAL) return v * *p.factor + to_float(static_cast<const T *>(p.summand)[at]);
    if (p.then == THEN_AFFINE)
        return activate(p.activation, p.number, v * p.factor[c] + static_cast<const float *>(p.summand)[c]);
    return v;
}

#define PIXELS 4
#define TAPS 9
#define MOST_THREADS 512

// The sums over the block of four numbers of each thread, in every thread. One use of `scratch` each.
__device__ __forceinline__ float4 block_sums(float4 x, float4 *scratch) {
    x = make_float4(warp_sum(x.x), warp_sum(x.y), warp_sum(x.z), warp_sum(x.w));
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = x;
    __syncthreads();
    x = scratch[0];
    for (int warp = 1; warp < blockDim.x / WARP; warp++) {
        float4 other = scratch[warp];
        x = make_float4(x.x + other.x, x.y + other.y, x.z + other.z, x.w + other.w);
    }
    return x;
}

// Of N channels of four pixels: (sums - mean) / sqrt(var + eps). A thread without channels has sums of 0.
template <int N>
__device__ __forceinline__ void normalize(float (&sums)[PIXELS][N], bool has_channels, int channels, float eps,
                                          float4 (*scratch)[MOST_THREADS / WARP]) {
    float total[PIXELS] = {}, squares[PIXELS] = {};
    for (int i = 0; i < PIXELS; i++)
        for (int n = 0; n < N; n++) total[i] += sums[i][n];
    float4 all = block_sums(make_float4(total[0], total[1], total[2], total[3]), scratch[0]);
    float mean[PIXELS] = {all.x / channels, all.y / channels, all.z / channels, all.w / channels};
    for (int i = 0; i < PIXELS; i++)
        for (int n = 0; n < N; n++) {
            sums[i][n] -= mean[i];
            if (has_channels) squares[i] += sums[i][n] * sums[i][n];
        }
    all = block_sums(make_float4(squares[0], squares[1], squares[2], squares[3]), scratch[1]);
    float variance[PIXELS] = {all.x / channels, all.y / channels, all.z / channels, all.w / channels};
    for (int i = 0; i < PIXELS; i++) {
        float inverse = 1.0f / sqrtf(variance[i] + eps);
        for (int n = 0; n < N; n++) sums[i][n] *= inverse;
    }
}

// A kernel of 3 x 3, stride 1, and G inputs per output; channels and from_x are whole packs, all aligned to 16 bytes.
template <class T, int G> __device__ __forceinline__ void three(const Convolution &p) {
    // Input channels of a thread, and output channels.
    const int R = 16 / sizeof(T), N = R / G;
    __shared__ float4 scratch[2][MOST_THREADS / WARP];
    int tiles = (p.out_width + PIXELS - 1) / PIXELS;
    int row = blockIdx.x / tiles, column = blockIdx.x % tiles * PIXELS;
    int image = row / p.out_height, line = row % p.out_height;
    int c = (blockIdx.y * blockDim.x + threadIdx.x) * N;
    bool has_channels = c < p.channels;
    float sums[PIXELS][N] = {};
    if (has_channels) {
        bool first = c * G < p.from_x;
        int step = first ? p.from_x : p.channels * G - p.from_x;
        const T *input = static_cast<const T *>(first ? p.x : p.skip) + (first ? c * G : c * G - p.from_x);
        input += (i64)image * p.height * p.width * step;
        if (p.bias)
            for (int n = 0; n < N; n++)
                for (int i = 0; i < PIXELS; i++) sums[i][n] = p.bias[c + n];
        // The weights of the thread's channels lie in one run: R channels, 9 taps each.
        Pack<T, R> weights[TAPS];
        const T *weight = static_cast<const T *>(p.weight) + (i64)c * G * TAPS;
        for (int i = 0; i < TAPS; i++) weights[i] = load_pack<T, R>(weight + i * R);
#pragma unroll
        for (int u = 0; u < 3; u++) {
            int y = line + u - 1;
            if (p.replicate) y = min(max(y, 0), p.height - 1);
            if (y < 0 || y >= p.height) continue;
            float w[3][R];
            for (int v = 0; v < 3; v++)
                for (int r = 0; r < R; r++) {
                    int at = r * TAPS + u * 3 + v;
                    w[v][r] = to_float(weights[at / R].at[at % R]);
                }
            const T *inputs = input + (i64)y * p.width * step;
#pragma unroll
            for (int j = 0; j < PIXELS + 2; j++) {
                int x = column + j - 1;
                bool inside = p.replicate || (x >= 0 && x < p.width);
                x = min(max(x, 0), p.width - 1);
                Pack<T, R> values = {};
                if (inside) values = load_pack<T, R>(inputs + (i64)x * step);
                for (int r = 0; r < R; r++) {
                    float value = to_float(values.at[r]);
                    for (int v = 0; v < 3; v++)
                        if (j - v >= 0 && j - v < PIXELS) sums[j - v][r / G] += value * w[v][r];
                }
            }
        }
    }
    if (p.then == THEN_LAYER_NORM) normalize<N>(sums, has_channels, p.channels, p.number, scratch);
    if (!has_channels) return;
#pragma unroll
    for (int i = 0; i < PIXELS; i++) {
        if (column + i >= p.out_width) break;
        i64 at = ((i64)row * p.out_width + column + i) * p.channels + c;
        Pack<T, N> out;
        for (int n = 0; n < N; n++) out.at[n] = from_float<T>(follow<T>(p, sums[i][n], at + n, c + n));
        store_pack<T, N>(static_cast<T *>(p.y) + at, out);
    }
}

// hot: depthwise_three_f32
// hot: depthwise_three_f16
// hot: depthwise_three_bf16
// hot: depthwise_three_pairs_f32
// hot: depthwise_three_pairs_f16
// hot: depthwise_three_pairs_bf16
#define DEPTHWISE_THREE(T, suffix)                                                                                     \
    extern "C" __global__ void __launch_bounds__(MOST_THREADS) depthwise_three_##suffix(Convolution p) {               \
        three<T, 1>(p);                                                                                                \
    }                                                                                                                  \
    CU_KERNEL(depthwise_three_##suffix)                                                                                \
    extern "C" __global__ void __launch_bounds__(MOST_THREADS) depthwise_three_pairs_##suffix(Convolution p) {         \
        three<T, 2>(p);                                                                                                \
    }                                                                                                                  \
    CU_KERNEL(depthwise_three_pairs_##suffix)

FOR_FLOATS(DEPTHWISE_THREE)

// The convolution at a pixel of the result.
template <class T> __device__ float any_sum(const Convolution &p, i64 image, int y, int x, int c) {
    int taps = p.kernel * p.kernel, from_skip = p.channels * p.groups - p.from_x;
    const T *weight = static_cast<const T *>(p.weight) + (i64)c * p.groups * taps;
    float sum = p.bias ? p.bias[c] : 0.0f;
    for (int u = 0; u < p.kernel; u++) {
        int row = place(p, y, u, p.height);
        if (row < 0) continue;
        for (int v = 0; v < p.kernel; v++) {
            int column = place(p, x, v, p.width);
            if (column < 0) continue;
            i64 pixel = (image * p.height + row) * p.width + column;
            for (int g = 0; g < p.groups; g++) {
                int q = c * p.groups + g;
                T value = q < p.from_x ? static_cast<const T *>(p.x)[pixel * p.from_x + q]
                                       : static_cast<const T *>(p.skip)[pixel * from_skip + q - p.from_x];
                sum += to_float(value) * to_float(weight[g * taps + u * p.kernel + v]);
            }
        }
    }
    return sum;
}

// Where channels are normalised, `chunk` is all of them, and dynamic shared memory holds them for each warp.
template <class T> __device__ void any(const Convolution &p) {
    DYN_SHARED(float, rows);
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    i64 pixel = (i64)blockIdx.x * (blockDim.x / WARP) + warp;
    if (pixel >= p.pixels) return;
    i64 line = quotient(pixel, p.out_width), image = quotient(line, p.out_height);
    int x = pixel - line * p.out_width, y = line - image * p.out_height;
    T *out = static_cast<T *>(p.y) + pixel * p.channels;
    int first = blockIdx.y * p.chunk, end = min(p.channels, first + p.chunk);
    // A lane reads back only what it wrote.
    float *kept = rows + (i64)warp * p.channels, total = 0.0f, squares = 0.0f;
    for (int c = first + lane; c < end; c += WARP) {
        float sum = any_sum<T>(p, image, y, x, c);
        if (p.then == THEN_LAYER_NORM) {
            kept[c] = sum;
            total += sum;
        } else {
            out[c] = from_float<T>(follow<T>(p, sum, pixel * p.channels + c, c));
        }
    }
    if (p.then != THEN_LAYER_NORM) return;
    float mean = warp_sum(total) / p.channels;
    for (int c = lane; c < p.channels; c += WARP) squares += (kept[c] - mean) * (kept[c] - mean);
    float inverse = 1.0f / sqrtf(warp_sum(squares) / p.channels + p.number);
    for (int c = lane; c < p.channels; c += WARP) out[c] = from_float<T>((kept[c] - mean) * inverse);
}

#define DEPTHWISE_ANY(T, suffix)                                                                                       \
    extern "C" __global__ void depthwise_any_##suffix(Convolution p) { any<T>(p); }                                    \
    CU_KERNEL(depthwise_any_##suffix)

FOR_FLOATS(DEPTHWISE_ANY)
