// Mathematics, atomics and conversions that CUDA C++ has built in.
#pragma once

// --- Atomics: nothing else runs between two switches, so plain updates are atomic -------------------------------

#if CUEMU_TSAN
#define CUEMU_ATOMIC __attribute__((no_sanitize_thread)) inline
#else
#define CUEMU_ATOMIC inline
#endif

#define CUEMU_UPDATE(name, T, update)                                                                                  \
    CUEMU_ATOMIC T name(T *p, T v) {                                                                                   \
        T old = *p;                                                                                                    \
        *p = (update);                                                                                                 \
        return old;                                                                                                    \
    }
#define CUEMU_INTEGERS(of, name, update)                                                                               \
    of(name, int, update) of(name, unsigned, update) of(name, unsigned long long, update)
CUEMU_INTEGERS(CUEMU_UPDATE, atomicAdd, old + v)
CUEMU_UPDATE(atomicAdd, float, old + v)
CUEMU_UPDATE(atomicAdd, double, old + v)
CUEMU_UPDATE(atomicSub, int, old - v)
CUEMU_UPDATE(atomicSub, unsigned, old - v)
CUEMU_INTEGERS(CUEMU_UPDATE, atomicMax, v > old ? v : old)
CUEMU_UPDATE(atomicMax, long long, v > old ? v : old)
CUEMU_INTEGERS(CUEMU_UPDATE, atomicMin, v < old ? v : old)
CUEMU_UPDATE(atomicMin, long long, v < old ? v : old)
CUEMU_INTEGERS(CUEMU_UPDATE, atomicAnd, old &v)
CUEMU_INTEGERS(CUEMU_UPDATE, atomicOr, old | v)
CUEMU_INTEGERS(CUEMU_UPDATE, atomicXor, old ^ v)
CUEMU_INTEGERS(CUEMU_UPDATE, atomicExch, v)
CUEMU_UPDATE(atomicExch, float, v)
CUEMU_UPDATE(atomicInc, unsigned, old >= v ? 0 : old + 1)
CUEMU_UPDATE(atomicDec, unsigned, old == 0 || old > v ? v : old - 1)

#define CUEMU_SWAP(T)                                                                                                  \
    CUEMU_ATOMIC T atomicCAS(T *p, T expected, T v) {                                                                  \
        T old = *p;                                                                                                    \
        if (old == expected) *p = v;                                                                                   \
        return old;                                                                                                    \
    }
CUEMU_SWAP(int)
CUEMU_SWAP(unsigned)
CUEMU_SWAP(unsigned short)
CUEMU_SWAP(unsigned long long)

// --- Loads and stores with hints --------------------------------------------------------------------------------

template <class T> inline T __ldg(const T *p) { return *p; }
template <class T> inline T __ldca(const T *p) { return *p; }
template <class T> inline T __ldcg(const T *p) { return *p; }
template <class T> inline T __ldcs(const T *p) { return *p; }
template <class T> inline void __stcg(T *p, T v) { *p = v; }
template <class T> inline void __stcs(T *p, T v) { *p = v; }
template <class T> inline void __stwb(T *p, T v) { *p = v; }

// --- Floating point ---------------------------------------------------------------------------------------------

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline float normcdff(float x) { return 0.5f * erfcf(x * -0.70710678118654752f); }
inline double normcdf(double x) { return 0.5 * erfc(x * -0.70710678118654752); }
inline float fdividef(float a, float b) { return a / b; }
inline float sinpif(float x) { return (float)sin((double)x * 3.141592653589793); }
inline float cospif(float x) { return (float)cos((double)x * 3.141592653589793); }
inline void sincospif(float x, float *s, float *c) { *s = sinpif(x), *c = cospif(x); }
inline float __saturatef(float x) { return x >= 1.0f ? 1.0f : x > 0.0f ? x : 0.0f; }

