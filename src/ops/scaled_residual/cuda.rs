//! The residual sum on a GPU.

use std::sync::Arc;

use crate::device::Context;
use crate::device::cuda::{Launch, Precision, Stream, kernels};
use crate::error::Result;
use crate::ops::sums;
use crate::tensor::{DType, Tensor};

kernels!(KERNELS, "scaled_residual");

/// Numbers of one part of the gain's gradient, at least, and the most parts.
const LEAST_PART: usize = 16 << 10;
const MOST_PARTS: usize = 512;

/// Bytes that a thread owns.
const PACK: usize = 16;

/// [`super::scaled_residual`] without recording, of the type of `y`.
pub fn add(
    cx: &Context,
    stream: &Arc<Stream>,
    y: &Tensor,
    gain: &Tensor,
    residual: &Tensor,
) -> Result<Tensor> {
    let precision = y.precision("scaled residual")?;
    let mut out = Tensor::new(cx, "scaled residual", y.dims(), y.dtype())?;
    let count = y.elements();
    if count == 0 {
        return Ok(out);
    }
    let (values, kept) = (y.on(cx, stream)?, residual.on_as(cx, stream, "scaled residual", precision)?);
    let gain = gain.on_as(cx, stream, "residual gain", Precision::F32)?;
    let to = out.on_mut(stream)?;
    let launch = Launch::elements(count.div_ceil(PACK / precision.size()));
    // SAFETY: as the kernel declares; all three have this many numbers, the gain has one.
    unsafe {
        stream.launch(
            &KERNELS,
            "scaled_residual",
            Some(precision),
            launch,
            &[&values.address(), &gain.address(), &kept.address(), &to, &(count as i64)],
        )?;
    }
    Ok(out)
}

/// The gradient of what was scaled: `gain * g`.
pub fn of_y(cx: &Context, stream: &Arc<Stream>, g: &Tensor, gain: &Tensor) -> Result<Tensor> {
    let mut out = Tensor::new(cx, "scaled residual gradient", g.dims(), DType::F32)?;
    let count = g.elements();
    if count == 0 {
        return Ok(out);
    }
    let from = g.on(cx, stream)?;
    let gain = gain.on_as(cx, stream, "residual gain", Precision::F32)?;
    let to = out.on_mut(stream)?;
    // SAFETY: as the kernel declares; both have this many numbers, the gain has one.
    unsafe {
        stream.launch(
            &KERNELS,
            "scaled_residual_gradient",
            None,
            Launch::elements(count),
            &[&from.address(), &gain.address(), &to, &(count as i64)],
        )?;
    }
    Ok(out)
}

/// The gradient of the gain: the sum of `g * y`, `[1]`.
pub fn of_gain(cx: &Context, stream: &Arc<Stream>, g: &Tensor, y: &Tensor) -> Result<Tensor> {
    let count = g.elements();
    if count == 0 {
        return Tensor::zeros(cx, "gain gradient", &[1], DType::F32);
    }
    let part = count.div_ceil(MOST_PARTS).max(LEAST_PART);
    let mut parts = Tensor::new(cx, "gain gradient", &[count.div_ceil(part), 1], DType::F32)?;
    let (from, y) = (g.on(cx, stream)?, y.on_as(cx, stream, "scaled residual", Precision::F32)?);
    let to = parts.on_mut(stream)?;
    // SAFETY: as the kernel declares; g and y have this many numbers, the sums one for each part.
    unsafe {
        stream.launch(
            &KERNELS,
            "scaled_residual_dot",
            None,
            Launch::blocks(parts.elements(), 256),
            &[&from.address(), &y.address(), &to, &(count as i64), &(part as i64)],
        )?;
    }
    sums::add_parts(cx, "gain gradient", &parts)
}
