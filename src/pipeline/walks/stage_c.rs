//! Stage C's walk from noise, or from a picture's latents, to latents (paper, section 3.3).

use std::ops::Range;

use super::guided::Texts;
use super::{is_guided, modulated};
use crate::device::Context;
use crate::diffusion::latents::{Kept, LatentSampling, LatentStep};
use crate::diffusion::noise::{Draw, NoiseSource, normals};
use crate::error::{Error, Result};
use crate::image::to_mask;
use crate::ops::batch::concat;
use crate::ops::sampler_step::{diffuse, implied_clean};
use crate::pipeline::generate_options::{GenerateOptions, Init, InitFrom};
use crate::pipeline::halves::Prior;
use crate::pipeline::model::Model;
use crate::stages::blocks::{Conditioning, Modulations};
use crate::tensor::replay::Replay;
use crate::tensor::{DType, Tensor};

/// Stage C's walk. It works on Stage C's own latents, and gives them as Stage B takes them.
pub(in crate::pipeline) struct StageCWalk<'a> {
    prior: &'a Prior,
    cx: &'a Context,
    sampling: LatentSampling,
    modulations: Modulations,
    guidance: f32,
    guided: bool,
    grid: (usize, usize),
    /// What the options start from, one entry for all pictures or one for each: as Stage B takes it …
    given: Option<Tensor>,
    /// … and as Stage C's own latents.
    start: Option<Tensor>,
}

impl<'a> StageCWalk<'a> {
    /// A walk as the options ask for it, over a grid of latents. An initial picture is encoded here.
    ///
    /// # Errors
    /// `Unsupported` without Stage C; `InvalidArgument` if initial latents have another grid.
    pub fn new(
        model: &'a Model,
        options: &GenerateOptions,
        cx: &'a Context,
        grid: (usize, usize),
    ) -> Result<Self> {
        let _span = cx.span("stage_c");
        let prior = model.prior()?;
        let given = initial_latents(model, options, cx)?;
        let start = match &given {
            Some(latents) => {
                let [_, h, w, _] = latents.dims_of("latents")?;
                if (h, w) != grid {
                    let expected = format!("a grid of {h} x {w}, as the initial latents have");
                    let found = format!("{} x {}", grid.0, grid.1);
                    return Err(Error::argument("initial_noise", expected, found));
                }
                let mut own = Tensor::from_parts(cx, "latents", latents.dims(), &[latents])?;
                prior.scaling.undo(own.slice_mut()?);
                Some(own)
            }
            None => None,
        };
        let kept = match (&options.mask, &start) {
            (Some(mask), Some(latents)) => {
                let mask = to_mask(cx, mask, grid.0, grid.1)?;
                Some(Kept { latents: latents.clone(), mask })
            }
            _ => None,
        };
        let sampling = LatentSampling {
            schedule: prior.schedule,
            times: options.stage_c_times(),
            sampler: options.stage_c.sampler,
            fresh: Draw::LatentStep,
            kept,
        };
        let modulations = prior.stage_c.network.modulations(cx, &sampling.times)?;
        let guidance = options.stage_c.guidance;
        let guided = is_guided(model.inner.halves.index.pipeline.generation(), guidance);
        Ok(StageCWalk { prior, cx, sampling, modulations, guidance, guided, grid, given, start })
    }

    pub fn is_guided(&self) -> bool {
        self.guided
    }

    /// Steps; none for a picture that is only decoded again.
    pub fn steps(&self) -> usize {
        self.sampling.times.len() - 1
    }

