// The nearest row of a codebook. A block owns 32 vectors, of which each of its eight warps compares a part of every
// tile of codes; a thread owns a vector. Then the first warp takes the best of the eight.
#include "kernel.cuh"

#define ROWS 32
#define PARTS 8
#define TILE 2048
#define HELD 8

template <class T>
__device__ void nearest_code(const T *__restrict__ x, const float *__restrict__ codes, i64 *__restrict__ out, i64 rows,
                             int count, int dim, i64 otherwise) {
    __shared__ float tile[TILE];
    __shared__ float least[PARTS][ROWS];
    __shared__ int index[PARTS][ROWS];
    i64 row = (i64)blockIdx.x * ROWS + threadIdx.x;
    const T *vector = x + min(row, rows - 1) * dim;
    float held[HELD];
    for (int d = 0; d < HELD; d++) held[d] = d < dim ? to_float(vector[d]) : 0.0f;
    float best = INFINITY_F;
    int nearest = -1, at_once = max(1, TILE / dim);
    bool in_tile = dim <= TILE;
    for (int first = 0; first < count; first += at_once) {
        int codes_here = min(at_once, count - first);
        if (in_tile) {
            __syncthreads();
            for (int i = threadIdx.y * ROWS + threadIdx.x; i < codes_here * dim; i += ROWS * PARTS)
                tile[i] = codes[(i64)first * dim + i];
            __syncthreads();
        }
        for (int v = threadIdx.y; v < codes_here; v += PARTS) {
            const float *code = in_tile ? tile + v * dim : codes + (i64)(first + v) * dim;
            float distance = 0.0f;
#pragma unroll
            for (int d = 0; d < HELD; d++) {
                if (d >= dim) break;
                float difference = held[d] - code[d];
                distance = fmaf(difference, difference, distance);
            }
            for (int d = HELD; d < dim; d++) {
                float difference = to_float(vector[d]) - code[d];
                distance = fmaf(difference, difference, distance);
            }
            if (distance < best) {
                best = distance;
                nearest = first + v;
            }
        }
    }
    least[threadIdx.y][threadIdx.x] = best;
    index[threadIdx.y][threadIdx.x] = nearest;
    __syncthreads();
    if (threadIdx.y != 0 || row >= rows) return;
    for (int part = 1; part < PARTS; part++) {
        float distance = least[part][threadIdx.x];
        int v = index[part][threadIdx.x];
        if (v >= 0 && (distance < best || (distance == best && v < nearest))) {
            best = distance;
            nearest = v;
        }
    }
    out[row] = nearest < 0 ? otherwise : nearest;
}

// hot: nearest_code_f32
#define NEAREST_CODE(T, suffix)                                                                                        \
    extern "C" __global__ void nearest_code_##suffix(const T *x, const float *codes, i64 *out, i64 rows, int count,    \
                                                     int dim, i64 otherwise) {                                         \
        nearest_code(x, codes, out, rows, count, dim, otherwise);                                                      \
    }                                                                                                                  \
    CU_KERNEL(nearest_code_##suffix)

FOR_FLOATS(NEAREST_CODE)
