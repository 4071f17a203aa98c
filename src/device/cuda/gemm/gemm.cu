// Matrix products with what follows them. A block owns a square tile of the result, and all or a part of the sums of
// its elements. Any sizes: what does not fill a tile is read as zero and not written.
#include "kernel.cuh"

// v = activation(v scale + bias) gain + residual, then v (1 + a) + b. Null: nothing.
struct Follow {
    const float *scale;
    const void *bias;        // floats, or of the type of the result
    const void *residual;    // laid out as the result
    const float *modulation; // [samples, 2 n]: a, then b
    i64 rows_per_sample;     // 0: one for all
    int bias_is_float, activation;
    float slope, gain;
};

// out (+)= alpha a b, row-major; in the order a, b, out: elements from row to row, and from product to product. The
// sums are cut into `parts` of `depth`, which go to `partial` [batches, parts, m, n] if there are several: add_parts
// does the rest.
struct Call {
    const void *a, *b;
    void *out;
    float *partial;
    i64 m, n, k, batches, parts, depth;
    i64 leading[3], stride[3];
    int a_transposed, b_transposed, out_is_float, accumulate;
    int fused; // whether to do what follows: the result is of the factors' type, and all is aligned in fours
    float alpha;
    Follow tail;
};

// --- What follows a product -------------------------------------------------------------------------------------

template <class T, int N> __device__ __forceinline__ void widen(float (&to)[N], const T *from) {
    constexpr int AT_ONCE = N * sizeof(T) > 16 ? 16 / sizeof(T) : N;
#pragma unroll
    for (int i = 0; i < N; i += AT_ONCE) {
        Pack<T, AT_ONCE> v = load_pack<T, AT_ONCE>(from + i);
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++) to[i + j] = to_float(v.at[j]);
    }
}

// N neighbours of a row of the result, of type Out, from the sums of their products. They and all that goes with them
// are aligned as a whole.
template <class Out, int N>
__device__ __forceinline__ void finish(const Call &p, i64 batch, i64 row, i64 column, float (&v)[N]) {
    const Follow &f = p.tail;
    i64 at = batch * p.stride[2] + row * p.leading[2] + column;
    Out *out = (Out *)p.out + at;
    float other[N];
    for (int j = 0; j < N; j++) v[j] *= p.alpha;
    if (p.accumulate) {
        widen<Out, N>(other, out);
        for (int j = 0; j < N; j++) v[j] += other[j];
    }
    if (f.scale) {
        widen<float, N>(other, f.scale + column);
        for (int j = 0; j < N; j++) v[j] *= other[j];
    }
    if (f.bias) {
        if (f.bias_is_float)
            widen<float, N>(other, (const float *)f.bias + column);
        else
            widen<Out, N>(other, (const Out *)f.bias + column);
        for (int j = 0; j < N; j++) v[j] += other[j];
    }
    for (int j = 0; j < N; j++) v[j] = activate(f.activation, f.slope, v[j]) * f.gain;
    if (f.residual) {
        widen<Out, N>(other, (const Out *)f.residual + at);
        for (int j = 0; j < N; j++) v[j] += other[j];
    }
    if (f.modulation) {
        const float *of_row = f.modulation + column;
        if (f.rows_per_sample) of_row += row / f.rows_per_sample * 2 * p.n;
        widen<float, N>(other, of_row);
        for (int j = 0; j < N; j++) v[j] *= 1.0f + other[j];
        widen<float, N>(other, of_row + p.n);
        for (int j = 0; j < N; j++) v[j] += other[j];
    }
    Pack<Out, N> result;
    for (int j = 0; j < N; j++) result.at[j] = from_float<Out>(v[j]);
    store_pack<Out, N>(out, result);
}

// Elements of the result without what follows.
template <class Out>
__device__ __forceinline__ void write_plain(const Call &p, i64 batch, i64 row, i64 column, const float (&v)[4]) {
    Out *out = (Out *)p.out + batch * p.stride[2] + row * p.leading[2] + column;
#pragma unroll
    for (int j = 0; j < 4; j++)
        if (column + j < p.n)
            out[j] = from_float<Out>(p.alpha * v[j] + (p.accumulate ? to_float(out[j]) : 0.0f));
}

// --- Tiles ------------------------------------------------------------------------------------------------------

// Tiles run down in groups of this many rows of them, so that blocks that run at a time share factors.
#define GROUP 8

// The first element of a block's tile, and its part of the sums.
struct Place {
    i64 batch, part, row, column, k, end;
};

