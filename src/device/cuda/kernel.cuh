// What every kernel source includes: element types, sums over warps and blocks, activations, tensor cores.
//
// No other header is needed, so that NVRTC compiles a kernel on a machine without a toolkit. Under CUEMU the same
// source runs on the CPU, in tests: see tests/cuda-emulation.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

// Half-precision numbers are bits; arithmetic is done in float.
struct f16_t {
    u16 bits;
};
struct bf16_t {
    u16 bits;
};

#if defined(CUEMU)
#define DYN_SHARED(T, name) T *name = cuemu::dyn_shared<T>()
#else
#define CU_KERNEL(name)
#define DYN_SHARED(T, name)                                                                                            \
    extern __shared__ __align__(128) unsigned char dynamic_shared[];                                                   \
    T *name = reinterpret_cast<T *>(dynamic_shared)
#endif

// Instantiates KERNEL(T, suffix) for the three element types; the library appends the suffix to a kernel's name.
#define FOR_FLOATS(KERNEL) KERNEL(float, f32) KERNEL(f16_t, f16) KERNEL(bf16_t, bf16)

// --- Conversions ------------------------------------------------------------------------------------------------

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16_t x) { return __uint_as_float((u32)x.bits << 16); }

__device__ __forceinline__ float to_float(f16_t x) {
#if defined(CUEMU)
    return __half2float(__half{x.bits});
#else
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
#endif
}

template <class T> __device__ __forceinline__ T from_float(float x);

template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }

