//! Layer normalisation over channels (Ba et al. 2016).

pub(crate) mod cpu;
mod cuda;
mod gradient;
#[cfg(test)]
mod tests;

use crate::device::Context;
use crate::error::Result;
use crate::ops::kernels;
use crate::ops::work;
use crate::tensor::autograd::{record, records};
use crate::tensor::{DType, Tensor};

/// The parameters of [`layer_norm`].
#[derive(Debug, Clone, Copy)]
pub struct LayerNorm<'a> {
    /// Added to the variance.
    pub eps: f32,
    /// Weight and bias, `[C]` each, of any float type.
    pub affine: Option<(&'a Tensor, &'a Tensor)>,
    /// One more factor for all channels alike, less 1: one element of any float type.
    pub scale: Option<&'a Tensor>,
    /// One more summand for all channels alike: one element of any float type.
    pub shift: Option<&'a Tensor>,
}

impl Default for LayerNorm<'_> {
    fn default() -> Self {
        LayerNorm { eps: 1e-6, affine: None, scale: None, shift: None }
    }
}

/// `y = ((x - mean) / sqrt(var + eps) * w + b) * (1 + scale) + shift` over the last axis; the variance is the biased one.
///
/// # Shapes
/// `x` and the result: `[.., C]`, `F32`; on a GPU of any float type.
///
/// # Errors
/// `InvalidArgument` if `x` is not `F32` or the affine parameters do not have `C` elements, or the scale
/// or shift not one.
pub fn layer_norm(cx: &Context, x: &Tensor, p: &LayerNorm) -> Result<Tensor> {
    let _span = cx.op("layer_norm").working(|| work::moving(&[x, x]));
    apart(cx, x, p)
}

/// [`layer_norm`] of what is not needed afterwards: on the CPU in place if nobody else owns the memory of `x` and no tape
/// records.
///
/// # Errors
/// As [`layer_norm`].
pub fn layer_norm_in_place(cx: &Context, x: Tensor, p: &LayerNorm) -> Result<Tensor> {
    let _span = cx.op("layer_norm").working(|| work::moving(&[&x, &x]));
    let (weight, bias) = p.affine.unzip();
    if cx.cuda()?.is_some() || records(cx, &[Some(&x), weight, bias, p.scale, p.shift]) {
        return apart(cx, &x, p);
    }
    let channels = x.shape().channels();
    let held = Held::new(cx, p, channels)?;
    let rows = held.rows(channels)?;
    let chunk = kernels::rows_per_task(channels) * channels;
    let out = kernels::in_place(cx, "layer norm", x, chunk, |_, part| {
        cpu::normalize_rows_in_place(&rows, part);
    })?;
    Ok(out.constant())
}

/// [`layer_norm`] into memory of its own, without a span.
fn apart(cx: &Context, x: &Tensor, p: &LayerNorm) -> Result<Tensor> {
    let out = match cx.cuda()? {
        Some(stream) => cuda::normalize(cx, stream, x, p)?,
        None => {
            let mut out = Tensor::new(cx, "layer norm", x.dims(), DType::F32)?;
            normalize(cx, x.slice()?, x.shape().channels(), p, out.slice_mut()?)?;
            out
        }
    };
    let (weight, bias) = p.affine.unzip();
    record(cx, out, &[Some(x), weight, bias, p.scale, p.shift], || {
        let backward = gradient::Backward::new(x, p);
        move |cx, flow| backward.run(cx, flow)
    })
}

/// [`layer_norm`] of rows of `channels` numbers, into `out`, without recording.
///
/// # Errors
/// As [`layer_norm`].
pub(crate) fn normalize(
    cx: &Context,
    input: &[f32],
    channels: usize,
    p: &LayerNorm,
    out: &mut [f32],
) -> Result<()> {
    Held::new(cx, p, channels)?.normalize(cx, input, channels, out)
}

/// The parameters, widened.
struct Held {
    eps: f32,
    affine: Option<(Tensor, Tensor)>,
    /// 1 + scale.
    scale: f32,
    shift: f32,
}

impl Held {
    fn new(cx: &Context, p: &LayerNorm, channels: usize) -> Result<Self> {
        let affine = match p.affine {
            Some((weight, bias)) => Some((
                kernels::channel_vector(cx, "layer norm weight", weight, channels)?,
                kernels::channel_vector(cx, "layer norm bias", bias, channels)?,
            )),
            None => None,
        };
        let scalar = |what, tensor: Option<&Tensor>| tensor.map_or(Ok(0.0), |t| kernels::scalar(what, t));
        let (scale, shift) = (scalar("layer norm scale", p.scale)?, scalar("layer norm shift", p.shift)?);
        Ok(Held { eps: p.eps, affine, scale: 1.0 + scale, shift })
    }

    fn rows(&self, channels: usize) -> Result<cpu::Rows<'_>> {
        let affine = match &self.affine {
            Some((weight, bias)) => Some((weight.slice::<f32>()?, bias.slice::<f32>()?)),
            None => None,
        };
        Ok(cpu::Rows { channels, eps: self.eps, affine, scale: self.scale, shift: self.shift })
    }

    fn normalize(&self, cx: &Context, input: &[f32], channels: usize, out: &mut [f32]) -> Result<()> {
        let rows = self.rows(channels)?;
        let chunk = kernels::rows_per_task(channels) * channels;
        kernels::parallel_chunks(cx, out, chunk, |i, part| {
            cpu::normalize_rows(&rows, &input[i * chunk..][..part.len()], part);
        })
    }
}
