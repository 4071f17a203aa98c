//! The two walks of a generation, networks and mathematics joined: Stage C's over latents, Stage B's over tokens.
//! What does not change between steps is computed when a walk is made or started.

use super::generate_options::GenerateOptions;
use super::guided::{Guided, Texts};
use super::model::Model;
use crate::device::Context;
use crate::diffusion::latents::{Kept, LatentSampling, LatentStep, diffuse, implied_clean};
use crate::diffusion::noise::{Draw, NoiseSource};
use crate::diffusion::schedule::{CosineSchedule, linspace};
use crate::diffusion::tokens::{Choice, TokenSampling, TokenStep};
use crate::error::{Error, Result};
use crate::image::to_mask;
use crate::ops::batch::concat;
use crate::ops::token_choice::{NO_TOKEN, TokenChoice, choose_tokens};
use crate::stages::blocks::{Conditioning, Modulations};
use crate::tensor::{DType, Tensor};
use crate::weights::Weights;

/// Guidance with this weight is the conditional prediction itself.
const NO_GUIDANCE: f32 = 1.0;

/// Stage C's walk from noise, or from a picture, to latents.
pub(super) struct LatentWalk<'a> {
    model: &'a Model,
    cx: &'a Context,
    sampling: LatentSampling,
    modulations: Modulations,
    guidance: f32,
    grid: (usize, usize),
    start: Option<Tensor>,
}

impl<'a> LatentWalk<'a> {
    /// A walk as the options ask for it. An initial picture is encoded here.
    pub fn new(
        model: &'a Model,
        options: &GenerateOptions,
        cx: &'a Context,
        grid: (usize, usize),
    ) -> Result<Self> {
        let start = match &options.init_image {
            Some((image, _)) => {
                let image = image.resized(cx, options.width, options.height)?;
                Some(model.encode_pictures(cx, &[&image])?)
            }
            None => None,
        };
        if let Some(start) = &start {
            let [_, h, w, _] = start.dims_of("latents")?;
            if (h, w) != grid {
                let expected = format!("a grid of {h} x {w}, as the initial picture's latents have");
                return Err(Error::argument("initial_noise", expected, format!("{} x {}", grid.0, grid.1)));
            }
        }
        let kept = match (&options.mask, &start) {
            (Some(mask), Some(latents)) => {
                let mask = to_mask(cx, mask, grid.0, grid.1)?;
                Some(Kept { latents: latents.clone(), mask })
            }
            _ => None,
        };
        let sampling = LatentSampling {
            schedule: CosineSchedule::default(),
            times: times(options),
            sampler: options.stage_c.sampler,
            kept,
        };
        let modulations = model.inner.stage_c.network.modulations(cx, &sampling.times)?;
        Ok(LatentWalk { model, cx, sampling, modulations, guidance: options.stage_c.guidance, grid, start })
    }

    pub fn is_guided(&self) -> bool {
        self.guidance != NO_GUIDANCE
    }

    /// Steps; none for a picture that is only decoded again.
    pub fn steps(&self) -> usize {
        self.sampling.times.len() - 1
    }

    /// Walks with these texts. `start` replaces the noise that the walk would begin with.
    pub fn run(
        &self,
        texts: &Texts,
        noise: &mut dyn NoiseSource,
        start: Option<Tensor>,
        after_step: &mut dyn FnMut(LatentStep) -> Result<()>,
    ) -> Result<Tensor> {
        let network = &self.model.inner.stage_c.network;
        let samples = texts.index.len();
        let x = match start {
            Some(start) => start,
            None => self.starting_point(samples, noise)?,
        };
        if self.steps() == 0 {
            return Ok(x);
        }
        let mut sampling = self.sampling.clone();
        if let Some(kept) = &mut sampling.kept {
            kept.latents = concat(self.cx, &vec![&kept.latents; samples])?;
            kept.mask = concat(self.cx, &vec![&kept.mask; samples])?;
        }
        let guided = texts.attended(self.cx, None, |text| network.attend_to_text(self.cx, text))?;
        let predict = |x: &Tensor, step: usize| {
            let modulations = self.modulations.at(step)?;
            guided.run_guided(self.cx, x, self.guidance, |x, attended| {
                network.forward(self.cx, x, Conditioning { modulations: &modulations, attended })
            })
        };
        sampling.run(self.cx, x, noise, predict, after_step)
    }

