//! One generation, on the thread that it was given: text, Stage C, then Stage B and Stage A picture by picture.

use std::collections::HashMap;
use std::time::Instant;

use super::generate_options::{GenerateOptions, Init, InitFrom};
use super::load::TextPart;
use super::model::Model;
use super::options::{LogLevel, Progress, Stage};
use super::walks::{
    StageBWalk, StageCWalk, Texts, check_finite, check_finite_latents, initial_latents, one_each,
};
use crate::device::{CancelToken, Context};
use crate::diffusion::latents::LatentStep;
use crate::diffusion::noise::SeededNoise;
use crate::error::{Error, Result};
use crate::image::{Image, from_pixels};
use crate::ops::batch::concat;
use crate::tensor::Tensor;

/// Positions of Stage C's grid that go through it at once, twins included: enough to use every core, few
/// enough that activations stay small beside the weights.
const LATENT_POSITIONS_AT_ONCE: usize = 4096;
/// The same for Stage B's finest grid.
const TOKEN_POSITIONS_AT_ONCE: usize = 8192;
/// How much more of both goes through at once on a GPU, which a few thousand rows do not fill.
const TIMES_MORE_ON_GPU: usize = 8;
/// Prompts that go through the text tower at once.
const PROMPTS_AT_ONCE: usize = 16;

/// Hears about every step.
type Report<'a> = &'a dyn Fn(&Progress);

/// What is the same for all pictures of a call.
struct Run<'a> {
    model: &'a Model,
    options: &'a GenerateOptions,
    cx: Context,
    report: Report<'a>,
    started: Instant,
}

/// What one picture is made of.
#[derive(Debug, Clone, Copy)]
struct Request {
    prompt: usize,
    negative: usize,
    seed: u64,
}

impl Model {
    /// Makes the pictures of `options` on this thread. `cancel` stops it, beside the options' own token.
    ///
    /// # Errors
    /// As [`Model::generate`].
    pub(super) fn run_generation(
        &self,
        options: &GenerateOptions,
        cancel: &CancelToken,
        report: Report,
    ) -> Result<Vec<Image>> {
        let mut cx = self.context().cancelled_by(cancel);
        if let Some(token) = &options.cancel {
            cx = cx.cancelled_by(token);
        }
        cx.check()?;
        Run { model: self, options, cx, report, started: Instant::now() }.images()
    }
}

/// The embeddings of the call's different texts, `[T, width]` each, by the tower of each stage.
struct Embedded {
    for_stage_c: Vec<Tensor>,
    for_stage_b: Vec<Tensor>,
}

