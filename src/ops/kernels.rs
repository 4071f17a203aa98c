//! What the kernels share: parallel loops over disjoint parts of an output, instantiation per instruction set,
//! and sums whose order is fixed.

use std::sync::Arc;

use half::bf16;
use half::slice::HalfFloatSliceExt;

use crate::device::Context;
use crate::device::cuda::{Precision, Stream, Taken, convert};
use crate::device::scratch::SharedMut;
#[cfg(test)]
use crate::device::simd;
pub(crate) use crate::device::simd::fma as mul_add;
use crate::error::{Error, Result};
use crate::tensor::{DType, Tensor};

/// About how many numbers one task of a parallel loop writes: long against the cost of handing it out, and
/// fixed, so that the partition never depends on the threads.
const TASK_ELEMENTS: usize = 16 << 10;

/// How many rows of `row` numbers make one task.
pub(crate) fn rows_per_task(row: usize) -> usize {
    (TASK_ELEMENTS / row.max(1)).max(1)
}

/// Calls `body(i, part)` for each part of `chunk` elements of `out` (the last may be shorter), in parallel.
pub(crate) fn parallel_chunks<T: Send>(
    cx: &Context,
    out: &mut [T],
    chunk: usize,
    body: impl Fn(usize, &mut [T]) + Sync,
) -> Result<()> {
    cx.parallel_chunks(out, chunk, body)
}

/// Calls `body(n, first, part)` for every run of elements of `out` that lie in one of its samples, of `sample`
/// elements each: `part` begins at element `first` of `out`. In parallel, in tasks whose size is fixed.
pub(crate) fn parallel_samples(
    cx: &Context,
    out: &mut [f32],
    sample: usize,
    body: impl Fn(usize, usize, &mut [f32]) + Sync,
) -> Result<()> {
    parallel_chunks(cx, out, TASK_ELEMENTS, |i, part| {
        let (mut first, mut rest) = (i * TASK_ELEMENTS, part);
        while !rest.is_empty() {
            let n = first / sample;
            let (run, after) = rest.split_at_mut(rest.len().min((n + 1) * sample - first));
            body(n, first, run);
            first += run.len();
            rest = after;
        }
    })
}

/// [`parallel_chunks`] over two outputs at once: `body(i, part, other)` for part `i` of each. Where one of them ends
/// first, or is empty, its parts are.
pub(crate) fn parallel_pairs<T: Send, U: Send>(
    cx: &Context,
    (out, chunk): (&mut [T], usize),
    (other, other_chunk): (&mut [U], usize),
    body: impl Fn(usize, &mut [T], &mut [U]) + Sync,
) -> Result<()> {
    let (chunk, other_chunk) = (chunk.max(1), other_chunk.max(1));
    let tasks = out.len().div_ceil(chunk).max(other.len().div_ceil(other_chunk));
    let (out, other) = (SharedMut::new(out), SharedMut::new(other));
    let range =
        |i: usize, chunk: usize, len: usize| ((i * chunk).min(len), (i + 1).saturating_mul(chunk).min(len));
    cx.parallel(tasks, |i| {
        let (start, end) = range(i, chunk, out.len());
        let (other_start, other_end) = range(i, other_chunk, other.len());
        // SAFETY: each task number occurs once, and the ranges of different numbers are disjoint.
        let parts =
            unsafe { (out.part(start, end - start), other.part(other_start, other_end - other_start)) };
        body(i, parts.0, parts.1);
    })
}

