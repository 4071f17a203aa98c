//! Sampling of latents, Stage C's and v2's Stage B's: DDPM (Ho et al. 2020) and DDIM (Song et al. 2021), from pure noise, from a
//! picture's latents, or around a kept region (paper, section 3.3).

use super::noise::{Draw, NoiseSource, normals};
use super::schedule::CosineSchedule;
use crate::device::Context;
use crate::error::{Error, Result};
pub use crate::ops::sampler_step::Prediction;
pub use crate::ops::sampler_step::cpu::{ddim_step, ddpm_step, diffuse, implied_clean};
use crate::ops::sampler_step::{self, KeptRegion};
use crate::tensor::Tensor;

/// How a step gets from x_t to x_{t_next}.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sampler {
    /// Fresh noise in every step that does not reach t = 0.
    Ddpm,
    /// eta = 0: no noise after the start.
    Ddim,
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
    pub predicted: &'a Prediction,
}

impl LatentSampling {
    /// Walks from `x` to the last time. `predict(x, step)` gives the noise in x; `after_step` watches. On a GPU a step is
    /// one launch after the network, and waits for nothing.
    ///
    /// # Shapes
    /// `[N, h, w, C] -> [N, h, w, C]`
    ///
    /// # Errors
    /// `InvalidArgument` for fewer than two times or times that do not decrease; what the closures return.
    pub fn run<P: Into<Prediction>>(
        &self,
        cx: &Context,
        mut x: Tensor,
        noise: &mut dyn NoiseSource,
        mut predict: impl FnMut(&Tensor, usize) -> Result<P>,
        mut after_step: impl FnMut(LatentStep) -> Result<()>,
    ) -> Result<Tensor> {
        check_times(&self.times)?;
        for (step, pair) in self.times.windows(2).enumerate() {
            cx.check()?;
            let _span = cx.span("step");
            let t_next = pair[1];
            let alpha_bars = [self.schedule.alpha_bar(pair[0]), self.schedule.alpha_bar(t_next)];
            if let Some(Kept { latents, mask }) = &self.kept {
                let fresh = normals(cx, noise, (Draw::LatentKept, step), x.dims())?;
                let kept = KeptRegion { latents, mask };
                x = sampler_step::keep_region(cx, x, kept, &fresh, alpha_bars[0])?;
            }
            let predicted = predict(&x, step)?.into();
            x = match self.sampler {
                Sampler::Ddim => sampler_step::ddim_step(cx, x, &predicted, alpha_bars)?,
                Sampler::Ddpm if t_next == 0.0 => {
                    sampler_step::ddpm_step(cx, x, &predicted, None, alpha_bars)?
                }
                Sampler::Ddpm => {
                    let fresh = normals(cx, noise, (self.fresh, step), x.dims())?;
                    sampler_step::ddpm_step(cx, x, &predicted, Some(&fresh), alpha_bars)?
                }
            };
            after_step(LatentStep { done: step + 1, x: &x, predicted: &predicted })?;
        }
        Ok(x)
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
