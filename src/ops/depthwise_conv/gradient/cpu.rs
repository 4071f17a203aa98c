//! The gradients of a depthwise convolution on the CPU.
//!
//! That of the input is itself a convolution, and uses the forward one's registers and blocks of pixels. That of the
//! weight keeps the sums of one kernel row in registers over [`QUAD`] neighbouring pixels, whose inputs overlap.

use super::super::cpu::{Job, One, PIXELS, Tap, Vector, per_register, pixels, place};
use super::super::{MAX_KERNEL, Padding, Sizes};
use crate::ops::kernels::mul_add;

/// Output pixels of which the weight's gradient is summed in registers.
const QUAD: usize = 4;

/// The most pairs of a line's pixel and a tap that one input pixel feeds, where the edge is replicated: the first
/// pixel is all taps before the edge too, 4 + 3 + 2 + 1 with the largest kernel.
const MOST_PAIRS: usize = (MAX_KERNEL / 2 + 1) * (MAX_KERNEL / 2 + 2) / 2;

/// Along one axis, the output pixels that see an input pixel, each with the tap through which it does.
struct Pairs {
    list: [(usize, usize); MOST_PAIRS],
    len: usize,
}

/// One axis of a convolution.
#[derive(Clone, Copy)]
struct Axis {
    /// Input pixels.
    size: usize,
    /// Output pixels.
    out: usize,
    kernel: usize,
    stride: usize,
    padding: Padding,
}

impl Axis {
    fn pairs(&self, at: usize) -> Pairs {
        let half = self.kernel / 2;
        let mut pairs = Pairs { list: [(0, 0); MOST_PAIRS], len: 0 };
        let last = ((at + half) / self.stride + 1).min(self.out);
        for i in at.saturating_sub(half).div_ceil(self.stride)..last {
            for u in 0..self.kernel {
                if place(i * self.stride, u, self.kernel, self.size, self.padding) == Some(at) {
                    pairs.list[pairs.len] = (i, u);
                    pairs.len += 1;
                }
            }
        }
        pairs
    }
}

/// The gradient of one group of the input.
pub struct InputJob<'a> {
    /// A convolution of the result's gradient `[N, H', W', C]` that gives the input's `[N, H, W, C]`: with the weight
    /// `[k*k, 1, C]` of the group, a stride of 1, no bias, and the forward padding.
    pub job: Job<'a>,
    /// The forward stride.
    pub stride: usize,
}

#[inline(always)]
fn input_body<const FMA: bool, V: Vector>(p: &InputJob, first_row: usize, out: &mut [f32]) {
    let Sizes { height, width, out_height, out_width, channels, kernel, .. } = p.job.shape;
    let axis = |size, out| Axis { size, out, kernel, stride: p.stride, padding: p.job.padding };
    let (down, across) = (axis(out_height, height), axis(out_width, width));
    let image_size = height * width * channels;
    // Between these columns the pairs of neighbouring pixels are neighbours, and as many.
    let inner = if p.stride == 1 { (kernel / 2).min(out_width) } else { out_width };
    let outer = out_width.saturating_sub(kernel / 2).max(inner);
    let group = [PIXELS, PIXELS / 2].into_iter().find(|&count| inner + count <= outer).unwrap_or(1);
    for (row, out) in (first_row..).zip(out.chunks_exact_mut(out_width * channels)) {
        let image = &p.job.input[row / out_height * image_size..][..image_size];
        let above = down.pairs(row % out_height);
        let mut taps: [Tap; MOST_PAIRS * MOST_PAIRS] = [(0, 0); MOST_PAIRS * MOST_PAIRS];
        let mut x = 0;
        while x < out_width {
            let count = if x >= inner && x < outer { group } else { 1 };
            // A last group that would not fit starts earlier: what it does again, it does the same.
            let first = if count > 1 { x.min(outer - count) } else { x };
            let beside = across.pairs(first);
            let mut len = 0;
            for &(i, u) in &above.list[..above.len] {
                for &(j, v) in &beside.list[..beside.len] {
                    taps[len] = ((i * width + j) * channels, u * kernel + v);
                    len += 1;
                }
            }
            let out = &mut out[first * channels..(first + count) * channels];
            match count {
                PIXELS => pixels::<FMA, V, PIXELS>(&p.job, image, (&taps[..len], None), out),
                1 => pixels::<FMA, V, 1>(&p.job, image, (&taps[..len], None), out),
                _ => pixels::<FMA, V, { PIXELS / 2 }>(&p.job, image, (&taps[..len], None), out),
            }
            x = first + count;
        }
    }
}

per_register! {
    /// Rows of the input's gradient, from row `first_row` of the batch on.
    pub fn input_rows(p: &InputJob, first_row: usize, out: &mut [f32]) = input_body
}

/// The gradient of the weight.
pub struct WeightJob<'a> {
    /// Of the forward convolution.
    pub shape: Sizes,
    pub padding: Padding,
    /// `[N, H, W, G, C]`.
    pub input: &'a [f32],
    /// Of the result, `[N, H', W', C]`.
    pub gradient: &'a [f32],
}

/// Over what one part of the weight's gradient is summed.
pub struct Part {
    /// Rows of the batch's results.
    pub rows: std::ops::Range<usize>,
    /// Channels, and how many at most: the distance between the sums of two taps.
    pub channels: std::ops::Range<usize>,
    pub distance: usize,
}

/// Numbers that lie `step` apart, pixel after pixel or tap after tap.
#[derive(Clone, Copy)]
struct Strip<'a> {
    values: &'a [f32],
    step: usize,
}

