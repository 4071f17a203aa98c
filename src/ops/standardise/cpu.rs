//! The kernels of the CPU.

use super::Standardise;
use crate::device::Context;
use crate::device::scratch::Doubles;
use crate::error::Result;
use crate::ops::kernels::{self, mul_add};
use crate::ops::reduce::Columns;
use crate::simd_dispatch;
use crate::tensor::{DType, Tensor};

/// Mean and deviation of each group and channel, `[groups, C]` each.
#[derive(Debug)]
pub struct Moments {
    what: &'static str,
    columns: Columns,
    /// Of how many elements each is.
    count: f64,
    mean: Doubles,
    variance: Doubles,
    /// 1 / sqrt(variance + eps).
    inverse: Doubles,
}

impl Moments {
    /// From the sums of x and of x^2, `[groups, 2, C]`.
    pub fn new(cx: &Context, p: &Standardise, sums: &[f64], count: f64) -> Result<Self> {
        let Columns { groups, channels, .. } = p.columns;
        let numbers = |what| Doubles::new(cx.device(), what, groups * channels);
        let (mut mean, mut variance) = (numbers("means")?, numbers("variances")?);
        let mut inverse = numbers("deviations")?;
        for i in 0..groups * channels {
            let at = i / channels * 2 * channels + i % channels;
            let of = sums[at] / count;
            let squared = (sums[at + channels] / count - of * of).max(0.0);
            mean.values_mut()[i] = of;
            variance.values_mut()[i] = squared;
            inverse.values_mut()[i] = 1.0 / (squared + f64::from(p.eps)).sqrt();
        }
        Ok(Moments { what: p.what, columns: p.columns, count, mean, variance, inverse })
    }

    /// Means and variances, `F32 [2, groups, C]`.
    pub fn statistics(&self, cx: &Context) -> Result<Tensor> {
        let Columns { groups, channels, .. } = self.columns;
        let mut out = Tensor::new(cx, "statistics of a batch", &[2, groups, channels], DType::F32)?;
        let numbers = self.mean.values().iter().chain(self.variance.values());
        out.slice_mut::<f32>()?.iter_mut().zip(numbers).for_each(|(out, value)| *out = *value as f32);
        Ok(out)
    }

    /// `(x - mean) / deviation`, then by the weight and plus the bias.
    pub fn apply(&self, cx: &Context, x: &Tensor, p: &Standardise) -> Result<Tensor> {
        let wide = |vector| kernels::widened(cx, self.what, vector);
        let affine = p.affine.map(|[weight, bias]| Ok([wide(weight)?, wide(bias)?])).transpose()?;
        let affine = match &affine {
            Some([weight, bias]) => Some([weight.slice::<f32>()?, bias.slice::<f32>()?]),
            None => None,
        };
        let coefficients = self.coefficients(cx, |_, c, mean, inverse| {
            let [weight, bias] = affine.map_or([1.0, 0.0], |[w, b]| [f64::from(w[c]), f64::from(b[c])]);
            let (rounded, scale) = (mean as f32, weight * inverse);
            [rounded, scale as f32, ((f64::from(rounded) - mean) * scale + bias) as f32]
        })?;
        let input = x.slice::<f32>()?;
        let mut out = Tensor::new(cx, self.what, x.dims(), DType::F32)?;
        self.over_rows(cx, &mut out, &coefficients, |start, coefficients, part| {
            affine_slice(&input[start..][..part.len()], coefficients, part);
        })?;
        Ok(out)
    }

    /// From sums of g and of g x, `[groups, 2, C]`, those of g and of g (x - mean) / deviation.
    pub fn centre(&self, sums: &mut Doubles) {
        let channels = self.columns.channels;
        for (group, sums) in sums.values_mut().chunks_exact_mut(2 * channels.max(1)).enumerate() {
            let (values, products) = sums.split_at_mut(channels);
            for (i, (of_gx, of_g)) in (group * channels..).zip(products.iter_mut().zip(values)) {
                *of_gx = (*of_gx - self.mean.values()[i] * *of_g) * self.inverse.values()[i];
            }
        }
    }

