// Rows of a table. A warp owns a row: of the result, or of the gradient of the table.
#include "kernel.cuh"

#define ROWS_PER_BLOCK 8
#define COLUMNS 128

// An id that the table does not have gives a row of NaN.
template <class T, int N>
__device__ void look_up(const i64 *ids, const T *__restrict__ table, T *__restrict__ out, i64 rows, i64 count,
                        int channels) {
    i64 row = (i64)blockIdx.x * ROWS_PER_BLOCK + threadIdx.x / WARP;
    if (row >= rows) return;
    i64 id = ids[row];
    bool is_there = id >= 0 && id < count;
    for (int c = threadIdx.x % WARP * N; c < channels; c += WARP * N) {
        Pack<T, N> v;
        if (is_there) v = load_pack<T, N>(table + id * channels + c);
        else
            for (int j = 0; j < N; j++) v.at[j] = from_float<T>(__uint_as_float(0x7fffffffu));
        store_pack<T, N>(out + row * channels + c, v);
    }
}

#define EMBEDDING(T, suffix)                                                                                           \
    extern "C" __global__ void embedding_##suffix(const i64 *ids, const T *table, T *out, i64 rows, i64 count,         \
                                                  int channels) {                                                      \
        const int wide = 16 / sizeof(T);                                                                               \
        if (channels % wide == 0) look_up<T, wide>(ids, table, out, rows, count, channels);                            \
        else look_up<T, 1>(ids, table, out, rows, count, channels);                                                    \
    }                                                                                                                  \
    CU_KERNEL(embedding_##suffix)

FOR_FLOATS(EMBEDDING)

// Row v of the gradient is the sum of the rows of g whose id is v, in their order: its warp looks at all ids, 32 at a
// time, and has 128 columns.
extern "C" __global__ void embedding_gradient(const float *__restrict__ g, const i64 *__restrict__ ids,
                                              float *__restrict__ out, i64 places, i64 count, int channels) {
    i64 row = (i64)blockIdx.x * ROWS_PER_BLOCK + threadIdx.x / WARP;
    if (row >= count) return;
    int lane = threadIdx.x % WARP, first = blockIdx.y * COLUMNS + lane;
    float sums[COLUMNS / WARP] = {};
    for (i64 start = 0; start < places; start += WARP) {
        u32 found = __ballot_sync(ALL_LANES, start + lane < places && ids[start + lane] == row);
        while (found) {
            const float *of_place = g + (start + __ffs((int)found) - 1) * channels;
            found &= found - 1;
#pragma unroll
            for (int i = 0; i < COLUMNS / WARP; i++)
                if (first + i * WARP < channels) sums[i] += of_place[first + i * WARP];
        }
    }
#pragma unroll
    for (int i = 0; i < COLUMNS / WARP; i++)
        if (first + i * WARP < channels) out[row * channels + first + i * WARP] = sums[i];
}
CU_KERNEL(embedding_gradient)
