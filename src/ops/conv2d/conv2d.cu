// Gathering for dense convolutions, which are matrix products of patches, and filters in the order of those.
#include "kernel.cuh"

#define ROWS_PER_BLOCK 8

struct Pictures {
    // The first pixel of the result whose patch is gathered, and in which sample, and how many are.
    int sample, first, rows;
    int height, width, inputs, out_height, out_width, kernel_height, kernel_width, stride, padding;
    // From row to row of the patches: what is beyond a patch is filled with zeros.
    int leading;
};

// x [N, H, W, I] -> patches [rows, kh, kw, I]; x is zero outside the picture. A warp owns a patch, a lane N
// neighbouring channels of it at a time.
template <class T, int N>
__device__ void gather(const T *__restrict__ x, T *__restrict__ patches, const Pictures &p) {
    int row = blockIdx.x * ROWS_PER_BLOCK + threadIdx.x / WARP;
    if (row >= p.rows) return;
    int line = (p.first + row) / p.out_width, column = (p.first + row) % p.out_width;
    int left = column * p.stride - p.padding, top = line % p.out_height * p.stride - p.padding;
    x += (i64)(p.sample + line / p.out_height) * p.height * p.width * p.inputs;
    patches += (i64)row * p.leading;
    for (int i = threadIdx.x % WARP * N; i < p.leading; i += WARP * N) {
        int tap = i / p.inputs, c = i - tap * p.inputs;
        int u = tap / p.kernel_width, v = tap - u * p.kernel_width;
        int a = top + u, b = left + v;
        Pack<T, N> value = {};
        if (u < p.kernel_height && a >= 0 && a < p.height && b >= 0 && b < p.width)
            value = load_pack<T, N>(x + ((i64)a * p.width + b) * p.inputs + c);
        store_pack<T, N>(patches + i, value);
    }
}

// `wide`: whether lanes own 16 bytes at a time.
#define GATHER(T, suffix)                                                                                              \
    extern "C" __global__ void gather_patches_##suffix(const T *x, T *patches, Pictures p, int wide) {                 \
        if (wide)                                                                                                      \
            gather<T, 16 / sizeof(T)>(x, patches, p);                                                                  \
        else                                                                                                           \
            gather<T, 1>(x, patches, p);                                                                               \
    }                                                                                                                  \
    CU_KERNEL(gather_patches_##suffix)

// hot: gather_patches_bf16
// hot: gather_patches_f16
// hot: gather_patches_f32
FOR_FLOATS(GATHER)

// [filters, channels, taps] -> [filters, taps, channels], with zeros from there to the end of a row of `leading`. A
// thread owns an element of the result.
template <class T>
__device__ void order(const T *__restrict__ weight, T *__restrict__ out, i64 count, int channels, int taps,
                      int leading) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    i64 filter = i / leading;
    int at = i % leading, tap = at / channels, c = at - tap * channels;
    out[i] = tap < taps ? weight[(filter * channels + c) * taps + tap] : from_float<T>(0.0f);
}

#define ORDER(T, suffix)                                                                                               \
    extern "C" __global__ void order_filters_##suffix(const T *weight, T *out, i64 count, int channels, int taps,      \
                                                      int leading) {                                                   \
        order(weight, out, count, channels, taps, leading);                                                            \
    }                                                                                                                  \
    CU_KERNEL(order_filters_##suffix)

FOR_FLOATS(ORDER)

// The way back: [filters, taps, channels] in rows of `leading` -> [filters, channels, taps].
extern "C" __global__ void restore_filters(const float *__restrict__ ordered, float *__restrict__ out, i64 count,
                                           int channels, int taps, int leading) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    i64 filter = i / ((i64)channels * taps);
    int at = i % ((i64)channels * taps), c = at / taps, tap = at - c * taps;
    out[i] = ordered[filter * leading + tap * channels + c];
}
CU_KERNEL(restore_filters)
