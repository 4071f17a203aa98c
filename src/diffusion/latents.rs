//! Sampling of latents, Stage C's and v2's Stage B's: DDPM (Ho et al. 2020) and DDIM (Song et al. 2021), from pure noise, from a
//! picture's latents, or around a kept region (paper, section 3.3).

use super::noise::{Draw, NoiseSource};
use super::schedule::CosineSchedule;
use crate::device::Context;
use crate::error::{Error, Result};
use crate::tensor::{DType, Tensor};

/// How a step gets from x_t to x_{t_next}.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sampler {
    /// Fresh noise in every step that does not reach t = 0.
    Ddpm,
    /// eta = 0: no noise after the start.
    Ddim,
}

/// x_t = sqrt(alpha_bar) x + sqrt(1 - alpha_bar) noise (paper, section 3.2), in place.
pub fn diffuse(x: &mut [f32], noise: &[f32], alpha_bar: f32) {
    let (signal, spread) = (alpha_bar.sqrt(), (1.0 - alpha_bar).sqrt());
    x.iter_mut().zip(noise).for_each(|(x, noise)| *x = *x * signal + noise * spread);
}

/// One step of DDPM, in place (paper, section 3.3): mean (x - (1 - alpha)/sqrt(1 - alpha_bar) predicted) /
/// sqrt(alpha), deviation sqrt((1 - alpha)(1 - alpha_bar_next)/(1 - alpha_bar)) times `noise`, where alpha =
/// alpha_bar / alpha_bar_next. Without noise the deviation is left out.
pub fn ddpm_step(
    x: &mut [f32],
    predicted: &[f32],
    noise: Option<&[f32]>,
    alpha_bar: f32,
    alpha_bar_next: f32,
) {
    let alpha = alpha_bar / alpha_bar_next;
    let (root, weight) = (1.0 / alpha.sqrt(), 1.0 - alpha);
    let spread = (1.0 - alpha_bar).sqrt();
    for (x, predicted) in x.iter_mut().zip(predicted) {
        *x = root * (*x - weight * predicted / spread);
    }
    if let Some(noise) = noise {
        let deviation = (weight * (1.0 - alpha_bar_next) / (1.0 - alpha_bar)).sqrt();
        x.iter_mut().zip(noise).for_each(|(x, noise)| *x += deviation * noise);
    }
}

/// The clean sample that `x` and the predicted noise imply: (x - sqrt(1 - alpha_bar) predicted) / sqrt(alpha_bar).
pub fn implied_clean(x: f32, predicted: f32, alpha_bar: f32) -> f32 {
    (x - (1.0 - alpha_bar).sqrt() * predicted) / alpha_bar.sqrt()
}

/// One step of DDIM, in place: the implied clean sample, noised again to the next time with the same noise.
pub fn ddim_step(x: &mut [f32], predicted: &[f32], alpha_bar: f32, alpha_bar_next: f32) {
    let (signal, spread) = (alpha_bar_next.sqrt(), (1.0 - alpha_bar_next).sqrt());
    for (x, predicted) in x.iter_mut().zip(predicted) {
        *x = signal * implied_clean(*x, *predicted, alpha_bar) + spread * predicted;
    }
}

/// A region of the latents that is kept.
#[derive(Debug, Clone)]
pub struct Kept {
    /// The latents to keep, `[N, h, w, C]`.
    pub latents: Tensor,
    /// `[N, h, w, 1]`: 1 generates, 0 keeps.
    pub mask: Tensor,
}

/// A walk from noise to latents.
#[derive(Debug, Clone)]
pub struct LatentSampling {
    /// The schedule that the model was trained with.
    pub schedule: CosineSchedule,
    /// Strictly decreasing times, the start included; one step between each two.
    pub times: Vec<f32>,
    /// How a step is made.
    pub sampler: Sampler,
    /// What the noise of its steps is drawn as: each stage has streams of its own.
    pub fresh: Draw,
    /// For inpainting.
    pub kept: Option<Kept>,
}

