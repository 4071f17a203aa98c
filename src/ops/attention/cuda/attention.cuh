// What the kernels of attention share: the arguments of a call, tiles of keys, products of tiles by 16 x 16 threads.
#pragma once
#include "kernel.cuh"

#define MOST_SEGMENTS 8
#define SIDE 16
#define PRODUCT_THREADS (SIDE * SIDE)
#define LOG2_E 1.4426950408889634f

// A run of keys and values. Tokens lie a stride apart, in elements; the columns of all heads one after the other.
struct Segment {
    const void *keys, *values;
    // Of each sample: which entry it attends to. Null: that of its own number.
    const u32 *index;
    i64 key_stride, value_stride;
    // Gradients, laid out as keys and values are; null if nobody asks for them.
    float *of_keys, *of_values;
    int tokens, entries;
};

// A call.
struct Attention {
    Segment segments[MOST_SEGMENTS];
    const void *q;
    // Of each sample: how many keys there are for a causal mask. Null: all.
    const u32 *lengths;
    i64 q_stride;
    int segment_count, samples, queries, keys, heads, depth, causal;
    // Whether all addresses and strides are multiples of 16 bytes.
    int wide;
    // 1 / sqrt(depth)
    float scale;
};

// How many of all segments' keys query t of sample n sees, at least one.
__device__ __forceinline__ int visible(const Attention &p, int n, int t) {
    if (!p.causal) return p.keys;
    int seen = min(t, p.queries - 1) + 1;
    return p.lengths ? min(seen, (int)p.lengths[n]) : seen;
}

// A run of keys within one segment, from `first` on there and from `position` on among all.
struct Tile {
    int segment, first, position;
};

__device__ __forceinline__ int tile_size(const Attention &p, Tile tile, int most) {
    return min(most, p.segments[tile.segment].tokens - tile.first);
}

__device__ __forceinline__ Tile next_tile(const Attention &p, Tile tile, int most) {
    int size = tile_size(p, tile, most);
    tile.position += size;
    tile.first += size;
    if (tile.first == p.segments[tile.segment].tokens) {
        tile.segment++;
        tile.first = 0;
    }
    return tile;
}

// Some tokens' columns of a head: `count` rows of `depth` elements.
template <class T> struct Rows {
    const T *at;
    i64 stride;
    int count, depth;
    bool wide;
};

template <class T> __device__ __forceinline__ Rows<T> queries_of(const Attention &p, int n, int head, int first) {
    const T *at = (const T *)p.q + ((i64)n * p.queries + first) * p.q_stride + (i64)head * p.depth;
    return {at, p.q_stride, p.queries - first, p.depth, p.wide != 0};
}

template <class T>
__device__ __forceinline__ Rows<T> keys_of(const Attention &p, int entry, int head, Tile tile, int most) {
    const Segment &s = p.segments[tile.segment];
    const T *at = (const T *)s.keys + ((i64)entry * s.tokens + tile.first) * s.key_stride + (i64)head * p.depth;
    return {at, s.key_stride, tile_size(p, tile, most), p.depth, p.wide != 0};
}

template <class T>
__device__ __forceinline__ Rows<T> values_of(const Attention &p, int entry, int head, Tile tile, int most) {
    const Segment &s = p.segments[tile.segment];
    const T *at = (const T *)s.values + ((i64)entry * s.tokens + tile.first) * s.value_stride + (i64)head * p.depth;
    return {at, s.value_stride, tile_size(p, tile, most), p.depth, p.wide != 0};
}

// The entry that a sample attends to.
__device__ __forceinline__ int entry_of(const Attention &p, int segment, int n) {
    const u32 *index = p.segments[segment].index;
    return index ? (int)index[n] : n;
}

