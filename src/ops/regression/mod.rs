//! Losses of regression, and sums of losses: scalars `[1]`. Summed in f64, in an order that only the shape decides.

mod cuda;
#[cfg(test)]
mod tests;

use crate::device::Context;
use crate::device::scratch::Doubles;
use crate::error::{Error, Result};
use crate::ops::kernels;
use crate::ops::mix::sample_elements;
use crate::simd_dispatch;
use crate::tensor::autograd::{Flow, Tracked, record};
use crate::tensor::{DType, Tensor};

/// Numbers that are summed in one go.
const BLOCK: usize = 16 << 10;

/// Sums that a block keeps side by side.
const LANES: usize = 16;

/// mean over n of `weights[n]` times the mean of `(x[n, ..] - target[n, ..])^2`. Without weights they are 1.
///
/// # Shapes
/// `x` and `target` `[N, ..]`, `F32`, with at least one element; N weights; the result `[1]`.
///
/// # Errors
/// `InvalidArgument` if shapes or counts differ; `OutOfMemory`; `Cancelled`.
pub fn squared_error(cx: &Context, x: &Tensor, target: &Tensor, weights: Option<&[f32]>) -> Result<Tensor> {
    let _span = cx.op("regression");
    let ones = [1.0].repeat(check(x, target)?);
    let weights = weights.unwrap_or(&ones);
    let sample = sample_elements(x, weights)?;
    let loss = match cx.cuda()? {
        Some(stream) => cuda::loss(cx, stream, [x, target], Kind::Squared, weights)?,
        None => {
            let errors = sample_errors(cx, x, target)?;
            let sum: f64 = errors.iter().zip(weights).map(|(error, weight)| error * f64::from(*weight)).sum();
            Tensor::from_slice(&[1], &[(sum / errors.len() as f64) as f32])?
        }
    };
    record(cx, loss, &[Some(x), Some(target)], || {
        let share = 2.0 / x.elements() as f64;
        let factors = weights.iter().map(|weight| (share * f64::from(*weight)) as f32).collect();
        Differences { x: x.clone(), target: target.clone(), sample, factors, kind: Kind::Squared }.backward()
    })
}

/// What of a difference is summed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Its square.
    Squared,
    /// Its size.
    Absolute,
}

/// The mean of `(x[n, ..] - target[n, ..])^2` of each sample n: what [`squared_error`] weights. On the host.
fn sample_errors(cx: &Context, x: &Tensor, target: &Tensor) -> Result<Vec<f64>> {
    let samples = check(x, target)?;
    let sums = sums(cx, [x, target], samples, squared_differences)?;
    Ok(sums.into_iter().map(|sum| sum / (x.elements() / samples) as f64).collect())
}

/// The mean of `|x - target|`. Where both are equal the gradient is 0.
///
/// # Shapes
/// `x` and `target` alike, `F32`, with at least one element; the result `[1]`.
///
/// # Errors
/// As [`squared_error`].
pub fn absolute_error(cx: &Context, x: &Tensor, target: &Tensor) -> Result<Tensor> {
    let _span = cx.op("regression");
    check(x, target)?;
    let loss = match cx.cuda()? {
        Some(stream) => cuda::loss(cx, stream, [x, target], Kind::Absolute, &[1.0])?,
        None => {
            let sum: f64 = sums(cx, [x, target], 1, absolute_differences)?.iter().sum();
            Tensor::from_slice(&[1], &[(sum / x.elements() as f64) as f32])?
        }
    };
    record(cx, loss, &[Some(x), Some(target)], || {
        let (sample, factors) = (x.elements(), vec![(1.0 / x.elements() as f64) as f32]);
        Differences { x: x.clone(), target: target.clone(), sample, factors, kind: Kind::Absolute }.backward()
    })
}

/// The sum over `terms` of a scalar times its factor: several losses as one.
///
/// # Shapes
/// each term one element, `F32`; the result `[1]`.
///
/// # Errors
/// `InvalidArgument` for a term of more elements.
pub fn weighted_sum(cx: &Context, terms: &[(&Tensor, f32)]) -> Result<Tensor> {
    let _span = cx.op("regression");
    if let Some((term, _)) = terms.iter().find(|(term, _)| term.elements() != 1) {
        return Err(Error::argument("a term of a sum", "one element", term.shape()));
    }
    let sum = match cx.cuda()? {
        Some(stream) => cuda::weighted_sum(cx, stream, terms)?,
        None => {
            let mut sum = 0.0;
            for (term, factor) in terms {
                sum += f64::from(term.slice::<f32>()?[0]) * f64::from(*factor);
            }
            Tensor::from_slice(&[1], &[sum as f32])?
        }
    };
    let inputs: Vec<Option<&Tensor>> = terms.iter().map(|(term, _)| Some(*term)).collect();
    record(cx, sum, &inputs, || {
        let to: Vec<(Option<Tracked>, f32)> =
            terms.iter().map(|(t, factor)| (t.tracked(), *factor)).collect();
        move |cx, flow| {
            for (to, factor) in to {
                flow.give(cx, to, |g| match cx.cuda()? {
                    Some(stream) => cuda::weighted_sum(cx, stream, &[(g, factor)]),
                    None => Tensor::from_slice(&[1], &[g.slice::<f32>()?[0] * factor]),
                })?;
            }
            Ok(())
        }
    })
}

