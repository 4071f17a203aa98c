//! The gradients of a depthwise convolution.
//!
//! `dz[n,y,x,c*G+g] = sum over the i,j,u,v through which the result sees pixel (y, x) of weight[c,g,u,v] *
//! dy[n,i,j,c]`, which with a replicated edge are more at the edge; `dweight[c,g,u,v] = sum over n,i,j of dy[n,i,j,c] *
//! z[n, i*s+u-k/2, j*s+v-k/2, c*G+g]`; `dbias[c] = sum of dy[.., c]`.

mod cpu;
mod cuda;

use std::sync::Arc;

use super::{DepthwiseConv, Padding, Sizes, join};
use crate::device::Context;
use crate::device::cuda::Stream;
use crate::error::Result;
use crate::ops::{kernels, sums};
use crate::tensor::autograd::{Flow, Tracked};
use crate::tensor::{DType, Tensor};

/// Channels that one task sums the weight's gradient of: the sums of all taps stay in the first cache.
const CHANNELS: usize = 256;

/// The fewest output pixels of such a task, and the most tasks that share the pixels of a channel.
const LEAST_PIXELS: usize = 256;
const MOST_PARTS: usize = 64;

/// What the backward pass needs.
pub struct Backward {
    shape: Sizes,
    padding: Padding,
    dims: [usize; 3],
    /// For the gradient of the weight.
    inputs: Option<(Tensor, Option<Tensor>)>,
    /// For that of the inputs.
    weight: Option<Tensor>,
    /// Channels of x and of the skip, and where their gradients go.
    x: (usize, Option<Tracked>),
    skip: (usize, Option<Tracked>),
    to_weight: Option<Tracked>,
    to_bias: Option<Tracked>,
}

impl Backward {
    pub fn new(x: &Tensor, skip: Option<&Tensor>, p: &DepthwiseConv, shape: Sizes) -> Self {
        let part = |t: Option<&Tensor>| t.map_or((0, None), |t| (t.shape().channels(), t.tracked()));
        let to_weight = p.weight.tracked();
        let (from_x, from_skip) = (part(Some(x)), part(skip));
        Backward {
            shape,
            padding: p.padding,
            dims: [x.dims()[0], shape.height, shape.width],
            inputs: to_weight.map(|_| (x.clone(), skip.cloned())),
            weight: from_x.1.or(from_skip.1).map(|_| p.weight.clone()),
            x: from_x,
            skip: from_skip,
            to_weight,
            to_bias: p.bias.and_then(Tensor::tracked),
        }
    }

    pub fn run(self, cx: &Context, flow: &mut Flow) -> Result<()> {
        if let Some(stream) = cx.cuda()? {
            return self.run_on(cx, stream, flow);
        }
        if let Some(weight) = &self.weight {
            let groups = self.of_groups(cx, flow.gradient(), weight)?;
            flow.give(cx, self.x.1, |_| self.of_channels(cx, &groups, 0, self.x.0))?;
            flow.give(cx, self.skip.1, |_| self.of_channels(cx, &groups, self.x.0, self.skip.0))?;
        }
        if let Some((x, skip)) = &self.inputs {
            flow.give(cx, self.to_weight, |g| {
                let joined = match (skip, self.shape.groups) {
                    (None, 1) => x.clone(),
                    _ => join(cx, x, skip.as_ref(), self.shape.groups)?,
                };
                self.of_weight(cx, g, &joined)
            })?;
        }
        let channels = self.shape.channels;
        flow.give(cx, self.to_bias, |g| sums::columns(cx, "depthwise bias gradient", g.slice()?, channels))
    }

    fn run_on(self, cx: &Context, stream: &Arc<Stream>, flow: &mut Flow) -> Result<()> {
        let sizes = (self.shape, self.padding);
        let [n, h, w] = self.dims;
        if let Some(weight) = &self.weight {
            for (first, (count, to)) in [(0, self.x), (self.x.0, self.skip)] {
                flow.give(cx, to, |g| {
                    cuda::of_channels(cx, stream, (g, weight), sizes, ([n, h, w, count], first))
                })?;
            }
        }
        if let Some((x, skip)) = &self.inputs {
            let inputs = (x, skip.as_ref());
            flow.give(cx, self.to_weight, |g| cuda::of_weight(cx, stream, g, inputs, sizes))?;
        }
        flow.give(cx, self.to_bias, |g| sums::columns_on(cx, stream, "depthwise bias gradient", g))
    }

