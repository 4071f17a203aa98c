// The largest number of each 2 x 2 pixels. A thread owns N neighbouring channels of a window, which takes part in no
// other.
#include "kernel.cuh"

struct Pictures {
    i64 windows;
    int height, width, channels;
};

// The first element of window number `i / channels`'s first pixel, at channel `i % channels`.
__device__ __forceinline__ i64 first_pixel(const Pictures &p, i64 i) {
    int channel = i % p.channels, out_width = p.width / 2, out_height = p.height / 2;
    i64 window = i / p.channels, row = window / out_width;
    return ((row / out_height * p.height + row % out_height * 2) * p.width + window % out_width * 2) * p.channels +
           channel;
}

// The larger; a number that is none wins, so that it shows.
__device__ __forceinline__ float greater(float a, float b) { return a > b || isnan(a) ? a : b; }

template <class T, int N> __device__ void pool(const T *__restrict__ x, T *__restrict__ y, const Pictures &p) {
    i64 i = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * N;
    if (i >= p.windows * p.channels) return;
    x += first_pixel(p, i);
    i64 line = (i64)p.width * p.channels;
    Pack<T, N> a = load_pack<T, N>(x), b = load_pack<T, N>(x + p.channels);
    Pack<T, N> c = load_pack<T, N>(x + line), d = load_pack<T, N>(x + line + p.channels);
    for (int j = 0; j < N; j++) {
        float upper = greater(to_float(a.at[j]), to_float(b.at[j]));
        a.at[j] = from_float<T>(greater(upper, greater(to_float(c.at[j]), to_float(d.at[j]))));
    }
    store_pack<T, N>(y + i, a);
}

// `wide`: whether threads own 4 channels each.
#define MAX_POOL(T, suffix)                                                                                            \
    extern "C" __global__ void max_pool_##suffix(const T *x, T *y, Pictures p, int wide) {                             \
        if (wide)                                                                                                      \
            pool<T, 4>(x, y, p);                                                                                       \
        else                                                                                                           \
            pool<T, 1>(x, y, p);                                                                                       \
    }                                                                                                                  \
    CU_KERNEL(max_pool_##suffix)

FOR_FLOATS(MAX_POOL)

// g to the first of the largest, row by row, and 0 to the others. Odd last rows and columns are zero before.
template <int N>
__device__ void gradient(const float *__restrict__ g, const float *__restrict__ x, float *__restrict__ dx,
                         const Pictures &p) {
    i64 i = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * N;
    if (i >= p.windows * p.channels) return;
    i64 at = first_pixel(p, i), line = (i64)p.width * p.channels;
    const i64 places[4] = {at, at + p.channels, at + line, at + line + p.channels};
    Pack<float, N> of_y = load_pack<float, N>(g + i), v[4];
    for (int k = 0; k < 4; k++) v[k] = load_pack<float, N>(x + places[k]);
    for (int j = 0; j < N; j++) {
        float a = v[0].at[j], b = v[1].at[j], c = v[2].at[j], d = v[3].at[j];
        float above = greater(a, b), below = greater(c, d);
        v[0].at[j] = a >= b && a >= below ? of_y.at[j] : 0.0f;
        v[1].at[j] = b > a && b >= below ? of_y.at[j] : 0.0f;
        v[2].at[j] = c > above && c >= d ? of_y.at[j] : 0.0f;
        v[3].at[j] = d > above && d > c ? of_y.at[j] : 0.0f;
    }
    for (int k = 0; k < 4; k++) store_pack<float, N>(dx + places[k], v[k]);
}

extern "C" __global__ void max_pool_gradient(const float *g, const float *x, float *dx, Pictures p, int wide) {
    if (wide)
        gradient<4>(g, x, dx, p);
    else
        gradient<1>(g, x, dx, p);
}
CU_KERNEL(max_pool_gradient)