// The fast ones are as exact here as the others.
inline float __expf(float x) { return expf(x); }
inline float __exp10f(float x) { return (float)pow(10.0, (double)x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __log10f(float x) { return log10f(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline float __tanf(float x) { return tanf(x); }
inline void __sincosf(float x, float *s, float *c) { *s = sinf(x), *c = cosf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frsqrt_rn(float x) { return (float)(1.0 / sqrt((double)x)); }

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __drcp_rn(double a) { return 1.0 / a; }
inline double __dsqrt_rn(double a) { return sqrt(a); }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }

template <class A, class B> inline std::common_type_t<A, B> min(A a, B b) {
    using T = std::common_type_t<A, B>;
    if constexpr (std::is_floating_point_v<T>) return std::fmin((T)a, (T)b);
    else return (T)b < (T)a ? (T)b : (T)a;
}
template <class A, class B> inline std::common_type_t<A, B> max(A a, B b) {
    using T = std::common_type_t<A, B>;
    if constexpr (std::is_floating_point_v<T>) return std::fmax((T)a, (T)b);
    else return (T)a < (T)b ? (T)b : (T)a;
}

// --- Integers and bits ------------------------------------------------------------------------------------------

inline int __mulhi(int a, int b) { return (int)((long long)a * b >> 32); }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((unsigned long long)a * b >> 32); }
inline long long __mul64hi(long long a, long long b) { return (long long)((__int128)a * b >> 64); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)((unsigned __int128)a * b >> 64);
}
inline int __mul24(int a, int b) {
    return (int)(((long long)a << 40 >> 40) * ((long long)b << 40 >> 40));
}
inline unsigned __umul24(unsigned a, unsigned b) { return (a & 0xffffff) * (b & 0xffffff); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
inline unsigned __brev(unsigned x) {
    unsigned y = 0;
    for (int i = 0; i < 32; i++) y |= (x >> i & 1) << (31 - i);
    return y;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned by) {
    by &= 31;
    return by ? high << by | low >> (32 - by) : high;
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned by) {
    by &= 31;
    return by ? low >> by | high << (32 - by) : low;
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    unsigned long long bytes = (unsigned long long)y << 32 | x;
    unsigned result = 0;
    for (int i = 0; i < 4; i++) result |= (unsigned)(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
    return result;
}

namespace cuemu {
template <class To, class From> inline To bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof(To));
    return to;
}
} // namespace cuemu

inline unsigned __float_as_uint(float x) { return cuemu::bits<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return cuemu::bits<float>(x); }
inline int __float_as_int(float x) { return cuemu::bits<int>(x); }
inline float __int_as_float(int x) { return cuemu::bits<float>(x); }
inline long long __double_as_longlong(double x) { return cuemu::bits<long long>(x); }
inline double __longlong_as_double(long long x) { return cuemu::bits<double>(x); }

// Conversions saturate, and NaN becomes 0.
inline int __float2int_rn(float x) { return !(x == x) ? 0 : x >= 0x1p31f ? 0x7fffffff : x < -0x1p31f ? (int)0x80000000 : (int)nearbyintf(x); }
inline int __float2int_rz(float x) { return __float2int_rn(truncf(x)); }
inline int __float2int_rd(float x) { return __float2int_rn(floorf(x)); }
inline int __float2int_ru(float x) { return __float2int_rn(ceilf(x)); }
inline float __int2float_rn(int x) { return (float)x; }
inline float __uint2float_rn(unsigned x) { return (float)x; }
inline float __double2float_rn(double x) { return (float)x; }

// --- Half precision, under the names of cuda_fp16.h and cuda_bf16.h ---------------------------------------------
// NVRTC has neither header built in: a kernel converts by instructions there.

struct __nv_bfloat16 {
    unsigned short x;
};
struct __half {
    unsigned short x;
};

inline float __bfloat162float(__nv_bfloat16 b) { return __uint_as_float((unsigned)b.x << 16); }

// To the nearest, ties to even; NaN becomes 0x7fff, as on a GPU.
inline __nv_bfloat16 __float2bfloat16(float x) {
    unsigned u = __float_as_uint(x);
    if ((u & 0x7fffffff) > 0x7f800000) return {0x7fff};
    return {(unsigned short)((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}

inline float __half2float(__half h) {
    unsigned sign = (unsigned)(h.x >> 15) << 31, exponent = h.x >> 10 & 31, mantissa = h.x & 1023;
    if (exponent == 31) return __uint_as_float(sign | 0x7f800000 | mantissa << 13);
    if (exponent) return __uint_as_float(sign | (exponent + 112) << 23 | mantissa << 13);
    float x = ldexpf((float)mantissa, -24);
    return sign ? -x : x;
}

inline __half __float2half(float x) {
    unsigned u = __float_as_uint(x), sign = u >> 16 & 0x8000;
    u &= 0x7fffffff;
    if (u > 0x7f800000) return {0x7fff};
    if (u >= 0x477ff000) return {(unsigned short)(sign | 0x7c00)};
    if (u < 0x38800000) return {(unsigned short)(sign | (unsigned)nearbyintf(ldexpf(__uint_as_float(u), 24)))};
    u += 0xc8000000 + 0xfff + (u >> 13 & 1);
    return {(unsigned short)(sign | u >> 13)};
}
