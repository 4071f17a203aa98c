// Several copies at once. A row of blocks owns one copy; a thread moves 4 bytes at a time, or single ones at the end.
#include "kernel.cuh"

#define MOST_COPIES 64

struct Copies {
    u64 from[MOST_COPIES];
    u64 to[MOST_COPIES];
    u64 bytes[MOST_COPIES];
};

extern "C" __global__ void copy_all(Copies copies) {
    const u8 *from = reinterpret_cast<const u8 *>(copies.from[blockIdx.y]);
    u8 *to = reinterpret_cast<u8 *>(copies.to[blockIdx.y]);
    u64 bytes = copies.bytes[blockIdx.y];
    u64 words = ((u64)from | (u64)to) % 4 == 0 ? bytes / 4 : 0;
    u64 first = (u64)blockIdx.x * blockDim.x + threadIdx.x, step = (u64)gridDim.x * blockDim.x;
    for (u64 i = first; i < words; i += step)
        reinterpret_cast<u32 *>(to)[i] = reinterpret_cast<const u32 *>(from)[i];
    for (u64 i = 4 * words + first; i < bytes; i += step) to[i] = from[i];
}
CU_KERNEL(copy_all)