__device__ __forceinline__ Place place(const Call &p, int side) {
    i64 down = (p.m + side - 1) / side, across = (p.n + side - 1) / side, tiles = down * across;
    i64 tile = blockIdx.x % tiles, rest = blockIdx.x / tiles;
    i64 group = tile / (GROUP * across), first = group * GROUP, height = min((i64)GROUP, down - first);
    i64 within = tile % (GROUP * across), part = rest % p.parts;
    return Place{rest / p.parts,         part,           (first + within % height) * side, within / height * side,
                 part * p.depth, min(p.k, (part + 1) * p.depth)};
}

// Four neighbours of a row, of which some may be beyond its end. T: the type of the factors.
template <class T>
__device__ __forceinline__ void write_four(const Call &p, const Place &at, i64 row, i64 column, float (&v)[4]) {
    if (p.parts > 1) {
        float *to = p.partial + ((at.batch * p.parts + at.part) * p.m + row) * p.n + column;
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (column + j < p.n) to[j] = v[j];
    } else if (p.fused) {
        finish<T, 4>(p, at.batch, row, column, v);
    } else if (p.out_is_float) {
        write_plain<float>(p, at.batch, row, column, v);
    } else {
        write_plain<T>(p, at.batch, row, column, v);
    }
}

// --- A product of any types -------------------------------------------------------------------------------------

#define THREADS 256
#define DEPTH 16

// SIDE rows of a (columns of b) and DEPTH steps of k on their way to shared memory.
template <class T, int SIDE> struct Part {
    static constexpr int COUNT = SIDE * DEPTH / THREADS;
    float values[COUNT];

    // Neighbouring threads read in the direction that lies together in memory.
    static __device__ __forceinline__ void spot(int i, bool k_together, int &at, int &k) {
        int e = threadIdx.x + i * THREADS;
        at = k_together ? e / DEPTH : e % SIDE;
        k = k_together ? e % DEPTH : e / SIDE;
    }

    __device__ __forceinline__ void read(const T *from, i64 leading, bool k_together, i64 first, i64 count, i64 k0,
                                         i64 end) {
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            int at, k;
            spot(i, k_together, at, k);
            bool inside = first + at < count && k0 + k < end;
            i64 index = k_together ? (first + at) * leading + k0 + k : (k0 + k) * leading + first + at;
            values[i] = inside ? to_float(from[index]) : 0.0f;
        }
    }

    __device__ __forceinline__ void write(float (*to)[SIDE + 4], bool k_together) const {
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            int at, k;
            spot(i, k_together, at, k);
            to[k][at] = values[i];
        }
    }
};

// A thread owns 4 x 4 elements of each 64 x 64 of its tile. While it multiplies, the next parts are on their way.
template <class T, int SIDE> __device__ __forceinline__ void multiply(const Call &p) {
    constexpr int N = SIDE / 64;
    typedef float Half[DEPTH][SIDE + 4];
    __shared__ __align__(16) Half shared[4];
    Half *a_part = shared, *b_part = shared + 2;
    Place at = place(p, SIDE);
    const T *a = (const T *)p.a + at.batch * p.stride[0], *b = (const T *)p.b + at.batch * p.stride[1];
    bool a_together = !p.a_transposed, b_together = p.b_transposed;
    int x = threadIdx.x % 16 * 4, y = threadIdx.x / 16 * 4;
    float sums[N * 4][N * 4] = {};
    Part<T, SIDE> next_a, next_b;
    auto read = [&](i64 k) {
        next_a.read(a, p.leading[0], a_together, at.row, p.m, k, at.end);
        next_b.read(b, p.leading[1], b_together, at.column, p.n, k, at.end);
    };
    if (at.k < at.end) read(at.k);
    int now = 0;
    for (i64 k0 = at.k; k0 < at.end; k0 += DEPTH, now ^= 1) {
        next_a.write(a_part[now], a_together);
        next_b.write(b_part[now], b_together);
        __syncthreads();
        if (k0 + DEPTH < at.end) read(k0 + DEPTH);
#pragma unroll
        for (int k = 0; k < DEPTH; k++) {
            Pack<float, 4> left[N], right[N];
#pragma unroll
            for (int i = 0; i < N; i++) {
                left[i] = load_pack<float, 4>(&a_part[now][k][y + i * 64]);
                right[i] = load_pack<float, 4>(&b_part[now][k][x + i * 64]);
            }
#pragma unroll
            for (int i = 0; i < N * 4; i++)
#pragma unroll
                for (int j = 0; j < N * 4; j++) sums[i][j] += left[i / 4].at[i % 4] * right[j / 4].at[j % 4];
        }
    }
    // By way of shared memory, 64 rows at a time, so that what follows is there but once or twice.
    float *staged = shared[0][0];
#pragma unroll
    for (int half = 0; half < N; half++) {
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < N; j++) {
                const float *from = &sums[half * 4 + i][j * 4];
                store_pack<float, 4>(staged + (y + i) * SIDE + x + j * 64,
                                     Pack<float, 4>{{from[0], from[1], from[2], from[3]}});
            }
        __syncthreads();
#pragma unroll 1
        for (int i = threadIdx.x * 4; i < 64 * SIDE; i += THREADS * 4) {
            i64 row = at.row + half * 64 + i / SIDE, column = at.column + i % SIDE;
            Pack<float, 4> four = load_pack<float, 4>(staged + i);
            if (row < p.m && column < p.n) write_four<T>(p, at, row, column, four.at);
        }
    }
}

