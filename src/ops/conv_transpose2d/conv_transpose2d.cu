// The second half of transposed convolutions: the product of the input and the filters holds, for each pixel of the
// input, what it gives to each pixel below its filter; here each pixel of the result gathers what it is given.
#include "kernel.cuh"

struct Lines {
    // The first line of the result, counted over the batch, and how many; and the first line of the input that the
    // product holds, likewise.
    i64 first, count, held;
    int height, width, out_height, out_width, outputs, kernel_height, kernel_width, stride, padding;
    // From row to row of the product.
    int leading;
};

// given [pixels, kh, kw, O], rows of `leading` -> y [lines, W', O], plus bias [O], which may be null. A thread owns N
// neighbouring channels of a pixel.
template <class T, int N>
__device__ void collect(const float *__restrict__ given, const float *__restrict__ bias, T *__restrict__ y,
                        const Lines &p) {
    int packs = p.outputs / N;
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= p.count * p.out_width * packs) return;
    int o = (int)(i % packs) * N, column = (int)(i / packs % p.out_width);
    i64 line = p.first + i / packs / p.out_width, sample = line / p.out_height;
    int below = (int)(line % p.out_height) + p.padding, right = column + p.padding;
    float sum[N];
    for (int j = 0; j < N; j++) sum[j] = bias ? bias[o + j] : 0.0f;
    for (int u = below % p.stride; u < p.kernel_height && u <= below; u += p.stride) {
        int a = (below - u) / p.stride;
        if (a >= p.height) continue;
        for (int v = right % p.stride; v < p.kernel_width && v <= right; v += p.stride) {
            int b = (right - v) / p.stride;
            if (b >= p.width) continue;
            i64 pixel = (sample * p.height + a - p.held) * p.width + b;
            Pack<float, N> part =
                load_pack<float, N>(given + pixel * p.leading + (u * p.kernel_width + v) * p.outputs + o);
            for (int j = 0; j < N; j++) sum[j] += part.at[j];
        }
    }
    Pack<T, N> out;
    for (int j = 0; j < N; j++) out.at[j] = from_float<T>(sum[j]);
    store_pack<T, N>(y + (line * p.out_width + column) * p.outputs + o, out);
}

// `wide`: whether threads own 4 channels.
#define COLLECT(T, suffix)                                                                                             \
    extern "C" __global__ void collect_pixels_##suffix(const float *given, const float *bias, T *y, Lines p,           \
                                                       int wide) {                                                     \
        if (wide)                                                                                                      \
            collect<T, 4>(given, bias, y, p);                                                                          \
        else                                                                                                           \
            collect<T, 1>(given, bias, y, p);                                                                          \
    }                                                                                                                  \
    CU_KERNEL(collect_pixels_##suffix)

// hot: collect_pixels_bf16
// hot: collect_pixels_f16
// hot: collect_pixels_f32
FOR_FLOATS(COLLECT)
