//! Folding on the CPU.

use super::{Fixed, FixedNorm, Of};
use crate::device::Context;
use crate::error::Result;
use crate::ops::kernels;
use crate::tensor::{DType, Tensor};

/// Scale and shift.
pub fn fold(cx: &Context, p: &FixedNorm) -> Result<[Tensor; 2]> {
    let wide = |vector| kernels::widened(cx, "batch norm", vector);
    let scale = combined(cx, &wide(p.weight)?, &wide(p.variance)?, |weight, variance| {
        weight / (variance + p.eps).sqrt()
    })?;
    let scaled_mean = combined(cx, &wide(p.mean)?, &scale, |mean, scale| mean * scale)?;
    let shift = combined(cx, &wide(p.bias)?, &scaled_mean, |bias, mean| bias - mean)?;
    Ok([scale, shift])
}

/// The gradient of the weight or of the scale.
pub fn gradient(cx: &Context, g: &Tensor, fixed: &Fixed, of: Of) -> Result<Tensor> {
    let wide = |vector| kernels::widened(cx, "batch norm", vector);
    match of {
        Of::Weight => {
            combined(cx, g, &wide(&fixed.variance)?, |g, variance| g / (variance + fixed.eps).sqrt())
        }
        Of::Scale => combined(cx, g, &wide(&fixed.mean)?, |g, mean| -g * mean),
    }
}

/// f(a, b), element by element, as `[C]`.
fn combined(cx: &Context, a: &Tensor, b: &Tensor, f: impl Fn(f32, f32) -> f32) -> Result<Tensor> {
    let mut out = Tensor::new(cx, "batch norm", &[a.elements()], DType::F32)?;
    let pairs = a.slice::<f32>()?.iter().zip(b.slice::<f32>()?);
    out.slice_mut::<f32>()?.iter_mut().zip(pairs).for_each(|(out, (&a, &b))| *out = f(a, b));
    Ok(out)
}
