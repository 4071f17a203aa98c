//! Channels with mean 0 and variance 1 over some of the rows, and the gradient through mean and variance: what batch
//! and instance normalisation share.

use crate::device::Context;
use crate::device::scratch::Doubles;
use crate::error::Result;
use crate::ops::kernels::{self, mul_add};
use crate::ops::reduce::{Columns, Sums, Terms};
use crate::simd_dispatch;
use crate::tensor::{DType, Tensor};

/// Means and deviations of each group and channel.
///
/// Sums and sums of squares are f64, in which squares of f32 are exact: even where the mean is 10^4 deviations, the
/// variance has all the digits of an f32.
#[derive(Debug)]
pub(crate) struct Moments {
    pub columns: Columns,
    /// `[groups, C]`.
    pub mean: Doubles,
    /// 1 / sqrt(variance + eps), `[groups, C]`.
    pub inverse: Doubles,
}

impl Moments {
    /// From `[groups, 2, C]` sums of x and of x^2 over `count` elements each.
    pub fn new(cx: &Context, columns: Columns, sums: &[f64], count: f64, eps: f32) -> Result<Self> {
        let entries = columns.groups * columns.channels;
        let mut mean = Doubles::new(cx.device(), "means", entries)?;
        let mut inverse = Doubles::new(cx.device(), "deviations", entries)?;
        let outs = mean.values_mut().chunks_mut(columns.channels.max(1));
        let outs = outs.zip(inverse.values_mut().chunks_mut(columns.channels.max(1)));
        for ((means, inverses), sums) in outs.zip(sums.chunks_exact(2 * columns.channels.max(1))) {
            let (values, squares) = sums.split_at(columns.channels);
            for ((mean, inverse), (value, square)) in
                means.iter_mut().zip(inverses).zip(values.iter().zip(squares))
            {
                *mean = value / count;
                *inverse = 1.0 / (variance(*mean, *square, count) + f64::from(eps)).sqrt();
            }
        }
        Ok(Moments { columns, mean, inverse })
    }

    /// `(x - mean) / deviation`, then by `weight` and plus `bias`, `[C]` each.
    ///
    /// # Errors
    /// `OutOfMemory`; `Cancelled`.
    pub fn apply(
        &self,
        cx: &Context,
        what: &'static str,
        x: &Tensor,
        affine: Option<[&[f32]; 2]>,
    ) -> Result<Tensor> {
        let coefficients = self.coefficients(cx, |_, c, mean, inverse| {
            let [weight, bias] = affine.map_or([1.0, 0.0], |[w, b]| [f64::from(w[c]), f64::from(b[c])]);
            let (rounded, scale) = (mean as f32, weight * inverse);
            [rounded, scale as f32, ((f64::from(rounded) - mean) * scale + bias) as f32]
        })?;
        let input = x.slice::<f32>()?;
        let mut out = Tensor::new(cx, what, x.dims(), DType::F32)?;
        self.over_rows(cx, &mut out, &coefficients, |start, coefficients, part| {
            affine_slice(&input[start..][..part.len()], coefficients, part);
        })?;
        Ok(out)
    }

    /// From sums of g and of g x, those of g and of g (x - mean) / deviation: `[groups, 2, C]`.
    ///
    /// # Errors
    /// `OutOfMemory`.
    pub fn gradient_sums(&self, cx: &Context, sums: &Sums) -> Result<Doubles> {
        let (groups, channels) = (self.columns.groups, self.columns.channels);
        let mut out = Doubles::new(cx.device(), "sums of gradients", groups * 2 * channels)?;
        for (group, out) in out.values_mut().chunks_exact_mut(2 * channels.max(1)).enumerate() {
            let (values, products) = out.split_at_mut(channels);
            let places = group * channels..;
            let found = sums.row(group, 0).zip(sums.row(group, 1)).zip(places);
            for ((value, product), ((of_g, of_gx), i)) in values.iter_mut().zip(products).zip(found) {
                *value = of_g;
                *product = (of_gx - self.mean.values()[i] * of_g) * self.inverse.values()[i];
            }
        }
        Ok(out)
    }

    /// The gradient by x: `weight / deviation (g - mean of g - y mean of (g y))` with `y = (x - mean) / deviation`,
    /// where `sums` are [`Moments::gradient_sums`] over `count` elements.
    ///
    /// # Errors
    /// `OutOfMemory`; `Cancelled`.
    pub fn gradient(
        &self,
        cx: &Context,
        [g, x]: [&Tensor; 2],
        weight: Option<&[f32]>,
        sums: &[f64],
        count: f64,
    ) -> Result<Tensor> {
        let channels = self.columns.channels;
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

/// The biased variance, from the mean and the sum of squares.
pub(crate) fn variance(mean: f64, squares: f64, count: f64) -> f64 {
    (squares / count - mean * mean).max(0.0)
}

/// The sums of x and of x^2, `[groups, 2, C]`, with room for `more` numbers after them.
///
/// # Errors
/// `OutOfMemory`; `Cancelled`.
pub(crate) fn sums_of_squares(cx: &Context, columns: Columns, x: &[f32], more: usize) -> Result<Doubles> {
    let sums = columns.sums(cx, Terms::ValuesAndProducts(x, x))?;
    let mut out = Doubles::new(cx.device(), "sums of squares", columns.groups * 2 * columns.channels + more)?;
    let rows = (0..columns.groups).flat_map(|group| sums.row(group, 0).chain(sums.row(group, 1)));
    out.values_mut().iter_mut().zip(rows).for_each(|(out, sum)| *out = sum);
    Ok(out)
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