    /// The gradient by x, from the centred sums.
    pub fn gradient(
        &self,
        cx: &Context,
        [g, x]: [&Tensor; 2],
        weight: Option<&Tensor>,
        sums: &[f64],
    ) -> Result<Tensor> {
        let (channels, count) = (self.columns.channels, self.count);
        let weight = weight.map(|weight| kernels::widened(cx, self.what, weight)).transpose()?;
        let weight = weight.as_ref().map(Tensor::slice::<f32>).transpose()?;
        let coefficients = self.coefficients(cx, |group, c, mean, inverse| {
            let sums = &sums[2 * group * channels..];
            let (of_g, of_gy) = (sums[c] / count, sums[channels + c] / count);
            let scale = inverse * weight.map_or(1.0, |w| f64::from(w[c]));
            let (rounded, slope) = (mean as f32, -scale * of_gy * inverse);
            let shift = (f64::from(rounded) - mean) * slope - scale * of_g;
            [rounded, slope as f32, shift as f32, scale as f32]
        })?;
        let (gradients, input) = (g.slice::<f32>()?, x.slice::<f32>()?);
        let mut out = Tensor::new(cx, "gradient of a normalisation", x.dims(), DType::F32)?;
        self.over_rows(cx, &mut out, &coefficients, |start, coefficients, part| {
            let range = start..start + part.len();
            gradient_slice(&gradients[range.clone()], &input[range], coefficients, part);
        })?;
        Ok(out)
    }

    /// K vectors of C coefficients for each group, `of` group, channel, mean and inverse deviation.
    fn coefficients<const K: usize>(
        &self,
        cx: &Context,
        of: impl Fn(usize, usize, f64, f64) -> [f32; K],
    ) -> Result<Tensor> {
        let channels = self.columns.channels;
        let mut out = Tensor::new(cx, "coefficients", &[self.columns.groups, K, channels], DType::F32)?;
        let moments = self.mean.values().iter().zip(self.inverse.values());
        let values = out.slice_mut::<f32>()?;
        for (i, (mean, inverse)) in moments.enumerate() {
            let (group, c) = (i / channels, i % channels);
            for (kind, value) in of(group, c, *mean, *inverse).into_iter().enumerate() {
                values[(group * K + kind) * channels + c] = value;
            }
        }
        Ok(out)
    }

    /// Calls `body` with the first element, the coefficients and the place in `out` of each row.
    fn over_rows(
        &self,
        cx: &Context,
        out: &mut Tensor,
        coefficients: &Tensor,
        body: impl Fn(usize, &[f32], &mut [f32]) + Sync,
    ) -> Result<()> {
        let Columns { rows: per_group, channels, groups } = self.columns;
        let of_group = coefficients.elements() / groups.max(1);
        let coefficients = coefficients.slice::<f32>()?;
        let rows = kernels::rows_per_task(channels);
        kernels::parallel_chunks(cx, out.slice_mut()?, rows * channels, |i, part| {
            for (row, part) in (i * rows..).zip(part.chunks_exact_mut(channels)) {
                body(row * channels, &coefficients[row / per_group * of_group..][..of_group], part);
            }
        })
    }
}

simd_dispatch! {
    /// (x - c0) c1 + c2.
    fn affine_slice<const FMA: bool>(x: &[f32], coefficients: &[f32], out: &mut [f32]) {
        let (mean, others) = coefficients.split_at(out.len());
        let (scale, shift) = others.split_at(out.len());
        for ((out, x), (mean, (scale, shift))) in out.iter_mut().zip(x).zip(mean.iter().zip(scale.iter().zip(shift))) {
            *out = mul_add::<FMA>(x - mean, *scale, *shift);
        }
    }
}

simd_dispatch! {
    /// (x - c0) c1 + c2 + g c3.
    fn gradient_slice<const FMA: bool>(g: &[f32], x: &[f32], coefficients: &[f32], out: &mut [f32]) {
        let len = out.len();
        let (x, g, mean) = (&x[..len], &g[..len], &coefficients[..len]);
        let (slope, shift) = (&coefficients[len..2 * len], &coefficients[2 * len..3 * len]);
        let scale = &coefficients[3 * len..4 * len];
        for i in 0..len {
            let through_moments = mul_add::<FMA>(x[i] - mean[i], slope[i], shift[i]);
            out[i] = mul_add::<FMA>(g[i], scale[i], through_moments);
        }
    }
}
