// The contrastive loss: directions, softmax over rows and columns of their products, and what flows back.
#include "kernel.cuh"

// x / max(|x|, least) and that length. A block owns a row.
template <class T>
__device__ void directions(const T *__restrict__ x, float *__restrict__ rows, float *__restrict__ lengths, int width,
                           float least) {
    __shared__ double scratch[WARP];
    i64 start = (i64)blockIdx.x * width;
    double sum = 0.0;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        double v = to_float(x[start + i]);
        sum += v * v;
    }
    float length = (float)sqrt(block_sum(sum, scratch));
    length = fmaxf(length, least);
    for (int i = threadIdx.x; i < width; i += blockDim.x) rows[start + i] = to_float(x[start + i]) / length;
    if (threadIdx.x == 0) lengths[blockIdx.x] = length;
}

#define DIRECTIONS(T, suffix)                                                                                          \
    extern "C" __global__ void contrast_directions_##suffix(const T *x, float *rows, float *lengths, int width,        \
                                                            float least) {                                             \
        directions(x, rows, lengths, width, least);                                                                    \
    }                                                                                                                  \
    CU_KERNEL(contrast_directions_##suffix)

FOR_FLOATS(DIRECTIONS)

// What a row of logits is: the largest, the sum of e^(v - largest), the loss, and whether the diagonal is the first of
// the largest.
struct Row {
    float most, total, loss, is_right;
};

// The rows of two square matrices, the second of which is the transpose of the first. A block owns a row.
extern "C" __global__ void contrast_rows(const float *__restrict__ products, const float *log_temperature,
                                         Row *__restrict__ out, int count) {
    __shared__ double sums[WARP];
    __shared__ float scratch[2][WARP];
    i64 row = (i64)blockIdx.y * count + blockIdx.x;
    const float *of_row = products + row * count;
    float temperature = expf(*log_temperature), own = of_row[blockIdx.x] * temperature;
    float most = -INFINITY_F, beaten = 0.0f;
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
        float v = of_row[i] * temperature;
        most = fmaxf(most, v);
        if (v > own || (v == own && i < (int)blockIdx.x)) beaten = 1.0f;
    }
    most = block_max(most, scratch[0]);
    beaten = block_max(beaten, scratch[1]);
    double total = 0.0;
    for (int i = threadIdx.x; i < count; i += blockDim.x) total += expf(of_row[i] * temperature - most);
    total = block_sum(total, sums);
    if (threadIdx.x == 0) out[row] = Row{most, (float)total, most - own + (float)log(total), 1.0f - beaten};
}
CU_KERNEL(contrast_rows)

// out[0], the loss, and out[1], the share of right rows of the first matrix. One block.
extern "C" __global__ void contrast_loss(const Row *__restrict__ rows, float *__restrict__ out, int count) {
    __shared__ double scratch[2][WARP];
    double loss = 0.0, right = 0.0;
    for (int i = threadIdx.x; i < 2 * count; i += blockDim.x) {
        loss += rows[i].loss;
        if (i < count) right += rows[i].is_right;
    }
    loss = block_sum(loss, scratch[0]);
    right = block_sum(right, scratch[1]);
    if (threadIdx.x != 0) return;
    out[0] = (float)(loss * 0.5 / count);
    out[1] = (float)(right / count);
}
CU_KERNEL(contrast_loss)

// The gradient by the products: that by the logits, (softmax of the row + softmax of the column - 2 on the diagonal)
// / 2N, times g and the temperature; and for each row its part of that by log_temperature. A block owns a row.
extern "C" __global__ void contrast_gradient(const float *__restrict__ products, const float *log_temperature,
                                             const Row *__restrict__ rows, const float *g, float *__restrict__ out,
                                             float *__restrict__ of_temperature, int count) {
    __shared__ double scratch[WARP];
    i64 start = (i64)blockIdx.x * count;
    float temperature = expf(*log_temperature), share = *g * 0.5f / count;
    Row row = rows[blockIdx.x];
    double sum = 0.0;
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
        Row column = rows[count + i];
        float v = products[start + i] * temperature;
        float slope = expf(v - row.most) / row.total + expf(v - column.most) / column.total;
        slope = share * (slope - (i == (int)blockIdx.x ? 2.0f : 0.0f));
        out[start + i] = slope * temperature;
        sum += (double)slope * v;
    }
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) of_temperature[blockIdx.x] = (float)sum;
}
CU_KERNEL(contrast_gradient)

// The gradient by x from g, that by its direction, in place: what of it is across the direction, over the length.
extern "C" __global__ void contrast_across(float *__restrict__ g, const float *__restrict__ rows,
                                           const float *__restrict__ lengths, int width) {
    __shared__ double scratch[WARP];
    i64 start = (i64)blockIdx.x * width;
    double along = 0.0;
    for (int i = threadIdx.x; i < width; i += blockDim.x) along += (double)g[start + i] * (double)rows[start + i];
    float part = (float)block_sum(along, scratch), length = lengths[blockIdx.x];
    for (int i = threadIdx.x; i < width; i += blockDim.x)
        g[start + i] = (g[start + i] - part * rows[start + i]) / length;
}
CU_KERNEL(contrast_across)
