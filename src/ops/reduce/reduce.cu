// Sums over the rows of groups of rows, channel by channel, in double: squares of floats are exact there. A block owns
// 32 channels of a part of a group's rows; the parts of a sum are added in their order.
#include "kernel.cuh"

#define COLUMNS 32
#define LINES 8

// What is summed: x, x y, or both.
enum Terms { VALUES = 0, PRODUCTS = 1, VALUES_AND_PRODUCTS = 2 };

struct Shape {
    // Rows of a group, and of a part of it.
    i64 rows, rows_per_part;
    int parts, channels;
};

// x, y [groups, rows, C] -> sums [groups, parts, kinds, C]. Blocks count channels first, then parts, then groups.
template <class T, int TERMS>
__device__ void add_terms(const T *__restrict__ x, const T *__restrict__ y, double *__restrict__ sums,
                          const Shape &shape, double (*lines)[LINES][COLUMNS]) {
    const int kinds = TERMS == VALUES_AND_PRODUCTS ? 2 : 1;
    int tiles = (shape.channels + COLUMNS - 1) / COLUMNS, channels = shape.channels;
    int c = blockIdx.x % tiles * COLUMNS + threadIdx.x;
    i64 group = blockIdx.x / tiles / shape.parts, part = blockIdx.x / tiles % shape.parts;
    i64 first = part * shape.rows_per_part, end = min(shape.rows, first + shape.rows_per_part);
    double sum[2] = {0.0, 0.0};
    if (c < channels) {
        i64 start = group * shape.rows * channels + c;
#pragma unroll 4
        for (i64 row = first + threadIdx.y; row < end; row += LINES) {
            double value = to_float(x[start + row * channels]);
            if (TERMS != PRODUCTS) sum[0] += value;
            if (TERMS != VALUES) sum[kinds - 1] += value * to_float(y[start + row * channels]);
        }
    }
    for (int kind = 0; kind < kinds; kind++) lines[kind][threadIdx.y][threadIdx.x] = sum[kind];
    __syncthreads();
    if (threadIdx.y != 0 || c >= channels) return;
    for (int kind = 0; kind < kinds; kind++) {
        for (int line = 1; line < LINES; line++) sum[kind] += lines[kind][line][threadIdx.x];
        sums[((group * shape.parts + part) * kinds + kind) * channels + c] = sum[kind];
    }
}

#define ADD_TERMS(T, suffix)                                                                                           \
    extern "C" __global__ void column_terms_##suffix(const T *x, const T *y, double *sums, Shape shape, int terms) {   \
        __shared__ double lines[2][LINES][COLUMNS];                                                                    \
        switch (terms) {                                                                                               \
        case VALUES: add_terms<T, VALUES>(x, y, sums, shape, lines); break;                                            \
        case PRODUCTS: add_terms<T, PRODUCTS>(x, y, sums, shape, lines); break;                                        \
        default: add_terms<T, VALUES_AND_PRODUCTS>(x, y, sums, shape, lines);                                          \
        }                                                                                                              \
    }                                                                                                                  \
    CU_KERNEL(column_terms_##suffix)

FOR_FLOATS(ADD_TERMS)

// sums [groups, parts, width] -> totals [groups, width]. A thread owns a total.
extern "C" __global__ void column_totals(const double *__restrict__ sums, double *__restrict__ totals, i64 count,
                                         int parts, int width) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    const double *from = sums + i / width * parts * width + i % width;
    double total = 0.0;
#pragma unroll 8
    for (i64 part = 0; part < parts; part++) total += from[part * width];
    totals[i] = total;
}
CU_KERNEL(column_totals)

// totals [groups, kinds, C] -> out [groups, wanted, C]: of each group kind `first`, then, if two are wanted, `second`.
extern "C" __global__ void column_totals_rounded(const double *__restrict__ totals, float *__restrict__ out, i64 count,
                                                 int channels, int kinds, int wanted, int first, int second) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    i64 group = i / channels / wanted;
    int kind = i / channels % wanted == 0 ? first : second;
    out[i] = (float)totals[(group * kinds + kind) * channels + i % channels];
}
CU_KERNEL(column_totals_rounded)