    /// Pure noise, or the initial picture's latents noised to the first time.
    fn starting_point(&self, samples: usize, noise: &mut dyn NoiseSource) -> Result<Tensor> {
        let channels = self.model.inner.stage_c.network.config().latent_channels;
        let dims = [samples, self.grid.0, self.grid.1, channels];
        let mut x = Tensor::new(self.cx, "latents", &dims, DType::F32)?;
        match (&self.start, &self.sampling.kept) {
            (Some(latents), None) => {
                let mut fresh = Tensor::new(self.cx, "noise", &dims, DType::F32)?;
                noise.normal(Draw::LatentStart, 0, &mut fresh)?;
                x = concat(self.cx, &vec![latents; samples])?;
                if self.steps() > 0 {
                    let alpha_bar = self.sampling.schedule.alpha_bar(self.sampling.times[0]);
                    diffuse(x.slice_mut()?, fresh.slice()?, alpha_bar);
                }
            }
            _ => noise.normal(Draw::LatentStart, 0, &mut x)?,
        }
        Ok(x)
    }

    /// What the first sample would be without its noise.
    pub fn implied_clean(&self, step: &LatentStep) -> Result<Tensor> {
        let alpha_bar = self.sampling.schedule.alpha_bar(self.sampling.times[step.done]);
        let (x, predicted) = (step.x.narrow(0, 1)?, step.predicted.narrow(0, 1)?);
        let mut clean = Tensor::new(self.cx, "latents", x.dims(), DType::F32)?;
        let pairs = x.slice::<f32>()?.iter().zip(predicted.slice::<f32>()?);
        for (clean, (x, predicted)) in clean.slice_mut::<f32>()?.iter_mut().zip(pairs) {
            *clean = implied_clean(*x, *predicted, alpha_bar);
        }
        Ok(clean)
    }
}

/// The times of Stage C. An initial picture without a mask shortens the walk to its strength.
fn times(options: &GenerateOptions) -> Vec<f32> {
    if let Some(times) = &options.stage_c.timesteps {
        return times.clone();
    }
    let steps = options.stage_c.steps as usize;
    match &options.init_image {
        Some((_, strength)) if options.mask.is_none() => {
            if *strength == 0.0 {
                return vec![0.0];
            }
            let steps = ((steps as f32 * strength).round() as usize).max(1);
            linspace(*strength, 0.0, steps)
        }
        _ => linspace(1.0, 0.0, steps),
    }
}

/// Stage B's walk from random tokens to predicted ones.
pub(super) struct TokenWalk<'a> {
    model: &'a Model,
    cx: &'a Context,
    sampling: TokenSampling,
    modulations: Modulations,
    grid: (usize, usize),
}

impl<'a> TokenWalk<'a> {
    /// A walk as the options ask for it.
    pub fn new(model: &'a Model, options: &GenerateOptions, cx: &'a Context) -> Result<Self> {
        let b = &options.stage_b;
        let sampling = TokenSampling {
            temperature: b.temperature,
            ..TokenSampling::new(b.steps as usize, b.guidance, b.choice)
        };
        Self::with_sampling(model, options, cx, sampling)
    }

    /// The shortest walk there is: one greedy step without guidance.
    pub fn preview(model: &'a Model, options: &GenerateOptions, cx: &'a Context) -> Result<Self> {
        Self::with_sampling(model, options, cx, TokenSampling::new(1, NO_GUIDANCE, Choice::Argmax))
    }

    fn with_sampling(
        model: &'a Model,
        options: &GenerateOptions,
        cx: &'a Context,
        sampling: TokenSampling,
    ) -> Result<Self> {
        let factor = model.inner.stage_a.network.config().factor();
        let grid = (options.height as usize / factor, options.width as usize / factor);
        let modulations = model.inner.stage_b.network.modulations(cx, &sampling.times())?;
        Ok(TokenWalk { model, cx, sampling, modulations, grid })
    }

    pub fn is_guided(&self) -> bool {
        self.sampling.guidance != (NO_GUIDANCE, NO_GUIDANCE)
    }

    pub fn steps(&self) -> usize {
        self.sampling.steps
    }

    /// Positions of the finest grid that blocks work on, per sample.
    pub fn positions(&self) -> usize {
        let patch = self.model.inner.stage_b.network.config().patch_size;
        (self.grid.0 * self.grid.1 / (patch * patch)).max(1)
    }

