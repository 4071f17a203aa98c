// Pointwise ops. A thread owns a run of neighbouring elements: 16 bytes where lengths and addresses allow it, else one
// element. `wide` says which; `runs` is their number.
#include "kernel.cuh"

#define THREADS 256

template <class T, int N> __device__ __forceinline__ void add_run(const T *a, const T *b, T *y, i64 runs) {
    i64 i = (i64)blockIdx.x * THREADS + threadIdx.x;
    if (i >= runs) return;
    Pack<T, N> v = load_pack<T, N>(a + i * N), w = load_pack<T, N>(b + i * N);
    for (int j = 0; j < N; j++) v.at[j] = from_float<T>(to_float(v.at[j]) + to_float(w.at[j]));
    store_pack<T, N>(y + i * N, v);
}

// y = a + b.
#define ADD(T, suffix)                                                                                                 \
    extern "C" __global__ void add_##suffix(const T *a, const T *b, T *y, i64 runs, int wide) {                        \
        if (wide)                                                                                                      \
            add_run<T, 16 / sizeof(T)>(a, b, y, runs);                                                                 \
        else                                                                                                           \
            add_run<T, 1>(a, b, y, runs);                                                                              \
    }                                                                                                                  \
    CU_KERNEL(add_##suffix)

FOR_FLOATS(ADD)

template <class T, int N>
__device__ __forceinline__ void activate_run(const T *x, T *y, i64 runs, int code, float slope) {
    i64 i = (i64)blockIdx.x * THREADS + threadIdx.x;
    if (i >= runs) return;
    Pack<T, N> v = load_pack<T, N>(x + i * N);
    for (int j = 0; j < N; j++) v.at[j] = from_float<T>(activate(code, slope, to_float(v.at[j])));
    store_pack<T, N>(y + i * N, v);
}

// y = activation(x). y may be x.
#define ACTIVATE(T, suffix)                                                                                            \
    extern "C" __global__ void activate_##suffix(const T *x, T *y, i64 runs, int wide, int code, float slope) {        \
        if (wide)                                                                                                      \
            activate_run<T, 16 / sizeof(T)>(x, y, runs, code, slope);                                                  \
        else                                                                                                           \
            activate_run<T, 1>(x, y, runs, code, slope);                                                               \
    }                                                                                                                  \
    CU_KERNEL(activate_##suffix)

FOR_FLOATS(ACTIVATE)

struct Rescaling {
    float summand, factor, divisor;
};

template <class T, int N>
__device__ __forceinline__ void rescale_run(const T *x, T *y, i64 runs, const Rescaling &p) {
    i64 i = (i64)blockIdx.x * THREADS + threadIdx.x;
    if (i >= runs) return;
    Pack<T, N> v = load_pack<T, N>(x + i * N);
    for (int j = 0; j < N; j++)
        v.at[j] = from_float<T>((to_float(v.at[j]) + p.summand) * p.factor / p.divisor);
    store_pack<T, N>(y + i * N, v);
}

// y = (x + summand) factor / divisor. y may be x.
#define RESCALE(T, suffix)                                                                                             \
    extern "C" __global__ void rescale_##suffix(const T *x, T *y, i64 runs, int wide, Rescaling p) {                   \
        if (wide)                                                                                                      \
            rescale_run<T, 16 / sizeof(T)>(x, y, runs, p);                                                             \
        else                                                                                                           \
            rescale_run<T, 1>(x, y, runs, p);                                                                          \
    }                                                                                                                  \
    CU_KERNEL(rescale_##suffix)

FOR_FLOATS(RESCALE)

// As ops/elementwise/cuda.rs has it. A null scale is 1, a null shift 0; both are `stride` floats apart from sample to
// sample, where 0 means that all share them.
struct Channels {
    const float *scale, *shift;
    i64 samples, stride;
    // Runs of a sample, and of its channels.
    i64 runs, channel_runs;
    // Added to the scale.
    float plus;
};

// Blocks along x share a sample, or all samples in turn where there are more than blocks along y.
template <class T, int N> __device__ __forceinline__ void affine_run(const T *x, T *y, const Channels &p) {
    i64 first = (i64)blockIdx.x * THREADS, run = first + threadIdx.x;
    if (run >= p.runs) return;
    i64 c = (i64)(((u32)(first % p.channel_runs) + threadIdx.x) % (u32)p.channel_runs) * N;
    for (i64 n = blockIdx.y; n < p.samples; n += gridDim.y) {
        i64 at = (n * p.runs + run) * N;
        float scale[N], shift[N];
        if (p.scale) load_floats<N>(p.scale + n * p.stride + c, scale);
        if (p.shift) load_floats<N>(p.shift + n * p.stride + c, shift);
        Pack<T, N> v = load_pack<T, N>(x + at);
        for (int j = 0; j < N; j++) {
            float s = p.scale ? p.plus + scale[j] : 1.0f, b = p.shift ? shift[j] : 0.0f;
            v.at[j] = from_float<T>(fmaf(to_float(v.at[j]), s, b));
        }
        store_pack<T, N>(y + at, v);
    }
}

// y[n, .., c] = x[n, .., c] (plus + scale[n, c]) + shift[n, c]. y may be x.
#define AFFINE(T, suffix)                                                                                              \
    extern "C" __global__ void affine_channels_##suffix(const T *x, T *y, int wide, Channels p) {                      \
        if (wide)                                                                                                      \
            affine_run<T, 16 / sizeof(T)>(x, y, p);                                                                    \
        else                                                                                                           \
            affine_run<T, 1>(x, y, p);                                                                                 \
    }                                                                                                                  \
    CU_KERNEL(affine_channels_##suffix)

FOR_FLOATS(AFFINE)
