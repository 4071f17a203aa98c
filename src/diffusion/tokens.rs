//! Sampling of Stage B's tokens: predict all, then put some back to their start (paper, section 3.3; Rampas et
//! al. 2023, arXiv:2211.07292).

use super::guidance::ramp;
use super::noise::{Draw, NoiseSource, uniform_tensor, uniforms};
use super::schedule::linspace;
use crate::device::Context;
use crate::error::{Error, Result};
use crate::ops::sampler_step::renoise;
use crate::tensor::Tensor;

/// How a token is chosen from its logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    /// Sampled from softmax(logits / temperature).
    Multinomial,
    /// The largest logit; ties go to the lowest token.
    Argmax,
    /// The codebook's mean under softmax(logits / temperature), quantised again.
    Quant,
}

/// A walk from random tokens to predicted ones.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenSampling {
    /// Steps.
    pub steps: usize,
    /// Time of the first prediction and time that the last step heads for.
    pub times: (f32, f32),
    /// Guidance weight of the first and the last step, linear between.
    pub guidance: (f32, f32),
    /// Temperature of the first and the last step, linear between.
    pub temperature: (f32, f32),
    /// How tokens are chosen.
    pub choice: Choice,
    /// Renoising follows this many steps; the reference leaves out the last.
    pub renoise_steps: usize,
    /// From this step on tokens are chosen as [`Choice::Quant`], whatever `choice` says.
    pub quant_from: usize,
}

impl TokenSampling {
    /// The reference's walk of `steps` steps from t = 1 to 0 with one guidance weight and the paper's
    /// temperatures.
    pub fn new(steps: usize, guidance: f32, choice: Choice) -> Self {
        TokenSampling {
            steps,
            times: (1.0, 0.0),
            guidance: (guidance, guidance),
            temperature: (0.7, 0.3),
            choice,
            renoise_steps: steps.saturating_sub(1),
            quant_from: usize::MAX,
        }
    }

    /// The times at which the network is asked, and the one that the last step heads for.
    pub fn times(&self) -> Vec<f32> {
        linspace(self.times.0, self.times.1, self.steps)
    }
}

/// What one step asks of the network.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenStep {
    /// Number of the step, from 0.
    pub step: usize,
    /// Weight of guidance: logits = weight cond + (1 - weight) uncond.
    pub guidance: f32,
    /// Divides the logits.
    pub temperature: f32,
    /// How tokens are chosen.
    pub choice: Choice,
}

impl TokenSampling {
    /// Walks to the last tokens. `start` are the random tokens that renoising puts back; `tokens` where the
    /// walk begins, usually the same. `choose(tokens, step, uniforms)` predicts and chooses: uniforms, one per
    /// token, are there for a multinomial choice. `after_step(steps done, tokens chosen)` watches.
    ///
    /// # Shapes
    /// `I64 [N, H, W] -> I64 [N, H, W]`
    ///
    /// # Errors
    /// `InvalidArgument` for no steps or a temperature that is not positive; what the closures return.
    pub fn run(
        &self,
        cx: &Context,
        start: &Tensor,
        mut tokens: Tensor,
        noise: &mut dyn NoiseSource,
        mut choose: impl FnMut(&Tensor, TokenStep, Option<&Tensor>) -> Result<Tensor>,
        mut after_step: impl FnMut(usize, &Tensor) -> Result<()>,
    ) -> Result<Tensor> {
        if self.steps == 0 {
            return Err(Error::argument("stage_b steps", "at least 1", 0));
        }
        let times = self.times();
        let guidance = ramp(self.guidance.0, self.guidance.1, self.steps);
        let temperature = ramp(self.temperature.0, self.temperature.1, self.steps);
        for step in 0..self.steps {
            cx.check()?;
            let _span = cx.span("step");
            let choice = if step >= self.quant_from { Choice::Quant } else { self.choice };
            let asked = TokenStep { step, guidance: guidance[step], temperature: temperature[step], choice };
            let drawn = match choice {
                Choice::Multinomial => {
                    Some(uniform_tensor(cx, noise, (Draw::TokenChoice, step), start.dims())?)
                }
                Choice::Argmax | Choice::Quant => None,
            };
            tokens = choose(&tokens, asked, drawn.as_ref())?;
            after_step(step + 1, &tokens)?;
            if step < self.renoise_steps && step + 1 < times.len() {
                let uniforms = uniforms(cx, noise, (Draw::TokenRenoise, step), start.dims())?;
                tokens = renoise(cx, &tokens, start, &uniforms, times[step + 1])?;
            }
        }
        Ok(tokens)
    }
}
