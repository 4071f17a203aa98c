//! Channels with mean 0 and variance 1 over some of the rows, and the gradient through mean and variance: what batch
//! and instance normalisation share.

mod cpu;
mod cuda;

use std::sync::Arc;

use crate::device::{Context, Reduce};
use crate::error::{Error, Result};
use crate::ops::reduce::{Columns, Sums, Terms, Values};
use crate::tensor::Tensor;

/// The parameters of [`standardise`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct Standardise<'a> {
    /// Whose name errors and memory have.
    pub what: &'static str,
    /// The rows of x that have statistics of their own, and its channels.
    pub columns: Columns,
    /// Added to the variance.
    pub eps: f32,
    /// Weight and bias, `[C]` each, of any float type.
    pub affine: Option<[&'a Tensor; 2]>,
    /// The processes over whose rows the statistics go; else over those of this one.
    pub reduce: Option<&'a Arc<dyn Reduce>>,
}

/// `y = (x - mean) / sqrt(var + eps) * weight + bias`, mean and biased variance over the rows of each group, without
/// recording.
///
/// # Shapes
/// `x` and the result: `[groups, rows, C]` under any shape, `F32`; on a GPU of any float type.
///
/// # Errors
/// `InvalidArgument` if weight or bias do not fit, or there is no row; those of `reduce`; `OutOfMemory`; `Cancelled`.
pub(crate) fn standardise(cx: &Context, x: &Tensor, p: &Standardise) -> Result<(Tensor, Moments)> {
    let channels = p.columns.channels;
    for (name, vector) in ["weight", "bias"].into_iter().zip(p.affine.into_iter().flatten()) {
        if vector.elements() != channels {
            let expected = format!("{channels} elements");
            return Err(Error::argument(format!("{} {name}", p.what), expected, vector.shape()));
        }
    }
    let mut sums = p.columns.sums(cx, Terms::ValuesAndProducts(x, x))?;
    let count = sums.over_processes(cx, p.reduce, p.columns.rows as f64)?;
    if count < 1.0 {
        return Err(Error::argument(format!("{} input", p.what), "at least one pixel", x.shape()));
    }
    let (y, held) = match &sums.values {
        Values::Host(sums) => {
            let moments = cpu::Moments::new(cx, p, sums.values(), count)?;
            (moments.apply(cx, x, p)?, Held::Host(moments))
        }
        Values::Device(sums) => {
            let (moments, coefficients) = cuda::Moments::new(cx, p, sums, count)?;
            (moments.apply(cx, p.what, x, &coefficients)?, Held::Device(moments))
        }
    };
    Ok((y, Moments { columns: p.columns, count, held }))
}

/// Mean and deviation of each group and channel.
///
/// Sums and sums of squares are f64, in which squares of f32 are exact: even where the mean is 10^4 deviations, the
/// variance has all the digits of an f32.
#[derive(Debug)]
pub(crate) struct Moments {
    columns: Columns,
    count: f64,
    held: Held,
}

/// Where they were computed.
#[derive(Debug)]
enum Held {
    Host(cpu::Moments),
    Device(cuda::Moments),
}

impl Moments {
    /// Of how many elements each is, in all processes together.
    pub fn count(&self) -> f64 {
        self.count
    }

    /// Mean and biased variance.
    ///
    /// # Shapes
    /// `F32 [2, groups, C]`
    ///
    /// # Errors
    /// `OutOfMemory`; `Device`.
    pub fn statistics(&self, cx: &Context) -> Result<Tensor> {
        match &self.held {
            Held::Host(moments) => moments.statistics(cx),
            Held::Device(moments) => Ok(moments.statistics()),
        }
    }

    /// What the gradients are made of, from that of the result, `g`: of each group and channel the sums of g and of
    /// g y, where `y = (x - mean) / deviation`.
    ///
    /// # Errors
    /// `OutOfMemory`; `Cancelled`.
    pub fn gradient_sums(&self, cx: &Context, [g, x]: [&Tensor; 2]) -> Result<GradientSums> {
        let mut sums = self.columns.sums(cx, Terms::ValuesAndProducts(g, x))?;
        match (&mut sums.values, &self.held) {
            (Values::Host(sums), Held::Host(moments)) => moments.centre(sums),
            (Values::Device(sums), Held::Device(moments)) => moments.centre(cx, sums)?,
            _ => return Err(Error::internal("a normalisation", "its gradient is on another device")),
        }
        Ok(GradientSums { sums })
    }

    /// The gradient by x: `weight / deviation (g - mean of g - y mean of (g y))`, means over all processes.
    ///
    /// # Errors
    /// Those of `reduce`; `OutOfMemory`; `Cancelled`.
    pub fn gradient(
        &self,
        cx: &Context,
        [g, x]: [&Tensor; 2],
        weight: Option<&Tensor>,
        mut sums: GradientSums,
        reduce: Option<&Arc<dyn Reduce>>,
    ) -> Result<Tensor> {
        sums.sums.over_processes(cx, reduce, self.columns.rows as f64)?;
        match (&sums.sums.values, &self.held) {
            (Values::Host(sums), Held::Host(moments)) => moments.gradient(cx, [g, x], weight, sums.values()),
            (Values::Device(sums), Held::Device(moments)) => moments.gradient(cx, [g, x], weight, sums),
            _ => Err(Error::internal("a normalisation", "its gradient is on another device")),
        }
    }
}

/// [`Moments::gradient_sums`], of this process.
#[derive(Debug)]
pub(crate) struct GradientSums {
    sums: Sums,
}

impl GradientSums {
    /// Those of g: the gradient of a bias.
    ///
    /// # Shapes
    /// `F32 [groups, 1, C]`
    ///
    /// # Errors
    /// `OutOfMemory`; `Cancelled`.
    pub fn of_bias(&self, cx: &Context) -> Result<Tensor> {
        self.sums.tensor(cx, "gradient of a normalisation", &[0])
    }

    /// Those of g y: the gradient of a weight.
    ///
    /// # Shapes
    /// `F32 [groups, 1, C]`
    ///
    /// # Errors
    /// `OutOfMemory`; `Cancelled`.
    pub fn of_weight(&self, cx: &Context) -> Result<Tensor> {
        self.sums.tensor(cx, "gradient of a normalisation", &[1])
    }
}
