// One token of each sequence, and where its gradient goes. A thread owns an element of the result.
#include "kernel.cuh"

// out[n, c] = x[n, positions[n], c]
#define SELECT_TOKENS(T, suffix)                                                                                       \
    extern "C" __global__ void select_tokens_##suffix(const T *x, const u32 *positions, T *out, i64 count,             \
                                                      i64 tokens, int channels) {                                      \
        i64 i = thread_number();                                                                                       \
        if (i >= count) return;                                                                                        \
        i64 n = quotient(i, channels);                                                                                 \
        out[i] = x[(n * tokens + positions[n]) * channels + i - n * channels];                                         \
    }                                                                                                                  \
    CU_KERNEL(select_tokens_##suffix)

FOR_FLOATS(SELECT_TOKENS)

// dx[n, t, c] = g[n, c] where t = positions[n], else 0.
extern "C" __global__ void select_tokens_gradient(const float *__restrict__ g, const u32 *__restrict__ positions,
                                                  float *__restrict__ dx, i64 count, int tokens, int channels) {
    i64 i = thread_number();
    if (i >= count) return;
    i64 row = quotient(i, channels), n = quotient(row, tokens);
    dx[i] = row - n * tokens == positions[n] ? g[n * channels + i - row * channels] : 0.0f;
}
CU_KERNEL(select_tokens_gradient)
