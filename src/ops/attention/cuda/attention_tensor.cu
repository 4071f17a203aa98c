// Attention in half precision on tensor cores, with online softmax in float. A block of four warps owns a tile of
// queries of one head of one sample, a warp 16 TALL of its rows, kept in registers with scores and sums. Tiles
// of keys and values pass through shared memory, the next one under way while one is used. All is read in runs of 16
// bytes.
#include "attention.cuh"

#if HAS_MMA_16816

#define WARPS 4
#define THREADS (WARPS * WARP)
// Keys of a tile.
#define KEYS 64

// D += A B of 16 x 16 by 16 x 8.
__device__ __forceinline__ void multiply(bf16_t, float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    u32 b[2] = {b0, b1};
    mma_16816_bf16(d, a, b);
}

__device__ __forceinline__ void multiply(f16_t, float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    u32 b[2] = {b0, b1};
    mma_16816_f16(d, a, b);
}

// Two numbers of half precision, the first in the low bits.
__device__ __forceinline__ u32 pack_two(bf16_t, float low, float high) {
#if defined(CUEMU)
    return from_float<bf16_t>(low).bits | (u32)from_float<bf16_t>(high).bits << 16;
#else
    u32 both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
#endif
}

__device__ __forceinline__ u32 pack_two(f16_t, float low, float high) {
#if defined(CUEMU)
    return from_float<f16_t>(low).bits | (u32)from_float<f16_t>(high).bits << 16;
#else
    u32 both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
#endif
}

// Starts to bring ROWS rows of D numbers, 0 where the source has none, to shared memory: D + 8 apart, so that the eight
// rows of a matrix of ldmatrix lie in different banks.
template <int ROWS, int D, class T> __device__ __forceinline__ void start_rows(T *to, const Rows<T> &from) {
    constexpr int CHUNKS = D / 8, STEP = THREADS / CHUNKS;
    int row = threadIdx.x / CHUNKS, column = threadIdx.x % CHUNKS * 8;
    const T *source = from.at + row * from.stride + column;
    to += row * (D + 8) + column;
    // Of 96 channels 8 threads too many: they have no row.
    if (STEP * CHUNKS != THREADS && row == STEP) return;
    bool there = column < from.depth;
#pragma unroll
    for (int i = 0; i < (ROWS + STEP - 1) / STEP; i++) {
        if (ROWS % STEP != 0 && row + i * STEP >= ROWS) break;
        if (there && row + i * STEP < from.count) cp_async16(to, source);
        else store_pack<T, 8>(to, Pack<T, 8>{});
        to += STEP * (D + 8);
        source += STEP * from.stride;
    }
}

// What a warp holds of its TALL times 16 queries, each lane as the fragments of mma have it: in a tile of 16 rows lane
// l has of the rows l / 4 and l / 4 + 8 the numbers 2 (l % 4) and 2 (l % 4) + 1 of every eight.
template <int D, int TALL> struct State {
    u32 q[TALL][D / 16][4];
    float s[TALL][KEYS / 8][4], o[TALL][D / 8][4];
    // Of the two rows: the largest score so far, and this lane's part of the sum of the weights.
    float most[TALL][2], sum[TALL][2];
};

// s = q k^T
template <class T, int D, int TALL>
__device__ __forceinline__ void score(State<D, TALL> &state, const T *keys) {
    int lane = threadIdx.x % WARP;
    // Of matrices of 8 keys by 8 channels: keys 0 to 7 with channels 0 to 7 and 8 to 15, keys 8 to 15 likewise.
    keys += (lane % 8 + lane / 16 * 8) * (D + 8) + lane / 8 % 2 * 8;
#pragma unroll
    for (int tall = 0; tall < TALL; tall++)
#pragma unroll
        for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) state.s[tall][j][e] = 0.0f;
#pragma unroll
    for (int k = 0; k < D / 16; k++)
#pragma unroll
        for (int j = 0; j < KEYS / 8; j += 2) {
            u32 b[4];
            ldmatrix_x4(b, keys + j * 8 * (D + 8) + k * 16);
#pragma unroll
            for (int tall = 0; tall < TALL; tall++) {
                multiply(T{}, state.s[tall][j], state.q[tall][k], b[0], b[1]);
                multiply(T{}, state.s[tall][j + 1], state.q[tall][k], b[2], b[3]);
            }
        }
}

