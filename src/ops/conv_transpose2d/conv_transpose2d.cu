// The second half of transposed convolutions: the product of the input and the filters holds, for each pixel of the
// input, what it gives to each pixel below its filter; here each pixel of the result gathers what it is given.
#include "kernel.cuh"

struct Lines {
    // The first line of the result, and in which sample, and of the lines of the input that the product holds the
    // first, counted from this sample on.
    int sample, first, held;
    int height, width, out_height, out_width, outputs, kernel_height, kernel_width, stride, padding;
    // From row to row of the product.
    int leading;
    // Blocks of a line.
    int blocks;
};

// given [pixels, kh, kw, O], rows of `leading` -> y [lines, W', O], plus bias [O], which may be null. A block
// owns a part of a line, a thread N neighbouring channels of a pixel.
template <class T, int N>
__device__ void collect(const float *__restrict__ given, const float *__restrict__ bias, T *__restrict__ y,
                        const Lines &p) {
    int packs = p.outputs / N, i = blockIdx.x % p.blocks * blockDim.x + threadIdx.x;
    if (i >= p.out_width * packs) return;
    int column = i / packs, o = i % packs * N, line = p.first + blockIdx.x / p.blocks;
    int sample = line / p.out_height, below = line % p.out_height + p.padding, right = column + p.padding;
    float sum[N];
    for (int j = 0; j < N; j++) sum[j] = bias ? bias[o + j] : 0.0f;
    for (int u = below % p.stride; u < p.kernel_height && u <= below; u += p.stride) {
        int a = (below - u) / p.stride;
        if (a >= p.height) continue;
        for (int v = right % p.stride; v < p.kernel_width && v <= right; v += p.stride) {
            int b = (right - v) / p.stride;
            if (b >= p.width) continue;
            i64 pixel = ((i64)sample * p.height + a - p.held) * p.width + b;
            Pack<float, N> part =
                load_pack<float, N>(given + pixel * p.leading + (u * p.kernel_width + v) * p.outputs + o);
            for (int j = 0; j < N; j++) sum[j] += part.at[j];
        }
    }
    Pack<T, N> out;
    for (int j = 0; j < N; j++) out.at[j] = from_float<T>(sum[j]);
    i64 line_of_all = (i64)p.sample * p.out_height + line;
    store_pack<T, N>(y + (line_of_all * p.out_width + column) * p.outputs + o, out);
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
