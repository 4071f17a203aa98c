//! What an optimiser does: AdamW's update (Loshchilov and Hutter 2019), the sum of squares that clipping needs, and the
//! moving average of weights.

mod cuda;
#[cfg(test)]
mod tests;

use crate::device::Context;
use crate::error::{Error, Result};
use crate::ops::kernels;
use crate::simd_dispatch;
use crate::tensor::{DType, Tensor};

/// Numbers of one task.
const CHUNK: usize = 32 << 10;

/// The numbers of one step, alike for all tensors.
#[derive(Debug, Clone, Copy)]
pub struct AdamWStep {
    /// What gradients are multiplied by first.
    pub scale: f32,
    /// b1 and b2.
    pub betas: [f32; 2],
    /// 1 - rate * weight decay.
    pub decay: f32,
    /// rate / (1 - b1^t).
    pub size: f32,
    /// sqrt(1 - b2^t).
    pub root: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
}

/// `m = b1 m + (1 - b1) g`, `v = b2 v + (1 - b2) g^2`, `w = decay w - size m / (sqrt(v) / root + eps)`, g the
/// gradient times the scale.
///
/// # Shapes
/// all `F32` and alike; on a GPU weights and moments lie there.
///
/// # Errors
/// `InvalidArgument` for tensors of different lengths; `Internal` for weights or moments that are shared; `Cancelled`,
/// after which part of the work is done.
pub fn adamw(
    cx: &Context,
    step: &AdamWStep,
    weights: &mut Tensor,
    [first, second]: [&mut Tensor; 2],
    gradient: &Tensor,
) -> Result<()> {
    let _span = cx.op("adamw");
    for x in [&*first, &*second, gradient] {
        expect_like(weights, x)?;
    }
    if let Some(stream) = cx.cuda()? {
        return cuda::adamw(cx, stream, step, [weights, first, second], gradient);
    }
    let gradient = gradient.slice::<f32>()?;
    let all = [weights.slice_mut()?, first.slice_mut()?, second.slice_mut()?];
    cx.parallel_chunks_of(all, CHUNK, |i, [weights, first, second]| {
        update(step, weights, [first, second], &gradient[i * CHUNK..][..weights.len()]);
    })
}

/// `average = decay average + (1 - decay) x`.
///
/// # Shapes
/// both `F32` and alike; on a GPU the average lies there.
///
/// # Errors
/// `InvalidArgument` for tensors of different lengths; `Internal` for an average that is shared.
pub fn moving_average(cx: &Context, average: &mut Tensor, x: &Tensor, decay: f32) -> Result<()> {
    let _span = cx.op("adamw");
    expect_like(average, x)?;
    if let Some(stream) = cx.cuda()? {
        return cuda::moving_average(cx, stream, average, x, decay);
    }
    for (average, x) in average.slice_mut::<f32>()?.iter_mut().zip(x.slice::<f32>()?) {
        *average = *average * decay + x * (1.0 - decay);
    }
    Ok(())
}

/// `running = running + (factor x - running) momentum`: a running statistic follows what was seen.
///
/// # Shapes
/// both `F32` and alike; on a GPU the statistic lies there.
///
/// # Errors
/// As [`moving_average`].
pub fn approach(cx: &Context, running: &mut Tensor, x: &Tensor, [factor, momentum]: [f32; 2]) -> Result<()> {
    let _span = cx.op("adamw");
    expect_like(running, x)?;
    if let Some(stream) = cx.cuda()? {
        return cuda::approach(cx, stream, running, x, [factor, momentum]);
    }
    for (running, x) in running.slice_mut::<f32>()?.iter_mut().zip(x.slice::<f32>()?) {
        *running += (x * factor - *running) * momentum;
    }
    Ok(())
}

fn expect_like(x: &Tensor, other: &Tensor) -> Result<()> {
    if other.elements() == x.elements() && [x, other].iter().all(|x| x.dtype() == DType::F32) {
        return Ok(());
    }
    let found = format!("{} of {}", other.shape(), other.dtype());
    Err(Error::argument("an optimiser's tensor", format!("{} numbers of F32", x.elements()), found))
}

/// The sum of the squares of all numbers, in an order that only the lengths decide.
///
/// # Errors
/// `InvalidArgument` for another type than `F32`; `OutOfMemory`; `Cancelled`.
pub fn sum_of_squares(cx: &Context, tensors: &[&Tensor]) -> Result<f64> {
    let _span = cx.op("adamw");
    tensors.iter().try_for_each(|x| expect_like(x, x))?;
    if let Some(stream) = cx.cuda()? {
        return cuda::sum_of_squares(cx, stream, tensors);
    }
    let mut total = 0.0;
    for x in tensors {
        let values = x.slice::<f32>()?;
        let mut sums = Tensor::new(cx, "a sum of squares", &[values.len().div_ceil(CHUNK)], DType::F32)?;
        kernels::parallel_chunks(cx, sums.slice_mut::<f32>()?, 1, |i, sum| {
            sum[0] = square_sum(&values[i * CHUNK..values.len().min((i + 1) * CHUNK)]);
        })?;
        total += sums.slice::<f32>()?.iter().map(|&sum| f64::from(sum)).sum::<f64>();
    }
    Ok(total)
}

simd_dispatch! {
    fn update<const FMA: bool>(step: &AdamWStep, weights: &mut [f32], moments: [&mut [f32]; 2], gradient: &[f32]) {
        let [first, second] = moments;
        let [b1, b2] = step.betas;
        for ((w, g), (m, v)) in weights.iter_mut().zip(gradient).zip(first.iter_mut().zip(second)) {
            let g = g * step.scale;
            *m += (g - *m) * (1.0 - b1);
            *v = *v * b2 + g * g * (1.0 - b2);
            *w = *w * step.decay - step.size * (*m / (v.sqrt() / step.root + step.eps));
        }
    }
}

simd_dispatch! {
    fn square_sum<const FMA: bool>(values: &[f32]) -> f32 {
        kernels::sum_squares::<FMA>(values, 0.0)
    }
}
