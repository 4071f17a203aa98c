// The gradient of attention, in float. With the weights P of the forward pass, which are computed again from the scores
// and the logs that it kept, and delta = the sum over channels of dy y: dS = P (dy v^T - delta) / sqrt(depth), of q:
// dS k, of k: dS^T q, of v: P^T dy. One kernel owns tiles of queries and goes through the keys, one owns tiles of keys
// and goes through the queries that see them, so that each sum has one owner and one order.
#include "attention.cuh"

// The sizes of tiles: gradient.rs has the same.
template <int D> constexpr int OWN_QUERIES = D > 128 ? 16 : D > 64 ? 32 : 64;
template <int D> constexpr int KEYS = D > 128 ? 16 : 32;
template <int D> constexpr int OWN_KEYS = D > 128 ? 16 : D > 64 ? 32 : 64;
template <int D> constexpr int QUERIES = D > 64 ? 16 : 32;

// What the forward pass kept, and the gradient of its result. `logs` and `deltas` are [samples, heads, queries].
struct Known {
    const float *dy, *logs, *deltas;
};

__device__ __forceinline__ Rows<float> gradient_of(const Attention &p, const float *dy, int n, int head, int first) {
    i64 stride = (i64)p.heads * p.depth;
    return {dy + ((i64)n * p.queries + first) * stride + (i64)head * p.depth, stride, p.queries - first, p.depth,
            p.wide != 0};
}

// deltas = the sum over a head's channels of dy y. A warp owns a head of a query.
extern "C" __global__ void attention_deltas(const float *__restrict__ y, const float *__restrict__ dy,
                                            float *__restrict__ deltas, i64 rows, int heads, int queries, int depth) {
    i64 row = (i64)blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    if (row >= rows) return;
    float sum = 0.0f;
    for (int i = threadIdx.x % WARP; i < depth; i += WARP) sum += y[row * depth + i] * dy[row * depth + i];
    sum = warp_sum(sum);
    i64 head = row % heads, t = row / heads % queries, n = row / heads / queries;
    if (threadIdx.x % WARP == 0) deltas[(n * heads + head) * queries + t] = sum;
}
CU_KERNEL(attention_deltas)

// of_q is laid out as q is.
template <int D> __device__ __forceinline__ void of_queries(const Attention &p, const Known &known, float *of_q) {
    constexpr int M = OWN_QUERIES<D> / SIDE, N = KEYS<D> / SIDE, E = D / SIDE;
    DYN_SHARED(float, q);
    float *dy = q + OWN_QUERIES<D> * (D + 4), *kv = dy + OWN_QUERIES<D> * (D + 4), *scores = kv + KEYS<D> * (D + 4);
    int tiles = (p.queries + OWN_QUERIES<D> - 1) / OWN_QUERIES<D>;
    int first = blockIdx.x % tiles * OWN_QUERIES<D>, pair = blockIdx.x / tiles;
    int head = pair % p.heads, n = pair / p.heads;
    int row = threadIdx.x / SIDE, x = threadIdx.x % SIDE;
    load_rows<OWN_QUERIES<D>, D>(q, queries_of<float>(p, n, head, first));
    load_rows<OWN_QUERIES<D>, D>(dy, gradient_of(p, known.dy, n, head, first));
    float log[M], delta[M], dq[M][E] = {};
#pragma unroll
    for (int i = 0; i < M; i++) {
        i64 at = ((i64)n * p.heads + head) * p.queries + min(first + row + i * SIDE, p.queries - 1);
        log[i] = known.logs[at];
        delta[i] = known.deltas[at];
    }
    int end = visible(p, n, first + OWN_QUERIES<D> - 1);
    for (Tile tile = {}; tile.position < end; tile = next_tile(p, tile, KEYS<D>)) {
        int entry = entry_of(p, tile.segment, n), count = tile_size(p, tile, KEYS<D>);
        load_rows<KEYS<D>, D>(kv, values_of<float>(p, entry, head, tile, KEYS<D>));
        __syncthreads();
        float dp[M][N] = {}, s[M][N] = {};
        rows_by_rows<D>(dp, dy, kv);
        __syncthreads();
        load_rows<KEYS<D>, D>(kv, keys_of<float>(p, entry, head, tile, KEYS<D>));
        __syncthreads();
        rows_by_rows<D>(s, q, kv);
#pragma unroll
        for (int i = 0; i < M; i++) {
            int seen = min(count, visible(p, n, first + row + i * SIDE) - tile.position);
#pragma unroll
            for (int j = 0; j < N; j++) {
                float weight = exp2_fast(s[i][j] * p.scale * LOG2_E - log[i]);
                s[i][j] = x + j * SIDE < seen ? weight * (dp[i][j] - delta[i]) * p.scale : 0.0f;
            }
        }
        store_product(scores, s);
        __syncthreads();
        rows_by_columns<KEYS<D>, D>(dq, scores, kv);
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < M; i++) {
        int t = first + row + i * SIDE;
        if (t >= p.queries) continue;
        float *to = of_q + ((i64)n * p.queries + t) * p.q_stride + (i64)head * p.depth;
#pragma unroll
        for (int e = 0; e < E; e++)
            if (column_of<D>(e) < p.depth) to[column_of<D>(e)] = dq[i][e];
    }
}