/// Changes `x` part by part: where it lies if nobody else owns its memory, else in a copy. The result has the place
/// of `x` on the tape, which [`record`](crate::tensor::autograd::record) has to replace by its own.
pub(crate) fn in_place(
    cx: &Context,
    what: &'static str,
    mut x: Tensor,
    chunk: usize,
    body: impl Fn(usize, &mut [f32]) + Sync,
) -> Result<Tensor> {
    if let Ok(own) = x.slice_mut::<f32>() {
        parallel_chunks(cx, own, chunk, body)?;
        return Ok(x);
    }
    let shared = x.slice::<f32>()?;
    let mut out = Tensor::new(cx, what, x.dims(), DType::F32)?;
    parallel_chunks(cx, out.slice_mut()?, chunk, |i, part| {
        part.copy_from_slice(&shared[i * chunk.max(1)..][..part.len()]);
        body(i, part);
    })?;
    Ok(out.tracked_as(&x))
}

/// Where an op that works in place reads and writes on a GPU.
pub(crate) struct InPlace {
    /// The result, which has the place of the input on the tape.
    pub out: Tensor,
    /// The address of the input.
    pub from: u64,
    /// The address of the result: the input's own if nobody else owns its memory.
    pub to: u64,
    _input: Option<Taken>,
}

impl InPlace {
    /// [`in_place`] on a GPU, for a kernel to do.
    pub fn of(cx: &Context, stream: &Arc<Stream>, what: &'static str, mut x: Tensor) -> Result<Self> {
        if let Ok(own) = x.on_mut(stream) {
            return Ok(InPlace { out: x, from: own, to: own, _input: None });
        }
        let mut out = Tensor::new(cx, what, x.dims(), x.dtype())?;
        let (input, to) = (x.on(cx, stream)?, out.on_mut(stream)?);
        Ok(InPlace { out: out.tracked_as(&x), from: input.address(), to, _input: Some(input) })
    }
}

/// Reads elements `start..start + out.len()` of a float tensor of any type as `f32`.
pub(crate) fn widen(tensor: &Tensor, start: usize, out: &mut [f32]) -> Result<()> {
    let range = start..start + out.len();
    match tensor.dtype() {
        DType::F32 => out.copy_from_slice(&tensor.slice::<f32>()?[range]),
        DType::F16 => tensor.slice::<half::f16>()?[range].convert_to_f32_slice(out),
        DType::BF16 => {
            for (value, x) in out.iter_mut().zip(&tensor.slice::<bf16>()?[range]) {
                *value = f32::from_bits(u32::from(x.to_bits()) << 16);
            }
        }
        other => return Err(Error::argument("a weight", "a float type", other)),
    }
    Ok(())
}

/// The tensor itself if it holds `f32`, else a pooled copy that does: on the device for what lies on it.
pub(crate) fn widened(cx: &Context, what: &'static str, tensor: &Tensor) -> Result<Tensor> {
    if tensor.dtype() == DType::F32 {
        return Ok(tensor.clone());
    }
    let mut wide = Tensor::new(cx, what, tensor.dims(), DType::F32)?;
    match cx.cuda()? {
        Some(stream) if tensor.is_on_device() => {
            let (from, to) = (tensor.on(cx, stream)?, wide.on_mut(stream)?);
            let numbers = (from.address(), tensor.precision(what)?);
            // SAFETY: both have this many numbers.
            unsafe { convert(stream, numbers, (to, Precision::F32), tensor.elements())? };
        }
        _ => widen(tensor, 0, wide.slice_mut()?)?,
    }
    Ok(wide.tracked_as(tensor))
}

/// A float vector of `channels` elements, in any shape, as `f32`.
pub(crate) fn channel_vector(
    cx: &Context,
    what: &'static str,
    vector: &Tensor,
    channels: usize,
) -> Result<Tensor> {
    if vector.elements() != channels {
        return Err(Error::argument(what, format!("{channels} elements"), vector.shape()));
    }
    widened(cx, what, vector)
}

/// The number in a float tensor of one element.
pub(crate) fn scalar(what: &'static str, tensor: &Tensor) -> Result<f32> {
    if tensor.elements() != 1 {
        return Err(Error::argument(what, "1 element", tensor.shape()));
    }
    let mut value = [0f32];
    widen(tensor, 0, &mut value)?;
    Ok(value[0])
}

