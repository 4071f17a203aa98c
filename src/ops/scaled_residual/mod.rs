//! A residual sum with a learnt factor: the end of each half of a Stage A block.

mod cuda;

use crate::device::Context;
use crate::error::{Error, Result};
use crate::ops::kernels::{self, mul_add, per_cpu};
use crate::ops::sums;
use crate::ops::work;
use crate::tensor::autograd::record;
use crate::tensor::{DType, Tensor};

/// Numbers of one task.
const CHUNK: usize = 16 << 10;

#[inline(always)]
fn add_body<const FMA: bool>(y: &[f32], gain: f32, residual: &[f32], out: &mut [f32]) {
    for (out, (y, r)) in out.iter_mut().zip(y.iter().zip(residual)) {
        *out = mul_add::<FMA>(*y, gain, *r);
    }
}

per_cpu! {
    fn add_scaled(y: &[f32], gain: f32, residual: &[f32], out: &mut [f32]) = add_body
}

#[inline(always)]
fn scale_body<const FMA: bool>(gradient: &[f32], gain: f32, out: &mut [f32]) {
    for (out, g) in out.iter_mut().zip(gradient) {
        *out = g * gain;
    }
}

per_cpu! {
    fn scale(gradient: &[f32], gain: f32, out: &mut [f32]) = scale_body
}

#[inline(always)]
fn dot_body<const FMA: bool>(a: &[f32], b: &[f32]) -> f32 {
    kernels::dot::<FMA>(a, b)
}

per_cpu! {
    fn dot(a: &[f32], b: &[f32]) -> f32 = dot_body
}

/// `residual + gain * y`.
///
/// # Shapes
/// `y` and `residual` of one shape, `F32`, on a GPU of any float type, and so is the result: of that of `y`; `gain`
/// has one element, of any float type.
///
/// # Errors
/// `InvalidArgument` if shapes do not fit.
pub fn scaled_residual(cx: &Context, y: &Tensor, gain: &Tensor, residual: &Tensor) -> Result<Tensor> {
    let _span = cx.op("scaled_residual").working(|| work::moving(&[y, residual, y]));
    if y.dims() != residual.dims() {
        return Err(Error::argument("scaled residual", format!("the shape {}", y.shape()), residual.shape()));
    }
    if gain.elements() != 1 {
        return Err(Error::argument("residual gain", "1 element", gain.shape()));
    }
    let out = match cx.cuda()? {
        Some(stream) => cuda::add(cx, stream, y, gain, residual)?,
        None => add(cx, y, gain, residual)?,
    };
    record(cx, out, &[Some(y), Some(gain), Some(residual)], || {
        let (to_y, to_gain, to_residual) = (y.tracked(), gain.tracked(), residual.tracked());
        let (y, gain) = (to_gain.map(|_| y.clone()), gain.constant());
        move |cx, flow| {
            flow.give(cx, to_y, |g| of_y(cx, g, &gain))?;
            if let Some(y) = y {
                flow.give(cx, to_gain, |g| of_gain(cx, g, &y))?;
            }
            flow.give(cx, to_residual, |g| Ok(g.clone()))
        }
    })
}

fn add(cx: &Context, y: &Tensor, gain: &Tensor, residual: &Tensor) -> Result<Tensor> {
    let factor = kernels::scalar("residual gain", gain)?;
    let (values, kept) = (y.slice::<f32>()?, residual.slice::<f32>()?);
    let mut out = Tensor::new(cx, "scaled residual", y.dims(), DType::F32)?;
    kernels::parallel_chunks(cx, out.slice_mut()?, CHUNK, |i, part| {
        let range = i * CHUNK..i * CHUNK + part.len();
        add_scaled(&values[range.clone()], factor, &kept[range], part);
    })?;
    Ok(out)
}

