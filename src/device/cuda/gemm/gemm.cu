// Matrix products with what follows them. A block owns a square tile of the result.
#include "kernel.cuh"

// v = activation(v scale + bias) gain + residual, then v (1 + a) + b. Null: nothing.
struct Follow {
    const float *scale;
    const void *bias; // floats, or of the type of the result
    const void *residual; // laid out as the result
    const float *modulation; // [samples, 2 n]: a, then b
    i64 rows_per_sample; // 0: one for all
    int bias_is_float, activation;
    float slope, gain;
};

// out (+)= alpha a b, row-major; in the order a, b, out: elements from row to row, and from product to product.
struct Call {
    const void *a, *b;
    void *out;
    i64 m, n, k;
    i64 leading[3], stride[3];
    i64 batches;
    int a_transposed, b_transposed, out_is_float, accumulate;
    float alpha;
    Follow tail;
};

// The element of the result at `index`, in `row` and `column`, from the sum of its products. T is its type.
template <class T> __device__ __forceinline__ float follow(const Follow &f, i64 n, float v, i64 row, i64 column, i64 index) {
    if (f.scale) v *= f.scale[column];
    if (f.bias) v += f.bias_is_float ? ((const float *)f.bias)[column] : to_float(((const T *)f.bias)[column]);
    v = activate(f.activation, f.slope, v) * f.gain;
    if (f.residual) v += to_float(((const T *)f.residual)[index]);
    if (f.modulation) {
        const float *of_row = f.modulation + (f.rows_per_sample ? row / f.rows_per_sample * 2 * n : 0);
        v = v * (1.0f + of_row[column]) + of_row[n + column];
    }
    return v;
}

template <class Out>
__device__ __forceinline__ void finish_as(const Call &p, i64 row, i64 column, i64 index, float v) {
    Out *out = (Out *)p.out + index;
    if (p.accumulate) v += to_float(*out);
    *out = from_float<Out>(follow<Out>(p.tail, p.n, v, row, column, index));
}

// Writes an element of the result, of type T or float.
template <class T> __device__ __forceinline__ void finish(const Call &p, i64 batch, i64 row, i64 column, float sum) {
    i64 index = batch * p.stride[2] + row * p.leading[2] + column;
    if (p.out_is_float)
        finish_as<float>(p, row, column, index, p.alpha * sum);
    else
        finish_as<T>(p, row, column, index, p.alpha * sum);
}

// The tile of a block: tiles run down in groups of GROUP rows of them, so that what runs at a time shares factors.
#define GROUP 8

struct Place {
    i64 batch, row, column;
};

__device__ __forceinline__ Place place(const Call &p, int side) {
    i64 down = (p.m + side - 1) / side, across = (p.n + side - 1) / side;
    i64 tile = blockIdx.x % (down * across), batch = blockIdx.x / (down * across);
    i64 group = tile / (GROUP * across), first = group * GROUP, height = min((i64)GROUP, down - first);
    i64 within = tile % (GROUP * across);
    return Place{batch, (first + within % height) * side, within / height * side};
}

// --- A tiled product for any types ------------------------------------------------------------------------------

#define THREADS 256
#define DEPTH 16

// Reads part of a factor: SIDE rows of a (columns of b) from `first` on, DEPTH steps of k, in registers. `outer` and
// `inner` are the distances of neighbours in the two directions.
template <class T, int SIDE> struct Part {
    static constexpr int COUNT = SIDE * DEPTH / THREADS;
    float values[COUNT];

    // Whichever direction lies together in memory is read by neighbouring threads.
    static __device__ __forceinline__ void spot(int i, bool k_together, int &at, int &k) {
        int e = threadIdx.x + i * THREADS;
        at = k_together ? e / DEPTH : e % SIDE;
        k = k_together ? e % DEPTH : e / SIDE;
    }

    __device__ __forceinline__ void read(const T *from, i64 leading, bool k_together, i64 first, i64 count, i64 k0, i64 depth) {
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            int at, k;
            spot(i, k_together, at, k);
            bool inside = first + at < count && k0 + k < depth;
            i64 index = k_together ? (first + at) * leading + k0 + k : (k0 + k) * leading + first + at;
            values[i] = inside ? to_float(from[index]) : 0.0f;
        }
    }

    __device__ __forceinline__ void place(float (*to)[SIDE + 4], bool k_together) const {
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            int at, k;
            spot(i, k_together, at, k);
            to[k][at] = values[i];
        }
    }
};

// A thread owns 4 x 4 elements of each 64 x 64 of its tile. While it multiplies, the next parts are on their way.
template <class T, int SIDE> __device__ void multiply(const Call &p) {
    constexpr int N = SIDE / 64;
    __shared__ __align__(16) float a_part[2][DEPTH][SIDE + 4], b_part[2][DEPTH][SIDE + 4];
    Place at = place(p, SIDE);
    const T *a = (const T *)p.a + at.batch * p.stride[0], *b = (const T *)p.b + at.batch * p.stride[1];
    bool a_together = !p.a_transposed, b_together = p.b_transposed;
    int x = threadIdx.x % 16 * 4, y = threadIdx.x / 16 * 4;
    float sums[N * 4][N * 4] = {};
    Part<T, SIDE> next_a, next_b;
    auto read = [&](i64 k) {
        next_a.read(a, p.leading[0], a_together, at.row, p.m, k, p.k);
        next_b.read(b, p.leading[1], b_together, at.column, p.n, k, p.k);
    };
    if (p.k > 0) read(0);
    for (i64 k0 = 0, step = 0; k0 < p.k; k0 += DEPTH, step++) {
        auto *a_now = a_part[step % 2], *b_now = b_part[step % 2];
        next_a.place(a_now, a_together);
        next_b.place(b_now, b_together);
        __syncthreads();
        if (k0 + DEPTH < p.k) read(k0 + DEPTH);
#pragma unroll
        for (int k = 0; k < DEPTH; k++) {
            Pack<float, 4> left[N], right[N];
#pragma unroll
            for (int i = 0; i < N; i++) {
                left[i] = load_pack<float, 4>(&a_now[k][y + i * 64]);
                right[i] = load_pack<float, 4>(&b_now[k][x + i * 64]);
            }
#pragma unroll
            for (int i = 0; i < N * 4; i++)
#pragma unroll
                for (int j = 0; j < N * 4; j++) sums[i][j] += left[i / 4].at[i % 4] * right[j / 4].at[j % 4];
        }
    }
#pragma unroll
    for (int i = 0; i < N * 4; i++)
#pragma unroll
        for (int j = 0; j < N * 4; j++) {
            i64 row = at.row + y + i / 4 * 64 + i % 4, column = at.column + x + j / 4 * 64 + j % 4;
            if (row < p.m && column < p.n) finish<T>(p, at.batch, row, column, sums[i][j]);
        }
}

#define MULTIPLY_64(T, suffix)                                                                                         \
    extern "C" __global__ void multiply_64_##suffix(Call p) { multiply<T, 64>(p); }                                    \
    CU_KERNEL(multiply_64_##suffix)

FOR_FLOATS(MULTIPLY_64)