#define MULTIPLY(T, suffix, side)                                                                                      \
    extern "C" __global__ void __launch_bounds__(THREADS) multiply_##side##_##suffix(Call p) { multiply<T, side>(p); } \
    CU_KERNEL(multiply_##side##_##suffix)
#define MULTIPLY_64(T, suffix) MULTIPLY(T, suffix, 64)

// hot: multiply_128_f32
// hot: multiply_64_f32
FOR_FLOATS(MULTIPLY_64)
MULTIPLY(float, f32, 128)

// --- Products on tensor cores -----------------------------------------------------------------------------------

// Steps of k in shared memory at a time, and how many such stages are held: all but one are on their way.
#define STEP 32
#define STAGES 3

// Floats from row to row where results are staged: 8 more than 32, so that neither direction meets a bank twice.
#define ROW 40

#if HAS_MMA_16816
__device__ __forceinline__ void mma(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], bf16_t) {
    mma_16816_bf16(d, a, b);
}
__device__ __forceinline__ void mma(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], f16_t) {
    mma_16816_f16(d, a, b);
}

// A factor's part of a stage, as its matrix lies: rows of SIDE or of k. Each has 8 elements more than it holds, so that
// no two of the 8 rows that ldmatrix reads at a time lie in the same banks.
template <int SIDE, bool K_TOGETHER> struct Stage {
    static constexpr int ROWS = K_TOGETHER ? SIDE : STEP, COLUMNS = K_TOGETHER ? STEP : SIDE, PITCH = COLUMNS + 8,
                         ELEMENTS = ROWS * PITCH;
};

// Starts to bring a stage of a matrix that goes on for so many rows and columns from there: what is aligned and whole by
// asynchronous copies, the edges element by element.
template <class Stage, int THREADS_>
__device__ __forceinline__ void bring(u16 *stage, const u16 *from, i64 leading, bool whole, int rows, int columns) {
    constexpr int CHUNKS = Stage::COLUMNS / 8;
#pragma unroll
    for (int i = 0; i < Stage::ROWS * CHUNKS / THREADS_; i++) {
        int e = threadIdx.x + i * THREADS_, r = e / CHUNKS, c = e % CHUNKS * 8;
        u16 *to = stage + r * Stage::PITCH + c;
        const u16 *at = from + (r * leading + c);
        if (whole && r < rows && c + 8 <= columns) {
            cp_async16(to, at);
        } else {
#pragma unroll 1
            for (int j = 0; j < 8; j++) to[j] = r < rows && c + j < columns ? at[j] : (u16)0;
        }
    }
}

// The 16 x 16 fragment of a from `row` and `k` on.
template <class Stage, bool TRANSPOSED>
__device__ __forceinline__ void fragment_a(u32 (&r)[4], const u16 *stage, int row, int k) {
    int lane = threadIdx.x % WARP;
    if (TRANSPOSED)
        ldmatrix_x4_trans(r, stage + (k + lane % 8 + lane / 16 * 8) * Stage::PITCH + row + lane / 8 % 2 * 8);
    else
        ldmatrix_x4(r, stage + (row + lane % 16) * Stage::PITCH + k + lane / 16 * 8);
}

// Two 16 x 8 fragments of b from `k` and `column` on.
template <class Stage, bool TRANSPOSED>
__device__ __forceinline__ void fragments_b(u32 (&r)[4], const u16 *stage, int k, int column) {
    int lane = threadIdx.x % WARP;
    if (TRANSPOSED)
        ldmatrix_x4(r, stage + (column + lane / 16 * 8 + lane % 8) * Stage::PITCH + k + lane / 8 % 2 * 8);
    else
        ldmatrix_x4_trans(r, stage + (k + lane % 16) * Stage::PITCH + column + lane / 16 * 8);
}

