// Samples of a batch by factors of their own. A thread owns a few neighbouring elements of one sample, a row of
// blocks a sample.
#include "kernel.cuh"

// The most samples of one launch: as SAMPLES in cuda.rs.
#define SAMPLES 64

struct MixFactors {
    float a[SAMPLES], b[SAMPLES];
};

// out = a x + b y; out = a x without y.
template <class T>
__device__ void mix(const T *__restrict__ x, const T *__restrict__ y, const MixFactors &factors, T *__restrict__ out,
                    i64 sample) {
    const int N = 16 / sizeof(T);
    i64 first = thread_number() * N, begin = blockIdx.y * sample;
    if (first >= sample) return;
    float a = factors.a[blockIdx.y], b = factors.b[blockIdx.y];
    x += begin + first;
    out += begin + first;
    if (y) y += begin + first;
    if (first + N <= sample && is_aligned(x) && is_aligned(y) && is_aligned(out)) {
        Pack<T, N> v = load_pack<T, N>(x), w;
        if (y) w = load_pack<T, N>(y);
        for (int j = 0; j < N; j++) {
            float scaled = a * to_float(v.at[j]);
            v.at[j] = from_float<T>(y ? scaled + b * to_float(w.at[j]) : scaled);
        }
        store_pack<T, N>(out, v);
        return;
    }
    for (int j = 0; j < min((i64)N, sample - first); j++) {
        float scaled = a * to_float(x[j]);
        out[j] = from_float<T>(y ? scaled + b * to_float(y[j]) : scaled);
    }
}

#define MIX(T, suffix)                                                                                                 \
    extern "C" __global__ void mix_samples_##suffix(const T *x, const T *y, MixFactors factors, T *out, i64 sample) {  \
        mix<T>(x, y, factors, out, sample);                                                                            \
    }                                                                                                                  \
    CU_KERNEL(mix_samples_##suffix)

FOR_FLOATS(MIX)