    /// Walks with these latents and texts; `after_step(steps done, tokens)` watches.
    ///
    /// # Shapes
    /// latents `[N, h, w, C]` -> tokens `I64 [N, H, W]`
    pub fn run(
        &self,
        latents: &Tensor,
        texts: &Texts,
        noise: &mut dyn NoiseSource,
        after_step: &mut dyn FnMut(usize, &Tensor) -> Result<()>,
    ) -> Result<Tensor> {
        let config = self.model.inner.stage_b.network.config();
        let guided = self.condition(latents, texts)?;
        let dims = [guided.samples, self.grid.0, self.grid.1];
        let mut start = Tensor::new(self.cx, "tokens", &dims, DType::I64)?;
        let codebook_size = u32::try_from(config.codebook_size).unwrap_or(u32::MAX);
        noise.below(Draw::TokenStart, 0, codebook_size, &mut start)?;
        let choose = |tokens: &Tensor, step: TokenStep, uniforms: Option<&Tensor>| {
            self.choose(&guided, tokens, step, uniforms)
        };
        self.sampling.run(self.cx, &start, start.clone(), noise, choose, after_step)
    }

    /// The tokens that one greedy step from the first sample's conditioning gives.
    pub fn glance(&self, latents: &Tensor, texts: &Texts) -> Result<Tensor> {
        let first = texts.index.first().copied().unwrap_or_default();
        let texts =
            Texts { conditional: texts.conditional.narrow(first, 1)?, index: vec![0], unconditional: None };
        let mut noise = crate::diffusion::noise::SeededNoise::new(vec![0]);
        self.run(latents, &texts, &mut noise, &mut |_, _| Ok(()))
    }

    /// Keys and values of latents and texts. The twins see latents of zero, all of them the same ones.
    fn condition(&self, latents: &Tensor, texts: &Texts) -> Result<Guided> {
        let network = &self.model.inner.stage_b.network;
        let samples = texts.index.len();
        let mut entries = latents.clone();
        if texts.unconditional.is_some() {
            let mut dims = [0; 4];
            dims.copy_from_slice(&latents.dims_of::<4>("stage_b latents")?);
            dims[0] = 1;
            let zero = Tensor::zeros(self.cx, "latents", &dims, DType::F32)?;
            entries = concat(self.cx, &[latents, &zero])?;
        }
        let attended = network.attend_to_latents(self.cx, &entries)?;
        let others = (&attended, (0..samples).collect(), vec![samples; samples]);
        texts.attended(self.cx, Some(others), |text| network.attend_to_text(self.cx, text))
    }

    fn choose(
        &self,
        guided: &Guided,
        tokens: &Tensor,
        step: TokenStep,
        uniforms: Option<&Tensor>,
    ) -> Result<Tensor> {
        let inner = &self.model.inner;
        let network = &inner.stage_b.network;
        let modulations = self.modulations.at(step.step)?;
        let (conditional, unconditional) = guided.run(self.cx, tokens, |tokens, attended| {
            network.features(self.cx, tokens, Conditioning { modulations: &modulations, attended })
        })?;
        check_finite(&conditional, "Stage B", &inner.stage_b.weights)?;
        let rows = |x: &Tensor| x.reshape(&[x.shape().rows(), x.shape().channels()]);
        let (conditional, unconditional) =
            (rows(&conditional)?, unconditional.as_ref().map(rows).transpose()?);
        let uniforms = uniforms.map(|u| u.reshape(&[u.elements()])).transpose()?;
        let choice = match (step.choice, &uniforms) {
            (Choice::Multinomial, Some(uniforms)) => TokenChoice::Multinomial { uniforms },
            (Choice::Quant, _) => TokenChoice::Quant { codebook: inner.stage_a.network.codebook() },
            _ => TokenChoice::Argmax,
        };
        let chosen = choose_tokens(
            self.cx,
            &conditional,
            unconditional.as_ref(),
            network.logits_weight(),
            step.guidance,
            step.temperature,
            choice,
        )?;
        if chosen.slice::<i64>()?.contains(&NO_TOKEN) {
            return Err(not_finite("Stage B", &[&inner.stage_b.weights, &inner.stage_a.weights]));
        }
        chosen.reshape(tokens.dims())
    }
}

/// # Errors
/// `Format`, naming the tensor, if `x` is not finite because a weight is not; `InvalidArgument` if the weights
/// are finite and the options have driven the values out of range.
pub(super) fn check_finite(x: &Tensor, stage: &str, weights: &Weights) -> Result<()> {
    if x.slice::<f32>()?.iter().all(|v| v.is_finite()) {
        return Ok(());
    }
    Err(not_finite(stage, &[weights]))
}

/// Why an output is not finite: the first weight that is not, or the options.
fn not_finite(stage: &str, weights: &[&Weights]) -> Error {
    for weights in weights {
        if let Some((name, count)) = weights.find_not_finite() {
            let place = format!("{}: {name}", weights.path().display());
            return Error::format(place, "finite weights", format!("{count} that are not"));
        }
    }
    Error::argument(
        format!("{stage} options"),
        "values that keep the network's output finite",
        "an output that is not (guidance or temperature may be extreme)",
    )
}