/// What a walk has got to after a step.
#[derive(Debug)]
pub struct LatentStep<'a> {
    /// Steps done.
    pub done: usize,
    /// The sample now.
    pub x: &'a Tensor,
    /// The noise prediction of the step just made.
    pub predicted: &'a Tensor,
}

impl LatentSampling {
    /// Walks from `x` to the last time. `predict(x, step)` gives the noise in x, guidance applied;
    /// `after_step` watches.
    ///
    /// # Shapes
    /// `[N, h, w, C] -> [N, h, w, C]`
    ///
    /// # Errors
    /// `InvalidArgument` for fewer than two times or times that do not decrease; what the closures return.
    pub fn run(
        &self,
        cx: &Context,
        mut x: Tensor,
        noise: &mut dyn NoiseSource,
        mut predict: impl FnMut(&Tensor, usize) -> Result<Tensor>,
        mut after_step: impl FnMut(LatentStep) -> Result<()>,
    ) -> Result<Tensor> {
        check_times(&self.times)?;
        for (step, pair) in self.times.windows(2).enumerate() {
            cx.check()?;
            let (t, t_next) = (pair[0], pair[1]);
            let (alpha_bar, alpha_bar_next) = (self.schedule.alpha_bar(t), self.schedule.alpha_bar(t_next));
            if let Some(kept) = &self.kept {
                kept.blend(cx, &mut x, noise, step, alpha_bar)?;
            }
            let predicted = predict(&x, step)?;
            let (samples, predictions) = (x.slice_mut::<f32>()?, predicted.slice::<f32>()?);
            match self.sampler {
                Sampler::Ddim => ddim_step(samples, predictions, alpha_bar, alpha_bar_next),
                Sampler::Ddpm if t_next == 0.0 => {
                    ddpm_step(samples, predictions, None, alpha_bar, alpha_bar_next);
                }
                Sampler::Ddpm => {
                    let mut fresh = Tensor::new(cx, "sampler noise", predicted.dims(), DType::F32)?;
                    noise.normal(self.fresh, step, &mut fresh)?;
                    let fresh = Some(fresh.slice::<f32>()?);
                    ddpm_step(samples, predictions, fresh, alpha_bar, alpha_bar_next);
                }
            }
            after_step(LatentStep { done: step + 1, x: &x, predicted: &predicted })?;
        }
        Ok(x)
    }
}

impl Kept {
    /// x = mask x + (1 - mask) (the kept latents, noised to the step's time).
    fn blend(
        &self,
        cx: &Context,
        x: &mut Tensor,
        noise: &mut dyn NoiseSource,
        step: usize,
        alpha_bar: f32,
    ) -> Result<()> {
        let channels = x.shape().channels();
        let mut fresh = Tensor::new(cx, "inpainting noise", x.dims(), DType::F32)?;
        noise.normal(Draw::LatentKept, step, &mut fresh)?;
        let mut noised = Tensor::new(cx, "kept latents", x.dims(), DType::F32)?;
        let samples = noised.slice_mut::<f32>()?;
        samples.copy_from_slice(self.latents.slice()?);
        diffuse(samples, fresh.slice()?, alpha_bar);
        let rows = x.slice_mut::<f32>()?.chunks_exact_mut(channels).zip(samples.chunks_exact(channels));
        for ((x, kept), mask) in rows.zip(self.mask.slice::<f32>()?) {
            x.iter_mut().zip(kept).for_each(|(x, kept)| *x = *x * mask + kept * (1.0 - mask));
        }
        Ok(())
    }
}

/// # Errors
/// `InvalidArgument` unless there are at least two times, strictly decreasing, within 0..1.
pub fn check_times(times: &[f32]) -> Result<()> {
    if times.len() < 2 {
        return Err(Error::argument("timesteps", "at least two times", times.len()));
    }
    if let Some(t) = times.iter().find(|t| !(0.0..=1.0).contains(*t)) {
        return Err(Error::argument("timesteps", "times within 0 and 1", t));
    }
    if let Some(pair) = times.windows(2).find(|pair| pair[0] <= pair[1]) {
        let found = format!("{} before {}", pair[0], pair[1]);
        return Err(Error::argument("timesteps", "times that decrease", found));
    }
    Ok(())
}