/// The number of samples, if both have the same shape and an element.
fn check(x: &Tensor, target: &Tensor) -> Result<usize> {
    if x.dims() != target.dims() {
        return Err(Error::argument("target of a loss", format!("the shape {}", x.shape()), target.shape()));
    }
    match x.dims().first() {
        Some(&samples) if x.elements() > 0 => Ok(samples),
        _ => Err(Error::argument("input of a loss", "[N, ..] with at least one element", x.shape())),
    }
}

/// The sum of `term` over each sample: of blocks first, then of those.
fn sums(
    cx: &Context,
    [x, y]: [&Tensor; 2],
    samples: usize,
    term: fn(&[f32], &[f32]) -> f64,
) -> Result<Vec<f64>> {
    let (x, y) = (x.slice::<f32>()?, y.slice::<f32>()?);
    let sample = x.len() / samples;
    let blocks = sample.div_ceil(BLOCK);
    let mut partial = Doubles::new(cx.device(), "partial losses", samples * blocks)?;
    kernels::parallel_chunks(cx, partial.values_mut(), BLOCK.div_ceil(sample), |i, part| {
        for (block, sum) in (i * BLOCK.div_ceil(sample)..).zip(part) {
            let start = block / blocks * sample + block % blocks * BLOCK;
            let range = start..(start + BLOCK).min((block / blocks + 1) * sample);
            *sum = term(&x[range.clone()], &y[range]);
        }
    })?;
    Ok(partial.values().chunks_exact(blocks).map(|blocks| blocks.iter().sum()).collect())
}

/// The sum of `term` of the differences, in an order that only the length decides.
#[inline(always)]
fn sum_of(x: &[f32], y: &[f32], term: impl Fn(f64) -> f64) -> f64 {
    let mut lanes = [0f64; LANES];
    let ((x, x_rest), (y, y_rest)) = (x.as_chunks::<LANES>(), y.as_chunks::<LANES>());
    for (x, y) in x.iter().zip(y) {
        for i in 0..LANES {
            lanes[i] += term(f64::from(x[i]) - f64::from(y[i]));
        }
    }
    for (lane, (x, y)) in lanes.iter_mut().zip(x_rest.iter().zip(y_rest)) {
        *lane += term(f64::from(*x) - f64::from(*y));
    }
    lanes.iter().sum()
}

simd_dispatch! {
    fn squared_differences<const FMA: bool>(x: &[f32], y: &[f32]) -> f64 {
        sum_of(x, y, |difference| difference * difference)
    }
}

simd_dispatch! {
    fn absolute_differences<const FMA: bool>(x: &[f32], y: &[f32]) -> f64 {
        sum_of(x, y, f64::abs)
    }
}

simd_dispatch! {
    /// out = factor (x - y).
    fn scaled_differences<const FMA: bool>(x: &[f32], y: &[f32], factor: f32, out: &mut [f32]) {
        out.iter_mut().zip(x.iter().zip(y)).for_each(|(out, (x, y))| *out = factor * (x - y));
    }
}

simd_dispatch! {
    /// out = factor where x > y, -factor where x < y, else 0.
    fn signs<const FMA: bool>(x: &[f32], y: &[f32], factor: f32, out: &mut [f32]) {
        for (out, (x, y)) in out.iter_mut().zip(x.iter().zip(y)) {
            let above = if x > y { factor } else { 0.0 };
            *out = if x < y { -factor } else { above };
        }
    }
}

/// A loss whose gradient by x is a function of x - target, and by the target the opposite.
struct Differences {
    x: Tensor,
    target: Tensor,
    /// Elements of a sample.
    sample: usize,
    /// Of each sample.
    factors: Vec<f32>,
    kind: Kind,
}

impl Differences {
    fn backward(self) -> impl FnOnce(&Context, &mut Flow) -> Result<()> {
        move |cx, flow| {
            flow.give(cx, self.x.tracked(), |g| self.gradient(cx, g, 1.0))?;
            flow.give(cx, self.target.tracked(), |g| self.gradient(cx, g, -1.0))
        }
    }

    /// The gradient by x under that of the loss, `g`, times `sign`.
    fn gradient(&self, cx: &Context, g: &Tensor, sign: f32) -> Result<Tensor> {
        if let Some(stream) = cx.cuda()? {
            return cuda::gradient(cx, stream, self, g, sign);
        }
        let scale = sign * g.slice::<f32>()?[0];
        let kernel = match self.kind {
            Kind::Squared => scaled_differences,
            Kind::Absolute => signs,
        };
        let (x, y) = (self.x.slice::<f32>()?, self.target.slice::<f32>()?);
        let mut out = Tensor::new(cx, "gradient of a loss", self.x.dims(), DType::F32)?;
        kernels::parallel_samples(cx, out.slice_mut()?, self.sample, |n, start, part| {
            let range = start..start + part.len();
            kernel(&x[range.clone()], &y[range], scale * self.factors[n], part);
        })?;
        Ok(out)
    }
}
