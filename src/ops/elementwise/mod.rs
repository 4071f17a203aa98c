//! Ops whose every output element depends on one place of the inputs.
//!
//! Those that take a tensor by value work in place when it is the only owner of its memory.

pub(crate) mod cuda;
mod gradient;
#[cfg(test)]
mod tests;

use crate::device::Context;
use crate::error::{Error, Result};
use crate::ops::activation::Activation;
use crate::ops::kernels::{self, mul_add, per_cpu};
use crate::ops::work;
use crate::tensor::autograd::{record, records};
use crate::tensor::{DType, Tensor};
use gradient::Affine;

/// Numbers of one task.
const CHUNK: usize = 16 << 10;

#[inline(always)]
fn add_body<const FMA: bool>(a: &[f32], b: &[f32], out: &mut [f32]) {
    for (out, (a, b)) in out.iter_mut().zip(a.iter().zip(b)) {
        *out = a + b;
    }
}

per_cpu! {
    fn add_slices(a: &[f32], b: &[f32], out: &mut [f32]) = add_body
}

#[inline(always)]
fn affine_body<const FMA: bool>(row: &mut [f32], scale: &[f32], shift: &[f32]) {
    for (v, (scale, shift)) in row.iter_mut().zip(scale.iter().zip(shift)) {
        *v = mul_add::<FMA>(*v, *scale, *shift);
    }
}

per_cpu! {
    fn affine_slice(row: &mut [f32], scale: &[f32], shift: &[f32]) = affine_body
}

#[inline(always)]
fn scale_body<const FMA: bool>(row: &mut [f32], scale: &[f32]) {
    for (v, scale) in row.iter_mut().zip(scale) {
        *v *= scale;
    }
}

per_cpu! {
    fn scale_slice(row: &mut [f32], scale: &[f32]) = scale_body
}

/// `a + b`, of equal shapes.
///
/// # Shapes
/// `F32`; on a GPU of any float type, and the result of that of `a`.
///
/// # Errors
/// `InvalidArgument` if shapes differ.
pub fn add(cx: &Context, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let _span = cx.op("elementwise").working(|| work::moving(&[a, b, a]));
    if a.dims() != b.dims() {
        return Err(Error::argument("add", format!("the shape {}", a.shape()), b.shape()));
    }
    let out = match cx.cuda()? {
        Some(stream) => cuda::add(cx, stream, a, b)?,
        None => {
            let (first, second) = (a.slice::<f32>()?, b.slice::<f32>()?);
            let mut out = Tensor::new(cx, "sum", a.dims(), DType::F32)?;
            kernels::parallel_chunks(cx, out.slice_mut()?, CHUNK, |i, part| {
                let range = i * CHUNK..i * CHUNK + part.len();
                add_slices(&first[range.clone()], &second[range], part);
            })?;
            out
        }
    };
    record(cx, out, &[Some(a), Some(b)], || {
        let (to_a, to_b) = (a.tracked(), b.tracked());
        move |cx, flow| {
            flow.give(cx, to_a, |g| Ok(g.clone()))?;
            flow.give(cx, to_b, |g| Ok(g.clone()))
        }
    })
}

/// `activation(x)`.
///
/// # Errors
/// `InvalidArgument` if `x` is not `F32`, or on a GPU of no float type.
pub fn activate(cx: &Context, x: Tensor, activation: Activation) -> Result<Tensor> {
    let _span = cx.op("elementwise").working(|| work::moving(&[&x, &x]));
    let from_result = activation.differentiates_from_result();
    let input = (!from_result && records(cx, &[Some(&x)])).then(|| x.clone());
    let out = match cx.cuda()? {
        Some(stream) => cuda::activate(cx, stream, x, activation)?,
        None => kernels::in_place(cx, "activation", x, CHUNK, |_, part| activation.apply(part))?,
    };
    let place = out.clone();
    record(cx, out, &[Some(&place)], || {
        gradient::activate(place.tracked(), input.unwrap_or(place.constant()), activation)
    })
}

/// The numbers of [`rescale`].
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Rescale {
    /// Added first.
    pub summand: f32,
    /// What the sum is multiplied by.
    pub factor: f32,
    /// What the product is divided by.
    pub divisor: f32,
}

impl Default for Rescale {
    fn default() -> Self {
        Rescale { summand: 0.0, factor: 1.0, divisor: 1.0 }
    }
}

