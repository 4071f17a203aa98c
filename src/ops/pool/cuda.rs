//! The mean over pixels on a GPU.

use std::sync::Arc;

use crate::device::Context;
use crate::device::cuda::{Launch, Stream, kernels};
use crate::error::Result;
use crate::tensor::{DType, Tensor};

kernels!(KERNELS, "pool");

/// As the source has them.
const CHANNELS: usize = 32;
const LINES: u32 = 8;

/// Pixels that are summed in one go at least, and the most parts of an image.
const LEAST_PIXELS: usize = 64;
const MOST_PARTS: usize = 256;

/// [`super::pool`] without recording, of the type of x.
pub fn pool(cx: &Context, stream: &Arc<Stream>, x: &Tensor) -> Result<Tensor> {
    let [samples, height, width, channels] = x.dims_of::<4>("pool input")?;
    let precision = x.precision("pool input")?;
    let pixels = height * width;
    if x.elements() == 0 {
        return Tensor::zeros(cx, "pool", &[samples, channels], x.dtype());
    }
    let part = pixels.div_ceil(MOST_PARTS).max(LEAST_PIXELS);
    let parts = pixels.div_ceil(part);
    let mut sums = Tensor::new(cx, "pool sums", &[samples, parts, channels], DType::F32)?;
    let mut out = Tensor::new(cx, "pool", &[samples, channels], x.dtype())?;
    let (input, sums_at, to) = (x.on(cx, stream)?, sums.on_mut(stream)?, out.on_mut(stream)?);
    let launch = |parts: usize| Launch {
        grid: [(samples * channels.div_ceil(CHANNELS)) as u32, parts as u32, 1],
        block: [CHANNELS as u32, LINES, 1],
        shared_bytes: 0,
    };
    // SAFETY: as the kernels declare; the sums have a row of C numbers for each part of a sample, the result one for
    // each sample.
    unsafe {
        let parameters = (pixels as i64, channels as i32, part as i64);
        stream.launch(
            &KERNELS,
            "pool_parts",
            Some(precision),
            launch(parts),
            &[&input.address(), &sums_at, &parameters.0, &parameters.1, &parameters.2],
        )?;
        stream.launch(
            &KERNELS,
            "pool_means",
            Some(precision),
            launch(1),
            &[&sums_at, &to, &(parts as i64), &(channels as i32), &(1.0 / pixels as f32)],
        )?;
    }
    Ok(out)
}

/// A share of the mean's gradient for each of its `pixels`.
pub fn spread(
    cx: &Context,
    stream: &Arc<Stream>,
    g: &Tensor,
    dims: &[usize],
    pixels: usize,
) -> Result<Tensor> {
    let mut out = Tensor::new(cx, "gradient of a pool", dims, DType::F32)?;
    let count = out.elements();
    if count == 0 {
        return Ok(out);
    }
    let (from, to) = (g.on(cx, stream)?, out.on_mut(stream)?);
    // SAFETY: as the kernel declares; g has a row of C numbers for each sample of so many pixels.
    unsafe {
        stream.launch(
            &KERNELS,
            "pool_gradient",
            None,
            Launch::elements(count),
            &[
                &from.address(),
                &to,
                &(count as i64),
                &(pixels as i64),
                &(g.shape().channels() as i32),
                &(1.0 / pixels as f32),
            ],
        )?;
    }
    Ok(out)
}
