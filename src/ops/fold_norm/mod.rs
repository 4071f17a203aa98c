//! Batch normalisation with fixed statistics (Ioffe and Szegedy 2015) as one scale and one shift per channel.

mod cpu;
mod cuda;

use crate::device::Context;
use crate::error::{Error, Result};
use crate::tensor::Tensor;
use crate::tensor::autograd::{self, record};

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
    let _span = cx.op("fold_norm");
    let channels = p.weight.elements();
    for (what, vector) in [("bias", p.bias), ("mean", p.mean), ("variance", p.variance)] {
        if vector.elements() != channels {
            let expected = format!("{channels} elements");
            return Err(Error::argument(format!("batch norm {what}"), expected, vector.shape()));
        }
    }
    autograd::refuse(cx, "batch norm statistics", &[p.mean, p.variance])?;
    let [scale, shift] = match cx.cuda()? {
        Some(stream) => cuda::fold(cx, stream, p)?,
        None => cpu::fold(cx, p)?,
    };
    let scale = record(cx, scale, &[Some(p.weight)], || {
        let (to, fixed) = (p.weight.tracked(), Fixed::of(p));
        move |cx, flow| flow.give(cx, to, |g| fixed.gradient(cx, g, Of::Weight))
    })?;
    let shift = record(cx, shift, &[Some(p.bias), Some(&scale)], || {
        let (to_bias, to_scale, fixed) = (p.bias.tracked(), scale.tracked(), Fixed::of(p));
        move |cx, flow| {
            flow.give(cx, to_bias, |g| Ok(g.clone()))?;
            flow.give(cx, to_scale, |g| fixed.gradient(cx, g, Of::Scale))
        }
    })?;
    Ok([scale, shift])
}

/// What the gradients need.
struct Fixed {
    mean: Tensor,
    variance: Tensor,
    eps: f32,
}

/// Whose gradient is wanted.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Of {
    /// From that of the scale: `g / sqrt(variance + eps)`.
    Weight,
    /// From that of the shift: `-g mean`.
    Scale,
}

impl Fixed {
    fn of(p: &FixedNorm) -> Self {
        Fixed { mean: p.mean.clone(), variance: p.variance.clone(), eps: p.eps }
    }

    fn gradient(&self, cx: &Context, g: &Tensor, of: Of) -> Result<Tensor> {
        match cx.cuda()? {
            Some(stream) => cuda::gradient(cx, stream, g, self, of),
            None => cpu::gradient(cx, g, self, of),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cuda::Precision;
    use crate::ops::check::{
        cast, close, cx, gradients, gradients_on_device, moved, on_device, random, wide,
    };
    use crate::tensor::DType;

    #[test]
    fn agrees_with_the_definition() {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let [weight, bias, mean] = [1, 2, 3].map(|seed| cast(&random(&[300], seed), dtype));
            let spread: Vec<f32> = wide(&random(&[300], 4)).iter().map(|v| (v * v) as f32).collect();
            let variance = cast(&Tensor::from_slice(&[300], &spread).unwrap(), dtype);
            let [w, b, m, v] = [&weight, &bias, &mean, &variance].map(wide);
            let factors: Vec<f64> = (0..300).map(|c| w[c] / (v[c] + f64::from(1e-3f32)).sqrt()).collect();
            let shifts: Vec<f64> = (0..300).map(|c| b[c] - m[c] * factors[c]).collect();
            let op = |cx: &Context, t: [&Tensor; 4]| {
                let [weight, bias, mean, variance] = t;
                fold_norm(cx, &FixedNorm { weight, bias, mean, variance, eps: 1e-3 })
            };
            let [scale, shift] = op(&cx(), [&weight, &bias, &mean, &variance]).unwrap();
            close(&scale, &[300], &factors, 1e-6);
            close(&shift, &[300], &shifts, 1e-6);
            for i in 0..2 {
                on_device(&[&weight, &bias, &mean, &variance], &[(Precision::F32, 1e-6)], |cx, t| {
                    Ok(op(cx, [&t[0], &t[1], &t[2], &t[3]])?[i].clone())
                });
            }
        }
        let (long, short) = (random(&[3], 1), random(&[2], 1));
        let p = FixedNorm { weight: &long, bias: &long, mean: &long, variance: &short, eps: 1e-3 };
        assert!(fold_norm(&cx(), &p).is_err());
    }

    #[test]
    fn weight_and_bias_learn_from_the_shift() {
        let (mean, variance) =
            (random(&[5], 3), Tensor::from_slice(&[5], &[0.5f32, 1., 2., 3., 0.1]).unwrap());
        let op = |cx: &Context, x: &[Tensor]| {
            let p = FixedNorm { weight: &x[0], bias: &x[1], mean: &mean, variance: &variance, eps: 1e-3 };
            Ok(fold_norm(cx, &p)?[1].clone())
        };
        gradients_on_device(&[random(&[5], 1), random(&[5], 2)], |cx, x| {
            let [mean, variance] = [&mean, &variance].map(|x| moved(cx, x));
            let p = FixedNorm { weight: &x[0], bias: &x[1], mean: &mean, variance: &variance, eps: 1e-3 };
            Ok(fold_norm(cx, &p)?[1].clone())
        });
        let (m, v) = (wide(&mean), wide(&variance));
        gradients(&[random(&[5], 1), random(&[5], 2)], op, |x| {
            (0..5).map(|c| x[1][c] - m[c] * x[0][c] / (v[c] + f64::from(1e-3f32)).sqrt()).collect()
        });
    }
}