// A warp owns SIDE / 2 rows and 32 columns of the tile: SIDE / 16 warps in two rows of them.
template <class T, int SIDE, bool A_TRANSPOSED, bool B_TRANSPOSED>
__device__ __forceinline__ void multiply_on_tensor_cores(const Call &p) {
    typedef Stage<SIDE, !A_TRANSPOSED> StageA;
    typedef Stage<SIDE, B_TRANSPOSED> StageB;
    constexpr int COUNT = SIDE * 2, ROWS = SIDE / 32, COLUMNS = 4;
    DYN_SHARED(u16, shared);
    u16 *stages_a = shared, *stages_b = shared + STAGES * StageA::ELEMENTS;
    Place at = place(p, SIDE);
    const u16 *a = (const u16 *)p.a + at.batch * p.stride[0], *b = (const u16 *)p.b + at.batch * p.stride[1];
    bool whole_a = (u64)a % 16 == 0 && p.leading[0] % 8 == 0, whole_b = (u64)b % 16 == 0 && p.leading[1] % 8 == 0;
    a += A_TRANSPOSED ? at.k * p.leading[0] + at.row : at.row * p.leading[0] + at.k;
    b += B_TRANSPOSED ? at.column * p.leading[1] + at.k : at.k * p.leading[1] + at.column;
    int rows = (int)min(p.m - at.row, (i64)SIDE), columns = (int)min(p.n - at.column, (i64)SIDE);
    int depth = (int)max(at.end - at.k, (i64)0), steps = (depth + STEP - 1) / STEP;
    auto start = [&](int step) {
        int k = step * STEP;
        u16 *to_a = stages_a + step % STAGES * StageA::ELEMENTS, *to_b = stages_b + step % STAGES * StageB::ELEMENTS;
        if (A_TRANSPOSED)
            bring<StageA, COUNT>(to_a, a + k * p.leading[0], p.leading[0], whole_a, depth - k, rows);
        else
            bring<StageA, COUNT>(to_a, a + k, p.leading[0], whole_a, rows, depth - k);
        if (B_TRANSPOSED)
            bring<StageB, COUNT>(to_b, b + k, p.leading[1], whole_b, columns, depth - k);
        else
            bring<StageB, COUNT>(to_b, b + k * p.leading[1], p.leading[1], whole_b, depth - k, columns);
    };
    for (int step = 0; step < STAGES - 1; step++) {
        if (step < steps) start(step);
        cp_async_commit();
    }
    int warp = threadIdx.x / WARP, row = warp % 2 * (SIDE / 2), column = warp / 2 * 32;
    float sums[ROWS][COLUMNS][4] = {};
    for (int step = 0; step < steps; step++) {
        cp_async_wait<STAGES - 2>();
        __syncthreads();
        // Into the stage that all warps have done with.
        if (step + STAGES - 1 < steps) start(step + STAGES - 1);
        cp_async_commit();
        const u16 *now_a = stages_a + step % STAGES * StageA::ELEMENTS,
                  *now_b = stages_b + step % STAGES * StageB::ELEMENTS;
#pragma unroll
        for (int k = 0; k < STEP; k += 16) {
            u32 right[COLUMNS / 2][4];
#pragma unroll
            for (int j = 0; j < COLUMNS / 2; j++)
                fragments_b<StageB, B_TRANSPOSED>(right[j], now_b, k, column + j * 16);
#pragma unroll
            for (int i = 0; i < ROWS; i++) {
                u32 left[4];
                fragment_a<StageA, A_TRANSPOSED>(left, now_a, row + i * 16, k);
#pragma unroll
                for (int j = 0; j < COLUMNS; j++) {
                    u32 b_now[2] = {right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1]};
                    mma(sums[i][j], left, b_now, T{});
                }
            }
        }
    }
    // By way of shared memory, 32 rows of each warp at a time: a lane gets neighbours of a row.
    cp_async_wait<0>();
    __syncthreads();
    int lane = threadIdx.x % WARP;
    float *staged = (float *)shared + warp * 32 * ROW;
#pragma unroll
    for (int half = 0; half < ROWS / 2; half++) {
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < COLUMNS; j++) {
                const float(&from)[4] = sums[half * 2 + i / 2][j];
                float *to = staged + (i * 8 + lane / 4) * ROW + j * 8 + lane % 4 * 2;
                store_pack<float, 2>(to, Pack<float, 2>{{from[i % 2 * 2], from[i % 2 * 2 + 1]}});
            }
        __syncwarp();
