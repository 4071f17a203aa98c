// Antialiased resizing: the weights of an axis, then a pass for each axis. A thread owns an output pixel of the axis,
// then an element.
#include "kernel.cuh"

// As `Filter::weight` in mod.rs.
__device__ __forceinline__ double filter_weight(double x, int cubic) {
    x = x < 0.0 ? -x : x;
    if (!cubic) return x < 1.0 ? 1.0 - x : 0.0;
    if (x < 1.0) return (1.5 * x - 2.5) * x * x + 1.0;
    if (x < 2.0) return ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0;
    return 0.0;
}

// One axis: which output pixels of the grid, and how far the filter is stretched over the input.
struct ResizeAxis {
    double scale, support, stretch;
    int input, start, output, most, cubic;
};

// Of each output pixel the first input pixel, how many count, and their weights: `most` at most.
extern "C" __global__ void resize_taps(ResizeAxis axis, int2 *taps, float *weights) {
    int i = thread_number();
    if (i >= axis.output) return;
    double centre = axis.scale * ((double)(axis.start + i) + 0.5);
    int first = max((int)(centre - axis.support + 0.5), 0), end = (int)(centre + axis.support + 0.5);
    first = min(first, axis.input - 1);
    end = min(max(end, first + 1), min(axis.input, first + axis.most));
    double sum = 0.0;
    for (int j = first; j < end; j++) sum += filter_weight((j - centre + 0.5) / axis.stretch, axis.cubic);
    if (sum == 0.0) sum = 1.0;
    for (int j = first; j < end; j++)
        weights[(i64)i * axis.most + j - first] = filter_weight((j - centre + 0.5) / axis.stretch, axis.cubic) / sum;
    taps[i] = make_int2(first, end - first);
}
CU_KERNEL(resize_taps)

// y[outer, i, inner] = the sum over the taps of i of weight x[outer, first + j, inner].
template <class T, class Out>
__device__ void resize(const T *__restrict__ x, Out *__restrict__ y, const int2 *__restrict__ taps,
                       const float *__restrict__ weights, ResizeAxis axis, i64 count, int inner) {
    i64 at = thread_number();
    if (at >= count) return;
    i64 pixel = quotient(at, inner), outer = quotient(pixel, axis.output);
    int i = pixel - outer * axis.output;
    int2 of = taps[i];
    x += (outer * axis.input + of.x) * inner + at - pixel * inner;
    float sum = 0.0f;
    for (int j = 0; j < of.y; j++) sum += to_float(x[(i64)j * inner]) * weights[(i64)i * axis.most + j];
    y[at] = from_float<Out>(sum);
}

#define RESIZE(T, suffix)                                                                                              \
    extern "C" __global__ void resize_first_##suffix(const T *x, float *y, const int2 *taps, const float *weights,     \
                                                     ResizeAxis axis, i64 count, int inner) {                          \
        resize<T, float>(x, y, taps, weights, axis, count, inner);                                                     \
    }                                                                                                                  \
    CU_KERNEL(resize_first_##suffix)                                                                                   \
    extern "C" __global__ void resize_second_##suffix(const float *x, T *y, const int2 *taps, const float *weights,    \
                                                      ResizeAxis axis, i64 count, int inner) {                         \
        resize<float, T>(x, y, taps, weights, axis, count, inner);                                                     \
    }                                                                                                                  \
    CU_KERNEL(resize_second_##suffix)

FOR_FLOATS(RESIZE)
