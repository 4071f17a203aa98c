// Products of a matrix and vectors, for a power iteration. Sums along a whole vector are double, by one block.
#include "kernel.cuh"

#define COLUMNS 32
#define LINES 8

// sums[part, c] = the sum over the part's rows of u[row] w[row, c]. A block owns 32 columns of a part.
extern "C" __global__ void spectral_columns(const float *__restrict__ w, const float *__restrict__ u,
                                            float *__restrict__ sums, int rows, i64 columns, int rows_per_part) {
    __shared__ float lines[LINES][COLUMNS];
    i64 c = (i64)blockIdx.x * COLUMNS + threadIdx.x;
    int first = blockIdx.y * rows_per_part, end = min(rows, first + rows_per_part);
    float sum = 0.0f;
    if (c < columns)
        for (int row = first + threadIdx.y; row < end; row += LINES) sum += u[row] * w[row * columns + c];
    lines[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y != 0 || c >= columns) return;
    for (int line = 1; line < LINES; line++) sum += lines[line][threadIdx.x];
    sums[blockIdx.y * columns + c] = sum;
}
CU_KERNEL(spectral_columns)

// out[row] = the sum over columns of a[row, c] b[row * stride + c]. A block owns a row.
extern "C" __global__ void spectral_rows(const float *__restrict__ a, const float *__restrict__ b,
                                         float *__restrict__ out, i64 columns, i64 stride) {
    __shared__ float scratch[WARP];
    a += blockIdx.x * columns;
    b += blockIdx.x * stride;
    float sum = 0.0f;
    for (i64 c = threadIdx.x; c < columns; c += blockDim.x) sum += a[c] * b[c];
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
}
CU_KERNEL(spectral_rows)

// out[0] = the sum of a[i] b[i], or of a[i] where b is null. One block.
extern "C" __global__ void spectral_dot(const float *__restrict__ a, const float *__restrict__ b,
                                        double *__restrict__ out, i64 count) {
    __shared__ double scratch[WARP];
    double sum = 0.0;
    for (i64 i = threadIdx.x; i < count; i += blockDim.x) sum += b ? (double)a[i] * b[i] : (double)a[i];
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) *out = sum;
}
CU_KERNEL(spectral_dot)

// x / max(|x|, eps), in place. One block.
extern "C" __global__ void spectral_unit(float *x, i64 count, float eps) {
    __shared__ double scratch[WARP];
    double sum = 0.0;
    for (i64 i = threadIdx.x; i < count; i += blockDim.x) sum += (double)x[i] * x[i];
    float norm = fmaxf((float)sqrt(block_sum(sum, scratch)), eps);
    for (i64 i = threadIdx.x; i < count; i += blockDim.x) x[i] /= norm;
}
CU_KERNEL(spectral_unit)

// out = w / sigma.
extern "C" __global__ void spectral_scale(const float *__restrict__ w, const double *__restrict__ sigma,
                                          float *__restrict__ out, i64 count) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) out[i] = w[i] * (float)(1.0 / *sigma);
}
CU_KERNEL(spectral_scale)

// dw = (g - product / sigma u vT) / sigma, where `product` is that of g and w as vectors.
extern "C" __global__ void spectral_gradient(const float *__restrict__ g, const float *__restrict__ u,
                                             const float *__restrict__ v, const double *__restrict__ sigma,
                                             const double *__restrict__ product, float *__restrict__ dw, i64 count,
                                             i64 columns) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    float factor = (float)(*product / *sigma * u[i / columns] / *sigma);
    dw[i] = g[i] * (float)(1.0 / *sigma) - factor * v[i % columns];
}
CU_KERNEL(spectral_gradient)
