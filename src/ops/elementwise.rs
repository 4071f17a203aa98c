//! Ops whose every output element depends on one place of the inputs.
//!
//! Those that take a tensor by value work in place when it is the only owner of its memory.

use crate::device::Context;
use crate::error::{Error, Result};
use crate::ops::activation::Activation;
use crate::ops::kernels::{self, mul_add, per_cpu};
use crate::tensor::{DType, Tensor};

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
/// # Errors
/// `InvalidArgument` if shapes differ.
pub fn add(cx: &Context, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    if a.dims() != b.dims() {
        return Err(Error::argument("add", format!("the shape {}", a.shape()), b.shape()));
    }
    let (first, second) = (a.slice::<f32>()?, b.slice::<f32>()?);
    let mut out = Tensor::new(cx, "sum", a.dims(), DType::F32)?;
    kernels::parallel_chunks(cx, out.slice_mut()?, CHUNK, |i, part| {
        let range = i * CHUNK..i * CHUNK + part.len();
        add_slices(&first[range.clone()], &second[range], part);
    })?;
    Ok(out)
}

/// `activation(x)`.
///
/// # Errors
/// `InvalidArgument` if `x` is not `F32`.
pub fn activate(cx: &Context, x: Tensor, activation: Activation) -> Result<Tensor> {
    kernels::in_place(cx, "activation", x, CHUNK, |_, part| activation.apply(part))
}

/// Squeeze and excitation: `x[n, .., c] * s[n, c]`.
///
/// # Shapes
/// `x` `[N, .., C]`; `s` N * C elements of any float type.
///
/// # Errors
/// `InvalidArgument` if shapes do not fit.
pub fn scale_channels(cx: &Context, x: Tensor, s: &Tensor) -> Result<Tensor> {
    let rows = Rows::of(&x)?;
    let scale = kernels::channel_vector(cx, "channel scale", s, rows.samples * rows.channels)?;
    let scale = scale.slice::<f32>()?;
    rows.apply(cx, x, |row, n| scale_slice(row, &scale[n * rows.channels..][..rows.channels]))
}

/// `x[n, .., c] * scale[n, c] + shift[n, c]`, or with `scale[c]` and `shift[c]` if they have C elements.
///
/// # Shapes
/// `x` `[N, .., C]`; `scale` and `shift` both N * C or both C elements, of any float type.
///
/// # Errors
/// `InvalidArgument` if shapes do not fit.
pub fn affine_channels(cx: &Context, x: Tensor, scale: &Tensor, shift: &Tensor) -> Result<Tensor> {
    let rows = Rows::of(&x)?;
    let per_sample = scale.elements() != rows.channels;
    let count = if per_sample { rows.samples * rows.channels } else { rows.channels };
    let scale = kernels::channel_vector(cx, "channel scale", scale, count)?;
    let shift = kernels::channel_vector(cx, "channel shift", shift, count)?;
    let (scale, shift) = (scale.slice::<f32>()?, shift.slice::<f32>()?);
    rows.apply(cx, x, |row, n| {
        let first = if per_sample { n * rows.channels } else { 0 };
        affine_slice(row, &scale[first..][..rows.channels], &shift[first..][..rows.channels]);
    })
}

