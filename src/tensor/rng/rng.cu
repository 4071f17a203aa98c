// Random numbers. A thread owns a block of four elements of one sample.
#include "kernel.cuh"

// Calls write(sample, element of the sample, lane) for the elements of the thread's block, with what draw gives.
template <class Draw, class Write>
__device__ __forceinline__ void draw_block(const Generators &of, i64 samples, i64 per_sample, Draw draw, Write write) {
    i64 blocks = (per_sample + 3) / 4, i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= samples * blocks) return;
    i64 n = i / blocks, block = i - n * blocks;
    auto drawn = draw(of.keys[n], of.stream + of.stride * (u64)n, (u64)block);
    for (int lane = 0; lane < 4; lane++)
        if (4 * block + lane < per_sample) write(n * per_sample + 4 * block + lane, drawn.at[lane]);
}

extern "C" __global__ void random_normal(float *__restrict__ out, Generators of, i64 samples, i64 per_sample) {
    draw_block(
        of, samples, per_sample, [](u64 key, u64 stream, u64 block) { return random_normals(key, stream, block); },
        [&](i64 at, float value) { out[at] = value; });
}
CU_KERNEL(random_normal)

extern "C" __global__ void random_uniform(float *__restrict__ out, Generators of, i64 samples, i64 per_sample) {
    draw_block(
        of, samples, per_sample, [](u64 key, u64 stream, u64 block) { return random_uniforms(key, stream, block); },
        [&](i64 at, float value) { out[at] = value; });
}
CU_KERNEL(random_uniform)

// Integers below `bound`.
extern "C" __global__ void random_below(i64 *__restrict__ out, Generators of, i64 samples, i64 per_sample, u32 bound) {
    draw_block(
        of, samples, per_sample, [](u64 key, u64 stream, u64 block) { return philox(key, stream, block); },
        [&](i64 at, u32 word) { out[at] = (i64)((u64)word * bound >> 32); });
}
CU_KERNEL(random_below)
