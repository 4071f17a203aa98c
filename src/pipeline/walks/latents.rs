//! Stage B's walk over Stage A's latents (v2).

use super::guided::{Guided, Texts};
use super::stage_c::implied_clean_sample;
use super::{is_guided, modulated, with_zero_twin};
use crate::device::Context;
use crate::diffusion::latents::{LatentSampling, LatentStep, Sampler};
use crate::diffusion::noise::{Draw, NoiseSource};
use crate::diffusion::schedule::CosineSchedule;
use crate::error::Result;
use crate::pipeline::load::Part;
use crate::stages::blocks::{Attended, Conditioning, Modulations};
use crate::stages::diffnext::{DiffNeXt, Injected};
use crate::tensor::replay::Replay;
use crate::tensor::{DType, Tensor};

/// The generation whose Stage B works on latents.
const GENERATION: u32 = 2;

/// Stage B's walk from noise to Stage A's latents.
pub(super) struct LatentWalk<'a> {
    part: &'a Part<DiffNeXt>,
    cx: &'a Context,
    sampling: LatentSampling,
    modulations: Modulations,
    guidance: f32,
    grid: (usize, usize),
}

/// What the blocks take beside x: the text, and the latents of Stage C.
type Condition = ([Attended; 1], Injected, Replay);

impl<'a> LatentWalk<'a> {
    /// A walk through some times over a grid of Stage A's latents.
    pub fn new(
        part: &'a Part<DiffNeXt>,
        schedule: CosineSchedule,
        cx: &'a Context,
        (times, guidance): (Vec<f32>, f32),
        grid: (usize, usize),
    ) -> Result<Self> {
        let sampling =
            LatentSampling { schedule, times, sampler: Sampler::Ddpm, fresh: Draw::DecoderStep, kept: None };
        let modulations = part.network.modulations(cx, &sampling.times)?;
        Ok(LatentWalk { part, cx, sampling, modulations, guidance, grid })
    }

    pub fn is_guided(&self) -> bool {
        is_guided(GENERATION, self.guidance)
    }

    pub fn steps(&self) -> usize {
        self.sampling.times.len() - 1
    }

    /// Positions of the finest grid that blocks work on, per sample.
    pub fn positions(&self) -> usize {
        let patch = self.part.network.config().patch_size;
        (self.grid.0 * self.grid.1 / (patch * patch)).max(1)
    }

    /// Walks with Stage C's latents and texts.
    ///
    /// # Shapes
    /// latents `[N, h, w, C]` -> Stage A's latents `[N, H, W, 4]`
    pub fn run(
        &self,
        latents: &Tensor,
        texts: &Texts,
        noise: &mut dyn NoiseSource,
        after_step: &mut dyn FnMut(LatentStep) -> Result<()>,
    ) -> Result<Tensor> {
        let network = &self.part.network;
        let guided = self.condition(latents, texts)?;
        let dims = [guided.samples, self.grid.0, self.grid.1, network.config().latent_channels];
        let mut x = Tensor::new(self.cx, "Stage A's latents", &dims, DType::F32)?;
        noise.normal(Draw::DecoderStart, 0, &mut x)?;
        let predict = |x: &Tensor, step: usize| {
            let modulations = self.modulations.at(step)?;
            guided.predict(self.cx, x, self.guidance, |x, (attended, injected, replay)| {
                modulated(self.cx, replay, x, &modulations, |cx, x, modulations| {
                    network.forward(cx, x, Conditioning { modulations, attended }, injected)
                })
            })
        };
        self.sampling.run(self.cx, x, noise, predict, after_step)
    }

    /// Keys and values of the texts, and Stage C's latents as every block takes them. The twins see latents of zero.
    fn condition(&self, latents: &Tensor, texts: &Texts) -> Result<Guided<Condition>> {
        let network = &self.part.network;
        let samples = texts.index.len();
        let entries = with_zero_twin(self.cx, latents, texts.unconditional.is_some())?;
        let injected = network.inject(self.cx, &entries, self.grid)?;
        texts.guided(self.cx, |texts, index, who| {
            let text = network.attend_to_text(self.cx, texts)?.with_index(index);
            Ok(([text], injected.select(self.cx, &who.entries(samples))?, Replay::new()))
        })
    }

    /// What the first sample would be without its noise.
    pub fn implied_clean(&self, step: &LatentStep) -> Result<Tensor> {
        let alpha_bar = self.sampling.schedule.alpha_bar(self.sampling.times[step.done]);
        implied_clean_sample(self.cx, step, alpha_bar)
    }
}