/// Runs `body` once at each level below the best of this processor, if its loops run on this thread alone.
#[cfg(test)]
pub(crate) fn at_poorer_levels(mut body: impl FnMut(simd::Level)) {
    let best = simd::level();
    for level in simd::Level::available().filter(|&level| level < best) {
        simd::tests::at_level(level, || body(level));
    }
}

/// Defines a function that runs the `#[inline(always)]` function `$body::<FMA>` compiled for the best
/// instruction set of the processor: [`simd_dispatch!`](crate::simd_dispatch) for a body that has a name.
macro_rules! per_cpu {
    ($(#[$doc:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? = $body:ident) => {
        $crate::simd_dispatch! {
            $(#[$doc])*
            $vis fn $name<const FMA: bool>($($arg: $ty),*) $(-> $ret)? {
                $body::<FMA>($($arg),*)
            }
        }
    };
}
pub(crate) use per_cpu;

/// Partial sums that a reduction keeps side by side.
const LANES: usize = 32;

#[inline(always)]
fn fold(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// The sum, in an order that only the length decides.
#[inline(always)]
pub(crate) fn sum(x: &[f32]) -> f32 {
    let mut lanes = [0f32; LANES];
    let chunks = x.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] += chunk[i];
        }
    }
    for (lane, value) in lanes.iter_mut().zip(rest) {
        *lane += value;
    }
    fold(lanes)
}

/// The largest, of numbers: what is none is passed over.
#[inline(always)]
pub(crate) fn maximum(x: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = x.chunks_exact(LANES);
    let rest = chunks.remainder().iter().copied().fold(f32::NEG_INFINITY, f32::max);
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] = if chunk[i] > lanes[i] { chunk[i] } else { lanes[i] };
        }
    }
    lanes.into_iter().fold(rest, f32::max)
}

/// The sum of `(x - mean)^2`, in an order that only the length decides.
#[inline(always)]
pub(crate) fn sum_squares<const FMA: bool>(x: &[f32], mean: f32) -> f32 {
    let mut lanes = [0f32; LANES];
    let chunks = x.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for i in 0..LANES {
            let d = chunk[i] - mean;
            lanes[i] = mul_add::<FMA>(d, d, lanes[i]);
        }
    }
    for (lane, value) in lanes.iter_mut().zip(rest) {
        let d = value - mean;
        *lane = mul_add::<FMA>(d, d, *lane);
    }
    fold(lanes)
}

/// The sum of `a * (b - mean)`, in an order that only the length decides.
#[inline(always)]
pub(crate) fn centred_dot<const FMA: bool>(a: &[f32], b: &[f32], mean: f32) -> f32 {
    let mut lanes = [0f32; LANES];
    let (a_chunks, b_chunks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest = (a_chunks.remainder(), b_chunks.remainder());
    for (x, y) in a_chunks.zip(b_chunks) {
        for i in 0..LANES {
            lanes[i] = mul_add::<FMA>(x[i], y[i] - mean, lanes[i]);
        }
    }
    for (lane, (x, y)) in lanes.iter_mut().zip(rest.0.iter().zip(rest.1)) {
        *lane = mul_add::<FMA>(*x, *y - mean, *lane);
    }
    fold(lanes)
}

/// The sum of `a * b`, in an order that only the length decides.
#[inline(always)]
pub(crate) fn dot<const FMA: bool>(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0f32; LANES];
    let (a_chunks, b_chunks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest = (a_chunks.remainder(), b_chunks.remainder());
    for (x, y) in a_chunks.zip(b_chunks) {
        for i in 0..LANES {
            lanes[i] = mul_add::<FMA>(x[i], y[i], lanes[i]);
        }
    }
    for (lane, (x, y)) in lanes.iter_mut().zip(rest.0.iter().zip(rest.1)) {
        *lane = mul_add::<FMA>(*x, *y, *lane);
    }
    fold(lanes)
}
