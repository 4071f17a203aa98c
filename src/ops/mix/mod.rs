//! Each sample of a batch by a factor of its own, alone or mixed with another's: forward diffusion, and embeddings
//! that are noised or dropped.

mod cuda;

use crate::device::Context;
use crate::error::{Error, Result};
use crate::ops::kernels::{self, mul_add};
use crate::simd_dispatch;
use crate::tensor::autograd::record;
use crate::tensor::{DType, Tensor};

simd_dispatch! {
    /// out = a x + b y.
    fn mix_slices<const FMA: bool>(x: &[f32], y: &[f32], factors: [f32; 2], out: &mut [f32]) {
        let [a, b] = factors;
        for (out, (x, y)) in out.iter_mut().zip(x.iter().zip(y)) {
            *out = mul_add::<FMA>(a, *x, b * y);
        }
    }
}

simd_dispatch! {
    /// out = factor x.
    fn scale_slice<const FMA: bool>(x: &[f32], factor: f32, out: &mut [f32]) {
        out.iter_mut().zip(x).for_each(|(out, x)| *out = factor * x);
    }
}

/// `a[n] * x[n, ..] + b[n] * y[n, ..]`.
///
/// # Shapes
/// `x`, `y` and the result `[N, ..]`, `F32`, on a GPU of the type of `x`; `a` and `b` N numbers each.
///
/// # Errors
/// `InvalidArgument` if shapes or counts differ.
pub fn mix(cx: &Context, x: &Tensor, y: &Tensor, a: &[f32], b: &[f32]) -> Result<Tensor> {
    let _span = cx.op("mix");
    if x.dims() != y.dims() {
        return Err(Error::argument("mix", format!("the shape {}", x.shape()), y.shape()));
    }
    let sample = sample_elements(x, a)?;
    sample_elements(y, b)?;
    let out = match cx.cuda()? {
        Some(stream) => cuda::mix(cx, stream, (x, a), Some((y, b)))?,
        None => {
            let (first, second) = (x.slice::<f32>()?, y.slice::<f32>()?);
            let mut out = Tensor::new(cx, "a mixture", x.dims(), DType::F32)?;
            kernels::parallel_samples(cx, out.slice_mut()?, sample, |n, start, part| {
                mix_slices(&first[start..][..part.len()], &second[start..][..part.len()], [a[n], b[n]], part);
            })?;
            out
        }
    };
    record(cx, out, &[Some(x), Some(y)], || {
        let (to_x, to_y) = (x.tracked(), y.tracked());
        let (a, b) = (a.to_vec(), b.to_vec());
        move |cx, flow| {
            flow.give(cx, to_x, |g| scaled(cx, g, &a))?;
            flow.give(cx, to_y, |g| scaled(cx, g, &b))
        }
    })
}

/// `factors[n] * x[n, ..]`: with factors of 0 and more, stochastic depth (Huang et al. 2016).
///
/// # Shapes
/// `x` and the result `[N, ..]`, `F32`, on a GPU of any float type; N factors.
///
/// # Errors
/// `InvalidArgument` for another number of factors.
pub fn scale_samples(cx: &Context, x: &Tensor, factors: &[f32]) -> Result<Tensor> {
    let _span = cx.op("mix");
    let out = scaled(cx, x, factors)?;
    record(cx, out, &[Some(x)], || {
        let (to, factors) = (x.tracked(), factors.to_vec());
        move |cx, flow| flow.give(cx, to, |g| scaled(cx, g, &factors))
    })
}

fn scaled(cx: &Context, x: &Tensor, factors: &[f32]) -> Result<Tensor> {
    let sample = sample_elements(x, factors)?;
    if let Some(stream) = cx.cuda()? {
        return cuda::mix(cx, stream, (x, factors), None);
    }
    let values = x.slice::<f32>()?;
    let mut out = Tensor::new(cx, "scaled samples", x.dims(), DType::F32)?;
    kernels::parallel_samples(cx, out.slice_mut()?, sample, |n, start, part| {
        scale_slice(&values[start..][..part.len()], factors[n], part);
    })?;
    Ok(out)
}

