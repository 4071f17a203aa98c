// Global response normalisation of x, or of GELU(x), which is then computed twice and never stored: sums of squares over
// parts of the tokens, norms from them, and the result. So x is read twice and written once.
//
// In the first and the last kernel a thread owns a run of neighbouring channels, up to 16 bytes; a warp 32 such runs, a
// tile; a block of eight warps every eighth token of a part.
#include "kernel.cuh"

#define LINES 8
// Runs that a thread has under way.
#define AHEAD 4
#define COLUMNS 32

// As ops/response_norm/cuda.rs has it.
struct Shape {
    i64 tokens;
    int channels;
    // Tokens of a block, and how many such parts there are.
    int tokens_per_part, parts;
    // Of the channels: in runs, and for the norms in lines of 32.
    int tiles, norm_tiles;
    int wide, gelu;
};

// What a thread reads: channels c.. of every LINES-th of the tokens first..end of sample n.
struct Place {
    i64 n, first, end;
    int c;
};

template <int N> __device__ __forceinline__ Place place_of(const Shape &p) {
    Place at;
    at.n = blockIdx.x / (u32)p.tiles;
    i64 part = (i64)blockIdx.y * p.tokens_per_part;
    at.first = part + threadIdx.x / WARP;
    at.end = min(p.tokens, part + p.tokens_per_part);
    at.c = ((int)(blockIdx.x % (u32)p.tiles) * WARP + (int)(threadIdx.x % WARP)) * N;
    return at;
}

template <class T, int N>
__device__ __forceinline__ void load_ahead(const T *x, i64 token, const Place &at, int channels, Pack<T, N> (&v)[AHEAD]) {
#pragma unroll
    for (int k = 0; k < AHEAD; k++)
        if (token + k * LINES < at.end) v[k] = load_pack<T, N>(x + (token + k * LINES) * channels);
}

// `lines`: LINES * WARP * N floats of shared memory.
template <class T, int N, bool Gelu>
__device__ __forceinline__ void sum_squares(const T *x, float *sums, const Shape &p, float *lines) {
    Place at = place_of<N>(p);
    float sum[N];
    for (int i = 0; i < N; i++) sum[i] = 0.0f;
    if (at.c < p.channels) {
        x += at.n * p.tokens * p.channels + at.c;
        for (i64 token = at.first; token < at.end; token += LINES * AHEAD) {
            Pack<T, N> v[AHEAD];
            load_ahead<T, N>(x, token, at, p.channels, v);
#pragma unroll
            for (int k = 0; k < AHEAD; k++) {
                if (token + k * LINES >= at.end) break;
#pragma unroll
                for (int i = 0; i < N; i++) {
                    float a = to_float(v[k].at[i]);
                    if (Gelu) a = gelu(a);
                    sum[i] = fmaf(a, a, sum[i]);
                }
            }
        }
    }
    int line = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    for (int i = 0; i < N; i++) lines[(line * WARP + lane) * N + i] = sum[i];
    __syncthreads();
    for (int i = threadIdx.x; i < WARP * N; i += LINES * WARP) {
        int c = (int)(blockIdx.x % (u32)p.tiles) * WARP * N + i;
        if (c >= p.channels) continue;
        float total = 0.0f;
        for (int j = 0; j < LINES; j++) total += lines[j * WARP * N + i];
        sums[(at.n * p.parts + blockIdx.y) * p.channels + c] = total;
    }
}

