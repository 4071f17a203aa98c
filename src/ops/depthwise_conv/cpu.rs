//! Depthwise convolution on the CPU.
//!
//! Eight neighbouring pixels and a register of channels at a time: their sums stay in registers over all taps, and one load
//! of the weights serves eight pixels. What follows the convolution reads the pixels from the first cache.
//! A tap outside a zero-padded image is left out. The order of a sum is that of the taps, then of the group.

use super::{MAX_KERNEL, Padding, Sizes};
use crate::device::simd::prefetch;
use crate::ops::activation::Activation;
use crate::ops::kernels::mul_add;
use crate::ops::layer_norm::cpu::moments;

/// Pixels done together: as many sums as hide the latency of one fused multiply-add.
pub(super) const PIXELS: usize = 8;

/// Floats of one.
const CACHE_LINE: usize = 16;

/// A register of floats. Left to itself, the compiler keeps the sums of [`block`] in memory.
pub(super) trait Vector: Copy {
    /// How many floats it holds.
    const WIDTH: usize;

    /// # Safety
    /// `WIDTH` floats from `from` on must be readable, and the processor must have the instruction.
    unsafe fn load(from: *const f32) -> Self;

    /// # Safety
    /// `WIDTH` floats from `to` on must be writable, and the processor must have the instruction.
    unsafe fn store(self, to: *mut f32);

    /// `a * b + c`, as [`mul_add`] rounds it at this level.
    ///
    /// # Safety
    /// The processor must have the instruction.
    unsafe fn mul_add(a: Self, b: Self, c: Self) -> Self;
}

/// One float, where channels are few.
#[derive(Clone, Copy)]
pub(super) struct One<const FMA: bool>(f32);

impl<const FMA: bool> Vector for One<FMA> {
    const WIDTH: usize = 1;

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's.
        One(unsafe { *from })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller's.
        unsafe { *to = self.0 };
    }

    #[inline(always)]
    unsafe fn mul_add(a: Self, b: Self, c: Self) -> Self {
        One(mul_add::<FMA>(a.0, b.0, c.0))
    }
}

