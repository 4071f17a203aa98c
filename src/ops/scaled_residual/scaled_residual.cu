// A residual sum with a learnt factor, and its gradients. A thread owns a few neighbouring elements.
#include "kernel.cuh"

// out = residual + gain y
template <class T>
__device__ void add(const T *__restrict__ y, const float *gain, const T *__restrict__ residual, T *__restrict__ out,
                    i64 count) {
    const int N = 16 / sizeof(T);
    i64 first = thread_number() * N;
    if (first >= count) return;
    float factor = *gain;
    if (first + N <= count && is_aligned(y) && is_aligned(residual) && is_aligned(out)) {
        Pack<T, N> a = load_pack<T, N>(y + first), b = load_pack<T, N>(residual + first);
        for (int j = 0; j < N; j++) a.at[j] = from_float<T>(to_float(a.at[j]) * factor + to_float(b.at[j]));
        store_pack<T, N>(out + first, a);
        return;
    }
    for (i64 i = first; i < min(count, first + N); i++)
        out[i] = from_float<T>(to_float(y[i]) * factor + to_float(residual[i]));
}

// hot: scaled_residual_f32
// hot: scaled_residual_f16
// hot: scaled_residual_bf16
#define SCALED_RESIDUAL(T, suffix)                                                                                     \
    extern "C" __global__ void scaled_residual_##suffix(const T *y, const float *gain, const T *residual, T *out,      \
                                                        i64 count) {                                                   \
        add<T>(y, gain, residual, out, count);                                                                         \
    }                                                                                                                  \
    CU_KERNEL(scaled_residual_##suffix)

FOR_FLOATS(SCALED_RESIDUAL)

// out = gain g
extern "C" __global__ void scaled_residual_gradient(const float *__restrict__ g, const float *gain,
                                                    float *__restrict__ out, i64 count) {
    i64 i = thread_number();
    if (i < count) out[i] = g[i] * *gain;
}
CU_KERNEL(scaled_residual_gradient)

// The sum of g y over each part: a block owns a part.
extern "C" __global__ void scaled_residual_dot(const float *__restrict__ g, const float *__restrict__ y,
                                               float *__restrict__ sums, i64 count, i64 part) {
    __shared__ float scratch[WARP];
    i64 first = blockIdx.x * part, end = min(count, first + part);
    float sum = 0.0f;
    for (i64 i = first + threadIdx.x; i < end; i += blockDim.x) sum += g[i] * y[i];
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}
CU_KERNEL(scaled_residual_dot)
