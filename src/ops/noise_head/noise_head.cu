// The noise prediction from a head's last layers, and its gradients. A thread owns an element.
#include "kernel.cuh"

// As in mod.rs.
#define EPS 1e-5f
#define BOUND 1e-3f

__device__ __forceinline__ float gate(float b) { return 1.0f / (1.0f + expf(-b)); }

__device__ __forceinline__ float divisor(float b, int bounded) {
    return bounded ? gate(b) * (1.0f - 2.0f * BOUND) + BOUND : fabsf(1.0f - b) + EPS;
}

// The derivative of the divisor.
__device__ __forceinline__ float divisor_slope(float b, int bounded) {
    if (!bounded) return b > 1.0f ? 1.0f : b < 1.0f ? -1.0f : 0.0f;
    float s = gate(b);
    return s * (1.0f - s) * (1.0f - 2.0f * BOUND);
}

// out = (x - a) / divisor(b)
template <class T>
__device__ void quotients(const T *__restrict__ x, const T *__restrict__ head, T *__restrict__ out, i64 count,
                          int channels, int bounded) {
    i64 i = thread_number();
    if (i >= count) return;
    i64 row = quotient(i, channels);
    const T *a = head + i + row * channels;
    out[i] = from_float<T>((to_float(x[i]) - to_float(a[0])) / divisor(to_float(a[channels]), bounded));
}

#define NOISE_FROM_HEAD(T, suffix)                                                                                     \
    extern "C" __global__ void noise_from_head_##suffix(const T *x, const T *head, T *out, i64 count, int channels,    \
                                                        int bounded) {                                                 \
        quotients<T>(x, head, out, count, channels, bounded);                                                          \
    }                                                                                                                  \
    CU_KERNEL(noise_from_head_##suffix)

FOR_FLOATS(NOISE_FROM_HEAD)

// dx = g / divisor(b), and for a and b: -dx and -dx noise slope(b). What is null is not asked for.
extern "C" __global__ void noise_from_head_gradient(const float *__restrict__ g, const float *__restrict__ head,
                                                    const float *__restrict__ noise, float *__restrict__ dx,
                                                    float *__restrict__ dhead, i64 count, int channels, int bounded) {
    i64 i = thread_number();
    if (i >= count) return;
    i64 a = i + quotient(i, channels) * channels;
    float b = head[a + channels], share = g[i] / divisor(b, bounded);
    if (dx) dx[i] = share;
    if (dhead) {
        dhead[a] = -share;
        dhead[a + channels] = -share * noise[i] * divisor_slope(b, bounded);
    }
}
CU_KERNEL(noise_from_head_gradient)
