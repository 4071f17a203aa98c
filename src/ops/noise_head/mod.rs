//! The noise prediction of the diffusion models from their last layers, whose channels are a, then b.

mod cuda;

use crate::device::Context;
use crate::error::{Error, Result};
use crate::ops::activation::Activation;
use crate::ops::kernels;
use crate::ops::work;
use crate::tensor::autograd::record;
use crate::tensor::{DType, Tensor};

/// Keeps the quotient finite where b reaches 1.
const EPS: f32 = 1e-5;

/// How far the divisor of the bounded head stays from 0 and from 1.
const BOUND: f32 = 1e-3;

/// (x - a) / (|1 - b| + 1e-5): Stage C (paper, section 3.2).
///
/// # Shapes
/// x `[N, H, W, C]`, head `[N, H, W, 2 C]` (a, then b) -> `[N, H, W, C]`
///
/// # Errors
/// `InvalidArgument` for other shapes; `OutOfMemory`.
pub fn noise_from_head(cx: &Context, x: &Tensor, head: &Tensor) -> Result<Tensor> {
    let _span = cx.op("noise_head").working(|| work::moving(&[x, head, x]));
    quotient(cx, x, head, Divisor::Plain)
}

/// (x - a) / (sigmoid(b) (1 - 2e-3) + 1e-3): the decoder of v2 (diffusers, `WuerstchenDiffNeXt`).
///
/// # Shapes
/// As [`noise_from_head`].
///
/// # Errors
/// As [`noise_from_head`].
pub fn noise_from_bounded_head(cx: &Context, x: &Tensor, head: &Tensor) -> Result<Tensor> {
    let _span = cx.op("noise_head").working(|| work::moving(&[x, head, x]));
    quotient(cx, x, head, Divisor::Bounded)
}

/// What the difference is divided by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Divisor {
    /// |1 - b| + 1e-5.
    Plain,
    /// sigmoid(b) (1 - 2e-3) + 1e-3.
    Bounded,
}

impl Divisor {
    /// b <- divisor(b)
    fn apply(self, b: &mut [f32]) {
        match self {
            Divisor::Plain => b.iter_mut().for_each(|b| *b = (1.0 - *b).abs() + EPS),
            Divisor::Bounded => {
                Activation::Sigmoid.apply(b);
                b.iter_mut().for_each(|b| *b = *b * (1.0 - 2.0 * BOUND) + BOUND);
            }
        }
    }

    /// b <- the derivative at b.
    fn slope(self, b: &mut [f32]) {
        match self {
            Divisor::Plain => b.iter_mut().for_each(|b| *b = sign(*b - 1.0)),
            Divisor::Bounded => {
                Activation::Sigmoid.apply(b);
                b.iter_mut().for_each(|b| *b = *b * (1.0 - *b) * (1.0 - 2.0 * BOUND));
            }
        }
    }
}

/// 1 above 0, -1 below, and 0 there.
fn sign(x: f32) -> f32 {
    f32::from(i8::from(x > 0.0) - i8::from(x < 0.0))
}

/// (x - a) / divisor(b)
fn quotient(cx: &Context, x: &Tensor, head: &Tensor, divisor: Divisor) -> Result<Tensor> {
    let channels = x.shape().channels();
    if head.shape().rows() != x.shape().rows() || head.shape().channels() != 2 * channels {
        let expected = format!("{:?} with {} channels", x.dims(), 2 * channels);
        return Err(Error::argument("noise head", expected, head.shape()));
    }
    let noise = match cx.cuda()? {
        Some(stream) => cuda::quotient(cx, stream, x, head, divisor)?,
        None => quotient_on_host(cx, x, head, divisor)?,
    };
    let kept = noise.clone();
    record(cx, noise, &[Some(x), Some(head)], || {
        let (to_x, to_head) = (x.tracked(), head.tracked());
        let (head, noise) = (head.constant(), to_head.map(|_| kept));
        move |cx, flow| {
            if let Some(stream) = cx.cuda()? {
                let of = (flow.gradient(), &head, noise.as_ref());
                let [dx, dhead] = cuda::gradients(cx, stream, of, to_x.is_some(), divisor)?;
                if let Some(dhead) = dhead {
                    flow.give(cx, to_head, |_| Ok(dhead))?;
                }
                return dx.map_or(Ok(()), |dx| flow.give(cx, to_x, |_| Ok(dx)));
            }
            let shares = over_divisor(cx, flow.gradient(), &head, divisor)?;
            if let Some(noise) = noise {
                flow.give(cx, to_head, |_| head_gradient(cx, &shares, &noise, &head, divisor))?;
            }
            flow.give(cx, to_x, |_| Ok(shares))
        }
    })
}

