//! What an optimiser does to one tensor: AdamW's update (Loshchilov and Hutter 2019), and the sum of squares that
//! clipping needs.

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
/// # Errors
/// `InvalidArgument` for slices of different lengths; `Cancelled`, after which part of the work is done.
pub fn adamw(
    cx: &Context,
    step: &AdamWStep,
    weights: &mut [f32],
    [first, second]: [&mut [f32]; 2],
    gradient: &[f32],
) -> Result<()> {
    if gradient.len() != weights.len() {
        return Err(Error::argument("gradient", format!("{} numbers", weights.len()), gradient.len()));
    }
    cx.parallel_chunks_of([weights, first, second], CHUNK, |i, [weights, first, second]| {
        update(step, weights, [first, second], &gradient[i * CHUNK..][..weights.len()]);
    })
}

/// The sum of the squares, in an order that only the length decides.
///
/// # Errors
/// `OutOfMemory`; `Cancelled`.
pub fn sum_of_squares(cx: &Context, x: &Tensor) -> Result<f64> {
    let values = x.slice::<f32>()?;
    let mut sums = Tensor::new(cx, "a sum of squares", &[values.len().div_ceil(CHUNK)], DType::F32)?;
    kernels::parallel_chunks(cx, sums.slice_mut::<f32>()?, 1, |i, sum| {
        sum[0] = square_sum(&values[i * CHUNK..values.len().min((i + 1) * CHUNK)]);
    })?;
    Ok(sums.slice::<f32>()?.iter().map(|&sum| f64::from(sum)).sum())
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
