// The steps of the samplers. A thread owns four neighbouring numbers of one sample, which is what a block of a random
// generator gives. Arithmetic is rounded after each operation, in the order of cpu.rs, so that bits are the same.
#include "kernel.cuh"

#define AT_ONCE 4

// Given numbers, or what generators draw.
struct Random {
    const float *given;
    Generators drawn;
};

struct Sizes {
    i64 samples, per_sample;
};

// The thread's four numbers: of sample n, block `block` of it, and the place of the first in the tensor.
struct Place {
    i64 n, block, first;
    int count;
};

__device__ __forceinline__ Place place_of(const Sizes &sizes) {
    i64 blocks = (sizes.per_sample + AT_ONCE - 1) / AT_ONCE, i = thread_number();
    if (i >= sizes.samples * blocks) return Place{0, 0, 0, 0};
    i64 n = i / blocks, block = i - n * blocks;
    return Place{n, block, n * sizes.per_sample + block * AT_ONCE,
                 (int)min((i64)AT_ONCE, sizes.per_sample - block * AT_ONCE)};
}

// Whole packs where samples are made of them and begin at whole ones.
template <class T> __device__ __forceinline__ bool in_packs(const Sizes &sizes, const T *x) {
    return sizes.per_sample % AT_ONCE == 0 && ((u64)x & (AT_ONCE * sizeof(T) - 1)) == 0;
}

template <class T>
__device__ __forceinline__ Pack<float, AT_ONCE> load_four(const Sizes &sizes, const Place &place, const T *x) {
    Pack<float, AT_ONCE> out;
    if (in_packs(sizes, x)) {
        Pack<T, AT_ONCE> v = load_pack<T, AT_ONCE>(x + place.first);
        for (int i = 0; i < AT_ONCE; i++) out.at[i] = to_float(v.at[i]);
    } else {
        for (int i = 0; i < AT_ONCE; i++) out.at[i] = i < place.count ? to_float(x[place.first + i]) : 0.0f;
    }
    return out;
}

__device__ __forceinline__ void store_four(const Sizes &sizes, const Place &place, float *x,
                                           const Pack<float, AT_ONCE> &v) {
    if (in_packs(sizes, x)) return store_pack<float, AT_ONCE>(x + place.first, v);
    for (int i = 0; i < AT_ONCE; i++)
        if (i < place.count) x[place.first + i] = v.at[i];
}

__device__ __forceinline__ Pack<float, AT_ONCE> normals_of(const Sizes &sizes, const Place &place, const Random &of) {
    if (of.given) return load_four(sizes, place, of.given);
    return random_normals(of.drawn.keys[place.n], of.drawn.stream + of.drawn.stride * (u64)place.n, (u64)place.block);
}

// As in cuda.rs.
enum Kind { DDPM = 0, DDIM = 1, CLEAN = 2 };

struct Step {
    const float *x;
    float *out;
    const void *conditional, *unconditional;
    Random noise;
    Sizes sizes;
    int kind;
    float guidance;
    float numbers[4];
};

__device__ __forceinline__ float guided(float c, float u, float weight) {
    float difference = __fsub_rn(c, u);
    return weight < 0.5f ? __fadd_rn(u, __fmul_rn(weight, difference))
                         : __fsub_rn(c, __fmul_rn(difference, __fsub_rn(1.0f, weight)));
}

__device__ __forceinline__ float stepped(int kind, const float (&of)[4], float x, float predicted) {
    if (kind == DDPM) return __fmul_rn(of[0], __fsub_rn(x, __fdiv_rn(__fmul_rn(of[1], predicted), of[2])));
    float clean = __fdiv_rn(__fsub_rn(x, __fmul_rn(of[0], predicted)), of[1]);
    return kind == CLEAN ? clean : __fadd_rn(__fmul_rn(of[2], clean), __fmul_rn(of[3], predicted));
}

template <class T> __device__ void sampler_step(const Step &p) {
    Place place = place_of(p.sizes);
    if (place.count == 0) return;
    Pack<float, AT_ONCE> x = load_four(p.sizes, place, p.x);
    Pack<float, AT_ONCE> predicted = load_four(p.sizes, place, (const T *)p.conditional);
    if (p.unconditional) {
        Pack<float, AT_ONCE> other = load_four(p.sizes, place, (const T *)p.unconditional);
        for (int i = 0; i < AT_ONCE; i++) predicted.at[i] = guided(predicted.at[i], other.at[i], p.guidance);
    }
    for (int i = 0; i < AT_ONCE; i++) x.at[i] = stepped(p.kind, p.numbers, x.at[i], predicted.at[i]);
    if (p.noise.given || p.noise.drawn.keys) {
        Pack<float, AT_ONCE> noise = normals_of(p.sizes, place, p.noise);
        for (int i = 0; i < AT_ONCE; i++) x.at[i] = __fadd_rn(x.at[i], __fmul_rn(p.numbers[3], noise.at[i]));
    }
    store_four(p.sizes, place, p.out, x);
}

#define SAMPLER_STEP(T, suffix)                                                                                        \
    extern "C" __global__ void sampler_step_##suffix(Step p) { sampler_step<T>(p); }                                   \
    CU_KERNEL(sampler_step_##suffix)

FOR_FLOATS(SAMPLER_STEP)

struct Diffuse {
    const float *x;
    float *out;
    const float *kept, *mask;
    Random noise;
    Sizes sizes;
    int channels;
    float signal, spread;
};

// x, or what is kept of it, with noise; joined with x by the mask in the latter case.
extern "C" __global__ void sampler_diffuse(Diffuse p) {
    Place place = place_of(p.sizes);
    if (place.count == 0) return;
    Pack<float, AT_ONCE> x = load_four(p.sizes, place, p.x), noise = normals_of(p.sizes, place, p.noise);
    Pack<float, AT_ONCE> noised = p.kept ? load_four(p.sizes, place, p.kept) : x;
    for (int i = 0; i < AT_ONCE; i++)
        noised.at[i] = __fadd_rn(__fmul_rn(noised.at[i], p.signal), __fmul_rn(noise.at[i], p.spread));
    if (p.kept) {
        for (int i = 0; i < AT_ONCE; i++) {
            float mask = i < place.count ? p.mask[(place.first + i) / p.channels] : 0.0f;
            noised.at[i] = __fadd_rn(__fmul_rn(x.at[i], mask), __fmul_rn(noised.at[i], __fsub_rn(1.0f, mask)));
        }
    }
    store_four(p.sizes, place, p.out, noised);
}
CU_KERNEL(sampler_diffuse)

struct Renoise {
    const i64 *tokens, *random;
    i64 *out;
    Random uniforms;
    Sizes sizes;
    float t;
};

#define NO_TOKEN (-1)

// Each token put back to a random one where its uniform number is at most t, unless it is none.
extern "C" __global__ void renoise_tokens(Renoise p) {
    Place place = place_of(p.sizes);
    if (place.count == 0) return;
    const Generators &of = p.uniforms.drawn;
    Pack<float, AT_ONCE> u =
        p.uniforms.given
            ? load_four(p.sizes, place, p.uniforms.given)
            : random_uniforms(of.keys[place.n], of.stream + of.stride * (u64)place.n, (u64)place.block);
    for (int i = 0; i < place.count; i++) {
        i64 token = p.tokens[place.first + i];
        bool is_put_back = u.at[i] <= p.t && token != NO_TOKEN;
        p.out[place.first + i] = is_put_back ? p.random[place.first + i] : token;
    }
}
CU_KERNEL(renoise_tokens)
