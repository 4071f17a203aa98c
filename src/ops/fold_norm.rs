//! Batch normalisation with fixed statistics (Ioffe and Szegedy 2015) as one scale and one shift per channel.

use crate::device::Context;
use crate::error::Result;
use crate::ops::kernels;
use crate::tensor::{DType, Tensor, autograd};

/// What [`fold_norm`] folds: `[C]` each, of any float type.
#[derive(Debug, Clone, Copy)]
pub struct FixedNorm<'a> {
    /// The learnt factor.
    pub weight: &'a Tensor,
    /// The learnt summand.
    pub bias: &'a Tensor,
    /// The mean that is subtracted; a constant.
    pub mean: &'a Tensor,
    /// The variance that is divided by; a constant.
    pub variance: &'a Tensor,
    /// Added to the variance.
    pub eps: f32,
}

/// `scale = weight / sqrt(variance + eps)` and `shift = bias - mean * scale`.
///
/// # Shapes
/// -> both `F32 [C]`
///
/// # Errors
/// `InvalidArgument` if the four do not have as many elements; `OutOfMemory`.
pub fn fold_norm(cx: &Context, p: &FixedNorm) -> Result<[Tensor; 2]> {
    let channels = p.weight.elements();
    let read = |what, t| kernels::channel_vector(cx, what, t, channels);
    let [mean, variance] = [read("batch norm mean", p.mean)?, read("batch norm variance", p.variance)?];
    autograd::refuse(cx, "batch norm statistics", &[&mean, &variance])?;
    let mut factor = Tensor::new(cx, "batch norm", &[channels], DType::F32)?;
    let pairs = factor.slice_mut::<f32>()?.iter_mut().zip(variance.slice::<f32>()?);
    pairs.for_each(|(factor, variance)| *factor = (variance + p.eps).sqrt());
    let weight = read("batch norm weight", p.weight)?;
    let bias = read("batch norm bias", p.bias)?;
    let scale = scale(cx, &weight, factor)?;
    let shift = shift(cx, &bias, &mean, &scale)?;
    Ok([scale, shift])
}

/// weight / deviation.
fn scale(cx: &Context, weight: &Tensor, deviation: Tensor) -> Result<Tensor> {
    let out = combined(cx, weight, &deviation, |weight, deviation| weight / deviation)?;
    autograd::record(cx, out, &[Some(weight)], || {
        let to = weight.tracked();
        move |cx: &Context, flow: &mut autograd::Flow| {
            flow.give(cx, to, |gradient| combined(cx, gradient, &deviation, |g, deviation| g / deviation))
        }
    })
}

/// bias - mean * scale.
fn shift(cx: &Context, bias: &Tensor, mean: &Tensor, scale: &Tensor) -> Result<Tensor> {
    let scaled_mean = combined(cx, mean, scale, |mean, scale| mean * scale)?;
    let out = combined(cx, bias, &scaled_mean, |bias, mean| bias - mean)?;
    autograd::record(cx, out, &[Some(bias), Some(scale)], || {
        let (to_bias, to_scale, mean) = (bias.tracked(), scale.tracked(), mean.clone());
        move |cx: &Context, flow: &mut autograd::Flow| {
            flow.give(cx, to_bias, |gradient| Ok(gradient.clone()))?;
            flow.give(cx, to_scale, |gradient| combined(cx, gradient, &mean, |g, mean| -g * mean))
        }
    })
}

/// f(a, b), element by element.
fn combined(cx: &Context, a: &Tensor, b: &Tensor, f: impl Fn(f32, f32) -> f32) -> Result<Tensor> {
    let mut out = Tensor::new(cx, "batch norm", a.dims(), DType::F32)?;
    let pairs = a.slice::<f32>()?.iter().zip(b.slice::<f32>()?);
    out.slice_mut::<f32>()?.iter_mut().zip(pairs).for_each(|(out, (&a, &b))| *out = f(a, b));
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check::{gradients, random};

    #[test]
    fn weight_and_bias_learn_from_the_shift() {
        let (mean, variance) =
            (random(&[5], 3), Tensor::from_slice(&[5], &[0.5f32, 1., 2., 3., 0.1]).unwrap());
        let op = |cx: &Context, x: &[Tensor]| {
            let p = FixedNorm { weight: &x[0], bias: &x[1], mean: &mean, variance: &variance, eps: 1e-3 };
            Ok(fold_norm(cx, &p)?[1].clone())
        };
        let (m, v) = (crate::ops::check::wide(&mean), crate::ops::check::wide(&variance));
        gradients(&[random(&[5], 1), random(&[5], 2)], op, |x| {
            (0..5).map(|c| x[1][c] - m[c] * x[0][c] / (v[c] + f64::from(1e-3f32)).sqrt()).collect()
        });
    }
}