/// Adds to the sums of the `K` taps of one row what [`QUAD`] neighbouring output pixels give, of which pixel q meets
/// tap v at input pixel q + v, for channels `from..width` as far as whole vectors reach. Returns how far.
#[inline(always)]
fn quad<V: Vector, const K: usize>(
    dy: Strip,
    input: Strip,
    sums: (&mut [f32], usize),
    from: usize,
    width: usize,
) -> usize {
    assert!((QUAD - 1) * dy.step + width <= dy.values.len());
    assert!((QUAD + K - 2) * input.step + width <= input.values.len());
    assert!((K - 1) * sums.1 + width <= sums.0.len());
    let mut c = from;
    while c + V::WIDTH <= width {
        // SAFETY: `c` plus the width of a vector is at most `width`, and the asserts measured the slices.
        unsafe {
            // No closures: they would be compiled without the registers' instructions.
            let mut g = [V::load(dy.values.as_ptr().add(c)); QUAD];
            for (q, g) in g.iter_mut().enumerate().skip(1) {
                *g = V::load(dy.values.as_ptr().add(q * dy.step + c));
            }
            let mut acc = [g[0]; K];
            for (v, acc) in acc.iter_mut().enumerate() {
                *acc = V::load(sums.0.as_ptr().add(v * sums.1 + c));
            }
            for at in 0..K + QUAD - 1 {
                let x = V::load(input.values.as_ptr().add(at * input.step + c));
                for (v, acc) in acc.iter_mut().enumerate() {
                    if at >= v && at - v < QUAD {
                        *acc = V::mul_add(x, g[at - v], *acc);
                    }
                }
            }
            for (v, acc) in acc.into_iter().enumerate() {
                acc.store(sums.0.as_mut_ptr().add(v * sums.1 + c));
            }
        }
        c += V::WIDTH;
    }
    c
}

/// Adds `dy * input` to the sums of one tap.
#[inline(always)]
fn single<const FMA: bool>(dy: &[f32], input: &[f32], sums: &mut [f32]) {
    for (sum, (g, x)) in sums.iter_mut().zip(dy.iter().zip(input)) {
        *sum = mul_add::<FMA>(*g, *x, *sum);
    }
}

/// One row of taps over one row of pixels.
struct Line<'a> {
    /// Which row of the kernel.
    u: usize,
    /// The row of the input that it meets, all groups and channels.
    input: &'a [f32],
    /// The row of the gradient.
    dy: &'a [f32],
}

#[inline(always)]
fn line<const FMA: bool, V: Vector>(job: &WeightJob, part: &Part, line: &Line, sums: &mut [f32]) {
    let Sizes { width, out_width, channels, groups, kernel, stride, .. } = job.shape;
    let (first, count) = (part.channels.start, part.channels.len());
    let inner = if stride == 1 { (kernel / 2).min(out_width) } else { out_width };
    let outer = out_width.saturating_sub(kernel / 2).max(inner);
    let step = groups * channels;
    let mut x = 0;
    while x < out_width {
        let dy = Strip { values: &line.dy[x * channels + first..], step: channels };
        if x >= inner && x + QUAD <= outer {
            for g in 0..groups {
                let values = &line.input[(x - kernel / 2) * step + g * channels + first..];
                let sums = &mut sums[(line.u * kernel * groups + g) * part.distance..];
                four::<FMA, V>(kernel, dy, Strip { values, step }, (sums, groups * part.distance), count);
            }
            x += QUAD;
            continue;
        }
        for v in 0..kernel {
            let Some(column) = place(x * stride, v, kernel, width, job.padding) else { continue };
            for g in 0..groups {
                let input = &line.input[column * step + g * channels + first..][..count];
                let tap = line.u * kernel + v;
                let sums = &mut sums[(tap * groups + g) * part.distance..][..count];
                single::<FMA>(&dy.values[..count], input, sums);
            }
        }
        x += 1;
    }
}

/// [`quad`] for a kernel of any size, with the channels after the last vector.
#[inline(always)]
fn four<const FMA: bool, V: Vector>(
    kernel: usize,
    dy: Strip,
    input: Strip,
    sums: (&mut [f32], usize),
    width: usize,
) {
    let (sums, step) = sums;
    macro_rules! of {
        ($size:literal) => {{
            let done = quad::<V, $size>(dy, input, (&mut *sums, step), 0, width);
            quad::<One<FMA>, $size>(dy, input, (sums, step), done, width);
        }};
    }
    match kernel {
        1 => of!(1),
        3 => of!(3),
        5 => of!(5),
        _ => of!(7),
    }
}

#[inline(always)]
fn weight_body<const FMA: bool, V: Vector>(job: &WeightJob, part: &Part, sums: &mut [f32]) {
    let Sizes { height, width, out_height, out_width, channels, groups, kernel, stride } = job.shape;
    sums.fill(0.0);
    let row_size = width * groups * channels;
    for row in part.rows.clone() {
        let dy = &job.gradient[row * out_width * channels..][..out_width * channels];
        for u in 0..kernel {
            let Some(y) = place(row % out_height * stride, u, kernel, height, job.padding) else { continue };
            let input = &job.input[(row / out_height * height + y) * row_size..][..row_size];
            line::<FMA, V>(job, part, &Line { u, input, dy }, sums);
        }
    }
}

per_register! {
    /// The sums of a part, `[k*k, G, distance]`, of which the part's channels are filled and the others 0.
    pub fn weight_part(job: &WeightJob, part: &Part, sums: &mut [f32]) = weight_body
}
