//! Global response normalisation (Woo et al. 2023, ConvNeXt V2, algorithm 1).

mod cpu;

use crate::device::Context;
use crate::error::{Error, Result};
use crate::ops::kernels;
use crate::tensor::{DType, Tensor};

/// Tokens whose squares are summed in one go. Fixed, so that the order of the whole sum is.
const TOKENS: usize = 32;

/// `Gx = sqrt(sum over tokens of x^2)` for each sample and channel; `Nx = Gx / (mean over channels of Gx + 1e-6)`;
/// `y = gamma * (x * Nx) + beta + x`. Works in place when `x` is the only owner of its memory.
///
/// # Shapes
/// `x` `[N, H, W, C]` or `[N, T, C]`; `gamma` and `beta` have C elements, in any shape and of any float type.
///
/// # Errors
/// `InvalidArgument` if shapes do not fit.
pub fn response_norm(cx: &Context, x: Tensor, gamma: &Tensor, beta: &Tensor) -> Result<Tensor> {
    let channels = x.shape().channels();
    if x.dims().len() < 2 {
        return Err(Error::argument("response norm input", "[N, .., C]", x.shape()));
    }
    let gamma = kernels::channel_vector(cx, "response norm gamma", gamma, channels)?;
    let beta = kernels::channel_vector(cx, "response norm beta", beta, channels)?;
    let samples = x.dims()[0];
    let sample = x.elements() / samples.max(1);
    let factors = factors(cx, &x, gamma.slice()?)?;
    let (factors, beta) = (factors.slice::<f32>()?, beta.slice::<f32>()?);
    let rows = kernels::rows_per_task(channels);
    kernels::in_place(cx, "response norm", x, rows * channels, |i, part| {
        for (row, part) in (i * rows..).zip(part.chunks_exact_mut(channels)) {
            let factor = &factors[row * channels / sample * channels..][..channels];
            cpu::scale(part, factor, beta);
        }
    })
}

/// `gamma * Nx + 1` for each sample and channel, `[N, C]`.
fn factors(cx: &Context, x: &Tensor, gamma: &[f32]) -> Result<Tensor> {
    let (samples, channels) = (x.dims()[0], x.shape().channels());
    let input = x.slice::<f32>()?;
    let tokens = x.shape().rows() / samples.max(1);
    let blocks = tokens.div_ceil(TOKENS);
    let mut partial = Tensor::new(cx, "response norm sums", &[samples, blocks, channels], DType::F32)?;
    kernels::parallel_chunks(cx, partial.slice_mut()?, channels, |i, sums| {
        let (n, first) = (i / blocks, i % blocks * TOKENS);
        let rows = &input[(n * tokens + first) * channels..][..TOKENS.min(tokens - first) * channels];
        cpu::sum_squares(rows, sums);
    })?;
    let mut out = Tensor::new(cx, "response norm factors", &[samples, channels], DType::F32)?;
    let partial = partial.slice::<f32>()?;
    kernels::parallel_chunks(cx, out.slice_mut()?, channels, |n, factors| {
        factors.fill(0.0);
        for sums in partial[n * blocks * channels..][..blocks * channels].chunks_exact(channels) {
            factors.iter_mut().zip(sums).for_each(|(total, sum)| *total += sum);
        }
        cpu::finish(factors, gamma);
    })?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check;

    fn naive(x: &Tensor, gamma: &Tensor, beta: &Tensor) -> Vec<f64> {
        let (n, c) = (x.dims()[0], x.shape().channels());
        let (x, gamma, beta) = (check::wide(x), check::wide(gamma), check::wide(beta));
        let mut out = Vec::new();
        for sample in x.chunks(x.len() / n) {
            let gx: Vec<f64> =
                (0..c).map(|i| sample.iter().skip(i).step_by(c).map(|v| v * v).sum::<f64>().sqrt()).collect();
            let mean = gx.iter().sum::<f64>() / c as f64;
            out.extend(sample.iter().enumerate().map(|(i, v)| {
                let i = i % c;
                gamma[i] * (v * gx[i] / (mean + 1e-6)) + beta[i] + v
            }));
        }
        out
    }

    #[test]
    fn agrees_with_the_definition_in_place_and_not() {
        for (dims, dtype) in [
            (&[1usize, 1, 1, 1][..], DType::F32),
            (&[3, 9, 11, 37], DType::BF16),
            (&[2, 65, 130], DType::F16),
            (&[2, 33, 1, 600], DType::F32),
        ] {
            let c = dims[dims.len() - 1];
            let x = check::random(dims, 1);
            let gamma = check::cast(&check::random(&[1, 1, 1, c], 2), dtype);
            let beta = check::cast(&check::random(&[c], 3), dtype);
            let expected = naive(&x, &gamma, &beta);
            let shared = check::on_batch(&x, |cx, x, _, _| response_norm(cx, x.clone(), &gamma, &beta));
            check::close(&shared, dims, &expected, 2e-6);
            let own = check::on_threads(|cx| response_norm(cx, check::random(dims, 1), &gamma, &beta));
            assert!(own.bytes() == shared.bytes());
        }
    }

    #[test]
    fn works_in_place_when_it_can() {
        let (gamma, x) = (check::random(&[8], 1), check::random(&[2, 5, 8], 2));
        let address = x.bytes().as_ptr();
        let y = response_norm(&check::cx(), x, &gamma, &gamma).unwrap();
        assert_eq!(y.bytes().as_ptr(), address);
        let error = response_norm(&check::cx(), y, &check::random(&[7], 1), &gamma).unwrap_err();
        assert!(error.to_string().contains("gamma"), "{error}");
    }
}
