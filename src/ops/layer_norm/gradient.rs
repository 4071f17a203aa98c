//! The gradient of layer normalisation. Mean and variance of a row are computed again: it is read anyway.

use super::{Held, LayerNorm, cpu, cuda};
use crate::device::Context;
use crate::error::Result;
use crate::ops::{kernels, sums};
use crate::tensor::autograd::{Flow, Tracked};
use crate::tensor::{DType, Tensor};

/// What the backward pass needs.
pub struct Backward {
    x: Tensor,
    eps: f32,
    affine: Option<(Tensor, Tensor)>,
    scale: Option<Tensor>,
    shift: Option<Tensor>,
}

impl Backward {
    pub fn new(x: &Tensor, p: &LayerNorm) -> Self {
        Backward {
            x: x.clone(),
            eps: p.eps,
            affine: p.affine.map(|(weight, bias)| (weight.clone(), bias.clone())),
            scale: p.scale.cloned(),
            shift: p.shift.cloned(),
        }
    }

    fn parameters(&self) -> LayerNorm<'_> {
        LayerNorm {
            eps: self.eps,
            affine: self.affine.as_ref().map(|(weight, bias)| (weight, bias)),
            scale: self.scale.as_ref(),
            shift: self.shift.as_ref(),
        }
    }

    /// Where the gradients of weight, bias, scale and shift go.
    fn to_parameters(&self) -> [Option<Tracked>; 4] {
        let (weight, bias) = self.affine.as_ref().map(|(weight, bias)| (weight, bias)).unzip();
        [weight, bias, self.scale.as_ref(), self.shift.as_ref()].map(|p| p.and_then(Tensor::tracked))
    }

    pub fn run(self, cx: &Context, flow: &mut Flow) -> Result<()> {
        let g = flow.gradient().clone();
        let to = self.to_parameters();
        let shared = to.iter().any(Option::is_some);
        if let Some(stream) = cx.cuda()? {
            let asked = (self.x.tracked().is_some(), shared);
            let found = cuda::gradients(cx, stream, (&self.x, &g), &self.parameters(), asked)?;
            if let Some(dx) = found.dx {
                flow.give(cx, self.x.tracked(), |_| Ok(dx))?;
            }
            flow.give(cx, to[0], |_| found.of_affine.narrow(0, 1))?;
            flow.give(cx, to[1], |_| found.of_affine.narrow(1, 1))?;
            flow.give(cx, to[2], |_| found.of_scalars.narrow(0, 1))?;
            return flow.give(cx, to[3], |_| found.of_scalars.narrow(1, 1));
        }
        let held = Held::new(cx, &self.parameters(), self.x.shape().channels())?;
        let (dx, sums) = self.pass(cx, &held, &g, shared)?;
        flow.give(cx, self.x.tracked(), |_| Ok(dx))?;
        let (of_weight, of_bias) = sums.slice::<f32>()?.split_at(sums.elements() / 2);
        flow.give(cx, to[0], |_| scaled(cx, of_weight, held.scale))?;
        flow.give(cx, to[1], |_| scaled(cx, of_bias, held.scale))?;
        flow.give(cx, to[2], |_| of_scale(&held, of_weight, of_bias))?;
        flow.give(cx, to[3], |_| Tensor::from_slice(&[1], &[sums::total(of_bias)]))
    }

    /// The gradient of x, and the sums over all rows of `g * n` and of `g`, `[2 C]`. What nobody asks for is empty.
    fn pass(&self, cx: &Context, held: &Held, g: &Tensor, shared: bool) -> Result<(Tensor, Tensor)> {
        let channels = self.x.shape().channels();
        let count = self.x.shape().rows();
        let per_part = sums::rows_per_part(count);
        let parts = [count.div_ceil(per_part), if shared { 2 * channels } else { 0 }];
        let none = [0];
        let dims = if self.x.tracked().is_some() { self.x.dims() } else { &none };
        let mut dx = Tensor::new(cx, "layer norm gradient", dims, DType::F32)?;
        let mut parts = Tensor::new(cx, "layer norm sums", &parts, DType::F32)?;
        let (x, g) = (self.x.slice::<f32>()?, g.slice::<f32>()?);
        let rows = held.rows(channels)?;
        let chunk = per_part * channels;
        let outputs = ((dx.slice_mut()?, chunk), (parts.slice_mut()?, 2 * channels));
        kernels::parallel_pairs(cx, outputs.0, outputs.1, |i, dx, sums| {
            let range = i * chunk..x.len().min((i + 1) * chunk);
            cpu::gradient_rows(&rows, &x[range.clone()], &g[range], dx, sums);
        })?;
        Ok((dx, sums::add_parts(cx, "layer norm sums", &parts)?))
    }
}

/// A few numbers times `1 + scale`.
fn scaled(cx: &Context, values: &[f32], scale: f32) -> Result<Tensor> {
    let mut out = Tensor::new(cx, "layer norm gradient", &[values.len()], DType::F32)?;
    out.slice_mut::<f32>()?.iter_mut().zip(values).for_each(|(out, v)| *out = v * scale);
    Ok(out)
}

/// The sum of `g * (n w + b)`.
fn of_scale(held: &Held, of_weight: &[f32], of_bias: &[f32]) -> Result<Tensor> {
    let dot =
        |a: &[f32], b: &[f32]| -> f64 { a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum() };
    let sum = match &held.affine {
        None => sums::total(of_weight),
        Some((w, b)) => (dot(of_weight, w.slice()?) + dot(of_bias, b.slice()?)) as f32,
    };
    Tensor::from_slice(&[1], &[sum])
}