// Scores become weights, and what was summed up so far comes into the same measure.
template <int D, int TALL> __device__ __forceinline__ void weigh(State<D, TALL> &state, float scale) {
#pragma unroll
    for (int tall = 0; tall < TALL; tall++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float most = state.most[tall][half];
#pragma unroll
            for (int j = 0; j < KEYS / 8; j++)
                most = fmaxf(most, fmaxf(state.s[tall][j][2 * half], state.s[tall][j][2 * half + 1]));
            most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 1));
            most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 2));
            // Every row sees the first key of all: from the first tile on this is a number.
            float factor = exp2_fast((state.most[tall][half] - most) * scale), shift = -most * scale, sum = 0.0f;
            state.most[tall][half] = most;
#pragma unroll
            for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
                for (int e = 2 * half; e < 2 * half + 2; e++) {
                    state.s[tall][j][e] = exp2_fast(fmaf(state.s[tall][j][e], scale, shift));
                    sum += state.s[tall][j][e];
                }
            state.sum[tall][half] = state.sum[tall][half] * factor + sum;
#pragma unroll
            for (int j = 0; j < D / 8; j++) {
                state.o[tall][j][2 * half] *= factor;
                state.o[tall][j][2 * half + 1] *= factor;
            }
        }
}

// o += weights v
template <class T, int D, int TALL>
__device__ __forceinline__ void add_values(State<D, TALL> &state, const T *values) {
    int lane = threadIdx.x % WARP;
    // Of matrices of 8 keys by 8 channels, transposed: channels 0 to 7 with keys 0 to 7 and 8 to 15, then 8 to 15.
    values += lane % 16 * (D + 8) + lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < KEYS / 16; k++) {
        u32 weights[TALL][4];
#pragma unroll
        for (int tall = 0; tall < TALL; tall++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float *pair = state.s[tall][2 * k + i / 2] + i % 2 * 2;
                weights[tall][i] = pack_two(T{}, pair[0], pair[1]);
            }
#pragma unroll
        for (int j = 0; j < D / 8; j += 2) {
            u32 b[4];
            ldmatrix_x4_trans(b, values + k * 16 * (D + 8) + j * 8);
#pragma unroll
            for (int tall = 0; tall < TALL; tall++) {
                multiply(T{}, state.o[tall][j], weights[tall], b[0], b[1]);
                multiply(T{}, state.o[tall][j + 1], weights[tall], b[2], b[3]);
            }
        }
    }
}

// Hides keys from the one on that a row does not see. `own` is the lane's first query, `position` the tile's first key.
template <int D, int TALL>
__device__ __forceinline__ void hide(State<D, TALL> &state, const Attention &p, int n, int own, Tile tile) {
    int count = tile_size(p, tile, KEYS);
#pragma unroll
    for (int tall = 0; tall < TALL; tall++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int seen = min(count, visible(p, n, own + tall * 16 + half * 8) - tile.position);
#pragma unroll
            for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
                for (int e = 0; e < 2; e++)
                    if (j * 8 + threadIdx.x % 4 * 2 + e >= seen) state.s[tall][j][2 * half + e] = -INFINITY_F;
        }
}

// Divides by the sums, and writes through shared memory, where a block has room for its tile, in runs of 16 bytes.
template <class T, int D, int TALL>
__device__ __forceinline__ void finish(State<D, TALL> &state, T *shared, T *y, i64 stride, int count, int depth) {
    constexpr int ROWS = WARPS * TALL * 16;
    int lane = threadIdx.x % WARP, own = threadIdx.x / WARP * TALL * 16 + lane / 4;
#pragma unroll
    for (int tall = 0; tall < TALL; tall++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float sum = state.sum[tall][half];
            sum += __shfl_xor_sync(ALL_LANES, sum, 1);
            sum += __shfl_xor_sync(ALL_LANES, sum, 2);
            float factor = 1.0f / sum;
            T *row = shared + (own + tall * 16 + half * 8) * (D + 8) + lane % 4 * 2;
#pragma unroll
            for (int j = 0; j < D / 8; j++) {
                const float *pair = state.o[tall][j] + 2 * half;
                *reinterpret_cast<u32 *>(row + j * 8) = pack_two(T{}, pair[0] * factor, pair[1] * factor);
            }
        }
    __syncthreads();
    for (int chunk = threadIdx.x; chunk < ROWS * D / 8; chunk += THREADS) {
        int row = chunk / (D / 8), column = chunk % (D / 8) * 8;
        if (row < count && column < depth)
            store_pack<T, 8>(y + row * stride + column, load_pack<T, 8>(shared + row * (D + 8) + column));
    }
}

