//! Depthwise convolution on the CPU.
//!
//! Four neighbouring pixels and 32 channels at a time: their sums stay in registers over all taps, and one load
//! of the weights serves four pixels. What follows the convolution reads the four pixels from the first cache.
//! A tap outside a zero-padded image is left out. The order of a sum is that of the taps, then of the group.

use super::{MAX_KERNEL, Padding, Sizes};
use crate::ops::activation::{self, Activation};
use crate::ops::kernels::{mul_add, per_cpu};
use crate::ops::layer_norm::cpu::moments;

/// Pixels done together.
const PIXELS: usize = 4;

/// What follows the convolution.
pub enum Then<'a> {
    None,
    LayerNorm(f32),
    Residual(f32, &'a [f32]),
    Affine(&'a [f32], &'a [f32], Activation),
}

/// What all rows of one call share.
pub struct Job<'a> {
    pub shape: Sizes,
    pub padding: Padding,
    /// `[N, H, W, G, C]`.
    pub input: &'a [f32],
    /// `[k*k, G, C]`.
    pub weight: &'a [f32],
    pub bias: &'a [f32],
    pub then: Then<'a>,
}

/// The taps of a pixel that count: where the input pixel starts, and which weight it meets.
struct Taps {
    list: [(usize, usize); MAX_KERNEL * MAX_KERNEL],
    len: usize,
}

/// The place of `at + offset - k/2` within `0..size`, by the rule of the padding.
#[inline(always)]
fn place(at: usize, offset: usize, kernel: usize, size: usize, padding: Padding) -> Option<usize> {
    let shifted = at + offset;
    let inside = shifted.checked_sub(kernel / 2).filter(|&i| i < size);
    match padding {
        Padding::Zero => inside,
        Padding::Replicate => Some(inside.unwrap_or(if shifted < kernel / 2 { 0 } else { size - 1 })),
    }
}

impl Taps {
    /// The taps of output pixel (`y`, `x`), offsets counted from the start of the image.
    fn of(job: &Job, y: usize, x: usize) -> Self {
        let Sizes { height, width, channels, groups, kernel, stride, .. } = job.shape;
        let mut taps = Taps { list: [(0, 0); MAX_KERNEL * MAX_KERNEL], len: 0 };
        for u in 0..kernel {
            let Some(row) = place(y * stride, u, kernel, height, job.padding) else { continue };
            for v in 0..kernel {
                let Some(column) = place(x * stride, v, kernel, width, job.padding) else { continue };
                taps.list[taps.len] = ((row * width + column) * groups * channels, u * kernel + v);
                taps.len += 1;
            }
        }
        taps
    }
}

/// Sums of `P` pixels that lie `step` numbers apart in the input, over `L` channels from `first` on.
#[inline(always)]
fn block<const FMA: bool, const P: usize, const L: usize>(
    job: &Job,
    image: &[f32],
    taps: &Taps,
    first: usize,
    out: &mut [f32],
) {
    let Sizes { channels, groups, stride, .. } = job.shape;
    let step = stride * groups * channels;
    let mut sums = [[0f32; L]; P];
    for sum in &mut sums {
        sum.copy_from_slice(&job.bias[first..first + L]);
    }
    for &(pixel, tap) in &taps.list[..taps.len] {
        for g in 0..groups {
            let weight = &job.weight[(tap * groups + g) * channels + first..][..L];
            for (p, sum) in sums.iter_mut().enumerate() {
                let input = &image[pixel + p * step + g * channels + first..][..L];
                for i in 0..L {
                    sum[i] = mul_add::<FMA>(input[i], weight[i], sum[i]);
                }
            }
        }
    }
    for (p, sum) in sums.iter().enumerate() {
        out[p * channels + first..][..L].copy_from_slice(sum);
    }
}

/// All channels of `P` neighbouring output pixels.
#[inline(always)]
fn pixels<const FMA: bool, const P: usize>(job: &Job, image: &[f32], taps: &Taps, out: &mut [f32]) {
    let channels = job.shape.channels;
    let mut first = 0;
    while first + 32 <= channels {
        block::<FMA, P, 32>(job, image, taps, first, out);
        first += 32;
    }
    while first + 8 <= channels {
        block::<FMA, P, 8>(job, image, taps, first, out);
        first += 8;
    }
    while first < channels {
        block::<FMA, P, 1>(job, image, taps, first, out);
        first += 1;
    }
}

/// What follows, for pixels from number `pixel` of the output on.
#[inline(always)]
fn finish<const FMA: bool>(job: &Job, pixel: usize, out: &mut [f32]) {
    let channels = job.shape.channels;
    for (i, out) in out.chunks_exact_mut(channels).enumerate() {
        match job.then {
            Then::None => {}
            Then::LayerNorm(eps) => {
                let (mean, inverse) = moments::<FMA>(out, eps);
                out.iter_mut().for_each(|v| *v = (*v - mean) * inverse);
            }
            Then::Residual(gain, residual) => {
                for (v, r) in out.iter_mut().zip(&residual[(pixel + i) * channels..][..channels]) {
                    *v = mul_add::<FMA>(*v, gain, *r);
                }
            }
            Then::Affine(scale, shift, activation) => {
                for (v, (scale, shift)) in out.iter_mut().zip(scale.iter().zip(shift)) {
                    *v = mul_add::<FMA>(*v, *scale, *shift);
                }
                activation::apply::<FMA>(out, activation);
            }
        }
    }
}

#[inline(always)]
fn body<const FMA: bool>(job: &Job, first_row: usize, out: &mut [f32]) {
    let Sizes { height, width, out_height, out_width, channels, groups, kernel, stride, .. } = job.shape;
    let image_size = height * width * groups * channels;
    for (row, out) in (first_row..).zip(out.chunks_exact_mut(out_width * channels)) {
        let image = &job.input[row / out_height * image_size..][..image_size];
        let y = row % out_height;
        let mut x = 0;
        while x < out_width {
            let last_column = (x + PIXELS - 1) * stride + kernel / 2;
            let inside = x * stride >= kernel / 2 && x + PIXELS <= out_width && last_column < width;
            let count = if inside { PIXELS } else { 1 };
            let taps = Taps::of(job, y, x);
            let out = &mut out[x * channels..(x + count) * channels];
            if inside {
                pixels::<FMA, PIXELS>(job, image, &taps, out);
            } else {
                pixels::<FMA, 1>(job, image, &taps, out);
            }
            finish::<FMA>(job, row * out_width + x, out);
            x += count;
        }
    }
}

per_cpu! {
    /// Output rows from row `first_row` of the batch on.
    pub fn rows(job: &Job, first_row: usize, out: &mut [f32]) = body
}

/// One pixel of two inputs, as `[G, C]`: entry (g, c) is channel `c*G + g` of their concatenation.
pub fn join_pixel(first: &[f32], second: &[f32], channels: usize, out: &mut [f32]) {
    let groups = out.len() / channels;
    for (g, out) in out.chunks_exact_mut(channels).enumerate() {
        // The channels g, g + G, .. of the concatenation: first those of `first`, then those of `second`.
        let from_first = first.len().saturating_sub(g).div_ceil(groups);
        let skipped = g + from_first * groups - first.len();
        let values = first.iter().skip(g).step_by(groups).chain(second.iter().skip(skipped).step_by(groups));
        for (out, value) in out.iter_mut().zip(values) {
            *out = *value;
        }
    }
}
