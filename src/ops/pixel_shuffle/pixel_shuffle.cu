// Pixels to channels and back. A thread owns a channel of a patch of r x r pixels: r * r elements, neighbours on the
// side where they are channels; neighbouring threads own neighbouring channels.
#include "kernel.cuh"

// The fine picture has `width` patches in a row of patches, and `channels` channels.
template <class T, bool SHUFFLE>
__device__ void shuffle(const T *__restrict__ x, T *__restrict__ y, i64 count, int width, int channels, int r) {
    i64 i = thread_number();
    if (i >= count) return;
    i64 patch = quotient(i, channels), row = quotient(patch, width);
    int c = i - patch * channels, column = patch - row * width;
    i64 line = (i64)width * r * channels, fine = row * r * line + (i64)column * r * channels + c, coarse = i * r * r;
    if (r == 2 && (u64)(SHUFFLE ? x : y) % sizeof(Pack<T, 4>) == 0) {
        if (SHUFFLE) {
            Pack<T, 4> v = load_pack<T, 4>(x + coarse);
            for (int j = 0; j < 4; j++) y[fine + j / 2 * line + j % 2 * channels] = v.at[j];
        } else {
            Pack<T, 4> v;
            for (int j = 0; j < 4; j++) v.at[j] = x[fine + j / 2 * line + j % 2 * channels];
            store_pack<T, 4>(y + coarse, v);
        }
        return;
    }
    for (int u = 0; u < r; u++)
        for (int v = 0; v < r; v++) {
            i64 at = fine + u * line + v * channels, of_patch = coarse + u * r + v;
            if (SHUFFLE)
                y[at] = x[of_patch];
            else
                y[of_patch] = x[at];
        }
}

#define PIXEL_SHUFFLE(T, suffix)                                                                                       \
    extern "C" __global__ void pixel_unshuffle_##suffix(const T *x, T *y, i64 count, int width, int channels, int r) { \
        shuffle<T, false>(x, y, count, width, channels, r);                                                            \
    }                                                                                                                  \
    CU_KERNEL(pixel_unshuffle_##suffix)                                                                                \
    extern "C" __global__ void pixel_shuffle_##suffix(const T *x, T *y, i64 count, int width, int channels, int r) {   \
        shuffle<T, true>(x, y, count, width, channels, r);                                                             \
    }                                                                                                                  \
    CU_KERNEL(pixel_shuffle_##suffix)

FOR_FLOATS(PIXEL_SHUFFLE)