/// [`Vector`] over a register of this module's processor.
macro_rules! vector {
    ($type:ident, $width:literal, $load:ident, $store:ident, |$a:ident, $b:ident, $c:ident| $mul_add:expr) => {
        impl Vector for arch::$type {
            const WIDTH: usize = $width;

            #[inline(always)]
            unsafe fn load(from: *const f32) -> Self {
                // SAFETY: the caller's.
                unsafe { arch::$load(from) }
            }

            #[inline(always)]
            unsafe fn store(self, to: *mut f32) {
                // SAFETY: the caller's.
                unsafe { arch::$store(to, self) }
            }

            #[inline(always)]
            unsafe fn mul_add($a: Self, $b: Self, $c: Self) -> Self {
                // SAFETY: the caller's.
                unsafe { $mul_add }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
mod registers {
    use super::Vector;
    use std::arch::x86_64 as arch;

    vector!(__m512, 16, _mm512_loadu_ps, _mm512_storeu_ps, |a, b, c| arch::_mm512_fmadd_ps(a, b, c));
    vector!(__m256, 8, _mm256_loadu_ps, _mm256_storeu_ps, |a, b, c| arch::_mm256_fmadd_ps(a, b, c));
    vector!(__m128, 4, _mm_loadu_ps, _mm_storeu_ps, |a, b, c| arch::_mm_add_ps(arch::_mm_mul_ps(a, b), c));
}

#[cfg(target_arch = "aarch64")]
mod registers {
    use super::Vector;
    use std::arch::aarch64 as arch;

    vector!(float32x4_t, 4, vld1q_f32, vst1q_f32, |a, b, c| arch::vfmaq_f32(c, a, b));
}

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

/// Where an input pixel starts, and which weight it meets.
pub(super) type Tap = (usize, usize);

/// The taps of a pixel that count.
struct Taps {
    list: [Tap; MAX_KERNEL * MAX_KERNEL],
    len: usize,
}

/// The place of `at + offset - k/2` within `0..size`, by the rule of the padding.
#[inline(always)]
pub(super) fn place(at: usize, offset: usize, kernel: usize, size: usize, padding: Padding) -> Option<usize> {
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

/// `body` for each `p` below `count`, at most [`PIXELS`], unrolled: indices that the compiler knows are registers.
macro_rules! each_pixel {
    ($count:ident, |$p:ident| $body:expr) => {
        each_pixel!(@ $count, $p, $body, 0 1 2 3 4 5 6 7)
    };
    (@ $count:ident, $p:ident, $body:expr, $($number:literal)*) => {
        $(if $number < $count {
            let $p = $number;
            $body;
        })*
    };
}

/// Sums of `P` pixels that lie `stride` apart in the input, over the channels of a vector from `first` on. Asks for what
/// lies `ahead` of their first tap, if anything does.
#[inline(always)]
fn block<V: Vector, const P: usize>(
    job: &Job,
    image: &[f32],
    (taps, ahead): (&[Tap], Option<usize>),
    first: usize,
    out: &mut [f32],
) {
    let Sizes { channels, groups, stride, .. } = job.shape;
    let step = stride * groups * channels;
    let farthest = (P - 1) * step + groups * channels;
    assert!(first + V::WIDTH <= channels && out.len() >= P * channels && job.bias.len() == channels);
    if let Some(ahead) = ahead {
        let line = image.as_ptr().wrapping_add(ahead + first);
        for g in 0..groups {
            each_pixel!(P, |p| prefetch(line.wrapping_add(p * step + g * channels)));
        }
    }
    // SAFETY: with the asserts here and in the loop, every vector lies within its slice: `first` plus the width
    // is at most `channels`, `g` is below `groups`, `p` is below `P`.
    unsafe {
        let mut sums = [V::load(job.bias.as_ptr().add(first)); PIXELS];
        for &(pixel, tap) in taps {
            assert!(pixel + farthest <= image.len() && (tap + 1) * groups * channels <= job.weight.len());
            let mut weight = job.weight.as_ptr().add(tap * groups * channels + first);
            let mut input = image.as_ptr().add(pixel + first);
            for _ in 0..groups {
                let factor = V::load(weight);
                each_pixel!(P, |p| {
                    sums[p] = V::mul_add(V::load(input.wrapping_add(p * step)), factor, sums[p]);
                });
                weight = weight.wrapping_add(channels);
                input = input.wrapping_add(channels);
            }
        }
        each_pixel!(P, |p| sums[p].store(out.as_mut_ptr().add(p * channels + first)));
    }
}

/// All channels of `P` neighbouring output pixels; `ahead` is the place of an input pixel that rows below will begin with
/// here. A last vector that would not fit starts earlier: what it does
/// again, it does the same.
#[inline(always)]
pub(super) fn pixels<const FMA: bool, V: Vector, const P: usize>(
    job: &Job,
    image: &[f32],
    taps: (&[Tap], Option<usize>),
    out: &mut [f32],
) {
    let channels = job.shape.channels;
    if channels < V::WIDTH {
        for first in 0..channels {
            block::<One<FMA>, P>(job, image, taps, first, out);
        }
        return;
    }
    for i in 0..channels.div_ceil(V::WIDTH) {
        block::<V, P>(job, image, taps, (i * V::WIDTH).min(channels - V::WIDTH), out);
    }
}

/// Asks for what [`finish`] will add to `count` numbers of the output from number `first` on.
#[inline(always)]
fn ask_for_residual(job: &Job, first: usize, count: usize) {
    if let Then::Residual(_, residual) = job.then {
        for i in (first..first + count).step_by(CACHE_LINE) {
            prefetch(residual.as_ptr().wrapping_add(i));
        }
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
                activation.apply(out);
            }
        }
    }
}

#[inline(always)]
fn body<const FMA: bool, V: Vector>(job: &Job, first_row: usize, out: &mut [f32]) {
    let Sizes { height, width, out_height, out_width, channels, groups, kernel, stride, .. } = job.shape;
    let image_size = height * width * groups * channels;
    for (row, out) in (first_row..).zip(out.chunks_exact_mut(out_width * channels)) {
        let image = &job.input[row / out_height * image_size..][..image_size];
        let y = row % out_height;
        // Between these columns every tap lies within the row.
        let inner = (kernel / 2).div_ceil(stride).min(out_width);
        let outer =
            (width + kernel / 2).saturating_sub(kernel).checked_div(stride).map_or(0, |last| last + 1);
        let outer = if width > kernel / 2 { outer.clamp(inner, out_width) } else { inner };
        let group = [PIXELS, PIXELS / 2].into_iter().find(|&count| inner + count <= outer).unwrap_or(1);
        let mut x = 0;
        while x < out_width {
            let count = if x >= inner && x < outer { group } else { 1 };
            // A last group that would not fit starts earlier: what it does again, it does the same.
            let first = if count > 1 { x.min(outer - count) } else { x };
            let taps = Taps::of(job, y, first);
            // The row that the next output row reads for the first time: rows of images are too far apart for the
            // processor to foresee.
            let next = place(y * stride + stride, kernel - 1, kernel, height, Padding::Zero);
            let ahead = next.map(|row| (row * width + first * stride) * groups * channels);
            let taps = (&taps.list[..taps.len], ahead);
            ask_for_residual(job, (row * out_width + first) * channels, count * channels);
            let out = &mut out[first * channels..(first + count) * channels];
            match count {
                PIXELS => pixels::<FMA, V, PIXELS>(job, image, taps, out),
                1 => pixels::<FMA, V, 1>(job, image, taps, out),
                _ => pixels::<FMA, V, { PIXELS / 2 }>(job, image, taps, out),
            }
            finish::<FMA>(job, row * out_width + first, out);
            x = first + count;
        }
    }
}

/// Defines a function that runs `$body::<FMA, V>` with the widest registers of the processor.
macro_rules! per_register {
    ($(#[$doc:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) = $body:ident) => {
        $(#[$doc])*
        $vis fn $name($($arg: $ty),*) {
            use $crate::device::simd::{Level, level};
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")]
            fn avx512($($arg: $ty),*) {
                $body::<true, std::arch::x86_64::__m512>($($arg),*);
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2($($arg: $ty),*) {
                $body::<true, std::arch::x86_64::__m256>($($arg),*);
            }
            match level() {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: `level` found these instructions on this processor.
                Level::Avx512 => unsafe { avx512($($arg),*) },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: as above.
                Level::Avx2 => unsafe { avx2($($arg),*) },
                #[cfg(target_arch = "x86_64")]
                _ => $body::<false, std::arch::x86_64::__m128>($($arg),*),
                #[cfg(target_arch = "aarch64")]
                Level::Neon => $body::<true, std::arch::aarch64::float32x4_t>($($arg),*),
                // Without registers of ours the compiler makes what it can of single floats.
                #[cfg(not(target_arch = "x86_64"))]
                _ => $body::<false, $crate::ops::depthwise_conv::cpu::One<false>>($($arg),*),
            }
        }
    };
}
pub(super) use per_register;

per_register! {
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

/// The inverse of [`join_pixel`] for the channels from `first` on: `of_groups` hands out the C numbers of a group.
pub fn split_pixel<'a>(of_groups: impl Fn(usize) -> &'a [f32], groups: usize, first: usize, out: &mut [f32]) {
    for g in 0..groups {
        // The first channel from `first` on that belongs to group g.
        let skipped = (g + groups - first % groups) % groups;
        let values = &of_groups(g)[((first + skipped) / groups).min(of_groups(g).len())..];
        for (out, value) in out.iter_mut().skip(skipped).step_by(groups).zip(values) {
            *out = *value;
        }
    }
}