    /// The gradient of the joined inputs, group after group: `[G, N, H, W, C]`.
    fn of_groups(&self, cx: &Context, g: &Tensor, weight: &Tensor) -> Result<Tensor> {
        let Sizes { height, width, out_height, out_width, channels, groups, kernel, stride } = self.shape;
        let [n, ..] = self.dims;
        let weights = by_group(cx, weight)?;
        let weights = weights.slice::<f32>()?;
        let none = Tensor::zeros(cx, "depthwise bias", &[channels], DType::F32)?;
        let mut out =
            Tensor::new(cx, "depthwise gradient", &[groups, n, height, width, channels], DType::F32)?;
        let row = width * channels;
        let rows = kernels::rows_per_task(row);
        let size = kernel * kernel * channels;
        for (i, out) in out.slice_mut::<f32>()?.chunks_exact_mut((n * height * row).max(1)).enumerate() {
            let shape = Sizes {
                height: out_height,
                width: out_width,
                out_height: height,
                out_width: width,
                groups: 1,
                stride: 1,
                ..self.shape
            };
            let job = super::cpu::Job {
                shape,
                padding: self.padding,
                input: g.slice()?,
                weight: &weights[i * size..][..size],
                bias: none.slice()?,
                then: super::cpu::Then::None,
            };
            let job = cpu::InputJob { job, stride };
            kernels::parallel_chunks(cx, out, rows * row, |i, part| cpu::input_rows(&job, i * rows, part))?;
        }
        Ok(out)
    }

    /// Channels `first..first + count` of the concatenation.
    fn of_channels(&self, cx: &Context, of_groups: &Tensor, first: usize, count: usize) -> Result<Tensor> {
        let Sizes { channels, groups, .. } = self.shape;
        let [n, h, w] = self.dims;
        if groups == 1 && count == channels {
            return of_groups.reshape(&[n, h, w, channels]);
        }
        let values = of_groups.slice::<f32>()?;
        let of_group = n * h * w * channels;
        let mut out = Tensor::new(cx, "depthwise gradient", &[n, h, w, count], DType::F32)?;
        let pixels = kernels::rows_per_task(count);
        kernels::parallel_chunks(cx, out.slice_mut()?, pixels * count, |i, part| {
            for (pixel, out) in (i * pixels..).zip(part.chunks_exact_mut(count)) {
                let of = |g: usize| &values[g * of_group + pixel * channels..][..channels];
                super::cpu::split_pixel(of, groups, first, out);
            }
        })?;
        Ok(out)
    }

    fn of_weight(&self, cx: &Context, g: &Tensor, joined: &Tensor) -> Result<Tensor> {
        let Sizes { out_height, out_width, channels, groups, kernel, .. } = self.shape;
        let rows = self.dims[0] * out_height;
        let per_part = LEAST_PIXELS.div_ceil(out_width).max(rows.div_ceil(MOST_PARTS));
        let parts = rows.div_ceil(per_part);
        let distance = CHANNELS.min(channels);
        let chunks = channels.div_ceil(distance);
        let taps = kernel * kernel * groups;
        let job = cpu::WeightJob {
            shape: self.shape,
            padding: self.padding,
            input: joined.slice()?,
            gradient: g.slice()?,
        };
        let mut partial = Tensor::new(cx, "depthwise sums", &[chunks, parts, taps * distance], DType::F32)?;
        kernels::parallel_chunks(cx, partial.slice_mut()?, taps * distance, |i, sums| {
            let (row, channel) = (i % parts * per_part, i / parts * distance);
            let part = cpu::Part {
                rows: row..rows.min(row + per_part),
                channels: channel..channels.min(channel + distance),
                distance,
            };
            cpu::weight_part(&job, &part, sums);
        })?;
        let mut out = Tensor::new(cx, "depthwise gradient", &[channels, groups, kernel, kernel], DType::F32)?;
        for (i, out) in out.slice_mut::<f32>()?.chunks_mut((distance * taps).max(1)).enumerate() {
            let chunk = partial.narrow(i, 1)?.reshape(&[parts, taps * distance])?;
            let sums = sums::add_parts(cx, "depthwise sums", &chunk)?;
            let sums = sums.slice::<f32>()?;
            for (c, out) in out.chunks_exact_mut(taps).enumerate() {
                for (at, value) in out.iter_mut().enumerate() {
                    let (g, tap) = (at / (kernel * kernel), at % (kernel * kernel));
                    *value = sums[(tap * groups + g) * distance + c];
                }
            }
        }
        Ok(out)
    }
}

/// The weight `[C, G, k, k]` as `[G, k*k, C]`.
fn by_group(cx: &Context, weight: &Tensor) -> Result<Tensor> {
    let [channels, groups, kernel, _] = weight.dims_of::<4>("depthwise weight")?;
    let taps = kernel * kernel;
    let wide = kernels::widened(cx, "depthwise weight", weight)?;
    let source = wide.slice::<f32>()?;
    let mut out = Tensor::new(cx, "depthwise weight", &[groups, taps, channels], DType::F32)?;
    let target = out.slice_mut::<f32>()?;
    for (c, of_channel) in source.chunks_exact(groups * taps).enumerate() {
        for (at, value) in of_channel.iter().enumerate() {
            target[at * channels + c] = *value;
        }
    }
    Ok(out)
}
