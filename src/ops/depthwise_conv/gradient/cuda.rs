//! The gradients of a depthwise convolution on a GPU.

use std::sync::Arc;

use super::super::{Padding, Sizes};
use crate::device::Context;
use crate::device::cuda::{Launch, Parameter, Precision, Stream, kernels};
use crate::error::Result;
use crate::ops::sums;
use crate::tensor::{DType, Tensor};

kernels!(KERNELS, "depthwise_gradient");

/// As the source has them.
const CHANNELS: usize = 32;
const LINES: u32 = 8;
const WARP: usize = 32;

/// Warps of a block that finds the input's gradient, and channels of a warp.
const WARPS: usize = 8;
const CHUNK: usize = 128;

/// The fewest output pixels of a part of the weight's gradient, and the most parts.
const LEAST_PIXELS: usize = 128;
const MOST_PARTS: usize = 64;

/// As the source has it.
#[repr(C)]
#[derive(Clone, Copy)]
struct Backward {
    sizes: [i32; 4],
    channels: i32,
    groups: i32,
    kernel: i32,
    stride: i32,
    replicate: i32,
}

// SAFETY: as `Backward` in the source.
unsafe impl Parameter for Backward {}

impl Backward {
    fn new(sizes: Sizes, padding: Padding) -> Self {
        Backward {
            sizes: [sizes.height, sizes.width, sizes.out_height, sizes.out_width].map(|size| size as i32),
            channels: sizes.channels as i32,
            groups: sizes.groups as i32,
            kernel: sizes.kernel as i32,
            stride: sizes.stride as i32,
            replicate: i32::from(padding == Padding::Replicate),
        }
    }
}

/// The gradient of `dims[3]` channels of the inputs side by side, from channel `first` on: `dims` `[N, H, W, ..]`.
pub fn of_channels(
    cx: &Context,
    stream: &Arc<Stream>,
    (g, weight): (&Tensor, &Tensor),
    (sizes, padding): (Sizes, Padding),
    (dims, first): ([usize; 4], usize),
) -> Result<Tensor> {
    let mut out = Tensor::new(cx, "depthwise gradient", &dims, DType::F32)?;
    if out.elements() == 0 {
        return Ok(out);
    }
    let gradient = g.on(cx, stream)?;
    let weight = weight.on_as(cx, stream, "depthwise weight", Precision::F32)?;
    let to = out.on_mut(stream)?;
    let pixels = dims[0] * dims[1] * dims[2];
    let mut launch = Launch::blocks(pixels.div_ceil(WARPS), (WARPS * WARP) as u32);
    launch.grid[1] = dims[3].div_ceil(CHUNK) as u32;
    // SAFETY: as the kernel declares; the shapes are those of a convolution that was computed.
    unsafe {
        stream.launch(
            &KERNELS,
            "depthwise_input_gradient",
            None,
            launch,
            &[
                &gradient.address(),
                &weight.address(),
                &to,
                &Backward::new(sizes, padding),
                &(pixels as i64),
                &(first as i32),
                &(dims[3] as i32),
                &(CHUNK as i32),
            ],
        )?;
    }
    Ok(out)
}

/// The gradient of the weight, `[C, G, k, k]`.
pub fn of_weight(
    cx: &Context,
    stream: &Arc<Stream>,
    g: &Tensor,
    (x, skip): (&Tensor, Option<&Tensor>),
    (sizes, padding): (Sizes, Padding),
) -> Result<Tensor> {
    let Sizes { channels, groups, kernel, .. } = sizes;
    let rows = x.dims()[0] * sizes.out_height;
    let per_part = LEAST_PIXELS.div_ceil(sizes.out_width).max(rows.div_ceil(MOST_PARTS));
    let parts = rows.div_ceil(per_part);
    let dims = [channels, groups, kernel, kernel];
    let mut partial = Tensor::new(cx, "depthwise sums", &[parts, dims.iter().product()], DType::F32)?;
    if rows == 0 {
        return Tensor::zeros(cx, "depthwise gradient", &dims, DType::F32);
    }
    let gradient = g.on(cx, stream)?;
    let first = x.on_as(cx, stream, "depthwise input", Precision::F32)?;
    let second = skip.map(|skip| skip.on_as(cx, stream, "depthwise skip", Precision::F32)).transpose()?;
    let to = partial.on_mut(stream)?;
    let name = match kernel {
        1 => "depthwise_weight_sums_1",
        3 => "depthwise_weight_sums_3",
        5 => "depthwise_weight_sums_5",
        _ => "depthwise_weight_sums_7",
    };
    let launch = Launch {
        grid: [channels.div_ceil(CHANNELS) as u32, parts as u32, groups as u32],
        block: [CHANNELS as u32, LINES, 1],
        shared_bytes: 0,
    };
    // SAFETY: as the kernel declares; the shapes are those of a convolution that was computed, and the sums have a
    // weight for each part.
    unsafe {
        stream.launch(
            &KERNELS,
            name,
            None,
            launch,
            &[
                &first.address(),
                &second.as_ref().map_or(0, |skip| skip.address()),
                &gradient.address(),
                &to,
                &Backward::new(sizes, padding),
                &(x.shape().channels() as i32),
                &(rows as i64),
                &(per_part as i32),
            ],
        )?;
    }
    sums::add_parts(cx, "depthwise sums", &partial)?.reshape(&dims)
}