template <> __device__ __forceinline__ bf16_t from_float<bf16_t>(float x) {
#if !defined(CUEMU) && __CUDA_ARCH__ >= 800
    bf16_t y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
#else
    u32 bits = __float_as_uint(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16_t{0x7fff};
    return bf16_t{(u16)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
#endif
}

template <> __device__ __forceinline__ f16_t from_float<f16_t>(float x) {
#if defined(CUEMU)
    return f16_t{__float2half(x).x};
#else
    f16_t y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
#endif
}

// --- Runs of elements that one thread reads or writes at once ---------------------------------------------------

// N neighbouring elements, aligned as a whole: one load of up to 16 bytes.
template <class T, int N> struct __align__(sizeof(T) * N) Pack {
    T at[N];
};

template <class T, int N> __device__ __forceinline__ Pack<T, N> load_pack(const T *p) {
    return *reinterpret_cast<const Pack<T, N> *>(p);
}

// N neighbouring floats: one, or a multiple of four that is aligned to 16 bytes.
template <int N> __device__ __forceinline__ void load_floats(const float *p, float (&v)[N]) {
    if constexpr (N == 1) {
        v[0] = *p;
    } else {
        for (int i = 0; i < N; i += 4) {
            Pack<float, 4> four = load_pack<float, 4>(p + i);
            for (int j = 0; j < 4; j++) v[i + j] = four.at[j];
        }
    }
}

template <class T, int N> __device__ __forceinline__ void store_pack(T *p, const Pack<T, N> &v) {
    *reinterpret_cast<Pack<T, N> *>(p) = v;
}

// Whether a pack of 16 bytes may begin at an address.
__device__ __forceinline__ bool is_aligned(const void *p) { return ((u64)p & 15) == 0; }

// The number of this thread in a line of blocks.
__device__ __forceinline__ i64 thread_number() { return (i64)blockIdx.x * blockDim.x + threadIdx.x; }

// a / b for a from 0 on: in 32 bits where they hold it, which takes a third of the time.
__device__ __forceinline__ i64 quotient(i64 a, int b) { return a >> 32 ? a / b : (i64)((u32)a / (u32)b); }

#define INFINITY_F __uint_as_float(0x7f800000u)

// --- Sums -------------------------------------------------------------------------------------------------------

#define WARP 32
#define ALL_LANES 0xffffffffu

// The sum over the lanes of a warp, in every lane. All lanes must call.
__device__ __forceinline__ float warp_sum(float x) {
    for (int step = WARP / 2; step > 0; step /= 2) x += __shfl_xor_sync(ALL_LANES, x, step);
    return x;
}

__device__ __forceinline__ double warp_sum(double x) {
    for (int step = WARP / 2; step > 0; step /= 2) x += __shfl_xor_sync(ALL_LANES, x, step);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
    for (int step = WARP / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, step));
    return x;
}

// The sum over the threads of a one-dimensional block of whole warps, in every thread. `scratch` is shared memory for
// 32 floats; it may be used again after the next __syncthreads.
__device__ __forceinline__ float block_sum(float x, float *scratch) {
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    x = warp_sum(x);
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    x = lane < warps ? scratch[lane] : 0.0f;
    return warp_sum(x);
}

__device__ __forceinline__ double block_sum(double x, double *scratch) {
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    x = warp_sum(x);
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    x = lane < warps ? scratch[lane] : 0.0;
    return warp_sum(x);
}

__device__ __forceinline__ float block_max(float x, float *scratch) {
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    x = warp_max(x);
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    x = lane < warps ? scratch[lane] : -INFINITY_F;
    return warp_max(x);
}

// --- Random numbers: the bits of src/tensor/rng, whose arithmetic in double is rounded after each operation ---------

// The four words of a block of a stream.
struct Words {
    u32 at[4];
};

// Philox 4x32-10 (Salmon et al. 2011).
__device__ __forceinline__ Words philox(u64 key, u64 stream, u64 block) {
    u32 k0 = (u32)key, k1 = (u32)(key >> 32);
    u32 c0 = (u32)block, c1 = (u32)(block >> 32), c2 = (u32)stream, c3 = (u32)(stream >> 32);
#pragma unroll
    for (int round = 0; round < 10; round++) {
        u64 a = (u64)0xD2511F53u * c0, b = (u64)0xCD9E8D57u * c2;
        c0 = (u32)(b >> 32) ^ c1 ^ k0;
        c1 = (u32)b;
        c2 = (u32)(a >> 32) ^ c3 ^ k1;
        c3 = (u32)a;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return Words{{c0, c1, c2, c3}};
}

// sum * z + c and (sum + c) * z, rounded twice.
__device__ __forceinline__ double times_plus(double sum, double z, double c) { return __dadd_rn(__dmul_rn(sum, z), c); }
__device__ __forceinline__ double plus_times(double sum, double c, double z) { return __dmul_rn(__dadd_rn(sum, c), z); }

// The natural logarithm: with x = m 2^e, m in [sqrt(1/2), sqrt(2)), ln m = 2 artanh((m - 1) / (m + 1)).
__device__ __forceinline__ double random_ln(double x) {
    u64 bits = (u64)__double_as_longlong(x) + (0x3FF0000000000000ull - 0x3FE6A09E667F3BCDull);
    double e = (double)((int)(bits >> 52) - 1023);
    double m = __longlong_as_double((i64)((bits & 0x000FFFFFFFFFFFFFull) + 0x3FE6A09E667F3BCDull));
    double s = __ddiv_rn(__dadd_rn(m, -1.0), __dadd_rn(m, 1.0));
    double z = __dmul_rn(s, s), series = __dmul_rn(1.0 / 23.0, z);
    series = plus_times(series, 1.0 / 21.0, z);
    series = plus_times(series, 1.0 / 19.0, z);
    series = plus_times(series, 1.0 / 17.0, z);
    series = plus_times(series, 1.0 / 15.0, z);
    series = plus_times(series, 1.0 / 13.0, z);
    series = plus_times(series, 1.0 / 11.0, z);
    series = plus_times(series, 1.0 / 9.0, z);
    series = plus_times(series, 1.0 / 7.0, z);
    series = plus_times(series, 1.0 / 5.0, z);
    series = plus_times(series, 1.0 / 3.0, z);
    double twice = __dmul_rn(2.0, s), ln_m = __dadd_rn(twice, __dmul_rn(twice, series));
    double high = __longlong_as_double(0x3FE62E42FEE00000ll), low = __longlong_as_double(0x3DEA39EF35793C76ll);
    return __dadd_rn(__dmul_rn(e, high), times_plus(e, low, ln_m));
}

// sin and cos of 2 pi w / 2^32: whole quarter turns in integers, the rest by Taylor's series.
__device__ __forceinline__ double2 random_sin_cos(u32 w) {
    u64 quarter = ((u64)w + (1u << 29)) >> 30;
    double turns = __dmul_rn((double)((i64)w - (i64)(quarter << 30)), 1.0 / 4294967296.0);
    double angle = __dmul_rn(turns, 6.28318530717958647692528676655900577), z = __dmul_rn(angle, angle);
    double sin = -1.0 / 121645100408832000.0, cos = -1.0 / 6402373705728000.0;
    sin = times_plus(sin, z, 1.0 / 355687428096000.0);
    cos = times_plus(cos, z, 1.0 / 20922789888000.0);
    sin = times_plus(sin, z, -1.0 / 1307674368000.0);
    cos = times_plus(cos, z, -1.0 / 87178291200.0);
    sin = times_plus(sin, z, 1.0 / 6227020800.0);
    cos = times_plus(cos, z, 1.0 / 479001600.0);
    sin = times_plus(sin, z, -1.0 / 39916800.0);
    cos = times_plus(cos, z, -1.0 / 3628800.0);
    sin = times_plus(sin, z, 1.0 / 362880.0);
    cos = times_plus(cos, z, 1.0 / 40320.0);
    sin = times_plus(sin, z, -1.0 / 5040.0);
    cos = times_plus(cos, z, -1.0 / 720.0);
    sin = times_plus(sin, z, 1.0 / 120.0);
    cos = times_plus(cos, z, 1.0 / 24.0);
    sin = times_plus(sin, z, -1.0 / 6.0);
    cos = times_plus(cos, z, -1.0 / 2.0);
    sin = __dmul_rn(times_plus(sin, z, 1.0), angle);
    cos = times_plus(cos, z, 1.0);
    switch (quarter & 3) {
    case 0: return make_double2(sin, cos);
    case 1: return make_double2(cos, -sin);
    case 2: return make_double2(-sin, -cos);
    default: return make_double2(-cos, sin);
    }
}

// Two independent normals of two words (Box and Muller 1958).
__device__ __forceinline__ float2 normal_pair(u32 a, u32 b) {
    double u = __dmul_rn(__dadd_rn((double)a, 0.5), 1.0 / 4294967296.0);
    double radius = __dsqrt_rn(__dmul_rn(-2.0, random_ln(u)));
    double2 direction = random_sin_cos(b);
    return make_float2((float)__dmul_rn(radius, direction.y), (float)__dmul_rn(radius, direction.x));
}

// Four normals, and four numbers in [0, 1): elements 4 block .. 4 block + 3 of a stream.
__device__ __forceinline__ Pack<float, 4> random_normals(u64 key, u64 stream, u64 block) {
    Words w = philox(key, stream, block);
    float2 first = normal_pair(w.at[0], w.at[1]), second = normal_pair(w.at[2], w.at[3]);
    return Pack<float, 4>{{first.x, first.y, second.x, second.y}};
}

__device__ __forceinline__ Pack<float, 4> random_uniforms(u64 key, u64 stream, u64 block) {
    Words w = philox(key, stream, block);
    Pack<float, 4> u;
    for (int i = 0; i < 4; i++) u.at[i] = (float)(w.at[i] >> 8) * (1.0f / 16777216.0f);
    return u;
}

// The generators of a batch: sample n draws from keys[n] and stream `stream + n * stride`.
struct Generators {
    const u64 *keys;
    u64 stream, stride;
};

// --- Activations: the numbers are those of Activation::code in src/ops/activation.rs ------------------------------

enum ActivationCode { NONE = 0, RELU = 1, LEAKY_RELU = 2, QUICK_GELU = 3, SIGMOID = 4, SILU = 5, GELU = 6 };

__device__ __forceinline__ float gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f)); }

