// Attention with online softmax, in float, for elements of any type and heads of any size up to 256. A block of 16 x 16
// threads owns a tile of queries of one head of one sample, and goes through all keys once, a tile at a time; no matrix
// of scores is ever written. A thread owns every 16th row of the tile and some columns of each.
#include "attention.cuh"

// The sizes of tiles: `plain` in mod.rs has the same.
template <int D> constexpr int QUERIES = D > 128 ? 32 : 64;
template <int D> constexpr int KEYS = D > 128 ? 16 : 32;

// The running softmax of a thread's rows: the largest score so far, times log2(e), and the sum of the weights.
template <int M> struct Softmax {
    float most[M], sum[M];
};

// Turns scores into weights, 0 for keys that a row does not see, and what was summed up so far into the same measure.
template <int M, int N, int E>
__device__ __forceinline__ void weigh(float (&s)[M][N], Softmax<M> &softmax, float (&o)[M][E], const int (&seen)[M],
                                      float scale) {
    int x = threadIdx.x % SIDE;
#pragma unroll
    for (int i = 0; i < M; i++) {
        float most = softmax.most[i], sum = 0.0f;
#pragma unroll
        for (int j = 0; j < N; j++) {
            s[i][j] = x + j * SIDE < seen[i] ? s[i][j] * scale : -INFINITY_F;
            most = fmaxf(most, s[i][j]);
        }
        // Every row sees the first key of all: from the first tile on this is a number.
        for (int step = SIDE / 2; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, step));
        float factor = exp2_fast(softmax.most[i] - most);
#pragma unroll
        for (int j = 0; j < N; j++) {
            s[i][j] = exp2_fast(s[i][j] - most);
            sum += s[i][j];
        }
        for (int step = SIDE / 2; step > 0; step /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, step);
        softmax.most[i] = most;
        softmax.sum[i] = softmax.sum[i] * factor + sum;
#pragma unroll
        for (int e = 0; e < E; e++) o[i][e] *= factor;
    }
}

// y: [samples, queries, heads depth]. logs, [samples, heads, queries], gets log2 of the sum of e^score over the keys,
// which the gradient needs; it may be null.
template <class T, int D> __device__ __forceinline__ void attend(const Attention &p, T *y, float *logs) {
    constexpr int M = QUERIES<D> / SIDE, N = KEYS<D> / SIDE, E = D / SIDE;
    DYN_SHARED(float, q);
    float *kv = q + QUERIES<D> * (D + 4), *weights = kv + KEYS<D> * (D + 4);
    int tiles = (p.queries + QUERIES<D> - 1) / QUERIES<D>;
    int first = blockIdx.x % tiles * QUERIES<D>, head = blockIdx.x / tiles % p.heads, n = blockIdx.x / tiles / p.heads;
    int row = threadIdx.x / SIDE;
    load_rows<QUERIES<D>, D>(q, queries_of<T>(p, n, head, first));
    float o[M][E] = {};
    Softmax<M> softmax;
#pragma unroll
    for (int i = 0; i < M; i++) softmax.most[i] = -INFINITY_F, softmax.sum[i] = 0.0f;
    int end = visible(p, n, first + QUERIES<D> - 1);
    for (Tile tile = {}; tile.position < end; tile = next_tile(p, tile, KEYS<D>)) {
        int entry = entry_of(p, tile.segment, n), count = tile_size(p, tile, KEYS<D>), seen[M];
        load_rows<KEYS<D>, D>(kv, keys_of<T>(p, entry, head, tile, KEYS<D>));
        __syncthreads();
        float s[M][N] = {};
        rows_by_rows<D>(s, q, kv);
#pragma unroll
        for (int i = 0; i < M; i++) seen[i] = min(count, visible(p, n, first + row + i * SIDE) - tile.position);
        weigh(s, softmax, o, seen, p.scale * LOG2_E);
        store_product(weights, s);
        __syncthreads();
        load_rows<KEYS<D>, D>(kv, values_of<T>(p, entry, head, tile, KEYS<D>));
        __syncthreads();
        rows_by_columns<KEYS<D>, D>(o, weights, kv);
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < M; i++) {
        int t = first + row + i * SIDE;
        if (t >= p.queries) continue;
        float factor = 1.0f / softmax.sum[i];
        T *to = y + (((i64)n * p.queries + t) * p.heads + head) * p.depth;
#pragma unroll
        for (int e = 0; e < E; e++)
            if (column_of<D>(e) < p.depth) to[column_of<D>(e)] = from_float<T>(o[i][e] * factor);
        if (logs && threadIdx.x % SIDE == 0)
            logs[((i64)n * p.heads + head) * p.queries + t] = softmax.most[i] + log2f(softmax.sum[i]);
    }
}

#define ATTEND(D, T, suffix)                                                                                           \
    extern "C" __global__ void __launch_bounds__(PRODUCT_THREADS, 2)                                                   \
        attention_##D##_##suffix(const __grid_constant__ Attention p, T *y, float *logs) {                             \
        attend<T, D>(p, y, logs);                                                                                      \
    }                                                                                                                  \
    CU_KERNEL(attention_##D##_##suffix)

#define ATTEND_ALL(T, suffix) ATTEND(32, T, suffix) ATTEND(64, T, suffix) ATTEND(128, T, suffix) ATTEND(256, T, suffix)

// hot: attention_32_f32
// hot: attention_64_f32
// hot: attention_128_f32
FOR_FLOATS(ATTEND_ALL)
