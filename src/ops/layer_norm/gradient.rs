//! The gradient of layer normalisation. Mean and variance of a row are computed again: it is read anyway.

use super::{Held, LayerNorm, cpu};
use crate::device::Context;
use crate::error::Result;
use crate::ops::{kernels, sums};
use crate::tensor::autograd::{Flow, Tracked};
use crate::tensor::{DType, Tensor};

/// What the backward pass needs.
pub struct Backward {
    x: Tensor,
    held: Held,
    to_affine: Option<(Option<Tracked>, Option<Tracked>)>,
    to_scale: Option<Tracked>,
    to_shift: Option<Tracked>,
}

impl Backward {
    pub fn new(x: &Tensor, held: Held, p: &LayerNorm) -> Self {
        Backward {
            x: x.clone(),
            held,
            to_affine: p.affine.map(|(weight, bias)| (weight.tracked(), bias.tracked())),
            to_scale: p.scale.and_then(Tensor::tracked),
            to_shift: p.shift.and_then(Tensor::tracked),
        }
    }

    pub fn run(self, cx: &Context, flow: &mut Flow) -> Result<()> {
        let g = flow.gradient().clone();
        let channels = self.x.shape().channels();
        let (dx, sums) = self.pass(cx, &g, channels)?;
        flow.give(cx, self.x.tracked(), |_| Ok(dx))?;
        let (of_weight, of_bias) = sums.slice::<f32>()?.split_at(sums.elements() / 2);
        let scaled = |cx, values: &[f32]| self.scaled(cx, values);
        if let Some((to_weight, to_bias)) = self.to_affine {
            flow.give(cx, to_weight, |_| scaled(cx, of_weight))?;
            flow.give(cx, to_bias, |_| scaled(cx, of_bias))?;
        }
        flow.give(cx, self.to_scale, |_| self.of_scale(of_weight, of_bias))?;
        flow.give(cx, self.to_shift, |_| Tensor::from_slice(&[1], &[sums::total(of_bias)]))
    }

    /// The gradient of x, and the sums over all rows of `g * n` and of `g`, `[2 C]`. What nobody asks for is empty.
    fn pass(&self, cx: &Context, g: &Tensor, channels: usize) -> Result<(Tensor, Tensor)> {
        let shared = self.to_affine.is_some_and(|(weight, bias)| weight.is_some() || bias.is_some());
        let shared = shared || self.to_scale.is_some() || self.to_shift.is_some();
        let count = self.x.shape().rows();
        let per_part = sums::rows_per_part(count);
        let parts = [count.div_ceil(per_part), if shared { 2 * channels } else { 0 }];
        let none = [0];
        let dims = if self.x.tracked().is_some() { self.x.dims() } else { &none };
        let mut dx = Tensor::new(cx, "layer norm gradient", dims, DType::F32)?;
        let mut parts = Tensor::new(cx, "layer norm sums", &parts, DType::F32)?;
        let (x, g) = (self.x.slice::<f32>()?, g.slice::<f32>()?);
        let rows = self.held.rows(channels)?;
        let chunk = per_part * channels;
        let outputs = ((dx.slice_mut()?, chunk), (parts.slice_mut()?, 2 * channels));
        kernels::parallel_pairs(cx, outputs.0, outputs.1, |i, dx, sums| {
            let range = i * chunk..x.len().min((i + 1) * chunk);
            cpu::gradient_rows(&rows, &x[range.clone()], &g[range], dx, sums);
        })?;
        Ok((dx, sums::add_parts(cx, "layer norm sums", &parts)?))
    }

    /// A few numbers times `1 + scale`.
    fn scaled(&self, cx: &Context, values: &[f32]) -> Result<Tensor> {
        let mut out = Tensor::new(cx, "layer norm gradient", &[values.len()], DType::F32)?;
        let pairs = out.slice_mut::<f32>()?.iter_mut().zip(values);
        pairs.for_each(|(out, v)| *out = v * self.held.scale);
        Ok(out)
    }

    /// The sum of `g * (n w + b)`.
    fn of_scale(&self, of_weight: &[f32], of_bias: &[f32]) -> Result<Tensor> {
        let dot = |a: &[f32], b: &[f32]| -> f64 {
            a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
        };
        let sum = match &self.held.affine {
            None => sums::total(of_weight),
            Some((w, b)) => (dot(of_weight, w.slice()?) + dot(of_bias, b.slice()?)) as f32,
        };
        Tensor::from_slice(&[1], &[sum])
    }
}
