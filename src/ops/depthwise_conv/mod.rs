//! Depthwise convolution, and the grouped one that joins a skip: each output channel sees its own few inputs.

mod cpu;
mod cuda;
mod gradient;
#[cfg(test)]
mod tests;

use crate::device::Context;
use crate::device::profile::Work;
use crate::error::{Error, Result};
use crate::ops::activation::Activation;
use crate::ops::elementwise::{activate, affine_channels};
use crate::ops::kernels;
use crate::ops::layer_norm::{LayerNorm, layer_norm};
use crate::ops::scaled_residual::scaled_residual;
use crate::ops::work;
use crate::tensor::autograd::{record, records};
use crate::tensor::{DType, Tensor};

/// The largest kernel: 7 x 7.
pub const MAX_KERNEL: usize = 7;

/// Tasks per thread that even out threads of unequal speed.
const TASKS_PER_THREAD: usize = 4;

/// The most output rows of a task, unless they are short.
const MOST_ROWS: usize = 16;

/// What lies beyond the edge of the image, `k/2` pixels deep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Padding {
    /// Zeros.
    Zero,
    /// The nearest pixel of the image.
    Replicate,
}

/// What follows the convolution, done for a pixel while its channels are still in cache.
#[derive(Debug, Clone, Copy)]
pub enum Then<'a> {
    /// Nothing.
    None,
    /// Layer normalisation over the channels.
    LayerNorm {
        /// Added to the variance.
        eps: f32,
    },
    /// `residual + gain * y`.
    ScaledResidual {
        /// The factor: one element of any float type.
        gain: &'a Tensor,
        /// Of the shape of the result.
        residual: &'a Tensor,
    },
    /// `activation(y * scale + shift)`: a folded batch normalisation.
    ChannelAffine {
        /// `[C]`.
        scale: &'a Tensor,
        /// `[C]`.
        shift: &'a Tensor,
        /// The nonlinearity.
        activation: Activation,
    },
}

/// The parameters of [`depthwise_conv`].
#[derive(Debug, Clone, Copy)]
pub struct DepthwiseConv<'a> {
    /// `[C, G, k, k]`, k odd: output channel i reads the input channels `i*G .. (i+1)*G`.
    pub weight: &'a Tensor,
    /// `[C]`.
    pub bias: Option<&'a Tensor>,
    /// Distance between the pixels that are computed.
    pub stride: usize,
    /// What lies beyond the edge.
    pub padding: Padding,
    /// What follows.
    pub then: Then<'a>,
}

/// `y[n,i,j,c] = bias[c] + sum over g,u,v of weight[c,g,u,v] * z[n, i*s+u-k/2, j*s+v-k/2, c*G+g]`, then
/// [`Then`], where z is `x`, or the concatenation of `x` and `skip` over channels.
///
/// # Shapes
/// `x` `[N, H, W, X]`, `skip` `[N, H, W, S]`, with X + S = C * G; the result
/// `[N, (H + 2(k/2) - k)/s + 1, (W + 2(k/2) - k)/s + 1, C]`. For k odd and s = 1 that is `[N, H, W, C]`. `F32`, on a
/// GPU of any float type, and the result of that of activations.
///
/// # Errors
/// `InvalidArgument` if shapes do not fit together, the kernel is not square, odd and at most
/// [`MAX_KERNEL`], or the stride is 0.
pub fn depthwise_conv(cx: &Context, x: &Tensor, skip: Option<&Tensor>, p: &DepthwiseConv) -> Result<Tensor> {
    let span = cx.op("depthwise_conv");
    let [first, second] = p.then.tensors();
    let composed = !matches!(p.then, Then::None);
    if composed && records(cx, &[Some(x), skip, Some(p.weight), p.bias, first, second]) {
        let y = depthwise_conv(cx, x, skip, &DepthwiseConv { then: Then::None, ..*p })?;
        return p.then.apply(cx, y);
    }
    let shape = shape(x, skip, p)?;
    p.then.check(&[x.dims()[0], shape.out_height, shape.out_width, shape.channels])?;
    let _span = span.working(|| p.work(x, skip, shape));
    let out = match cx.cuda()? {
        Some(stream) => cuda::convolve(cx, stream, (x, skip), p, shape)?,
        None => convolve_on_host(cx, (x, skip), p, shape)?,
    };
    record(cx, out, &[Some(x), skip, Some(p.weight), p.bias], || {
        let backward = gradient::Backward::new(x, skip, p, shape);
        move |cx, flow| backward.run(cx, flow)
    })
}

