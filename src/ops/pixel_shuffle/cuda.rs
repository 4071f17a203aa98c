//! Pixels to channels and back on a GPU.

use std::sync::Arc;

use crate::device::Context;
use crate::device::cuda::{Launch, Stream, kernels};
use crate::error::Result;
use crate::tensor::Tensor;

kernels!(KERNELS, "pixel_shuffle");

/// A launch of either kernel.
pub struct Shuffle {
    /// Which.
    pub kernel: &'static str,
    /// Of the result.
    pub dims: [usize; 4],
    /// The side of a patch.
    pub r: usize,
    /// Patches in a row of them.
    pub width: usize,
    /// Channels of the finer picture.
    pub channels: usize,
}

/// `x` as the result, of the same type.
pub fn shuffle(cx: &Context, stream: &Arc<Stream>, x: &Tensor, p: &Shuffle) -> Result<Tensor> {
    let precision = x.precision(p.kernel)?;
    let mut out = Tensor::new(cx, p.kernel, &p.dims, x.dtype())?;
    if out.elements() == 0 {
        return Ok(out);
    }
    let count = out.elements() / (p.r * p.r);
    let (from, to) = (x.on(cx, stream)?, out.on_mut(stream)?);
    // SAFETY: as the kernel declares; x and the result have r * r numbers for each channel of each patch.
    unsafe {
        stream.launch(
            &KERNELS,
            p.kernel,
            Some(precision),
            Launch::elements(count),
            &[&from.address(), &to, &(count as i64), &(p.width as i32), &(p.channels as i32), &(p.r as i32)],
        )?;
    }
    Ok(out)
}