#pragma unroll 1
        for (int i = 0; i < 8; i++) {
            int r = i * 4 + lane / 8, c = lane % 8 * 4;
            i64 to_row = at.row + row + half * 32 + r, to_column = at.column + column + c;
            Pack<float, 4> four = load_pack<float, 4>(staged + r * ROW + c);
            if (to_row < p.m && to_column < p.n) write_four<T>(p, at, to_row, to_column, four.at);
        }
        __syncwarp();
    }
}
#define ON_TENSOR_CORES(...) __VA_ARGS__
#else
#define ON_TENSOR_CORES(...)
#endif

// As the names of BLAS have it: n as it lies, t transposed. `blocks`: at least so many have their registers at a time.
#define TENSOR(T, suffix, side, how, a, b, blocks)                                                                     \
    extern "C" __global__ void __launch_bounds__(side * 2, blocks)                                                     \
        multiply_tensor_##side##_##how##_##suffix(Call p) {                                                            \
        ON_TENSOR_CORES(multiply_on_tensor_cores<T, side, a, b>(p);)                                                   \
    }                                                                                                                  \
    CU_KERNEL(multiply_tensor_##side##_##how##_##suffix)
#define TENSOR_ALL(T, suffix)                                                                                          \
    TENSOR(T, suffix, 128, nn, false, false, 1)                                                                        \
    TENSOR(T, suffix, 128, nt, false, true, 2)                                                                         \
    TENSOR(T, suffix, 64, nn, false, false, 4)                                                                         \
    TENSOR(T, suffix, 64, nt, false, true, 4)                                                                          \
    TENSOR(T, suffix, 64, tn, true, false, 4)                                                                          \
    TENSOR(T, suffix, 64, tt, true, true, 4)

// hot: multiply_tensor_128_nn_bf16
// hot: multiply_tensor_128_nt_bf16
// hot: multiply_tensor_128_nn_f16
// hot: multiply_tensor_128_nt_f16
// hot: multiply_tensor_64_nn_bf16
// hot: multiply_tensor_64_nt_bf16
// hot: multiply_tensor_64_nn_f16
// hot: multiply_tensor_64_nt_f16
// tensor cores: multiply_tensor_128_nn_bf16
// tensor cores: multiply_tensor_128_nt_bf16
// tensor cores: multiply_tensor_64_nn_f16
// tensor cores: multiply_tensor_64_nt_f16
TENSOR_ALL(bf16_t, bf16)
TENSOR_ALL(f16_t, f16)

// --- Passes over a result ---------------------------------------------------------------------------------------

// The parts of each sum, in their order, and what follows. A thread owns one element. Out: the type of the result.
#define ADD_PARTS(Out, suffix)                                                                                         \
    extern "C" __global__ void add_parts_##suffix(Call p) {                                                            \
        i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;                                                            \
        if (i >= p.batches * p.m * p.n) return;                                                                        \
        i64 column = i % p.n, row = i / p.n % p.m, batch = i / p.n / p.m;                                              \
        float sum[1] = {0.0f};                                                                                         \
        for (i64 part = 0; part < p.parts; part++)                                                                     \
            sum[0] += p.partial[((batch * p.parts + part) * p.m + row) * p.n + column];                                \
        finish<Out, 1>(p, batch, row, column, sum);                                                                    \
    }                                                                                                                  \
    CU_KERNEL(add_parts_##suffix)

FOR_FLOATS(ADD_PARTS)

// What follows, of a product that lies in `out`. A thread owns N neighbours of a row, which are aligned as a whole.
template <class Out, int N> __device__ __forceinline__ void follow_in_place(const Call &p) {
    i64 packs = p.n / N, i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= p.batches * p.m * packs) return;
    i64 column = i % packs * N, row = i / packs, batch = 0;
    if (p.batches > 1) {
        batch = row / p.m;
        row %= p.m;
    }
    float v[N];
    widen<Out, N>(v, (const Out *)p.out + batch * p.stride[2] + row * p.leading[2] + column);
    finish<Out, N>(p, batch, row, column, v);
}

// hot: follow_product_wide_bf16
#define FOLLOW(Out, suffix)                                                                                            \
    extern "C" __global__ void follow_product_##suffix(Call p) { follow_in_place<Out, 1>(p); }                         \
    CU_KERNEL(follow_product_##suffix)                                                                                 \
    extern "C" __global__ void follow_product_wide_##suffix(Call p) { follow_in_place<Out, 16 / sizeof(Out)>(p); }     \
    CU_KERNEL(follow_product_wide_##suffix)

FOR_FLOATS(FOLLOW)
