//! Batch normalisation while training (Ioffe and Szegedy 2015): with the statistics of the batch, or of the batches of
//! all processes of a data-parallel run.

#[cfg(test)]
mod tests;

use std::sync::Arc;

use crate::device::{Context, Reduce};
use crate::error::{Error, Result};
use crate::ops::kernels;
use crate::ops::reduce::{Columns, Terms};
use crate::ops::standardise::{Moments, sums_of_squares, variance};
use crate::tensor::autograd::{Flow, Tracked, record};
use crate::tensor::{DType, Tensor};

/// The parameters of [`batch_norm`].
#[derive(Debug, Clone, Copy)]
pub struct BatchNorm<'a> {
    /// `[C]`, of any float type.
    pub weight: &'a Tensor,
    /// `[C]`, of any float type.
    pub bias: &'a Tensor,
    /// Added to the variance.
    pub eps: f32,
}

/// What [`batch_norm`] found out about its input: running averages are made of it. No tape knows of it.
#[derive(Debug, Clone)]
pub struct Statistics {
    /// The mean of each channel, `F32 [C]`.
    pub mean: Tensor,
    /// The biased variance of each channel, `F32 [C]`.
    pub variance: Tensor,
    /// How many elements of each channel they are of, in all processes together.
    pub count: u64,
}

/// `y = (x - mean) / sqrt(var + eps) * weight + bias`, mean and biased variance over all but the channels: those of
/// this `x`, or with `reduce` of the `x` of all processes (each then calls this, and each its backward pass). The
/// gradients of weight and bias are this process's share of their sum.
///
/// # Shapes
/// `x` and the result `[N, H, W, C]`, `F32`.
///
/// # Errors
/// `InvalidArgument` for other shapes, or if no process has a pixel; those of `reduce`; `OutOfMemory`; `Cancelled`.
pub fn batch_norm(
    cx: &Context,
    x: &Tensor,
    p: &BatchNorm,
    reduce: Option<&Arc<dyn Reduce>>,
) -> Result<(Tensor, Statistics)> {
    let [n, height, width, channels] = x.dims_of::<4>("batch norm input")?;
    let weight = kernels::channel_vector(cx, "batch norm weight", p.weight, channels)?;
    let bias = kernels::channel_vector(cx, "batch norm bias", p.bias, channels)?;
    let columns = Columns { groups: 1, rows: n * height * width, channels };

    let mut totals = sums_of_squares(cx, columns, x.slice()?, 1)?;
    totals.values_mut()[2 * channels] = columns.rows as f64;
    if let Some(reduce) = reduce {
        reduce.sum_f64(totals.values_mut())?;
    }
    let (sums, count) = (&totals.values()[..2 * channels], totals.values()[2 * channels]);
    if count < 1.0 {
        return Err(Error::argument("batch norm input", "at least one pixel", x.shape()));
    }
    let moments = Moments::new(cx, columns, sums, count, p.eps)?;
    let found = statistics(cx, &moments, &sums[channels..], count)?;
    let out = moments.apply(cx, "batch norm", x, Some([weight.slice()?, bias.slice()?]))?;
    let out = record(cx, out, &[Some(x), Some(&weight), Some(&bias)], || {
        let (x, weight, to_bias, reduce) = (x.clone(), weight.clone(), bias.tracked(), reduce.cloned());
        Gradient { x, weight, to_bias, moments, count, reduce }.backward()
    })?;
    Ok((out, found))
}

fn statistics(cx: &Context, moments: &Moments, squares: &[f64], count: f64) -> Result<Statistics> {
    let means = moments.mean.values();
    let mut mean = Tensor::new(cx, "batch mean", &[means.len()], DType::F32)?;
    mean.slice_mut::<f32>()?.iter_mut().zip(means).for_each(|(out, mean)| *out = *mean as f32);
    let mut of_squares = Tensor::new(cx, "batch variance", &[means.len()], DType::F32)?;
    for (out, (mean, squares)) in of_squares.slice_mut::<f32>()?.iter_mut().zip(means.iter().zip(squares)) {
        *out = variance(*mean, *squares, count) as f32;
    }
    Ok(Statistics { mean, variance: of_squares, count: count as u64 })
}

/// What the backward pass needs.
struct Gradient {
    x: Tensor,
    /// `F32`.
    weight: Tensor,
    to_bias: Option<Tracked>,
    moments: Moments,
    /// In all processes.
    count: f64,
    reduce: Option<Arc<dyn Reduce>>,
}

impl Gradient {
    fn backward(self) -> impl FnOnce(&Context, &mut Flow) -> Result<()> {
        move |cx, flow| {
            let (columns, g) = (self.moments.columns, flow.gradient());
            let sums = columns.sums(cx, Terms::ValuesAndProducts(g.slice()?, self.x.slice()?))?;
            let mut sums = self.moments.gradient_sums(cx, &sums)?;
            let (of_bias, of_weight) = sums.values().split_at(columns.channels);
            flow.give(cx, self.to_bias, |_| rounded(cx, of_bias))?;
            flow.give(cx, self.weight.tracked(), |_| rounded(cx, of_weight))?;
            flow.give(cx, self.x.tracked(), |g| {
                if let Some(reduce) = &self.reduce {
                    reduce.sum_f64(sums.values_mut())?;
                }
                let weight = Some(self.weight.slice()?);
                self.moments.gradient(cx, [g, &self.x], weight, sums.values(), self.count)
            })
        }
    }
}

fn rounded(cx: &Context, values: &[f64]) -> Result<Tensor> {
    let mut out = Tensor::new(cx, "gradient of a batch norm", &[values.len()], DType::F32)?;
    out.slice_mut::<f32>()?.iter_mut().zip(values).for_each(|(out, value)| *out = *value as f32);
    Ok(out)
}