impl DepthwiseConv<'_> {
    /// Of what follows only a residual is read anew: the rest works on what is at hand.
    fn work(&self, x: &Tensor, skip: Option<&Tensor>, shape: Sizes) -> Work {
        let pixels = (x.dims()[0] * shape.out_height * shape.out_width) as u64;
        let flops = 2 * pixels * self.weight.elements() as u64;
        let residual = match self.then {
            Then::ScaledResidual { residual, .. } => Some(residual),
            _ => None,
        };
        let others = [skip, residual].into_iter().flatten().map(|other| work::moving(&[other]).bytes);
        let read = work::moving(&[x, self.weight]).bytes + others.sum::<u64>();
        Work { flops, bytes: read + pixels * shape.channels as u64 * x.dtype().size() as u64 }
    }
}

fn convolve_on_host(
    cx: &Context,
    (x, skip): (&Tensor, Option<&Tensor>),
    p: &DepthwiseConv,
    shape: Sizes,
) -> Result<Tensor> {
    let joined = match (skip, shape.groups) {
        (None, 1) => x.clone(),
        _ => join(cx, x, skip, shape.groups)?,
    };
    let weight = reorder(cx, p.weight)?;
    let bias = match p.bias {
        Some(bias) => kernels::widened(cx, "depthwise bias", bias)?,
        None => Tensor::zeros(cx, "depthwise bias", &[shape.channels], DType::F32)?,
    };
    let dims = [x.dims()[0], shape.out_height, shape.out_width, shape.channels];
    let then = HeldThen::new(cx, &p.then)?;
    let job = cpu::Job {
        shape,
        padding: p.padding,
        input: joined.slice()?,
        weight: weight.slice()?,
        bias: bias.slice()?,
        then: then.borrow()?,
    };
    let mut out = Tensor::new(cx, "depthwise convolution", &dims, DType::F32)?;
    let row = shape.out_width * shape.channels;
    let rows = rows_per_task(cx, dims[0] * dims[1], row);
    kernels::parallel_chunks(cx, out.slice_mut()?, rows * row, |i, part| {
        cpu::rows(&job, i * rows, part);
    })?;
    Ok(out)
}

/// Output rows of a task: neighbours, so that each input row is fetched once and not once for every row of the kernel.
fn rows_per_task(cx: &Context, rows: usize, row: usize) -> usize {
    let even = rows.div_ceil(TASKS_PER_THREAD * cx.device().threads());
    kernels::rows_per_task(row).max(even.min(MOST_ROWS))
}

impl Then<'_> {
    fn tensors(&self) -> [Option<&Tensor>; 2] {
        match *self {
            Then::None | Then::LayerNorm { .. } => [None, None],
            Then::ScaledResidual { gain, residual } => [Some(gain), Some(residual)],
            Then::ChannelAffine { scale, shift, .. } => [Some(scale), Some(shift)],
        }
    }

    /// `dims` are those of the result.
    fn check(&self, dims: &[usize; 4]) -> Result<()> {
        let expect = |what, tensor: &Tensor, count: usize| match tensor.elements() == count {
            true => Ok(()),
            false => Err(Error::argument(what, format!("{count} elements"), tensor.shape())),
        };
        match *self {
            Then::None | Then::LayerNorm { .. } => Ok(()),
            Then::ScaledResidual { gain, residual } => {
                if residual.dims() != dims {
                    return Err(Error::argument("depthwise residual", format!("{dims:?}"), residual.shape()));
                }
                expect("depthwise gain", gain, 1)
            }
            Then::ChannelAffine { scale, shift, .. } => {
                expect("depthwise scale", scale, dims[3])?;
                expect("depthwise shift", shift, dims[3])
            }
        }
    }

    /// What follows as ops of their own, which record themselves.
    fn apply(&self, cx: &Context, y: Tensor) -> Result<Tensor> {
        match *self {
            Then::None => Ok(y),
            Then::LayerNorm { eps } => layer_norm(cx, &y, &LayerNorm { eps, ..LayerNorm::default() }),
            Then::ScaledResidual { gain, residual } => scaled_residual(cx, &y, gain, residual),
            Then::ChannelAffine { scale, shift, activation } => {
                activate(cx, affine_channels(cx, y, scale, shift)?, activation)
            }
        }
    }
}

/// Sizes that are known to fit together.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    height: usize,
    width: usize,
    out_height: usize,
    out_width: usize,
    channels: usize,
    groups: usize,
    kernel: usize,
    stride: usize,
}