__device__ __forceinline__ float exp2_fast(float x) {
#if defined(CUEMU)
    return exp2f(x);
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

// --- Tiles of float in shared memory: rows of D numbers, D + 4 apart so that reads of 16 bytes do not conflict ------

// Brings ROWS rows of D numbers to shared memory, 0 where the source has none.
template <int ROWS, int D, class T> __device__ __forceinline__ void load_rows(float *to, Rows<T> from) {
    if (from.wide) {
        constexpr int N = 16 / sizeof(T);
        for (int i = threadIdx.x; i < ROWS * D / N; i += PRODUCT_THREADS) {
            int row = i / (D / N), column = i % (D / N) * N;
            Pack<T, N> v = {};
            if (row < from.count && column < from.depth) v = load_pack<T, N>(from.at + row * from.stride + column);
#pragma unroll
            for (int j = 0; j < N; j += 4) {
                Pack<float, 4> f;
#pragma unroll
                for (int k = 0; k < 4; k++) f.at[k] = to_float(v.at[j + k]);
                store_pack<float, 4>(to + row * (D + 4) + column + j, f);
            }
        }
    } else {
#pragma unroll 1
        for (int i = threadIdx.x; i < ROWS * D; i += PRODUCT_THREADS) {
            int row = i / D, column = i % D;
            bool there = row < from.count && column < from.depth;
            to[row * (D + 4) + column] = there ? to_float(from.at[row * from.stride + column]) : 0.0f;
        }
    }
}

// c[i][j] += sum over k < D of a[y + 16 i][k] b[x + 16 j][k], for the thread in row y and column x of the block.
template <int D, int M, int N>
__device__ __forceinline__ void rows_by_rows(float (&c)[M][N], const float *a, const float *b) {
    a += threadIdx.x / SIDE * (D + 4);
    b += threadIdx.x % SIDE * (D + 4);
#pragma unroll 2
    for (int k = 0; k < D; k += 4) {
        Pack<float, 4> left[M], right[N];
#pragma unroll
        for (int i = 0; i < M; i++) left[i] = load_pack<float, 4>(a + i * SIDE * (D + 4) + k);
#pragma unroll
        for (int j = 0; j < N; j++) right[j] = load_pack<float, 4>(b + j * SIDE * (D + 4) + k);
#pragma unroll
        for (int i = 0; i < M; i++)
#pragma unroll
            for (int j = 0; j < N; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) c[i][j] += left[i].at[e] * right[j].at[e];
    }
}

// Neighbouring columns that a thread owns of a tile of width D: in runs of this many, 16 runs apart.
template <int D> constexpr int RUN = D >= 64 ? 4 : D / SIDE;

// The column of a thread's e-th number in a row of a tile of width D.
template <int D> __device__ __forceinline__ int column_of(int e) {
    return (threadIdx.x % SIDE + e / RUN<D> * SIDE) * RUN<D> + e % RUN<D>;
}

// c[i][e] += sum over k < K of a[y + 16 i][k] b[k][column_of(e)]; the rows of a are K + 4 apart.
template <int K, int D, int M>
__device__ __forceinline__ void rows_by_columns(float (&c)[M][D / SIDE], const float *a, const float *b) {
    constexpr int N = RUN<D>;
    a += threadIdx.x / SIDE * (K + 4);
    b += threadIdx.x % SIDE * N;
#pragma unroll 2
    for (int k = 0; k < K; k += 4) {
        Pack<float, 4> left[M];
#pragma unroll
        for (int i = 0; i < M; i++) left[i] = load_pack<float, 4>(a + i * SIDE * (K + 4) + k);
#pragma unroll
        for (int part = 0; part < 4; part++)
#pragma unroll
            for (int run = 0; run < D / SIDE / N; run++) {
                Pack<float, N> right = load_pack<float, N>(b + (k + part) * (D + 4) + run * SIDE * N);
#pragma unroll
                for (int i = 0; i < M; i++)
#pragma unroll
                    for (int e = 0; e < N; e++) c[i][run * N + e] += left[i].at[part] * right.at[e];
            }
    }
}

// Puts a product of rows_by_rows as rows of N * 16 numbers, which are 4 more apart.
template <int M, int N> __device__ __forceinline__ void store_product(float *to, const float (&c)[M][N]) {
    int y = threadIdx.x / SIDE, x = threadIdx.x % SIDE;
#pragma unroll
    for (int i = 0; i < M; i++)
#pragma unroll
        for (int j = 0; j < N; j++) to[(y + i * SIDE) * (N * SIDE + 4) + x + j * SIDE] = c[i][j];
}
