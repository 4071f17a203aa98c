//! Folding on a GPU.

use std::sync::Arc;

use super::{Fixed, FixedNorm, Of};
use crate::device::Context;
use crate::device::cuda::{Launch, Precision, Stream, kernels};
use crate::error::Result;
use crate::tensor::{DType, Tensor};

kernels!(KERNELS, "fold_norm");

/// Scale and shift.
pub fn fold(cx: &Context, stream: &Arc<Stream>, p: &FixedNorm) -> Result<[Tensor; 2]> {
    let channels = p.weight.elements();
    let on = |vector: &Tensor| vector.on_as(cx, stream, "batch norm", Precision::F32);
    let [weight, bias] = [on(p.weight)?, on(p.bias)?];
    let [mean, variance] = [on(p.mean)?, on(p.variance)?];
    let mut scale = Tensor::new(cx, "batch norm", &[channels], DType::F32)?;
    let mut shift = Tensor::new(cx, "batch norm", &[channels], DType::F32)?;
    let (scale_at, shift_at) = (scale.on_mut(stream)?, shift.on_mut(stream)?);
    if channels > 0 {
        let [weight, bias, mean, variance] = [&weight, &bias, &mean, &variance].map(|taken| taken.address());
        let count = channels as i32;
        // SAFETY: as the kernel declares; all have a number for each channel, as was checked.
        unsafe {
            stream.launch(
                &KERNELS,
                "fold_norm",
                None,
                Launch::elements(channels),
                &[&weight, &bias, &mean, &variance, &scale_at, &shift_at, &count, &p.eps],
            )?;
        }
    }
    Ok([scale, shift])
}

/// The gradient of the weight or of the scale.
pub fn gradient(cx: &Context, stream: &Arc<Stream>, g: &Tensor, fixed: &Fixed, of: Of) -> Result<Tensor> {
    let channels = g.elements();
    let on = |vector: &Tensor| vector.on_as(cx, stream, "batch norm", Precision::F32);
    let (g, mean, variance) = (on(g)?, on(&fixed.mean)?, on(&fixed.variance)?);
    let mut out = Tensor::new(cx, "batch norm gradient", &[channels], DType::F32)?;
    let to = out.on_mut(stream)?;
    if channels > 0 {
        let [g, mean, variance] = [&g, &mean, &variance].map(|taken| taken.address());
        let (of_scale, count) = (i32::from(of == Of::Scale), channels as i32);
        // SAFETY: as the kernel declares; all have a number for each channel.
        unsafe {
            stream.launch(
                &KERNELS,
                "fold_norm_gradient",
                None,
                Launch::elements(channels),
                &[&g, &mean, &variance, &to, &count, &fixed.eps, &of_scale],
            )?;
        }
    }
    Ok(out)
}
