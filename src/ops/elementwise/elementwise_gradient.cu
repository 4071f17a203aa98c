// Gradients of pointwise ops.
#include "kernel.cuh"

// dx = g activation'(x). A thread owns an element. What a ReLU cut off gets 0 even of an infinite gradient.
extern "C" __global__ void activate_gradient(const float *__restrict__ x, const float *__restrict__ g,
                                             float *__restrict__ dx, i64 count, int code, float slope) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    if (code == RELU)
        dx[i] = x[i] > 0.0f ? g[i] : 0.0f;
    else
        dx[i] = g[i] * activation_slope(code, slope, x[i]);
}
CU_KERNEL(activate_gradient)

#define COLUMNS 32
#define LINES 8

// As ops/elementwise/cuda.rs has it.
struct ChannelSums {
    // Null: those sums are not wanted.
    float *products, *values;
    // Floats from group to group of the sums, which have a row of channels for each part of a group's rows.
    i64 stride;
    i64 rows;
    int channels, rows_per_part;
    // Of 32 channels.
    int tiles;
};

// Of each part of each group's rows, the sums of g x and of g. A block owns 32 channels of a part; x may be null where
// no products are wanted.
extern "C" __global__ void channel_sums(const float *__restrict__ x, const float *__restrict__ g, ChannelSums p) {
    __shared__ float of_products[LINES][COLUMNS], of_values[LINES][COLUMNS];
    i64 group = blockIdx.x / (u32)p.tiles;
    int c = (int)(blockIdx.x % (u32)p.tiles) * COLUMNS + threadIdx.x;
    i64 first = (i64)blockIdx.y * p.rows_per_part, end = min(p.rows, first + p.rows_per_part);
    float product = 0.0f, value = 0.0f;
    if (c < p.channels) {
        for (i64 row = first + threadIdx.y; row < end; row += LINES) {
            i64 at = (group * p.rows + row) * p.channels + c;
            float gradient = g[at];
            if (p.products) product += gradient * x[at];
            value += gradient;
        }
    }
    of_products[threadIdx.y][threadIdx.x] = product;
    of_values[threadIdx.y][threadIdx.x] = value;
    __syncthreads();
    if (threadIdx.y > 0 || c >= p.channels) return;
    for (int line = 1; line < LINES; line++) {
        product += of_products[line][threadIdx.x];
        value += of_values[line][threadIdx.x];
    }
    i64 to = group * p.stride + (i64)blockIdx.y * p.channels + c;
    if (p.products) p.products[to] = product;
    if (p.values) p.values[to] = value;
}
CU_KERNEL(channel_sums)
