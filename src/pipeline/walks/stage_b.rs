//! Stage B's walk, whichever the generation: from Stage C's latents to what Stage A decodes.

use super::check_finite;
use super::guided::Texts;
use super::latents::LatentWalk;
use super::tokens::TokenWalk;
use crate::device::Context;
use crate::diffusion::noise::{NoiseSource, SeededNoise};
use crate::diffusion::schedule::linspace;
use crate::diffusion::tokens::TokenSampling;
use crate::error::Result;
use crate::pipeline::generate_options::GenerateOptions;
use crate::pipeline::halves::StageBPart;
use crate::pipeline::model::Model;
use crate::tensor::Tensor;

/// Steps of a preview in v2: one would show the noise that it starts from.
const PREVIEW_STEPS: usize = 3;
/// Previews are not guided: that would double their time.
const PREVIEW_GUIDANCE: f32 = 1.0;

/// Stage B's walk.
pub(in crate::pipeline) struct StageBWalk<'a> {
    walk: Walk<'a>,
    cx: &'a Context,
    stage_b: &'a StageBPart,
}

// One at a time: boxing it would save nothing that matters.
#[allow(clippy::large_enum_variant)]
enum Walk<'a> {
    Tokens(TokenWalk<'a>),
    Latents(LatentWalk<'a>),
}

/// Makes, when asked, what Stage A would decode of the first sample after a step.
pub(in crate::pipeline) type Glimpse<'a> = dyn Fn() -> Result<Tensor> + 'a;

impl<'a> StageBWalk<'a> {
    /// A walk as the options ask for it. `latents` is the grid of Stage C's.
    ///
    /// # Errors
    /// `Unsupported` without Stage B; `InvalidArgument` for a grid that it cannot decode.
    pub fn new(
        model: &'a Model,
        options: &GenerateOptions,
        cx: &'a Context,
        latents: (usize, usize),
    ) -> Result<Self> {
        let steps = (options.stage_b_times(), options.stage_b.guidance);
        Self::walking(model, options, cx, latents, TokenWalk::sampling(options), steps)
    }

    /// The shortest walk that shows something, without guidance.
    ///
    /// # Errors
    /// As [`StageBWalk::new`].
    pub fn preview(
        model: &'a Model,
        options: &GenerateOptions,
        cx: &'a Context,
        latents: (usize, usize),
    ) -> Result<Self> {
        let short = (linspace(1.0, 0.0, PREVIEW_STEPS), PREVIEW_GUIDANCE);
        Self::walking(model, options, cx, latents, TokenWalk::preview(), short)
    }

    /// A walk as the two generations call for it: `tokens` in v1, times and guidance in v2.
    fn walking(
        model: &'a Model,
        options: &GenerateOptions,
        cx: &'a Context,
        latents: (usize, usize),
        tokens: TokenSampling,
        times_and_guidance: (Vec<f32>, f32),
    ) -> Result<Self> {
        let _span = cx.span("stage_b");
        let decoder = model.decoder()?;
        let grid = model.inner.geometry.stage_b_grid(options.width, options.height, latents)?;
        let walk = match &decoder.stage_b {
            StageBPart::Tokens(part) => Walk::Tokens(TokenWalk::new(decoder, part, cx, tokens, grid)?),
            StageBPart::Latents(part, schedule) => {
                Walk::Latents(LatentWalk::new(part, *schedule, cx, times_and_guidance, grid)?)
            }
        };
        Ok(StageBWalk { walk, cx, stage_b: &decoder.stage_b })
    }

    pub fn is_guided(&self) -> bool {
        match &self.walk {
            Walk::Tokens(walk) => walk.is_guided(),
            Walk::Latents(walk) => walk.is_guided(),
        }
    }

    pub fn steps(&self) -> usize {
        match &self.walk {
            Walk::Tokens(walk) => walk.steps(),
            Walk::Latents(walk) => walk.steps(),
        }
    }

    /// Positions of the finest grid that blocks work on, per sample.
    pub fn positions(&self) -> usize {
        match &self.walk {
            Walk::Tokens(walk) => walk.positions(),
            Walk::Latents(walk) => walk.positions(),
        }
    }

    /// Walks with Stage C's latents and a text for each; `after_step(steps done, glimpse)` watches.
    ///
    /// # Shapes
    /// latents `[N, h, w, C]` -> tokens `I64 [N, H, W]` (v1) or Stage A's latents `[N, H, W, 4]` (v2)
    ///
    /// # Errors
    /// `Format` or `InvalidArgument` for values that are not finite; `OutOfMemory`; `Cancelled`.
    pub fn run(
        &self,
        latents: &Tensor,
        texts: &Texts,
        noise: &mut dyn NoiseSource,
        after_step: &mut dyn FnMut(usize, &Glimpse) -> Result<()>,
    ) -> Result<Tensor> {
        let _span = self.cx.span("stage_b");
        match &self.walk {
            Walk::Tokens(walk) => {
                walk.run(latents, texts, noise, &mut |done, tokens| after_step(done, &|| tokens.narrow(0, 1)))
            }
            Walk::Latents(walk) => {
                let decoded = walk.run(latents, texts, noise, &mut |step| {
                    let done = step.done;
                    after_step(done, &|| {
                        let clean = walk.implied_clean(&step)?;
                        check_finite(&clean, "Stage B", self.stage_b.weights())?;
                        Ok(clean)
                    })
                })?;
                check_finite(&decoded, "Stage B", self.stage_b.weights())?;
                Ok(decoded)
            }
        }
    }

    /// What the first sample's conditioning alone gives.
    ///
    /// # Errors
    /// As [`StageBWalk::run`].
    pub fn glance(&self, latents: &Tensor, texts: &Texts) -> Result<Tensor> {
        let first = texts.index.first().copied().unwrap_or_default();
        let texts =
            Texts { conditional: texts.conditional.narrow(first, 1)?, index: vec![0], unconditional: None };
        self.run(latents, &texts, &mut SeededNoise::new(vec![0]), &mut |_, _| Ok(()))
    }
}