// `slope` is that of the leaky ReLU below 0.
__device__ __forceinline__ float activate(int code, float slope, float x) {
    switch (code) {
    case RELU: return fmaxf(x, 0.0f);
    case LEAKY_RELU: return x > 0.0f ? x : slope * x;
    case QUICK_GELU: return x / (1.0f + expf(-1.702f * x));
    case SIGMOID: return 1.0f / (1.0f + expf(-x));
    case SILU: return x / (1.0f + expf(-x));
    case GELU: return gelu(x);
    default: return x;
    }
}

// The derivative of `activate` by x.
__device__ __forceinline__ float activation_slope(int code, float slope, float x) {
    float s;
    switch (code) {
    case RELU: return x > 0.0f ? 1.0f : 0.0f;
    case LEAKY_RELU: return x > 0.0f ? 1.0f : slope;
    case QUICK_GELU: s = 1.0f / (1.0f + expf(-1.702f * x)); return s + 1.702f * x * s * (1.0f - s);
    case SIGMOID: s = 1.0f / (1.0f + expf(-x)); return s * (1.0f - s);
    case SILU: s = 1.0f / (1.0f + expf(-x)); return s + x * s * (1.0f - s);
    case GELU: return 0.5f * (1.0f + erff(x * 0.70710678118654752f)) + x * 0.3989422804014327f * expf(-0.5f * x * x);
    default: return 1.0f;
    }
}

// --- Tensor cores and asynchronous copies (sm_80 and later) -----------------------------------------------------

#if defined(CUEMU) || __CUDA_ARCH__ >= 800
#define HAS_MMA_16816 1
#endif

#if defined(CUEMU)
#define mma_16816_bf16(d, a, b) cuemu_mma_bf16_16816(d, a, b)
#define mma_16816_f16(d, a, b) cuemu_mma_f16_16816(d, a, b)
#define ldmatrix_x4(r, p) cuemu_ldmatrix_x4(r, p)
#define ldmatrix_x2(r, p) cuemu_ldmatrix_x2(r, p)
#define ldmatrix_x4_trans(r, p) cuemu_ldmatrix_x4_trans(r, p)
#define ldmatrix_x2_trans(r, p) cuemu_ldmatrix_x2_trans(r, p)
#define cp_async16(s, g) cuemu_cp_async16(s, g)
#define cp_async_commit() cuemu_cp_async_commit()
template <int N> inline void cp_async_wait() { cuemu_cp_async_wait<N>(); }
#elif HAS_MMA_16816
__device__ __forceinline__ u32 shared_address(const void *p) { return (u32)__cvta_generic_to_shared(p); }

// D (16 x 8, float) += A (16 x 16, rows) * B (16 x 8, columns); fragments as the PTX ISA lays them out.
__device__ __forceinline__ void mma_16816_bf16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                 "{%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_16816_f16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                 "{%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four (two) 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void ldmatrix_x4(u32 (&r)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

__device__ __forceinline__ void ldmatrix_x2(u32 (&r)[2], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(row))
                 : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(u32 (&r)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

__device__ __forceinline__ void ldmatrix_x2_trans(u32 (&r)[2], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(row))
                 : "memory");
}

// 16 bytes from global to shared memory, both aligned to 16.
__device__ __forceinline__ void cp_async16(void *shared, const void *global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most N groups are under way.
template <int N> __device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
#endif