/// The gradient of what was scaled: `gain * g`.
fn of_y(cx: &Context, gradient: &Tensor, gain: &Tensor) -> Result<Tensor> {
    if let Some(stream) = cx.cuda()? {
        return cuda::of_y(cx, stream, gradient, gain);
    }
    let gain = kernels::scalar("residual gain", gain)?;
    let values = gradient.slice::<f32>()?;
    let mut out = Tensor::new(cx, "scaled residual gradient", gradient.dims(), DType::F32)?;
    kernels::parallel_chunks(cx, out.slice_mut()?, CHUNK, |i, part| {
        scale(&values[i * CHUNK..][..part.len()], gain, part);
    })?;
    Ok(out)
}

/// The gradient of the gain: the sum of `g * y`.
fn of_gain(cx: &Context, gradient: &Tensor, y: &Tensor) -> Result<Tensor> {
    if let Some(stream) = cx.cuda()? {
        return cuda::of_gain(cx, stream, gradient, y);
    }
    let (g, y) = (gradient.slice::<f32>()?, y.slice::<f32>()?);
    let mut parts = Tensor::new(cx, "gain gradient", &[g.len().div_ceil(CHUNK)], DType::F32)?;
    kernels::parallel_chunks(cx, parts.slice_mut()?, 1, |i, part| {
        let range = i * CHUNK..g.len().min((i + 1) * CHUNK);
        part[0] = dot(&g[range.clone()], &y[range]);
    })?;
    Tensor::from_slice(&[1], &[sums::total(parts.slice()?)])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cuda::Precision;
    use crate::ops::check;

    #[test]
    fn agrees_with_the_definition() {
        for dims in [&[1usize][..], &[3, 5, 7, 33], &[2, 130, 65]] {
            let (y, r) = (check::random(dims, 1), check::random(dims, 2));
            let gain = check::cast(&Tensor::from_slice(&[1], &[-0.3f32]).unwrap(), DType::F16);
            let factor = check::wide(&gain)[0];
            let expected: Vec<f64> =
                check::wide(&y).iter().zip(check::wide(&r)).map(|(y, r)| y * factor + r).collect();
            let sum = check::on_threads(|cx| scaled_residual(cx, &y, &gain, &r));
            check::close(&sum, dims, &expected, 1e-6);
            let halves = [(Precision::F32, 1e-6), (Precision::BF16, 1e-2), (Precision::F16, 2e-3)];
            check::on_device(&[&y, &gain, &r], &halves, |cx, t| scaled_residual(cx, &t[0], &t[1], &t[2]));
        }
        let (cx, x) = (check::cx(), check::random(&[2, 3], 1));
        assert!(scaled_residual(&cx, &x, &x, &x).is_err());
        assert!(scaled_residual(&cx, &x, &check::random(&[1], 1), &check::random(&[3, 2], 1)).is_err());
    }

    #[test]
    fn gradients() {
        let op = |cx: &Context, t: &[Tensor]| scaled_residual(cx, &t[0], &t[1].narrow(1, 1)?, &t[2]);
        let definition = |t: &[Vec<f64>]| t[0].iter().zip(&t[2]).map(|(y, r)| r + t[1][1] * y).collect();
        for dims in [&[1usize][..], &[2, 3, 5]] {
            let gains = check::cast(&check::random(&[3], 2), DType::BF16);
            check::gradients(&[check::random(dims, 1), gains, check::random(dims, 3)], op, definition);
        }
        let moved = [&[3usize, 70, 130][..], &[3], &[3, 70, 130]].map(|dims| check::random(dims, 1));
        check::gradients_on_device(&moved, op);
        // The same tensor twice.
        let (x, gain) = (check::random(&[2, 7], 1), check::random(&[1], 2));
        let twice = |cx: &Context, t: &[Tensor]| scaled_residual(cx, &t[0], &t[1], &t[0]);
        check::gradients(&[x, gain], twice, |t| t[0].iter().map(|x| x + t[1][0] * x).collect());
        let large = [&[3usize, 70, 130][..], &[3], &[3, 70, 130]].map(|dims| check::random(dims, 1));
        check::gradients_on_threads(&large, op);
    }
}