fn quotient_on_host(cx: &Context, x: &Tensor, head: &Tensor, divisor: Divisor) -> Result<Tensor> {
    let channels = x.shape().channels();
    let (input, values) = (x.slice::<f32>()?, head.slice::<f32>()?);
    let mut noise = Tensor::new(cx, "predicted noise", x.dims(), DType::F32)?;
    let chunk = kernels::rows_per_task(channels) * channels;
    kernels::parallel_chunks(cx, noise.slice_mut()?, chunk, |i, part| {
        let head = &values[2 * i * chunk..][..2 * part.len()];
        divisors(head, channels, part, divisor);
        let rows = input[i * chunk..][..part.len()].chunks_exact(channels);
        let rows = rows.zip(head.chunks_exact(2 * channels));
        for (out, (x, head)) in part.chunks_exact_mut(channels).zip(rows) {
            for ((out, x), a) in out.iter_mut().zip(x).zip(head) {
                *out = (x - a) / *out;
            }
        }
    })?;
    Ok(noise)
}

/// The divisors of all of b. A few numbers at a time would not fill a vector.
fn divisors(head: &[f32], channels: usize, out: &mut [f32], divisor: Divisor) {
    for (out, head) in out.chunks_exact_mut(channels).zip(head.chunks_exact(2 * channels)) {
        out.copy_from_slice(&head[channels..]);
    }
    divisor.apply(out);
}

/// g / divisor(b): the gradient of x.
fn over_divisor(cx: &Context, g: &Tensor, head: &Tensor, divisor: Divisor) -> Result<Tensor> {
    let channels = g.shape().channels();
    let mut out = Tensor::new(cx, "gradient of the noise", g.dims(), DType::F32)?;
    let (g, head) = (g.slice::<f32>()?, head.slice::<f32>()?);
    let chunk = kernels::rows_per_task(channels) * channels;
    kernels::parallel_chunks(cx, out.slice_mut()?, chunk, |i, part| {
        divisors(&head[2 * i * chunk..][..2 * part.len()], channels, part, divisor);
        part.iter_mut().zip(&g[i * chunk..]).for_each(|(out, g)| *out = g / *out);
    })?;
    Ok(out)
}