// The sums over each part's tokens of x^2, or of GELU(x)^2: [N, parts, C].
// hot: response_sums_f32
// hot: response_sums_f16
// hot: response_sums_bf16
#define RESPONSE_SUMS(T, suffix)                                                                                       \
    extern "C" __global__ void response_sums_##suffix(const T *x, float *sums, Shape p) {                              \
        const int wide = 16 / sizeof(T);                                                                               \
        __shared__ float lines[LINES * WARP * wide];                                                                   \
        if (p.wide && p.gelu)                                                                                          \
            sum_squares<T, wide, true>(x, sums, p, lines);                                                             \
        else if (p.wide)                                                                                               \
            sum_squares<T, wide, false>(x, sums, p, lines);                                                            \
        else if (p.gelu)                                                                                               \
            sum_squares<T, 1, true>(x, sums, p, lines);                                                                \
        else                                                                                                           \
            sum_squares<T, 1, false>(x, sums, p, lines);                                                               \
    }                                                                                                                  \
    CU_KERNEL(response_sums_##suffix)

FOR_FLOATS(RESPONSE_SUMS)

// norms [N, C]: the roots of the sums over parts; shares [N, norm_tiles]: the sum of the norms of 32 channels. A block
// owns those of a sample.
extern "C" __global__ void response_norms(const float *__restrict__ sums, float *__restrict__ norms,
                                          float *__restrict__ shares, Shape p) {
    __shared__ float lines[LINES][COLUMNS];
    i64 n = blockIdx.x / (u32)p.norm_tiles;
    int line = threadIdx.x / COLUMNS, lane = threadIdx.x % COLUMNS;
    int c = (int)(blockIdx.x % (u32)p.norm_tiles) * COLUMNS + lane;
    float sum = 0.0f;
    if (c < p.channels)
        for (int part = line; part < p.parts; part += LINES) sum += sums[(n * p.parts + part) * p.channels + c];
    lines[line][lane] = sum;
    __syncthreads();
    if (line > 0) return;
    for (int i = 1; i < LINES; i++) sum += lines[i][lane];
    float norm = sqrtf(sum);
    if (c < p.channels) norms[n * p.channels + c] = norm;
    float share = warp_sum(norm);
    if (lane == 0) shares[blockIdx.x] = share;
}
CU_KERNEL(response_norms)

// `inverse` is 1 / (mean of the sample's norms + eps).
template <class T, int N, bool Gelu>
__device__ __forceinline__ void respond(const T *x, const float *norms, const float *gamma, const float *beta, T *y,
                                        const Shape &p, float inverse) {
    Place at = place_of<N>(p);
    if (at.c >= p.channels) return;
    float factor[N], summand[N], weight[N];
    load_floats<N>(norms + at.n * p.channels + at.c, factor);
    load_floats<N>(gamma + at.c, weight);
    load_floats<N>(beta + at.c, summand);
    for (int i = 0; i < N; i++) factor[i] = fmaf(factor[i] * inverse, weight[i], 1.0f);
    i64 sample = at.n * p.tokens * p.channels + at.c;
    x += sample;
    y += sample;
    for (i64 token = at.first; token < at.end; token += LINES * AHEAD) {
        Pack<T, N> v[AHEAD];
        load_ahead<T, N>(x, token, at, p.channels, v);
#pragma unroll
        for (int k = 0; k < AHEAD; k++) {
            if (token + k * LINES >= at.end) break;
#pragma unroll
            for (int i = 0; i < N; i++) {
                float a = to_float(v[k].at[i]);
                if (Gelu) a = gelu(a);
                v[k].at[i] = from_float<T>(fmaf(a, factor[i], summand[i]));
            }
            store_pack<T, N>(y + (token + k * LINES) * p.channels, v[k]);
        }
    }
}

// y = a (gamma Nx + 1) + beta, with a = x or GELU(x). y may be x.
// hot: response_norm_f32
// hot: response_norm_f16
// hot: response_norm_bf16
#define RESPONSE_NORM(T, suffix)                                                                                       \
    extern "C" __global__ void response_norm_##suffix(const T *x, const float *norms, const float *shares,             \
                                                      const float *gamma, const float *beta, T *y, Shape p,            \
                                                      float eps) {                                                     \
        const int wide = 16 / sizeof(T);                                                                               \
        __shared__ float scratch[WARP];                                                                                \
        const float *own = shares + (i64)(blockIdx.x / (u32)p.tiles) * p.norm_tiles;                                   \
        float total = 0.0f;                                                                                            \
        for (int i = threadIdx.x; i < p.norm_tiles; i += blockDim.x) total += own[i];                                  \
        float inverse = 1.0f / (block_sum(total, scratch) / p.channels + eps);                                         \
        if (p.wide && p.gelu)                                                                                          \
            respond<T, wide, true>(x, norms, gamma, beta, y, p, inverse);                                              \
        else if (p.wide)                                                                                               \
            respond<T, wide, false>(x, norms, gamma, beta, y, p, inverse);                                             \
        else if (p.gelu)                                                                                               \
            respond<T, 1, true>(x, norms, gamma, beta, y, p, inverse);                                                 \
        else                                                                                                           \
            respond<T, 1, false>(x, norms, gamma, beta, y, p, inverse);                                                \
    }                                                                                                                  \
    CU_KERNEL(response_norm_##suffix)

FOR_FLOATS(RESPONSE_NORM)
