//! Batch normalisation while training (Ioffe and Szegedy 2015): with the statistics of the batch, or of the batches of
//! all processes of a data-parallel run.

#[cfg(test)]
mod tests;

use std::sync::Arc;

use crate::device::{Context, Reduce};
use crate::error::Result;
use crate::ops::reduce::Columns;
use crate::ops::standardise::{Standardise, standardise};
use crate::tensor::Tensor;
use crate::tensor::autograd::record;

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
/// `x` and the result `[N, H, W, C]`, `F32`; on a GPU of any float type.
///
/// # Errors
/// `InvalidArgument` for other shapes, or if no process has a pixel; those of `reduce`; `OutOfMemory`; `Cancelled`.
pub fn batch_norm(
    cx: &Context,
    x: &Tensor,
    p: &BatchNorm,
    reduce: Option<&Arc<dyn Reduce>>,
) -> Result<(Tensor, Statistics)> {
    let _span = cx.op("batch_norm");
    let [n, height, width, channels] = x.dims_of::<4>("batch norm input")?;
    let BatchNorm { weight, bias, eps } = *p;
    let p = Standardise {
        what: "batch norm",
        columns: Columns { groups: 1, rows: n * height * width, channels },
        eps,
        affine: Some([weight, bias]),
        reduce,
    };
    let (out, moments) = standardise(cx, x, &p)?;
    let (both, count) = (moments.statistics(cx)?, moments.count() as u64);
    let of = |i: usize| both.narrow(i, 1)?.reshape(&[channels]);
    let found = Statistics { mean: of(0)?, variance: of(1)?, count };
    let out = record(cx, out, &[Some(x), Some(weight), Some(bias)], || {
        let (x, weight, to_bias, reduce) = (x.clone(), weight.clone(), bias.tracked(), reduce.cloned());
        move |cx, flow| {
            let sums = moments.gradient_sums(cx, [flow.gradient(), &x])?;
            flow.give(cx, to_bias, |_| sums.of_bias(cx)?.reshape(&[channels]))?;
            flow.give(cx, weight.tracked(), |_| sums.of_weight(cx)?.reshape(&[channels]))?;
            flow.give(cx, x.tracked(), |g| {
                moments.gradient(cx, [g, &x], Some(&weight), sums, reduce.as_ref())
            })
        }
    })?;
    Ok((out, found))
}
