//! Distances of features on a GPU.

use std::sync::Arc;

use crate::device::Context;
use crate::device::cuda::{Launch, Parameter, Precision, Stream, kernels};
use crate::error::{Error, Result};
use crate::ops::reduce::Numbers;
use crate::tensor::{DType, Tensor};

kernels!(KERNELS, "feature_distance");

const THREADS: u32 = 256;
/// A warp for each.
const PIXELS_PER_BLOCK: usize = 8;
/// Enough to fill a GPU, few enough for one block to add up.
const MOST_BLOCKS: usize = 1024;

/// [`super::feature_distance`] without recording.
pub fn mean(cx: &Context, stream: &Arc<Stream>, [x, y]: [&Tensor; 2], w: &Tensor) -> Result<Tensor> {
    let (channels, precision) = (w.elements(), x.precision("features")?);
    if y.dtype() != x.dtype() {
        return Err(Error::argument("features", format!("two maps of type {}", x.dtype()), y.dtype()));
    }
    let pixels = x.elements() / channels;
    let blocks = pixels.div_ceil(PIXELS_PER_BLOCK).min(MOST_BLOCKS);
    let sums = Numbers::new(stream, "feature distances", blocks)?;
    let mut out = Tensor::new(cx, "feature distance", &[1], DType::F32)?;
    let (x, y) = (x.on(cx, stream)?, y.on(cx, stream)?);
    let w = w.on_as(cx, stream, "weights of features", Precision::F32)?;
    let (sums_at, to) = (sums.address(), out.on_mut(stream)?);
    let (count, width, of_blocks) = (pixels as i64, channels as i32, blocks as i32);
    let parameters: [&dyn Parameter; 6] =
        [&x.address(), &y.address(), &w.address(), &sums_at, &count, &width];
    // SAFETY: as the kernel declares; x and y have so many pixels, w a number for each channel, the sums one for each
    // block.
    unsafe {
        let launch = Launch::blocks(blocks, THREADS);
        stream.launch(&KERNELS, "feature_distances", Some(precision), launch, &parameters)?;
    }
    // SAFETY: as the kernel declares; there are so many sums.
    unsafe {
        stream.launch(
            &KERNELS,
            "feature_distance_mean",
            None,
            Launch::blocks(1, THREADS),
            &[&sums_at, &to, &of_blocks, &count],
        )?;
    }
    Ok(out)
}

/// The gradient by x from that of the distance, `F32`.
pub fn gradient(
    cx: &Context,
    stream: &Arc<Stream>,
    g: &Tensor,
    [x, y]: [&Tensor; 2],
    w: &Tensor,
) -> Result<Tensor> {
    let channels = w.elements();
    let pixels = x.elements() / channels;
    let mut dx = Tensor::new(cx, "feature distance gradient", x.dims(), DType::F32)?;
    let to = dx.on_mut(stream)?;
    let [g, x, y, w] = [(g, "a gradient"), (x, "features"), (y, "features"), (w, "weights of features")]
        .map(|(tensor, what)| tensor.on_as(cx, stream, what, Precision::F32));
    let (g, x, y, w) = (g?, x?, y?, w?);
    let parameters: [&dyn Parameter; 7] =
        [&g.address(), &x.address(), &y.address(), &w.address(), &to, &(pixels as i64), &(channels as i32)];
    // SAFETY: as the kernel declares; x, y and dx have so many pixels, w a number for each channel, g is one.
    unsafe {
        let launch = Launch::blocks(pixels.div_ceil(PIXELS_PER_BLOCK), THREADS);
        stream.launch(&KERNELS, "feature_distance_gradient", None, launch, &parameters)?;
    }
    Ok(dx)
}
