//! The noise prediction of the diffusion models from their last layers, whose channels are a, then b.

use crate::device::Context;
use crate::error::{Error, Result};
use crate::ops::activation::Activation;
use crate::ops::kernels;
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
    quotient(cx, x, head, |b| b.iter_mut().for_each(|b| *b = (1.0 - *b).abs() + EPS))
}

/// (x - a) / (sigmoid(b) (1 - 2e-3) + 1e-3): the decoder of v2 (diffusers, `WuerstchenDiffNeXt`).
///
/// # Shapes
/// As [`noise_from_head`].
///
/// # Errors
/// As [`noise_from_head`].
pub fn noise_from_bounded_head(cx: &Context, x: &Tensor, head: &Tensor) -> Result<Tensor> {
    quotient(cx, x, head, |b| {
        Activation::Sigmoid.apply(b);
        b.iter_mut().for_each(|b| *b = *b * (1.0 - 2.0 * BOUND) + BOUND);
    })
}

/// (x - a) / divisor(b).
fn quotient(cx: &Context, x: &Tensor, head: &Tensor, divisor: impl Fn(&mut [f32]) + Sync) -> Result<Tensor> {
    let channels = x.shape().channels();
    if head.shape().rows() != x.shape().rows() || head.shape().channels() != 2 * channels {
        let expected = format!("{:?} with {} channels", x.dims(), 2 * channels);
        return Err(Error::argument("noise head", expected, head.shape()));
    }
    let (input, head) = (x.slice::<f32>()?, head.slice::<f32>()?);
    let mut noise = Tensor::new(cx, "predicted noise", x.dims(), DType::F32)?;
    let chunk = kernels::rows_per_task(channels) * channels;
    kernels::parallel_chunks(cx, noise.slice_mut()?, chunk, |i, part| {
        let head = &head[2 * i * chunk..][..2 * part.len()];
        // All of b first: a few numbers at a time would not fill a vector.
        for (out, head) in part.chunks_exact_mut(channels).zip(head.chunks_exact(2 * channels)) {
            out.copy_from_slice(&head[channels..]);
        }
        divisor(part);
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

#[cfg(test)]
mod tests {
    use super::*;
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
        }
        let (cx, x) = (check::cx(), check::random(&[1, 2, 2, 3], 1));
        assert!(noise_from_bounded_head(&cx, &x, &check::random(&[1, 2, 2, 3], 1)).is_err());
    }

    #[test]
    fn the_divisor_is_bounded() {
        let x = Tensor::from_slice(&[1, 1, 1, 2], &[1f32, 1.]).unwrap();
        let head = Tensor::from_slice(&[1, 1, 1, 4], &[0f32, 0., -1e9, 1e9]).unwrap();
        let noise = noise_from_bounded_head(&check::cx(), &x, &head).unwrap();
        check::close(&noise, &[1, 1, 1, 2], &[1e3, 1.0 / 0.999], 1e-6);
    }
}
