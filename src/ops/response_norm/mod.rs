//! Global response normalisation (Woo et al. 2023, ConvNeXt V2, algorithm 1).

mod cpu;
pub(crate) mod cuda;
mod gradient;
#[cfg(test)]
mod tests;

use crate::device::Context;
use crate::error::{Error, Result};
use crate::ops::kernels;
use crate::ops::work;
use crate::tensor::autograd::{record, records};
use crate::tensor::{DType, Tensor};

/// Tokens whose squares are summed in one go. Fixed, so that the order of the whole sum is.
const TOKENS: usize = 32;

/// `Gx = sqrt(sum over tokens of x^2)` for each sample and channel; `Nx = Gx / (mean over channels of Gx + 1e-6)`;
/// `y = gamma * (x * Nx) + beta + x`. Works in place when `x` is the only owner of its memory.
///
/// # Shapes
/// `x` `F32 [N, H, W, C]` or `[N, T, C]`, on a GPU of any float type; `gamma` and `beta` have C elements, in any shape
/// and of any float type.
///
/// # Errors
/// `InvalidArgument` if shapes do not fit.
pub fn response_norm(cx: &Context, x: Tensor, gamma: &Tensor, beta: &Tensor) -> Result<Tensor> {
    let _span = cx.op("response_norm").working(|| work::moving(&[&x, &x, &x]));
    if x.dims().len() < 2 {
        return Err(Error::argument("response norm input", "[N, .., C]", x.shape()));
    }
    if !records(cx, &[Some(&x), Some(gamma), Some(beta)]) {
        return Ok(normalize(cx, x, gamma, beta)?.constant());
    }
    // The gradient needs x: it is not overwritten.
    let out = normalize(cx, x.clone(), gamma, beta)?;
    record(cx, out, &[Some(&x), Some(gamma), Some(beta)], || {
        let backward = gradient::Backward::new(&x, gamma, beta);
        move |cx, flow| backward.run(cx, flow)
    })
}

fn normalize(cx: &Context, x: Tensor, gamma: &Tensor, beta: &Tensor) -> Result<Tensor> {
    if let Some(stream) = cx.cuda()? {
        return cuda::normalize(cx, stream, x, (gamma, beta), false);
    }
    let channels = x.shape().channels();
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