/// The number of elements of a sample, if there is a factor for each sample.
pub(crate) fn sample_elements(x: &Tensor, factors: &[f32]) -> Result<usize> {
    match x.dims().split_first() {
        Some((&samples, inner)) if samples == factors.len() => Ok(inner.iter().product()),
        _ => Err(Error::argument(
            "factors of samples",
            format!("one for each of {}", x.shape()),
            factors.len(),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cuda::Precision;
    use crate::ops::check;

    const SHAPES: [&[usize]; 5] = [&[1], &[3, 1], &[3, 5, 7], &[2, 90, 200], &[70, 9]];

    fn factors(count: usize, seed: u64) -> Vec<f32> {
        check::random(&[count], seed).slice().unwrap().to_vec()
    }

    fn definition(x: &[f64], y: &[f64], a: &[f32], b: &[f32]) -> Vec<f64> {
        let sample = x.len() / a.len();
        let of = |i: usize| f64::from(a[i / sample]) * x[i] + f64::from(b[i / sample]) * y[i];
        (0..x.len()).map(of).collect()
    }

    #[test]
    fn agrees_with_the_definition() {
        for dims in SHAPES {
            let (x, y) = (check::random(dims, 1), check::random(dims, 2));
            let (a, b) = (factors(dims[0], 3), factors(dims[0], 4));
            let expected = definition(&check::wide(&x), &check::wide(&y), &a, &b);
            let mixed = check::on_batch(&x, |cx, x, first, count| {
                let y = y.narrow(first, count)?;
                mix(cx, x, &y, &a[first..first + count], &b[first..first + count])
            });
            check::close(&mixed, dims, &expected, 3e-7);
            let zeros = vec![0.0; dims[0]];
            let expected = definition(&check::wide(&x), &check::wide(&y), &a, &zeros);
            let scaled = check::on_threads(|cx| scale_samples(cx, &x, &a));
            check::close(&scaled, dims, &expected, 1e-7);
            let halves = [(Precision::F32, 1e-6), (Precision::BF16, 1e-2), (Precision::F16, 2e-3)];
            check::on_device(&[&x, &y], &halves, |cx, t| mix(cx, &t[0], &t[1], &a, &b));
            check::on_device(&[&x], &halves, |cx, t| scale_samples(cx, &t[0], &a));
        }
        let (cx, x) = (check::cx(), check::random(&[2, 3], 1));
        assert!(mix(&cx, &x, &x, &[1.0], &[1.0, 1.0]).is_err());
        assert!(mix(&cx, &x, &x, &[1.0, 1.0], &[1.0]).is_err());
        assert!(mix(&cx, &x, &check::random(&[3, 2], 1), &[1.0, 1.0], &[1.0, 1.0]).is_err());
        assert!(scale_samples(&cx, &x, &[1.0; 6]).is_err());
    }

    #[test]
    fn gradients_are_those_of_the_definition() {
        for dims in &SHAPES[..3] {
            let inputs = [check::random(dims, 1), check::random(dims, 2)];
            let (a, b) = (factors(dims[0], 3), factors(dims[0], 4));
            check::gradients_on_device(&inputs, |cx, x| mix(cx, &x[0], &x[1], &a, &b));
            check::gradients(
                &inputs,
                |cx, x| mix(cx, &x[0], &x[1], &a, &b),
                |x| definition(&x[0], &x[1], &a, &b),
            );
            check::gradients(
                &inputs[..1],
                |cx, x| mix(cx, &x[0], &scale_samples(cx, &x[0], &a)?, &a, &b),
                |x| definition(&x[0], &definition(&x[0], &x[0], &a, &vec![0.0; a.len()]), &a, &b),
            );
        }
    }
}