// A tile of an entry's keys of a head, by the number of a block. Segments that need no gradient have none.
template <int SIZE> struct Owned {
    Tile tile;
    int entry, head;

    __device__ __forceinline__ Owned(const Attention &p, i64 block) : tile{}, entry(0), head(0) {
        for (; tile.segment < p.segment_count; tile.segment++) {
            const Segment &s = p.segments[tile.segment];
            int tiles = (s.tokens + SIZE - 1) / SIZE;
            i64 blocks = s.of_keys || s.of_values ? (i64)tiles * p.heads * s.entries : 0;
            if (block < blocks) {
                tile.first = block % tiles * SIZE;
                tile.position += tile.first;
                head = block / tiles % p.heads;
                entry = block / tiles / p.heads;
                return;
            }
            block -= blocks;
            tile.position += s.tokens;
        }
    }
};

template <int M, int D>
__device__ __forceinline__ void store_rows(float *to, i64 stride, int count, int depth, const float (&c)[M][D / SIDE]) {
#pragma unroll
    for (int i = 0; i < M; i++) {
        int row = threadIdx.x / SIDE + i * SIDE;
        if (row >= count) continue;
#pragma unroll
        for (int e = 0; e < D / SIDE; e++)
            if (column_of<D>(e) < depth) to[row * stride + column_of<D>(e)] = c[i][e];
    }
}

template <int D> __device__ __forceinline__ void of_keys(const Attention &p, const Known &known) {
    constexpr int M = OWN_KEYS<D> / SIDE, N = QUERIES<D> / SIDE, E = D / SIDE;
    DYN_SHARED(float, k);
    float *v = k + OWN_KEYS<D> * (D + 4), *q = v + OWN_KEYS<D> * (D + 4), *dy = q + QUERIES<D> * (D + 4);
    float *scores = dy + QUERIES<D> * (D + 4);
    Owned<OWN_KEYS<D>> own(p, blockIdx.x);
    const Segment &segment = p.segments[own.tile.segment];
    int row = threadIdx.x / SIDE, x = threadIdx.x % SIDE, head = own.head;
    int count = tile_size(p, own.tile, OWN_KEYS<D>), position = own.tile.position;
    load_rows<OWN_KEYS<D>, D>(k, keys_of<float>(p, own.entry, head, own.tile, OWN_KEYS<D>));
    load_rows<OWN_KEYS<D>, D>(v, values_of<float>(p, own.entry, head, own.tile, OWN_KEYS<D>));
    float dk[M][E] = {}, dv[M][E] = {};
    for (int n = 0; n < p.samples; n++) {
        if (entry_of(p, own.tile.segment, n) != own.entry || visible(p, n, p.queries - 1) <= position) continue;
        const i64 numbers = ((i64)n * p.heads + head) * p.queries;
        // With a causal mask query t sees key t at most.
        int first = p.causal ? position / QUERIES<D> * QUERIES<D> : 0;
        for (; first < p.queries; first += QUERIES<D>) {
            load_rows<QUERIES<D>, D>(q, queries_of<float>(p, n, head, first));
            load_rows<QUERIES<D>, D>(dy, gradient_of(p, known.dy, n, head, first));
            __syncthreads();
            float s[M][N] = {};
            rows_by_rows<D>(s, k, q);
#pragma unroll
            for (int j = 0; j < N; j++) {
                int t = first + x + j * SIDE, seen = t < p.queries ? min(count, visible(p, n, t) - position) : 0;
                float log = known.logs[numbers + min(t, p.queries - 1)];
#pragma unroll
                for (int i = 0; i < M; i++)
                    s[i][j] = row + i * SIDE < seen ? exp2_fast(s[i][j] * p.scale * LOG2_E - log) : 0.0f;
            }
            if (segment.of_values) {
                store_product(scores, s);
                __syncthreads();
                rows_by_columns<QUERIES<D>, D>(dv, scores, dy);
            }
            if (segment.of_keys) {
                float dp[M][N] = {};
                rows_by_rows<D>(dp, v, dy);
#pragma unroll
                for (int j = 0; j < N; j++) {
                    int t = min(first + x + j * SIDE, p.queries - 1);
                    float delta = known.deltas[numbers + t];
#pragma unroll
                    for (int i = 0; i < M; i++) s[i][j] *= (dp[i][j] - delta) * p.scale;
                }
                __syncthreads();
                store_product(scores, s);
                __syncthreads();
                rows_by_columns<QUERIES<D>, D>(dk, scores, q);
            }
            __syncthreads();
        }
    }
    i64 token = (i64)own.entry * segment.tokens + own.tile.first, column = (i64)head * p.depth;
    i64 keys = token * segment.key_stride + column, values = token * segment.value_stride + column;
    if (segment.of_keys) store_rows<M, D>(segment.of_keys + keys, segment.key_stride, count, p.depth, dk);
    if (segment.of_values) store_rows<M, D>(segment.of_values + values, segment.value_stride, count, p.depth, dv);
}

#define GRADIENTS(D)                                                                                                   \
    extern "C" __global__ void __launch_bounds__(PRODUCT_THREADS, 2)                                                   \
        attention_of_queries_##D(const __grid_constant__ Attention p, const __grid_constant__ Known known,             \
                                 float *of_q) {                                                                        \
        of_queries<D>(p, known, of_q);                                                                                 \
    }                                                                                                                  \
    CU_KERNEL(attention_of_queries_##D)                                                                                \
    extern "C" __global__ void __launch_bounds__(PRODUCT_THREADS, 2)                                                   \
        attention_of_keys_##D(const __grid_constant__ Attention p, const __grid_constant__ Known known) {              \
        of_keys<D>(p, known);                                                                                          \
    }                                                                                                                  \
    CU_KERNEL(attention_of_keys_##D)

// hot: attention_of_queries_64
// hot: attention_of_queries_128
// hot: attention_of_keys_64
// hot: attention_of_keys_128
GRADIENTS(32)
GRADIENTS(64)
GRADIENTS(128)
GRADIENTS(256)
