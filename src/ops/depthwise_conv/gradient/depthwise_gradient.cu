// The gradients of a depthwise convolution.
//
// Of its input: a warp owns a pixel, or a range of its channels, a lane one channel in 32. Of its weight: a block owns
// 32 channels of a part of the rows, for one input of each group; a thread keeps the sums of all taps over every
// eighth pixel of a row. The parts are added afterwards.
#include "kernel.cuh"

struct Backward {
    int height, width, out_height, out_width, channels, groups, kernel, stride, replicate;
};

// Output pixels in a row, `first` to `last`: none if that is smaller.
struct Seen {
    int first, last;
};

// Which output pixels of `out` see pixel `at` of `size` through tap `offset`: one or none within the image, more where
// the edge is replicated.
__device__ __forceinline__ Seen seen(const Backward &p, int at, int offset, int size, int out) {
    int reach = at + p.kernel / 2 - offset;
    Seen s = {reach > 0 ? (reach + p.stride - 1) / p.stride : 0, reach >= 0 ? min(reach / p.stride, out - 1) : -1};
    if (p.replicate && at == 0) s.first = 0;
    if (p.replicate && at == size - 1) s.last = out - 1;
    return s;
}

// dx[pixel, i], i below `count`, for channel `first + i` of the inputs side by side, c G + g:
// the sum over the taps and the pixels that see it of weight[c, g, u, v] dy[.., c].
extern "C" __global__ void depthwise_input_gradient(const float *__restrict__ dy, const float *__restrict__ weight,
                                                    float *__restrict__ dx, Backward p, i64 pixels, int first,
                                                    int count, int chunk) {
    i64 pixel = (i64)blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    if (pixel >= pixels) return;
    i64 line = quotient(pixel, p.width), image = quotient(line, p.height);
    int x = pixel - line * p.width, y = line - image * p.height, taps = p.kernel * p.kernel;
    int end = min(count, (int)(blockIdx.y + 1) * chunk);
    for (int i = blockIdx.y * chunk + threadIdx.x % WARP; i < end; i += WARP) {
        int q = first + i, c = q / p.groups;
        float sum = 0.0f;
        for (int u = 0; u < p.kernel; u++) {
            Seen rows = seen(p, y, u, p.height, p.out_height);
            for (int v = 0; v < p.kernel; v++) {
                Seen columns = seen(p, x, v, p.width, p.out_width);
                float factor = weight[(i64)q * taps + u * p.kernel + v];
                for (int row = rows.first; row <= rows.last; row++)
                    for (int column = columns.first; column <= columns.last; column++) {
                        i64 at = (image * p.out_height + row) * p.out_width + column;
                        sum += factor * dy[at * p.channels + c];
                    }
            }
        }
        dx[pixel * count + i] = sum;
    }
}
CU_KERNEL(depthwise_input_gradient)

#define CHANNELS 32
#define LINES 8

// Where tap `offset` of output pixel `at` lies within `size` pixels; below 0: nowhere.
__device__ __forceinline__ int place(const Backward &p, int at, int offset, int size) {
    int i = at * p.stride + offset - p.kernel / 2;
    if (p.replicate) return min(max(i, 0), size - 1);
    return i < size ? i : -1;
}

// x [N, H, W, from_x] and skip [N, H, W, C G - from_x]; the sums [parts, C, G, K, K].
template <int K>
__device__ void weight_sums(const float *x, const float *skip, const float *__restrict__ dy, float *__restrict__ sums,
                            const Backward &p, int from_x, i64 rows, int rows_per_part) {
    __shared__ float lines[LINES][CHANNELS];
    int c = blockIdx.x * CHANNELS + threadIdx.x, q = c * p.groups + blockIdx.z;
    i64 first = (i64)blockIdx.y * rows_per_part, end = min(rows, first + rows_per_part);
    float acc[K * K] = {};
    if (c < p.channels) {
        bool in_x = q < from_x;
        int step = in_x ? from_x : p.channels * p.groups - from_x;
        const float *input = in_x ? x + q : skip + q - from_x;
        for (i64 row = first; row < end; row++) {
            i64 image = quotient(row, p.out_height);
            int y = row - image * p.out_height;
            const float *pixels = input + image * p.height * p.width * step;
            for (int column = threadIdx.y; column < p.out_width; column += LINES) {
                float g = dy[(row * p.out_width + column) * p.channels + c];
#pragma unroll
                for (int u = 0; u < K; u++) {
                    int from = place(p, y, u, p.height);
                    if (from < 0) continue;
#pragma unroll
                    for (int v = 0; v < K; v++) {
                        int at = place(p, column, v, p.width);
                        if (at >= 0) acc[u * K + v] += g * pixels[((i64)from * p.width + at) * step];
                    }
                }
            }
        }
    }
    i64 parameters = (i64)p.channels * p.groups * K * K;
#pragma unroll
    for (int tap = 0; tap < K * K; tap++) {
        lines[threadIdx.y][threadIdx.x] = acc[tap];
        __syncthreads();
        if (threadIdx.y == 0 && c < p.channels) {
            float sum = acc[tap];
            for (int line = 1; line < LINES; line++) sum += lines[line][threadIdx.x];
            sums[blockIdx.y * parameters + (i64)q * K * K + tap] = sum;
        }
        __syncthreads();
    }
}

#define WEIGHT_SUMS(K)                                                                                                 \
    extern "C" __global__ void depthwise_weight_sums_##K(const float *x, const float *skip, const float *dy,           \
                                                         float *sums, Backward p, int from_x, i64 rows,                \
                                                         int rows_per_part) {                                          \
        weight_sums<K>(x, skip, dy, sums, p, from_x, rows, rows_per_part);                                             \
    }                                                                                                                  \
    CU_KERNEL(depthwise_weight_sums_##K)

WEIGHT_SUMS(1)
WEIGHT_SUMS(3)
WEIGHT_SUMS(5)
WEIGHT_SUMS(7)