/// -s for a, and -s noise slope(b) for b, with s = g / divisor(b).
fn head_gradient(
    cx: &Context,
    shares: &Tensor,
    noise: &Tensor,
    head: &Tensor,
    divisor: Divisor,
) -> Result<Tensor> {
    let channels = shares.shape().channels();
    let (shares, noise, values) = (shares.slice::<f32>()?, noise.slice::<f32>()?, head.slice::<f32>()?);
    let mut out = Tensor::new(cx, "gradient of the noise head", head.dims(), DType::F32)?;
    let rows = kernels::rows_per_task(2 * channels);
    kernels::parallel_chunks(cx, out.slice_mut()?, 2 * rows * channels, |i, part| {
        part.copy_from_slice(&values[2 * i * rows * channels..][..part.len()]);
        // Of a too, which is overwritten: whole rows are what fills vectors.
        divisor.slope(part);
        for (row, part) in (i * rows..).zip(part.chunks_exact_mut(2 * channels)) {
            let (of_a, of_b) = part.split_at_mut(channels);
            let terms = shares[row * channels..].iter().zip(&noise[row * channels..]);
            for ((a, b), (share, noise)) in of_a.iter_mut().zip(of_b).zip(terms) {
                (*a, *b) = (-share, -share * noise * *b);
            }
        }
    })?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cuda::Precision;
    use crate::ops::check;

    #[test]
    fn agrees_with_the_definitions() {
        for dims in [[1usize, 1, 1, 1], [2, 3, 5, 4], [2, 90, 130, 4], [3, 2, 2, 33]] {
            let [n, h, w, c] = dims;
            let (x, head) = (check::random(&dims, 1), check::random(&[n, h, w, 2 * c], 2));
            let (wide_x, wide_head) = (check::wide(&x), check::wide(&head));
            let expected = |divisor: fn(f64) -> f64| -> Vec<f64> {
                let at = |i: usize| (i / c * 2 * c + i % c, wide_x[i]);
                let all = (0..wide_x.len()).map(at);
                all.map(|(a, x)| (x - wide_head[a]) / divisor(wide_head[a + c])).collect()
            };
            let bounded = check::on_batch(&x, |cx, x, first, count| {
                noise_from_bounded_head(cx, x, &head.narrow(first, count)?)
            });
            let sigmoid = |b: f64| 1.0 / (1.0 + (-b).exp()) * (1.0 - 2e-3) + 1e-3;
            check::close(&bounded, &dims, &expected(sigmoid), 1e-6);
            let plain = check::on_batch(&x, |cx, x, first, count| {
                noise_from_head(cx, x, &head.narrow(first, count)?)
            });
            // Where b is close to 1, its rounding is all there is.
            check::close(&plain, &dims, &expected(|b| (1.0 - b).abs() + 1e-5), 1e-4);
            let halves = [(Precision::F32, 1e-6), (Precision::BF16, 5e-2), (Precision::F16, 1e-2)];
            check::on_device(&[&x, &head], &halves, |cx, t| noise_from_bounded_head(cx, &t[0], &t[1]));
            check::on_device(&[&x, &head], &[(Precision::F32, 1e-4)], |cx, t| {
                noise_from_head(cx, &t[0], &t[1])
            });
        }
        let (cx, x) = (check::cx(), check::random(&[1, 2, 2, 3], 1));
        assert!(noise_from_bounded_head(&cx, &x, &check::random(&[1, 2, 2, 3], 1)).is_err());
    }

    #[test]
    fn gradients_are_those_of_the_definitions() {
        for [n, p, c] in [[1usize, 1usize, 1usize], [2, 3, 5]] {
            let inputs = [check::random(&[n, p, 1, c], 1), check::random(&[n, p, 1, 2 * c], 2)];
            let definition = |x: &[f64], head: &[f64], divisor: fn(f64) -> f64| -> Vec<f64> {
                let at = |i: usize| i / c * 2 * c + i % c;
                x.iter().enumerate().map(|(i, x)| (x - head[at(i)]) / divisor(head[at(i) + c])).collect()
            };
            let plain = |b: f64| (1.0 - b).abs() + 1e-5;
            let bounded = |b: f64| 1.0 / (1.0 + (-b).exp()) * (1.0 - 2e-3) + 1e-3;
            check::gradients(
                &inputs,
                |cx, x| noise_from_bounded_head(cx, &x[0], &x[1]),
                |x| definition(&x[0], &x[1], bounded),
            );
            check::gradients(
                &inputs,
                |cx, x| noise_from_head(cx, &x[0], &x[1]),
                |x| definition(&x[0], &x[1], plain),
            );
            check::gradients_on_device(&inputs, |cx, x| noise_from_head(cx, &x[0], &x[1]));
            let head = check::wide(&inputs[1]);
            check::gradients(
                &inputs[..1],
                |cx, x| noise_from_head(cx, &x[0], &inputs[1]),
                |x| definition(&x[0], &head, plain),
            );
        }
    }

    #[test]
    fn the_divisor_is_bounded() {
        let x = Tensor::from_slice(&[1, 1, 1, 2], &[1f32, 1.]).unwrap();
        let head = Tensor::from_slice(&[1, 1, 1, 4], &[0f32, 0., -1e9, 1e9]).unwrap();
        let noise = noise_from_bounded_head(&check::cx(), &x, &head).unwrap();
        check::close(&noise, &[1, 1, 1, 2], &[1e3, 1.0 / 0.999], 1e-6);
    }
}