// y: [samples, queries, heads depth]. Shared memory has two tiles of keys and of values each, in turns.
template <class T, int D, int TALL> __device__ __forceinline__ void attend(const Attention &p, T *y) {
    constexpr int QUERIES = WARPS * TALL * 16, TILE = KEYS * (D + 8);
    DYN_SHARED(T, shared);
    int tiles = (p.queries + QUERIES - 1) / QUERIES;
    int first = blockIdx.x % tiles * QUERIES, head = blockIdx.x / tiles % p.heads, n = blockIdx.x / tiles / p.heads;
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, own = first + warp * TALL * 16 + lane / 4;
    // All rows of the block see `least` keys, none more than `end`.
    int least = visible(p, n, first), end = visible(p, n, first + QUERIES - 1);

    // Queries pass through the second pair of tiles.
    Tile tile = {};
    int entry = entry_of(p, 0, n);
    start_rows<QUERIES, D>(shared + 2 * TILE, queries_of<T>(p, n, head, first));
    start_rows<KEYS, D>(shared, keys_of<T>(p, entry, head, tile, KEYS));
    cp_async_commit();
    start_rows<KEYS, D>(shared + TILE, values_of<T>(p, entry, head, tile, KEYS));
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();
    State<D, TALL> state;
#pragma unroll
    for (int tall = 0; tall < TALL; tall++) {
        const T *row = shared + 2 * TILE + ((warp * TALL + tall) * 16 + lane % 16) * (D + 8) + lane / 16 * 8;
#pragma unroll
        for (int k = 0; k < D / 16; k++) ldmatrix_x4(state.q[tall][k], row + k * 16);
#pragma unroll
        for (int half = 0; half < 2; half++) state.most[tall][half] = -INFINITY_F, state.sum[tall][half] = 0.0f;
#pragma unroll
        for (int j = 0; j < D / 8; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) state.o[tall][j][e] = 0.0f;
    }

    for (int turn = 0; tile.position < end; turn ^= 1) {
        T *keys = shared + turn * 2 * TILE, *values = keys + TILE;
        T *next_keys = shared + (turn ^ 1) * 2 * TILE, *next_values = next_keys + TILE;
        Tile next = next_tile(p, tile, KEYS);
        bool more = next.position < end;
        // The keys are here, and nobody reads the other ones any more.
        cp_async_wait<1>();
        __syncthreads();
        if (more) start_rows<KEYS, D>(next_keys, keys_of<T>(p, entry_of(p, next.segment, n), head, next, KEYS));
        cp_async_commit();
        score(state, keys);
        if (tile_size(p, tile, KEYS) < KEYS || tile.position + KEYS > least) hide(state, p, n, own, tile);
        weigh(state, p.scale * LOG2_E);
        cp_async_wait<1>();
        __syncthreads();
        if (more) start_rows<KEYS, D>(next_values, values_of<T>(p, entry_of(p, next.segment, n), head, next, KEYS));
        cp_async_commit();
        add_values(state, values);
        tile = next;
    }
    __syncthreads();
    i64 stride = (i64)p.heads * p.depth;
    T *to = y + ((i64)n * p.queries + first) * stride + (i64)head * p.depth;
    finish(state, shared, to, stride, p.queries - first, p.depth);
}

#define ATTEND(name, T, suffix, D, TALL)                                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS, 2)                                                           \
    attention_tensor_##name##_##suffix(const __grid_constant__ Attention p, T *y) {                                    \
        attend<T, D, TALL>(p, y);                                                                                      \
    }                                                                                                                  \
    CU_KERNEL(attention_tensor_##name##_##suffix)

#define ATTEND_ALL(T, suffix)                                                                                          \
    ATTEND(32, T, suffix, 32, 1)                                                                                       \
    ATTEND(64, T, suffix, 64, 1)                                                                                       \
    ATTEND(64_tall, T, suffix, 64, 2)                                                                                  \
    ATTEND(96, T, suffix, 96, 1)                                                                                       \
    ATTEND(128, T, suffix, 128, 1)

// hot: attention_tensor_32_f16
// hot: attention_tensor_64_f16
// hot: attention_tensor_64_tall_f16
// hot: attention_tensor_96_f16
// hot: attention_tensor_128_f16
// hot: attention_tensor_64_bf16
// hot: attention_tensor_64_tall_bf16
// tensor cores: attention_tensor_64_f16
// tensor cores: attention_tensor_64_tall_f16
// tensor cores: attention_tensor_64_bf16
// tensor cores: attention_tensor_64_tall_bf16
ATTEND_ALL(f16_t, f16)
ATTEND_ALL(bf16_t, bf16)

#endif