/// `x[n, .., c] * (1 + a[n, c]) + b[n, c]`: what a TimestepBlock does.
///
/// # Shapes
/// `x` `[N, .., C]`; `modulation` `F32 [N or 1, 2 C]`, a then b.
///
/// # Errors
/// `InvalidArgument` if shapes do not fit.
pub fn modulate(cx: &Context, x: Tensor, modulation: &Tensor) -> Result<Tensor> {
    let rows = Rows::of(&x)?;
    let channels = rows.channels;
    let entries = modulation.shape().rows();
    if modulation.shape().channels() != 2 * channels || (entries != 1 && entries != rows.samples) {
        let expected = format!("[{} or 1, {}]", rows.samples, 2 * channels);
        return Err(Error::argument("modulation", expected, modulation.shape()));
    }
    let values = modulation.slice::<f32>()?;
    rows.apply(cx, x, |row, n| {
        let (a, b) = values[n.min(entries - 1) * 2 * channels..][..2 * channels].split_at(channels);
        crate::ops::linear::modulate(row, a, b);
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
    if x.dims().get(1..) != Some(rows.dims()) {
        return Err(Error::argument("added rows", format!("[T, C] of {}", x.shape()), rows.shape()));
    }
    let table = kernels::widened(cx, "added rows", rows)?;
    let table = table.slice::<f32>()?;
    kernels::in_place(cx, "added rows", x, table.len(), |_, part| {
        part.iter_mut().zip(table).for_each(|(v, row)| *v += row);
    })
}

/// A tensor `[N, .., C]` as rows of C.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check;

    const SHAPES: [[usize; 4]; 4] = [[1, 1, 1, 1], [3, 5, 7, 33], [2, 1, 90, 200], [2, 130, 130, 3]];

    #[test]
    fn add_and_activate() {
        for dims in SHAPES {
            let (a, b) = (check::random(&dims, 1), check::random(&dims, 2));
            let sum = check::on_batch(&a, |cx, a, first, count| add(cx, a, &b.narrow(first, count)?));
            let expected: Vec<f64> =
                check::wide(&a).iter().zip(check::wide(&b)).map(|(a, b)| a + b).collect();
            check::close(&sum, &dims, &expected, 1e-7);
            // `add` of a tensor to itself reads it twice.
            let twice: Vec<f64> = check::wide(&a).iter().map(|a| 2.0 * a).collect();
            check::close(&add(&check::cx(), &a, &a).unwrap(), &dims, &twice, 1e-7);
            let relu = check::on_batch(&a, |cx, a, _, _| activate(cx, a.clone(), Activation::LeakyRelu(0.2)));
            let expected: Vec<f64> =
                check::wide(&a).iter().map(|&v| check::activation(Activation::LeakyRelu(0.2), v)).collect();
            check::close(&relu, &dims, &expected, 1e-7);
        }
        let cx = check::cx();
        assert!(add(&cx, &check::random(&[2, 3], 1), &check::random(&[3, 2], 1)).is_err());
    }

    #[test]
    fn channels() {
        for dims in SHAPES {
            let [n, _, _, c] = dims;
            let (x, s) = (check::random(&dims, 1), check::random(&[n, c], 2));
            let b = check::cast(&check::random(&[n, c], 3), DType::F16);
            let (wx, ws, wb) = (check::wide(&x), check::wide(&s), check::wide(&b));
            let of = |i: usize| i / (wx.len() / n) * c + i % c;
            let scaled = check::on_batch(&x, |cx, x, first, count| {
                scale_channels(cx, x.clone(), &s.narrow(first, count)?)
            });
            let expected: Vec<f64> = wx.iter().enumerate().map(|(i, v)| v * ws[of(i)]).collect();
            check::close(&scaled, &dims, &expected, 1e-7);
            let affine = check::on_threads(|cx| affine_channels(cx, x.clone(), &s, &b));
            let expected: Vec<f64> = wx.iter().enumerate().map(|(i, v)| v * ws[of(i)] + wb[of(i)]).collect();
            check::close(&affine, &dims, &expected, 2e-7);
            let (s, b) = (s.narrow(0, 1).unwrap(), b.narrow(0, 1).unwrap());
            let affine = check::on_batch(&x, |cx, x, _, _| affine_channels(cx, x.clone(), &s, &b));
            let expected: Vec<f64> = wx.iter().enumerate().map(|(i, v)| v * ws[i % c] + wb[i % c]).collect();
            check::close(&affine, &dims, &expected, 2e-7);
        }
        let (cx, x) = (check::cx(), check::random(&[2, 3, 4], 1));
        assert!(scale_channels(&cx, x.clone(), &check::random(&[4], 1)).is_err());
        let address = x.bytes().as_ptr();
        let y = scale_channels(&cx, x, &check::random(&[2, 4], 1)).unwrap();
        assert_eq!(y.bytes().as_ptr(), address);
    }
}