/// `(x + summand) * factor / divisor`.
///
/// # Errors
/// `InvalidArgument` if `x` is not `F32`, or on a GPU of no float type.
pub fn rescale(cx: &Context, x: Tensor, p: Rescale) -> Result<Tensor> {
    let _span = cx.op("elementwise").working(|| work::moving(&[&x, &x]));
    let out = match cx.cuda()? {
        Some(stream) => cuda::rescale(cx, stream, x, p)?,
        None => kernels::in_place(cx, "rescaled numbers", x, CHUNK, |_, part| {
            part.iter_mut().for_each(|v| *v = (*v + p.summand) * p.factor / p.divisor);
        })?,
    };
    let place = out.clone();
    record(cx, out, &[Some(&place)], || {
        let to = place.tracked();
        move |cx, flow| flow.give(cx, to, |g| rescale(cx, g.clone(), Rescale { summand: 0.0, ..p }))
    })
}

/// Squeeze and excitation: `x[n, .., c] * s[n, c]`.
///
/// # Shapes
/// `x` `[N, .., C]`; `s` N * C elements of any float type.
///
/// # Errors
/// `InvalidArgument` if shapes do not fit.
pub fn scale_channels(cx: &Context, x: Tensor, s: &Tensor) -> Result<Tensor> {
    let _span = cx.op("elementwise").working(|| work::moving(&[&x, &x]));
    let rows = Rows::of(&x)?;
    let scale = channel_vector(cx, "channel scale", s, rows.samples * rows.channels)?;
    let input = records(cx, &[Some(s)]).then(|| x.clone());
    let out = rows.scale(cx, x, &scale)?;
    let place = out.clone();
    record(cx, out, &[Some(&place), Some(s)], || {
        Affine { rows, to_x: place.tracked(), scale, to_scale: s.tracked(), to_shift: None, input }.backward()
    })
}

/// `x[n, .., c] * scale[n, c] + shift[n, c]`, or with `scale[c]` and `shift[c]` if they have C elements.
///
/// # Shapes
/// `x` `[N, .., C]`; `scale` and `shift` both N * C or both C elements, of any float type.
///
/// # Errors
/// `InvalidArgument` if shapes do not fit.
pub fn affine_channels(cx: &Context, x: Tensor, scale: &Tensor, shift: &Tensor) -> Result<Tensor> {
    let _span = cx.op("elementwise").working(|| work::moving(&[&x, &x]));
    let rows = Rows::of(&x)?;
    let per_sample = scale.elements() != rows.channels;
    let count = if per_sample { rows.samples * rows.channels } else { rows.channels };
    let scale = channel_vector(cx, "channel scale", scale, count)?;
    let shift = channel_vector(cx, "channel shift", shift, count)?;
    let input = records(cx, &[Some(&scale)]).then(|| x.clone());
    let out = match cx.cuda()? {
        Some(stream) => {
            let parameters = cuda::Parameters::Apart { scale: Some(&scale), shift: Some(&shift) };
            cuda::affine(cx, stream, rows, x, parameters)?
        }
        None => {
            let (scales, shifts) = (scale.slice::<f32>()?, shift.slice::<f32>()?);
            rows.apply(cx, x, |row, n| {
                let first = if per_sample { n * rows.channels } else { 0 };
                affine_slice(row, &scales[first..][..rows.channels], &shifts[first..][..rows.channels]);
            })?
        }
    };
    let place = out.clone();
    record(cx, out, &[Some(&place), Some(&scale), Some(&shift)], || {
        let (to_scale, to_shift) = (scale.tracked(), shift.tracked());
        Affine { rows, to_x: place.tracked(), scale: scale.clone(), to_scale, to_shift, input }.backward()
    })
}

