// Sums over rows. A block owns 32 columns of a part of the rows; parts are added in their order.
#include "kernel.cuh"

#define COLUMNS 32
#define LINES 8

// [rows, width] -> [parts, width].
template <class T>
__device__ void add_columns(const T *__restrict__ x, float *__restrict__ sums, i64 rows, int width, int rows_per_part) {
    __shared__ float lines[LINES][COLUMNS];
    int c = blockIdx.x * COLUMNS + threadIdx.x;
    i64 first = (i64)blockIdx.y * rows_per_part, end = min(rows, first + rows_per_part);
    float sum = 0.0f;
    if (c < width)
        for (i64 row = first + threadIdx.y; row < end; row += LINES) sum += to_float(x[row * width + c]);
    lines[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && c < width) {
        for (int line = 1; line < LINES; line++) sum += lines[line][threadIdx.x];
        sums[(i64)blockIdx.y * width + c] = sum;
    }
}

#define ADD_COLUMNS(T, suffix)                                                                                         \
    extern "C" __global__ void sum_columns_##suffix(const T *x, float *sums, i64 rows, int width,                      \
                                                    int rows_per_part) {                                               \
        add_columns(x, sums, rows, width, rows_per_part);                                                              \
    }                                                                                                                  \
    CU_KERNEL(sum_columns_##suffix)

FOR_FLOATS(ADD_COLUMNS)

// Few rows of many groups: [groups, rows, width] -> [groups, width]. A block owns 32 columns of a group.
extern "C" __global__ void sum_groups(const float *__restrict__ x, float *__restrict__ sums, int rows, int width,
                                      int tiles) {
    __shared__ float lines[LINES][COLUMNS];
    i64 group = blockIdx.x / (u32)tiles;
    int c = (int)(blockIdx.x % (u32)tiles) * COLUMNS + threadIdx.x;
    float sum = 0.0f;
    if (c < width)
        for (int row = threadIdx.y; row < rows; row += LINES) sum += x[(group * rows + row) * width + c];
    lines[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && c < width) {
        for (int line = 1; line < LINES; line++) sum += lines[line][threadIdx.x];
        sums[group * width + c] = sum;
    }
}
CU_KERNEL(sum_groups)