impl Run<'_> {
    fn images(&self) -> Result<Vec<Image>> {
        let (texts, requests) = self.requests();
        let embedded = self.embed(&texts)?;
        let latents = self.latents(&embedded, &requests)?;
        let images = self.pictures(&embedded.for_stage_b, &requests, &latents)?;
        self.model.log(LogLevel::Info, || {
            format!("made {} pictures in {:.2?}", images.len(), self.started.elapsed())
        });
        Ok(images)
    }

    /// Each different text once, and what each picture is made of.
    fn requests(&self) -> (Vec<&str>, Vec<Request>) {
        let mut numbers: HashMap<&str, usize> = HashMap::new();
        let mut unique: Vec<&str> = Vec::new();
        let mut requests = Vec::with_capacity(self.options.image_count());
        for prompt in &self.options.prompts {
            let [negative, prompt] =
                [prompt.negative.as_deref().unwrap_or(""), prompt.text.as_str()].map(|text| {
                    *numbers.entry(text).or_insert_with(|| {
                        unique.push(text);
                        unique.len() - 1
                    })
                });
            for _ in 0..self.options.images_per_prompt {
                let seed = self.options.seed.wrapping_add(requests.len() as u64);
                requests.push(Request { prompt, negative, seed });
            }
        }
        (unique, requests)
    }

    /// The texts by both towers, or once by the one that the stages share.
    fn embed(&self, texts: &[&str]) -> Result<Embedded> {
        let for_b = self.model.text_of(Stage::B)?;
        let for_stage_b = self.embed_by(for_b, texts)?;
        let for_stage_c = match self.model.text_of(Stage::C) {
            Ok(for_c) if std::ptr::eq(for_b, for_c) => for_stage_b.clone(),
            Ok(for_c) if self.options.stage_c_times().len() > 1 => self.embed_by(for_c, texts)?,
            // Stage C does not run.
            _ => Vec::new(),
        };
        Ok(Embedded { for_stage_c, for_stage_b })
    }

    fn embed_by(&self, part: &TextPart, texts: &[&str]) -> Result<Vec<Tensor>> {
        let mut embeddings = Vec::with_capacity(texts.len());
        for texts in texts.chunks(PROMPTS_AT_ONCE) {
            let hidden = part.embed(&self.cx, texts)?;
            for i in 0..texts.len() {
                embeddings.push(hidden.narrow(i, 1)?);
            }
        }
        self.model.leave_stage(&part.tower.weights);
        Ok(embeddings)
    }

    /// The texts of some pictures: each different one once.
    fn select(&self, texts: &[Tensor], requests: &[Request], guidance: bool) -> Result<Texts> {
        let (conditional, index) = gather(&self.cx, texts, requests.iter().map(|r| r.prompt))?;
        let unconditional = match guidance {
            true => Some(gather(&self.cx, texts, requests.iter().map(|r| r.negative))?),
            false => None,
        };
        Ok(Texts { conditional, index, unconditional })
    }

    /// Height and width of Stage C's latents.
    fn latent_grid(&self) -> (usize, usize) {
        self.model.inner.geometry.latent_size(self.options.width, self.options.height)
    }

    /// What Stage B takes, for all pictures: a view `[h, w, C]` each.
    fn latents(&self, texts: &Embedded, requests: &[Request]) -> Result<Vec<Tensor>> {
        if self.options.stage_c_times().len() < 2
            && let Some(initial) = initial_latents(self.model, self.options, &self.cx)?
        {
            let all = one_each(&self.cx, &initial, 0..requests.len())?;
            return (0..requests.len()).map(|i| all.narrow(i, 1)).collect();
        }
        let (h, w) = self.latent_grid();
        let walk = StageCWalk::new(self.model, self.options, &self.cx, (h, w))?;
        let prior = self.model.prior()?;
        let mut latents = Vec::with_capacity(requests.len());
        let at_once = self.at_once(LATENT_POSITIONS_AT_ONCE, h * w);
        let chunks = requests.len().div_ceil(at_once);
        for (chunk, requests) in requests.chunks(at_once).enumerate() {
            let select = |texts: &[Tensor], guided| self.select(texts, requests, guided);
            let chosen = select(&texts.for_stage_c, walk.is_guided())?;
            let pictures = latents.len()..latents.len() + requests.len();
            let mut noise = SeededNoise::new(requests.iter().map(|r| r.seed).collect());
            let x = walk.run(pictures, &chosen, &mut noise, None, &mut |step| {
                let done = (chunk * walk.steps() + step.done) as u32;
                let steps = (chunks * walk.steps()) as u32;
                let preview = match self.preview_is_due(done) {
                    true => {
                        let chosen = select(&texts.for_stage_b[..], false)?;
                        Some(self.preview_of_latents(&walk, &chosen, step)?)
                    }
                    false => None,
                };
                self.tell(Stage::C, done, steps, preview);
                Ok(())
            })?;
            check_finite_latents(&x, prior)?;
            for i in 0..requests.len() {
                latents.push(x.narrow(i, 1)?);
            }
        }
        self.model.leave_stage(&prior.stage_c.weights);
        Ok(latents)
    }

    /// Stage B and Stage A, a few pictures at a time.
    fn pictures(&self, texts: &[Tensor], requests: &[Request], latents: &[Tensor]) -> Result<Vec<Image>> {
        let decoder = self.model.decoder()?;
        let walk = StageBWalk::new(self.model, self.options, &self.cx, self.latent_grid())?;
        let at_once = self.at_once(TOKEN_POSITIONS_AT_ONCE, walk.positions());
        let (total, chunks) = (requests.len(), requests.len().div_ceil(at_once));
        let mut images = Vec::new();
        images.try_reserve_exact(total).map_err(|_| Error::out_of_memory("pictures", total))?;
        for (chunk, (requests, latents)) in requests.chunks(at_once).zip(latents.chunks(at_once)).enumerate()
        {
            let texts = self.select(texts, requests, walk.is_guided())?;
            let latents = concat(&self.cx, &latents.iter().collect::<Vec<_>>())?;
            let mut noise = SeededNoise::new(requests.iter().map(|r| r.seed).collect());
            let decoded = walk.run(&latents, &texts, &mut noise, &mut |done, glimpse| {
                let done = (chunk * walk.steps() + done) as u32;
                let preview = match self.preview_is_due(done) {
                    true => Some(self.decode(&glimpse()?)?),
                    false => None,
                };
                self.tell(Stage::B, done, (chunks * walk.steps()) as u32, preview);
                Ok(())
            })?;
            drop(texts);
            for i in 0..requests.len() {
                images.push(self.picture(&decoded.narrow(i, 1)?)?);
                self.tell(Stage::A, images.len() as u32, total as u32, None);
            }
        }
        self.model.leave_stage(decoder.stage_b.weights());
        self.model.leave_stage(&decoder.stage_a.weights);
        Ok(images)
    }

    /// Stage A for one picture, with the kept part of an initial picture laid over it.
    fn picture(&self, decoded: &Tensor) -> Result<Image> {
        let image = self.decode(decoded)?;
        match (&self.options.init, &self.options.mask) {
            (Some(Init { from: InitFrom::Image(original), .. }), Some(mask)) => {
                let (width, height) = (image.width(), image.height());
                let original = original.resized(&self.cx, width, height)?;
                let mask = mask.resized(&self.cx, width, height)?;
                image.over(&original, &mask)
            }
            _ => Ok(image),
        }
    }

    /// Stage A's picture of tokens or latents.
    fn decode(&self, tokens_or_latents: &Tensor) -> Result<Image> {
        let decoder = self.model.decoder()?;
        let pixels = decoder.pixels(&self.cx, tokens_or_latents)?;
        check_finite(&pixels, "Stage A", &decoder.stage_a.weights)?;
        from_pixels(&pixels)
    }

    /// How many pictures of so many positions each go through a stage at once, of `positions` in all on the CPU.
    fn at_once(&self, positions: usize, of_picture: usize) -> usize {
        let inner = &self.model.inner;
        let roomy_gpu = inner.device.accelerator().is_some() && !inner.fills_gpu;
        let times = if roomy_gpu { TIMES_MORE_ON_GPU } else { 1 };
        (times * positions / (2 * of_picture)).max(1)
    }

    fn tell(&self, stage: Stage, step: u32, steps: u32, preview: Option<Image>) {
        let seconds = self.started.elapsed().as_secs_f64();
        self.model.log(LogLevel::Debug, || format!("{stage:?} {step}/{steps} at {seconds:.3} s"));
        (self.report)(&Progress { stage, step, steps, seconds, preview });
    }

    fn preview_is_due(&self, done: u32) -> bool {
        self.options.preview_every != 0 && done.is_multiple_of(self.options.preview_every)
    }

    /// A short Stage B from the clean latents that the first picture's state implies.
    fn preview_of_latents(&self, walk: &StageCWalk, texts: &Texts, step: LatentStep) -> Result<Image> {
        let clean = walk.implied_clean(&step)?;
        check_finite_latents(&clean, self.model.prior()?)?;
        let short = StageBWalk::preview(self.model, self.options, &self.cx, self.latent_grid())?;
        self.decode(&short.glance(&clean, texts)?)
    }
}

/// Each different entry once, `[entries, T, width]`, and where each of `numbers` went.
fn gather(
    cx: &Context,
    texts: &[Tensor],
    numbers: impl Iterator<Item = usize>,
) -> Result<(Tensor, Vec<usize>)> {
    let mut used: Vec<usize> = Vec::new();
    let index = numbers
        .map(|number| {
            used.iter().position(|&u| u == number).unwrap_or_else(|| {
                used.push(number);
                used.len() - 1
            })
        })
        .collect();
    let parts: Vec<&Tensor> = used.iter().map(|&u| &texts[u]).collect();
    Ok((concat(cx, &parts)?, index))
}
