// The gradient of global response normalisation, as ops/response_norm/gradient.rs has it.
#include "kernel.cuh"

#define COLUMNS 32
#define LINES 8

// Of each part of a sample's tokens, the sums of x^2, x g and g: [N, parts, 3, C]. A block owns 32 channels of a part.
extern "C" __global__ void response_gradient_sums(const float *__restrict__ x, const float *__restrict__ g,
                                                  float *__restrict__ sums, i64 tokens, int channels,
                                                  int tokens_per_part, int tiles) {
    __shared__ float lines[LINES][3][COLUMNS];
    i64 n = blockIdx.x / (u32)tiles;
    int line = threadIdx.x / COLUMNS, lane = threadIdx.x % COLUMNS;
    int c = (int)(blockIdx.x % (u32)tiles) * COLUMNS + lane;
    i64 first = (i64)blockIdx.y * tokens_per_part, end = min(tokens, first + tokens_per_part);
    float square = 0.0f, product = 0.0f, plain = 0.0f;
    if (c < channels) {
        for (i64 token = first + line; token < end; token += LINES) {
            i64 at = (n * tokens + token) * channels + c;
            float v = x[at], gradient = g[at];
            square = fmaf(v, v, square);
            product = fmaf(v, gradient, product);
            plain += gradient;
        }
    }
    lines[line][0][lane] = square;
    lines[line][1][lane] = product;
    lines[line][2][lane] = plain;
    __syncthreads();
    if (line >= 3 || c >= channels) return;
    float sum = 0.0f;
    for (int i = 0; i < LINES; i++) sum += lines[i][line][lane];
    sums[((n * gridDim.y + blockIdx.y) * 3 + line) * channels + c] = sum;
}
CU_KERNEL(response_gradient_sums)

// From a sample's sums [3, C]: the slope dG / G, its part of the gradients of gamma and of beta, and the factor
// gamma Nx + 1: [4, C]. A block for each sample.
extern "C" __global__ void response_gradient_finish(const float *__restrict__ sums, const float *__restrict__ gamma,
                                                    float *__restrict__ out, int channels, float eps) {
    __shared__ float of_norms[WARP], of_slopes[WARP];
    sums += (i64)blockIdx.x * 3 * channels;
    out += (i64)blockIdx.x * 4 * channels;
    float total = 0.0f;
    for (int c = threadIdx.x; c < channels; c += blockDim.x) total += sqrtf(sums[c]);
    float inverse = 1.0f / (block_sum(total, of_norms) / channels + eps);
    float of_mean = 0.0f;
    for (int c = threadIdx.x; c < channels; c += blockDim.x)
        of_mean += gamma[c] * sums[channels + c] * sqrtf(sums[c]) * inverse;
    of_mean = block_sum(of_mean, of_slopes) / channels;
    for (int c = threadIdx.x; c < channels; c += blockDim.x) {
        float norm = sqrtf(sums[c]), product = sums[channels + c], response = norm * inverse;
        out[c] = norm > 0.0f ? (gamma[c] * product - of_mean) * inverse / norm : 0.0f;
        out[channels + c] = product * response;
        out[2 * channels + c] = sums[2 * channels + c];
        out[3 * channels + c] = fmaf(response, gamma[c], 1.0f);
    }
}
CU_KERNEL(response_gradient_finish)

// dx = g factor + x slope. A block owns 32 channels of a part, a thread one of every eighth token.
extern "C" __global__ void response_gradient(const float *__restrict__ x, const float *__restrict__ g,
                                             const float *__restrict__ finished, float *__restrict__ dx, i64 tokens,
                                             int channels, int tokens_per_part, int tiles) {
    i64 n = blockIdx.x / (u32)tiles;
    int line = threadIdx.x / COLUMNS;
    int c = (int)(blockIdx.x % (u32)tiles) * COLUMNS + (int)(threadIdx.x % COLUMNS);
    if (c >= channels) return;
    i64 first = (i64)blockIdx.y * tokens_per_part, end = min(tokens, first + tokens_per_part);
    float slope = finished[n * 4 * channels + c], factor = finished[(n * 4 + 3) * channels + c];
    for (i64 token = first + line; token < end; token += LINES) {
        i64 at = (n * tokens + token) * channels + c;
        dx[at] = fmaf(g[at], factor, x[at] * slope);
    }
}
CU_KERNEL(response_gradient)
