//! Standardisation on a GPU.

use std::sync::Arc;

use super::Standardise;
use crate::device::Context;
use crate::device::cuda::{Launch, Precision, Stream, Taken, kernels};
use crate::error::{Error, Result};
use crate::ops::reduce::{Columns, Numbers};
use crate::tensor::{DType, Tensor};

kernels!(KERNELS, "standardise");

/// Channels that a thread owns where they divide.
const WIDE: usize = 4;

/// Mean and deviation of each group and channel.
#[derive(Debug)]
pub struct Moments {
    columns: Columns,
    /// Of how many elements each is.
    count: f64,
    /// Mean and 1 / sqrt(variance + eps), `[2, groups, C]`.
    moments: Numbers,
    /// Mean and variance, `F32 [2, groups, C]`.
    statistics: Tensor,
}

fn stream(cx: &Context) -> Result<&Arc<Stream>> {
    cx.cuda()?.ok_or_else(|| Error::internal("a normalisation of a GPU", "used without it"))
}

/// A vector of the parameters on the device; null if there is none.
fn vector(cx: &Context, what: &str, vector: Option<&Tensor>) -> Result<(u64, Option<Taken>)> {
    let held = vector.map(|v| v.on_as(cx, stream(cx)?, what, Precision::F32)).transpose()?;
    Ok((held.as_ref().map_or(0, Taken::address), held))
}

impl Moments {
    /// From the sums of x and of x^2, `[groups, 2, C]`; also what [`Moments::apply`] takes.
    pub fn new(cx: &Context, p: &Standardise, sums: &Numbers, count: f64) -> Result<(Self, Tensor)> {
        let (stream, Columns { groups, channels, .. }) = (stream(cx)?, p.columns);
        let entries = groups * channels;
        let moments = Numbers::new(stream, "moments", 2 * entries)?;
        let mut statistics = Tensor::new(cx, "statistics of a batch", &[2, groups, channels], DType::F32)?;
        let mut coefficients = Tensor::new(cx, "coefficients", &[groups, 3, channels], DType::F32)?;
        let [of_weight, of_bias] = [p.affine.map(|a| a[0]), p.affine.map(|a| a[1])];
        let ((weight, _weight), (bias, _bias)) =
            (vector(cx, p.what, of_weight)?, vector(cx, p.what, of_bias)?);
        let (statistics_at, to) = (statistics.on_mut(stream)?, coefficients.on_mut(stream)?);
        let (of_sums, at, eps) = (sums.address(), moments.address(), f64::from(p.eps));
        if entries > 0 {
            // SAFETY: as the kernel declares; all have the numbers of each group and channel, weight and bias those of
            // each channel, as was checked.
            unsafe {
                stream.launch(
                    &KERNELS,
                    "standardise_moments",
                    None,
                    Launch::elements(entries),
                    &[
                        &of_sums,
                        &weight,
                        &bias,
                        &at,
                        &statistics_at,
                        &to,
                        &(entries as i64),
                        &(channels as i32),
                        &count,
                        &eps,
                    ],
                )?;
            }
        }
        Ok((Moments { columns: p.columns, count, moments, statistics }, coefficients))
    }

    /// Means and variances, `F32 [2, groups, C]`.
    pub fn statistics(&self) -> Tensor {
        self.statistics.clone()
    }

    fn entries(&self) -> usize {
        self.columns.groups * self.columns.channels
    }

    /// `(x - mean) / deviation`, then by the weight and plus the bias.
    pub fn apply(
        &self,
        cx: &Context,
        what: &'static str,
        x: &Tensor,
        coefficients: &Tensor,
    ) -> Result<Tensor> {
        let stream = stream(cx)?;
        let mut y = Tensor::new(cx, what, x.dims(), x.dtype())?;
        let (from, by, to) = (x.on(cx, stream)?, coefficients.on(cx, stream)?, y.on_mut(stream)?);
        let addresses = [from.address(), by.address(), to];
        let split = Split::new(x.elements(), &self.columns, x.dtype().size(), &[addresses[0], to]);
        let Some(split) = split else { return Ok(y) };
        // SAFETY: as the kernel declares; x and y have the elements of all groups, which were summed; the coefficients
        // are three for each group and channel.
        unsafe {
            stream.launch(
                &KERNELS,
                "standardise",
                Some(x.precision(what)?),
                split.launch,
                &[
                    &addresses[0],
                    &addresses[1],
                    &to,
                    &split.packs,
                    &split.of_group,
                    &split.channels,
                    &split.wide,
                ],
            )?;
        }
        Ok(y)
    }

