// From logits to tokens. A block owns a row of logits, which it reads once if there is shared memory for it.
#include "kernel.cuh"

// As in cuda.rs.
enum Rule { ARGMAX = 0, MULTINOMIAL = 1, MEAN = 2 };

struct Choice {
    float *logits;
    // Those without condition, or null.
    const float *others;
    // One for each row.
    const float *uniforms;
    // [classes, dim].
    const float *codes;
    // [rows, dim], of the rule MEAN; else tokens are written.
    float *means;
    i64 *tokens;
    int classes, dim, rule, in_shared;
    float guidance, inverse_temperature;
};

#define NO_TOKEN (-1)

// Weights are summed in runs, runs in groups, each in its order.
#define MOST_RUNS 256
#define GROUP 16

struct Sums {
    double runs[MOST_RUNS], groups[MOST_RUNS / GROUP], total;
    // Weights of a run, and how many runs there are.
    int length, count;
};

// Sums all weights. The block must have met since they were written; it has met when this returns.
__device__ __forceinline__ void sum_weights(Sums &sums, const float *weights, int classes) {
    int length = WARP * ((classes + WARP * MOST_RUNS - 1) / (WARP * MOST_RUNS));
    int count = (classes + length - 1) / length, lane = threadIdx.x % WARP;
    for (int run = threadIdx.x / WARP; run < count; run += blockDim.x / WARP) {
        int end = min(classes, (run + 1) * length);
        double sum = 0.0;
        for (int v = run * length + lane; v < end; v += WARP) sum += weights[v];
        sum = warp_sum(sum);
        if (lane == 0) sums.runs[run] = sum;
    }
    __syncthreads();
    if ((int)threadIdx.x * GROUP < count) {
        double sum = 0.0;
        for (int run = threadIdx.x * GROUP; run < min(count, (int)(threadIdx.x + 1) * GROUP); run++)
            sum += sums.runs[run];
        sums.groups[threadIdx.x] = sum;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        double total = 0.0;
        for (int group = 0; group * GROUP < count; group++) total += sums.groups[group];
        sums.total = total;
        sums.length = length;
        sums.count = count;
    }
    __syncthreads();
}

// The first of the terms `first` .. `end` up to which they sum to more than target, from `below` on, which becomes the
// sum before it; if rounding leaves none, the last that is not 0. `first` if all are.
template <class T>
__device__ __forceinline__ int first_above(const T *terms, int first, int end, double target, double &below) {
    int last = first;
    double before_last = below, running = below;
    for (int i = first; i < end; i++) {
        if (terms[i] > (T)0) last = i, before_last = running;
        running += (double)terms[i];
        if (running > target) break;
    }
    below = before_last;
    return last;
}

// The class up to which the weights sum to more than `uniform` of their total. One thread calls.
__device__ __forceinline__ int inverse_cdf(const Sums &sums, const float *weights, int classes, float uniform) {
    double target = (double)uniform * sums.total, below = 0.0;
    int group = first_above(sums.groups, 0, (sums.count + GROUP - 1) / GROUP, target, below);
    int run = first_above(sums.runs, group * GROUP, min(sums.count, (group + 1) * GROUP), target, below);
    return first_above(weights, run * sums.length, min(classes, (run + 1) * sums.length), target, below);
}

__device__ __forceinline__ bool is_finite(float x) { return (__float_as_uint(x) & 0x7fffffffu) < 0x7f800000u; }

// hot: choose_token
extern "C" __global__ void choose_token(Choice p) {
    DYN_SHARED(float, held);
    __shared__ Sums sums;
    __shared__ float scratch[WARP];
    __shared__ int first;
    int row = blockIdx.x;
    const float *logits = p.logits + (i64)row * p.classes, *others = p.others + (i64)row * p.classes;
    float *weights = p.in_shared ? held : p.logits + (i64)row * p.classes;
    float most = -INFINITY_F;
    bool is_bad = false;
#pragma unroll 4
    for (int v = threadIdx.x; v < p.classes; v += blockDim.x) {
        float l = logits[v];
        if (p.others) l = fmaf(l, p.guidance, others[v] * (1.0f - p.guidance));
        weights[v] = l;
        most = fmaxf(most, l);
        is_bad |= !is_finite(l);
    }
    if (threadIdx.x == 0) first = p.classes;
    if (__syncthreads_or(is_bad)) {
        if (p.rule != MEAN && threadIdx.x == 0) p.tokens[row] = NO_TOKEN;
        for (int d = threadIdx.x; p.rule == MEAN && d < p.dim; d += blockDim.x)
            p.means[(i64)row * p.dim + d] = INFINITY_F;
        return;
    }
    most = block_max(most, scratch);
    if (p.rule == ARGMAX) {
        int own = p.classes;
        for (int v = threadIdx.x; v < p.classes && own == p.classes; v += blockDim.x)
            if (weights[v] == most) own = v;
        atomicMin(&first, own);
        __syncthreads();
        if (threadIdx.x == 0) p.tokens[row] = first;
        return;
    }
    for (int v = threadIdx.x; v < p.classes; v += blockDim.x)
        weights[v] = expf((weights[v] - most) * p.inverse_temperature);
    __syncthreads();
    sum_weights(sums, weights, p.classes);
    if (p.rule == MULTINOMIAL) {
        if (threadIdx.x == 0) p.tokens[row] = inverse_cdf(sums, weights, p.classes, p.uniforms[row]);
        return;
    }
    float inverse = (float)(1.0 / sums.total);
    for (int d = 0; d < p.dim; d++) {
        float sum = 0.0f;
        for (int v = threadIdx.x; v < p.classes; v += blockDim.x) sum += weights[v] * p.codes[(i64)v * p.dim + d];
        sum = block_sum(sum, scratch);
        if (threadIdx.x == 0) p.means[(i64)row * p.dim + d] = sum * inverse;
        __syncthreads();
    }
}
CU_KERNEL(choose_token)