    /// Walks for some pictures of the call, with a text for each. `start` replaces the noise that the walk would
    /// begin with.
    ///
    /// # Shapes
    /// -> `[pictures, h, w, C]`, as Stage B takes them
    pub fn run(
        &self,
        pictures: Range<usize>,
        texts: &Texts,
        noise: &mut dyn NoiseSource,
        start: Option<Tensor>,
        after_step: &mut dyn FnMut(LatentStep) -> Result<()>,
    ) -> Result<Tensor> {
        if let (0, None, Some(given)) = (self.steps(), &start, &self.given) {
            return one_each(self.cx, given, pictures);
        }
        let _span = self.cx.span("stage_c");
        let network = &self.prior.stage_c.network;
        let samples = pictures.len();
        let x = match start {
            Some(start) => start,
            None => self.starting_point(pictures.clone(), noise)?,
        };
        let mut sampling = self.sampling.clone();
        if let Some(kept) = &mut sampling.kept {
            kept.latents = one_each(self.cx, &kept.latents, pictures)?;
            kept.mask = concat(self.cx, &vec![&kept.mask; samples])?;
        }
        let guided = texts.guided(self.cx, |texts, index, _| {
            Ok(([network.attend_to_text(self.cx, texts)?.with_index(index)], Replay::new()))
        })?;
        let predict = |x: &Tensor, step: usize| {
            let modulations = self.modulations.at(step)?;
            guided.predict(self.cx, x, self.guidance, |x, (attended, replay)| {
                modulated(self.cx, replay, x, &modulations, |cx, x, modulations| {
                    network.forward(cx, x, Conditioning { modulations, attended })
                })
            })
        };
        let mut latents = match self.steps() {
            0 => x,
            _ => sampling.run(self.cx, x, noise, predict, after_step)?,
        };
        self.prior.scaling.apply(latents.slice_mut()?);
        Ok(latents)
    }

    /// Pure noise, or the initial latents noised to the first time.
    fn starting_point(&self, pictures: Range<usize>, noise: &mut dyn NoiseSource) -> Result<Tensor> {
        let channels = self.prior.stage_c.network.config().latent_channels;
        let dims = [pictures.len(), self.grid.0, self.grid.1, channels];
        let mut x = Tensor::new(self.cx, "latents", &dims, DType::F32)?;
        match (&self.start, &self.sampling.kept) {
            (Some(latents), None) => {
                x = one_each(self.cx, latents, pictures)?;
                if self.steps() > 0 {
                    let fresh = normals(self.cx, noise, (Draw::LatentStart, 0), &dims)?;
                    let alpha_bar = self.sampling.schedule.alpha_bar(self.sampling.times[0]);
                    x = diffuse(self.cx, x, &fresh, alpha_bar)?;
                }
            }
            _ => noise.normal(Draw::LatentStart, 0, &mut x)?,
        }
        Ok(x)
    }

    /// What the first sample would be without its noise, as Stage B takes it.
    pub fn implied_clean(&self, step: &LatentStep) -> Result<Tensor> {
        let alpha_bar = self.sampling.schedule.alpha_bar(self.sampling.times[step.done]);
        let mut clean = implied_clean_sample(self.cx, step, alpha_bar)?;
        self.prior.scaling.apply(clean.slice_mut()?);
        Ok(clean)
    }
}

/// What the first sample of a walk would be without its noise.
pub(super) fn implied_clean_sample(cx: &Context, step: &LatentStep, alpha_bar: f32) -> Result<Tensor> {
    implied_clean(cx, &step.x.narrow(0, 1)?, &step.predicted.narrow(0, 1)?, alpha_bar)
}

/// What the options start from, as Stage B takes it: one entry for all pictures or one for each.
///
/// # Shapes
/// -> `[1 or pictures, h, w, C]`
///
/// # Errors
/// `Unsupported` for a picture without an image encoder; what encoding it returns.
pub(in crate::pipeline) fn initial_latents(
    model: &Model,
    options: &GenerateOptions,
    cx: &Context,
) -> Result<Option<Tensor>> {
    match &options.init {
        None => Ok(None),
        Some(Init { from: InitFrom::Latents(latents), .. }) => Ok(Some(latents.clone())),
        Some(Init { from: InitFrom::Image(image), .. }) => {
            let image = image.resized(cx, options.width, options.height)?;
            model.encode_pictures(cx, &[&image]).map(Some)
        }
    }
}

/// A copy of an entry for each of some pictures: of their own, or of the one that all share.
///
/// # Errors
/// `InvalidArgument` if there is no such entry; `OutOfMemory`.
pub(in crate::pipeline) fn one_each(
    cx: &Context,
    entries: &Tensor,
    pictures: Range<usize>,
) -> Result<Tensor> {
    match entries.dims().first() {
        Some(1) => concat(cx, &vec![entries; pictures.len()]),
        _ => concat(cx, &[&entries.narrow(pictures.start, pictures.len())?]),
    }
}
