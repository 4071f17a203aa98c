//! The gradient of global response normalisation, in two passes over x.
//!
//! With `m = mean over channels of Gx + 1e-6`, `S = sum over tokens of g x` and `dN = gamma S`:
//! `dG = dN / m - mean over channels of (dN Gx) / m^2`, `dx = g (1 + gamma Nx) + x dG / Gx`,
//! `dgamma = sum over samples of Nx S` and `dbeta = sum of g`. Where Gx is 0, so is the second term of dx.

use super::{cpu, cuda};
use crate::device::Context;
use crate::error::Result;
use crate::ops::{kernels, sums};
use crate::tensor::autograd::{Flow, Tracked};
use crate::tensor::{DType, Tensor};

/// What the backward pass needs.
pub struct Backward {
    x: Tensor,
    gamma: Tensor,
    to_beta: Option<Tracked>,
}

impl Backward {
    pub fn new(x: &Tensor, gamma: &Tensor, beta: &Tensor) -> Self {
        Backward { x: x.clone(), gamma: gamma.clone(), to_beta: beta.tracked() }
    }

    pub fn run(self, cx: &Context, flow: &mut Flow) -> Result<()> {
        let channels = self.x.shape().channels();
        if let Some(stream) = cx.cuda()? {
            let (g, of_x) = (flow.gradient().clone(), self.x.tracked().is_some());
            let found = cuda::gradients(cx, stream, (&self.x, &g), &self.gamma, of_x)?;
            if let Some(dx) = found.dx {
                flow.give(cx, self.x.tracked(), |_| Ok(dx))?;
            }
            flow.give(cx, self.gamma.tracked(), |_| found.shared.narrow(1, 1))?;
            return flow.give(cx, self.to_beta, |_| found.shared.narrow(2, 1));
        }
        let gamma = kernels::channel_vector(cx, "response norm gamma", &self.gamma, channels)?;
        let finished = self.finished(cx, flow.gradient(), gamma.slice()?)?;
        flow.give(cx, self.x.tracked(), |g| self.of_x(cx, g, finished.slice()?))?;
        let sum = |part| over_samples(cx, finished.slice()?, channels, part);
        flow.give(cx, self.gamma.tracked(), |_| sum(1))?;
        flow.give(cx, self.to_beta, |_| sum(2))
    }

    /// What [`cpu::finish_gradient`] says of each sample, `[N, 4, C]`.
    fn finished(&self, cx: &Context, g: &Tensor, gamma: &[f32]) -> Result<Tensor> {
        let (samples, channels) = (self.x.dims()[0], gamma.len());
        let (x, g) = (self.x.slice::<f32>()?, g.slice::<f32>()?);
        let tokens = self.x.shape().rows() / samples.max(1);
        let per_part = sums::rows_per_part(tokens);
        let parts = tokens.div_ceil(per_part);
        let mut partial = Tensor::new(cx, "response norm sums", &[samples, parts, 3 * channels], DType::F32)?;
        kernels::parallel_chunks(cx, partial.slice_mut()?, 3 * channels, |i, sums| {
            let (n, first) = (i / parts, i % parts * per_part);
            let start = (n * tokens + first) * channels;
            let range = start..start + per_part.min(tokens - first) * channels;
            cpu::gradient_sums(&x[range.clone()], &g[range], sums);
        })?;
        let mut out = Tensor::new(cx, "response norm sums", &[samples, 4 * channels], DType::F32)?;
        let partial = partial.slice::<f32>()?;
        let width = 3 * channels;
        kernels::parallel_chunks(cx, out.slice_mut()?, 4 * channels, |n, out| {
            out.fill(0.0);
            for sums in partial[n * parts * width..][..parts * width].chunks_exact(width) {
                out.iter_mut().zip(sums).for_each(|(total, sum)| *total += sum);
            }
            cpu::finish_gradient(out, gamma);
        })?;
        Ok(out)
    }

    fn of_x(&self, cx: &Context, g: &Tensor, finished: &[f32]) -> Result<Tensor> {
        let (x, g) = (self.x.slice::<f32>()?, g.slice::<f32>()?);
        let channels = self.x.shape().channels();
        let sample = x.len() / self.x.dims()[0].max(1);
        let rows = kernels::rows_per_task(channels);
        let mut dx = Tensor::new(cx, "response norm gradient", self.x.dims(), DType::F32)?;
        kernels::parallel_chunks(cx, dx.slice_mut()?, rows * channels, |i, part| {
            for (row, dx) in (i * rows..).zip(part.chunks_exact_mut(channels)) {
                let at = row * channels;
                let of_sample = &finished[at / sample * 4 * channels..][..4 * channels];
                cpu::gradient(&x[at..][..channels], &g[at..][..channels], of_sample, dx);
            }
        })?;
        Ok(dx)
    }
}

/// The sum over samples of one of the four vectors of each.
fn over_samples(cx: &Context, finished: &[f32], channels: usize, part: usize) -> Result<Tensor> {
    let mut out = Tensor::zeros(cx, "response norm gradient", &[channels], DType::F32)?;
    let sums = out.slice_mut::<f32>()?;
    for of_sample in finished.chunks_exact((4 * channels).max(1)) {
        sums.iter_mut().zip(&of_sample[part * channels..]).for_each(|(sum, v)| *sum += v);
    }
    Ok(out)
}