    /// From sums of g and of g x, `[groups, 2, C]`, those of g and of g (x - mean) / deviation.
    pub fn centre(&self, cx: &Context, sums: &Numbers) -> Result<()> {
        let (entries, stream) = (self.entries(), stream(cx)?);
        if entries == 0 {
            return Ok(());
        }
        let parameters =
            (sums.address(), self.moments.address(), entries as i64, self.columns.channels as i32);
        // SAFETY: as the kernel declares; two sums and two moments for each group and channel.
        unsafe {
            stream.launch(
                &KERNELS,
                "standardise_centre",
                None,
                Launch::elements(entries),
                &[&parameters.0, &parameters.1, &parameters.2, &parameters.3],
            )
        }
    }

    /// The gradient by x, from the centred sums.
    pub fn gradient(
        &self,
        cx: &Context,
        [g, x]: [&Tensor; 2],
        weight: Option<&Tensor>,
        sums: &Numbers,
    ) -> Result<Tensor> {
        let stream = stream(cx)?;
        let Columns { groups, channels, .. } = self.columns;
        let mut dx = Tensor::new(cx, "gradient of a normalisation", x.dims(), DType::F32)?;
        let (g, x) = (
            g.on_as(cx, stream, "a gradient", Precision::F32)?,
            x.on_as(cx, stream, "an input", Precision::F32)?,
        );
        let (of_g, of_x, to) = (g.address(), x.address(), dx.on_mut(stream)?);
        let split = Split::new(dx.elements(), &self.columns, size_of::<f32>(), &[of_g, of_x, to]);
        let Some(split) = split else { return Ok(dx) };
        let mut coefficients = Tensor::new(cx, "coefficients", &[groups, 4, channels], DType::F32)?;
        let ((weight, _weight), entries) = (vector(cx, "a normalisation's weight", weight)?, self.entries());
        let (at, by) = (self.moments.address(), coefficients.on_mut(stream)?);
        let (of_sums, count) = (sums.address(), self.count);
        // SAFETY: as the kernel declares; two sums, two moments and four coefficients for each group and channel, the
        // weight as many numbers as channels.
        unsafe {
            stream.launch(
                &KERNELS,
                "standardise_slopes",
                None,
                Launch::elements(entries),
                &[&of_sums, &at, &weight, &by, &(entries as i64), &split.channels, &count],
            )?;
        }
        // SAFETY: as the kernel declares; g, x and dx have the elements of all groups.
        unsafe {
            stream.launch(
                &KERNELS,
                "standardise_gradient",
                None,
                split.launch,
                &[&of_g, &of_x, &by, &to, &split.packs, &split.of_group, &split.channels, &split.wide],
            )?;
        }
        Ok(dx)
    }
}

/// How the elements are given to threads.
struct Split {
    packs: i64,
    /// Elements of a group.
    of_group: i64,
    channels: i32,
    wide: i32,
    launch: Launch,
}

impl Split {
    /// Of `elements` elements of `size` bytes at these addresses. None where there are no elements.
    fn new(elements: usize, columns: &Columns, size: usize, addresses: &[u64]) -> Option<Self> {
        let aligned = addresses.iter().all(|address| address.is_multiple_of((WIDE * size) as u64));
        let wide = columns.channels.is_multiple_of(WIDE) && aligned;
        let packs = elements / if wide { WIDE } else { 1 };
        (packs > 0).then(|| Split {
            packs: packs as i64,
            of_group: (columns.rows * columns.channels) as i64,
            channels: columns.channels as i32,
            wide: wide.into(),
            launch: Launch::elements(packs),
        })
    }
}