/// `x[n, .., c] * (1 + a[n, c]) + b[n, c]`: what a TimestepBlock does.
///
/// # Shapes
/// `x` `[N, .., C]`; `modulation` `F32 [N or 1, 2 C]`, a then b; on a GPU both of any float type.
///
/// # Errors
/// `InvalidArgument` if shapes do not fit.
pub fn modulate(cx: &Context, x: Tensor, modulation: &Tensor) -> Result<Tensor> {
    let _span = cx.op("elementwise").working(|| work::moving(&[&x, &x]));
    let rows = Rows::of(&x)?;
    let channels = rows.channels;
    let entries = modulation.shape().rows();
    if modulation.shape().channels() != 2 * channels || (entries != 1 && entries != rows.samples) {
        let expected = format!("[{} or 1, {}]", rows.samples, 2 * channels);
        return Err(Error::argument("modulation", expected, modulation.shape()));
    }
    let input = records(cx, &[Some(modulation)]).then(|| x.clone());
    let out = match cx.cuda()? {
        Some(stream) => {
            let parameters = cuda::Parameters::Modulation { values: modulation, shifted: true };
            cuda::affine(cx, stream, rows, x, parameters)?
        }
        None => {
            let values = modulation.slice::<f32>()?;
            rows.apply(cx, x, |row, n| {
                let (a, b) = values[n.min(entries - 1) * 2 * channels..][..2 * channels].split_at(channels);
                crate::ops::linear::modulate(row, a, b);
            })?
        }
    };
    let place = out.clone();
    record(cx, out, &[Some(&place), Some(modulation)], || {
        gradient::modulate(rows, place.tracked(), modulation.clone(), input)
    })
}

/// `x[n, t, c] + rows[t, c]`: position embeddings.
///
/// # Shapes
/// `x` `[N, T, C]`; `rows` `[T, C]` of any float type.
///
/// # Errors
/// `InvalidArgument` if shapes do not fit.
pub fn add_rows(cx: &Context, x: Tensor, rows: &Tensor) -> Result<Tensor> {
    let _span = cx.op("elementwise").working(|| work::moving(&[&x, &x]));
    if x.dims().get(1..) != Some(rows.dims()) {
        return Err(Error::argument("added rows", format!("[T, C] of {}", x.shape()), rows.shape()));
    }
    let out = match cx.cuda()? {
        Some(stream) => {
            let whole = Rows { samples: 1, per_sample: x.dims()[0], channels: rows.elements() };
            let parameters = cuda::Parameters::Apart { scale: None, shift: Some(rows) };
            cuda::affine(cx, stream, whole, x, parameters)?
        }
        None => {
            let table = kernels::widened(cx, "added rows", rows)?;
            let table = table.slice::<f32>()?;
            kernels::in_place(cx, "added rows", x, table.len(), |_, part| {
                part.iter_mut().zip(table).for_each(|(v, row)| *v += row);
            })?
        }
    };
    let place = out.clone();
    record(cx, out, &[Some(&place), Some(rows)], || gradient::add_rows(&place, rows))
}

/// A float vector of `count` elements: on the CPU as `F32`, on a GPU as it is, since its kernels convert it.
fn channel_vector(cx: &Context, what: &'static str, v: &Tensor, count: usize) -> Result<Tensor> {
    match cx.cuda()? {
        Some(_) if v.elements() == count => Ok(v.clone()),
        _ => kernels::channel_vector(cx, what, v, count),
    }
}

/// A tensor `[N, .., C]` as rows of C.
#[derive(Debug, Clone, Copy)]
struct Rows {
    samples: usize,
    per_sample: usize,
    channels: usize,
}

impl Rows {
    fn of(x: &Tensor) -> Result<Self> {
        if x.dims().len() < 2 {
            return Err(Error::argument("an image", "[N, .., C]", x.shape()));
        }
        let samples = x.dims()[0];
        let per_sample = x.shape().rows() / samples.max(1);
        Ok(Rows { samples, per_sample, channels: x.shape().channels() })
    }

    /// `x[n, .., c] * scale[n, c]`, or `scale[c]` if there are no more.
    fn scale(&self, cx: &Context, x: Tensor, scale: &Tensor) -> Result<Tensor> {
        if let Some(stream) = cx.cuda()? {
            let parameters = cuda::Parameters::Apart { scale: Some(scale), shift: None };
            return cuda::affine(cx, stream, *self, x, parameters);
        }
        let scale = scale.slice::<f32>()?;
        let of_sample = if scale.len() == self.channels { 0 } else { self.channels };
        self.apply(cx, x, |row, n| scale_slice(row, &scale[n * of_sample..][..self.channels]))
    }

    /// Calls `body` with each row and the number of its sample.
    fn apply(&self, cx: &Context, x: Tensor, body: impl Fn(&mut [f32], usize) + Sync) -> Result<Tensor> {
        let rows = kernels::rows_per_task(self.channels);
        kernels::in_place(cx, "scaled channels", x, rows * self.channels, |i, part| {
            for (row, part) in (i * rows..).zip(part.chunks_exact_mut(self.channels)) {
                body(part, row / self.per_sample);
            }
        })
    }
}
