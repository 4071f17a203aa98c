//! The loss of telling two kinds apart, on a GPU.

use std::sync::Arc;

use crate::device::Context;
use crate::device::cuda::{Launch, Precision, Stream, Taken, kernels};
use crate::error::Result;
use crate::tensor::{DType, Tensor};

kernels!(KERNELS, "binary_cross_entropy");

fn list(stream: &Stream, targets: &[f32]) -> Result<Taken> {
    stream.constant(&targets.iter().map(|t| t.to_bits()).collect::<Vec<u32>>())
}

/// The loss, `[1]`.
pub fn loss(cx: &Context, stream: &Arc<Stream>, x: &Tensor, targets: &[f32]) -> Result<Tensor> {
    let (count, sample) = (x.elements(), x.elements() / targets.len().max(1));
    let precision = x.precision("binary cross-entropy")?;
    let mut out = Tensor::new(cx, "a loss", &[1], DType::F32)?;
    let (x, targets, to) = (x.on(cx, stream)?, list(stream, targets)?, out.on_mut(stream)?);
    // One block: a number for each patch of a picture is little work.
    // SAFETY: as the kernel declares; x has `count` numbers, of samples of `sample`, with a target for each.
    unsafe {
        stream.launch(
            &KERNELS,
            "binary_cross_entropy",
            Some(precision),
            Launch::blocks(1, 1024),
            &[&x.address(), &targets.address(), &to, &(count as i64), &(sample as i64)],
        )?;
    }
    Ok(out)
}

/// The gradient by x under that of the loss, `[1]`.
pub fn gradient(
    cx: &Context,
    stream: &Arc<Stream>,
    x: &Tensor,
    targets: &[f32],
    g: &Tensor,
) -> Result<Tensor> {
    let (count, sample) = (x.elements(), x.elements() / targets.len().max(1));
    let mut out = Tensor::new(cx, "binary cross-entropy gradient", x.dims(), DType::F32)?;
    let x = x.on_as(cx, stream, "binary cross-entropy", Precision::F32)?;
    let (targets, g, to) = (list(stream, targets)?, g.on(cx, stream)?, out.on_mut(stream)?);
    // SAFETY: as the kernel declares; as in `loss`.
    unsafe {
        stream.launch(
            &KERNELS,
            "binary_cross_entropy_gradient",
            None,
            Launch::elements(count),
            &[&x.address(), &targets.address(), &g.address(), &to, &(count as i64), &(sample as i64)],
        )?;
    }
    Ok(out)
}
