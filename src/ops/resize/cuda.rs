//! Resizing on a GPU. The weights are computed there too: their number depends on the picture, and nothing is copied.

use std::sync::Arc;

use super::{Axis, Corners, Filter};
use crate::device::Context;
use crate::device::cuda::{Launch, Memory, Parameter, Stream, kernels};
use crate::error::Result;
use crate::tensor::{DType, Tensor};

kernels!(KERNELS, "resize");

/// One axis, as the source has it.
#[repr(C)]
#[derive(Clone, Copy)]
struct Stretched {
    scale: f64,
    support: f64,
    stretch: f64,
    input: i32,
    start: i32,
    output: i32,
    most: i32,
    cubic: i32,
}

// SAFETY: as `ResizeAxis` in the source.
unsafe impl Parameter for Stretched {}

/// The weights of an axis on the device.
struct Taps {
    axis: Stretched,
    /// The first pixel and the number of weights of each output pixel.
    pixels: Memory,
    weights: Memory,
}

impl Taps {
    fn new(stream: &Stream, axis: Axis, filter: Filter, corners: Corners) -> Result<Self> {
        let scale = axis.scale(corners);
        let stretch = scale.max(1.0);
        let support = filter.radius() * stretch;
        let most = axis.most_taps(support);
        let stretched = Stretched {
            scale,
            support,
            stretch,
            input: axis.input as i32,
            start: axis.start as i32,
            output: axis.output as i32,
            most: most as i32,
            cubic: i32::from(filter == Filter::Bicubic),
        };
        let pixels = stream.take("the weights of a resize", axis.output * size_of::<[i32; 2]>())?;
        let weights =
            stream.take("the weights of a resize", axis.output.saturating_mul(most * size_of::<f32>()))?;
        // SAFETY: as the kernel declares; there is room for two numbers and `most` weights of each output pixel.
        unsafe {
            stream.launch(
                &KERNELS,
                "resize_taps",
                None,
                Launch::elements(axis.output),
                &[&stretched, &pixels.address(), &weights.address()],
            )?;
        }
        Ok(Taps { axis: stretched, pixels, weights })
    }
}

/// [`super::resize_axes`] of a picture and to a size without sides of 0; of the type of the input, in F32 between.
pub fn resize(
    cx: &Context,
    stream: &Arc<Stream>,
    input: &Tensor,
    [vertical, horizontal]: [Axis; 2],
    (filter, corners): (Filter, Corners),
) -> Result<Tensor> {
    let [n, h, _, c] = input.dims_of("the input of a resize")?;
    let precision = input.precision("the input of a resize")?;
    let wide_dims = [n, h, horizontal.output, c];
    let mut wide = Tensor::new(cx, "a resized picture", &wide_dims, DType::F32)?;
    let dims = [n, vertical.output, horizontal.output, c];
    let mut out = Tensor::new(cx, "a resized picture", &dims, input.dtype())?;
    let from = input.on(cx, stream)?;
    let (wide_at, to) = (wide.on_mut(stream)?, out.on_mut(stream)?);
    let pass = |kernel, (from, to): (u64, u64), axis, count: usize, inner: usize| {
        let taps = Taps::new(stream, axis, filter, corners)?;
        // SAFETY: as the kernels declare; the input has pixels of `inner` numbers along the axis, and the result
        // `count` numbers.
        unsafe {
            stream.launch(
                &KERNELS,
                kernel,
                Some(precision),
                Launch::elements(count),
                &[
                    &from,
                    &to,
                    &taps.pixels.address(),
                    &taps.weights.address(),
                    &taps.axis,
                    &(count as i64),
                    &(inner as i32),
                ],
            )
        }
    };
    pass("resize_first", (from.address(), wide_at), horizontal, wide.elements(), c)?;
    pass("resize_second", (wide_at, to), vertical, out.elements(), horizontal.output * c)?;
    Ok(out)
}
