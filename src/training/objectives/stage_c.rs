//! Stage C: the noise in latents, weighted by its time (paper, section 3.3).

use crate::device::Context;
use crate::diffusion::schedule::CosineSchedule;
use crate::error::Result;
use crate::ops::mix::mix;
use crate::ops::regression::squared_error;
use crate::stages::blocks::Conditioning;
use crate::stages::stage_c::StageC;
use crate::tensor::Tensor;

/// How much the loss at a time counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TimeWeighting {
    /// (1 - alpha_bar) / (1 + alpha_bar), as the paper prints it.
    Paper,
    /// (1 + alpha_bar / (1 - alpha_bar))^-1 = 1 - alpha_bar, as the authors' code has it (Choi et al. 2022, k = 1,
    /// gamma = 1).
    Snr,
}

impl TimeWeighting {
    /// The weight at a time with this share of signal.
    pub fn weight(self, alpha_bar: f32) -> f32 {
        match self {
            TimeWeighting::Paper => (1.0 - alpha_bar) / (1.0 + alpha_bar),
            TimeWeighting::Snr => 1.0 / (1.0 + alpha_bar / (1.0 - alpha_bar)),
        }
    }
}

/// One batch of N samples.
#[derive(Debug, Clone, Copy)]
pub struct Batch<'a> {
    /// What pictures were encoded to, `[N, h, w, C]`.
    pub latents: &'a Tensor,
    /// The noise to find, of the same shape.
    pub noise: &'a Tensor,
    /// Per sample, in 0..1.
    pub times: &'a [f32],
    /// Embedded texts, `[N, T, width]`.
    pub text: &'a Tensor,
}

/// x_t = sqrt(alpha_bar) x + sqrt(1 - alpha_bar) noise, per sample.
///
/// # Errors
/// `InvalidArgument` for shapes that differ; `OutOfMemory`; `Cancelled`.
pub fn noised(
    cx: &Context,
    schedule: &CosineSchedule,
    x: &Tensor,
    noise: &Tensor,
    times: &[f32],
) -> Result<Tensor> {
    let shares: Vec<f32> = times.iter().map(|&t| schedule.alpha_bar(t)).collect();
    let signal: Vec<f32> = shares.iter().map(|share| share.sqrt()).collect();
    let strength: Vec<f32> = shares.iter().map(|share| (1.0 - share).sqrt()).collect();
    mix(cx, x, noise, &signal, &strength)
}

/// mean over samples of weight(t) * mean((eps(x_t, t, text) - noise)^2), a scalar.
///
/// # Errors
/// `InvalidArgument` for shapes that do not fit together; `OutOfMemory`; `Cancelled`.
pub fn loss(
    cx: &Context,
    network: &StageC,
    schedule: &CosineSchedule,
    weighting: TimeWeighting,
    batch: &Batch,
) -> Result<Tensor> {
    let x = noised(cx, schedule, batch.latents, batch.noise, batch.times)?;
    let modulations = network.modulations(cx, batch.times)?;
    let attended = [network.attend_to_text(cx, batch.text)?];
    let found = network.forward(cx, &x, Conditioning { modulations: &modulations, attended: &attended })?;
    let weights: Vec<f32> = batch.times.iter().map(|&t| weighting.weight(schedule.alpha_bar(t))).collect();
    squared_error(cx, &found, batch.noise, Some(&weights))
}