fn shape(x: &Tensor, skip: Option<&Tensor>, p: &DepthwiseConv) -> Result<Sizes> {
    let [n, height, width, from_x] = x.dims_of::<4>("depthwise input")?;
    let from_skip = match skip {
        None => 0,
        Some(skip) => match skip.dims_of::<4>("depthwise skip")? {
            [sn, sh, sw, channels] if [sn, sh, sw] == [n, height, width] => channels,
            _ => {
                return Err(Error::argument(
                    "depthwise skip",
                    format!("the size of {}", x.shape()),
                    skip.shape(),
                ));
            }
        },
    };
    let [channels, groups, kernel, across] = p.weight.dims_of::<4>("depthwise weight")?;
    if kernel != across || kernel % 2 == 0 || kernel > MAX_KERNEL {
        let expected = format!("a square odd kernel of at most {MAX_KERNEL}");
        return Err(Error::argument("depthwise weight", expected, p.weight.shape()));
    }
    if channels * groups != from_x + from_skip || channels == 0 {
        let expected = format!("{} input channels", channels * groups);
        return Err(Error::argument("depthwise input", expected, from_x + from_skip));
    }
    if p.stride == 0 || height == 0 || width == 0 {
        return Err(Error::argument("depthwise convolution", "a stride and a size of at least 1", x.shape()));
    }
    if let Some(bias) = p.bias.filter(|bias| bias.elements() != channels) {
        return Err(Error::argument("depthwise bias", format!("{channels} elements"), bias.shape()));
    }
    let out = |size: usize| (size - 1) / p.stride + 1;
    let (out_height, out_width) = (out(height), out(width));
    Ok(Sizes { height, width, out_height, out_width, channels, groups, kernel, stride: p.stride })
}

/// `x` and `skip` side by side as `[.., G, C]`: entry (g, c) is channel `c*G + g` of the concatenation.
fn join(cx: &Context, x: &Tensor, skip: Option<&Tensor>, groups: usize) -> Result<Tensor> {
    let [n, h, w, from_x] = x.dims_of::<4>("depthwise input")?;
    let from_skip = skip.map_or(0, |s| s.shape().channels());
    let all = from_x + from_skip;
    let channels = all / groups;
    let first = x.slice::<f32>()?;
    let second = match skip {
        Some(skip) => skip.slice::<f32>()?,
        None => &[],
    };
    let mut out = Tensor::new(cx, "joined skip", &[n, h, w, all], DType::F32)?;
    let pixels = kernels::rows_per_task(all);
    kernels::parallel_chunks(cx, out.slice_mut()?, pixels * all, |i, part| {
        for (pixel, row) in (i * pixels..).zip(part.chunks_exact_mut(all)) {
            cpu::join_pixel(
                &first[pixel * from_x..][..from_x],
                &second[pixel * from_skip..][..from_skip],
                channels,
                row,
            );
        }
    })?;
    Ok(out)
}

/// The weight `[C, G, k, k]` as `[k*k, G, C]`, so that channels are contiguous as they are in the image.
fn reorder(cx: &Context, weight: &Tensor) -> Result<Tensor> {
    let [channels, groups, kernel, _] = weight.dims_of::<4>("depthwise weight")?;
    let taps = kernel * kernel;
    let wide = kernels::widened(cx, "depthwise weight", weight)?;
    let source = wide.slice::<f32>()?;
    let mut out = Tensor::new(cx, "depthwise weight", &[taps, groups, channels], DType::F32)?;
    let target = out.slice_mut::<f32>()?;
    for (c, of_channel) in source.chunks_exact(groups * taps).enumerate() {
        for (g, of_group) in of_channel.chunks_exact(taps).enumerate() {
            for (tap, value) in of_group.iter().enumerate() {
                target[(tap * groups + g) * channels + c] = *value;
            }
        }
    }
    Ok(out)
}

/// [`Then`] with its vectors widened.
enum HeldThen {
    None,
    LayerNorm(f32),
    Residual(f32, Tensor),
    Affine(Tensor, Tensor, Activation),
}

impl HeldThen {
    fn new(cx: &Context, then: &Then) -> Result<Self> {
        Ok(match *then {
            Then::None => HeldThen::None,
            Then::LayerNorm { eps } => HeldThen::LayerNorm(eps),
            Then::ScaledResidual { gain, residual } => {
                HeldThen::Residual(kernels::scalar("depthwise gain", gain)?, residual.clone())
            }
            Then::ChannelAffine { scale, shift, activation } => HeldThen::Affine(
                kernels::widened(cx, "depthwise scale", scale)?,
                kernels::widened(cx, "depthwise shift", shift)?,
                activation,
            ),
        })
    }

    fn borrow(&self) -> Result<cpu::Then<'_>> {
        Ok(match self {
            HeldThen::None => cpu::Then::None,
            HeldThen::LayerNorm(eps) => cpu::Then::LayerNorm(*eps),
            HeldThen::Residual(gain, residual) => cpu::Then::Residual(*gain, residual.slice()?),
            HeldThen::Affine(scale, shift, activation) => {
                cpu::Then::Affine(scale.slice()?, shift.slice()?, *activation)
            }
        })
    }
}
