//! One generation, on the thread that it was given: text, Stage C, then Stage B and Stage A picture by picture.

use std::collections::HashMap;
use std::time::Instant;

use super::generate_options::GenerateOptions;
use super::guided::Texts;
use super::model::Model;
use super::options::{LogLevel, Progress, Stage};
use super::sampling::{LatentWalk, TokenWalk};
use crate::device::{CancelToken, Context};
use crate::diffusion::noise::SeededNoise;
use crate::error::{Error, Result};
use crate::image::{Image, from_pixels};
use crate::ops::batch::concat;
use crate::tensor::Tensor;
use crate::weights::Weights;

/// Positions of Stage C's grid that go through it at once, twins included: enough to use every core, few
/// enough that activations stay small beside the weights.
const LATENT_POSITIONS_AT_ONCE: usize = 4096;
/// The same for Stage B's finest grid.
const TOKEN_POSITIONS_AT_ONCE: usize = 8192;
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
        let mut cx = Context::new(&self.inner.device).cancelled_by(cancel);
        if let Some(token) = &options.cancel {
            cx = cx.cancelled_by(token);
        }
        cx.check()?;
        Run { model: self, options, cx, report, started: Instant::now() }.images()
    }
}

impl Run<'_> {
    fn images(&self) -> Result<Vec<Image>> {
        let (texts, requests) = self.texts()?;
        let latents = self.latents(&texts, &requests)?;
        let images = self.pictures(&texts, &requests, &latents)?;
        self.model.log(LogLevel::Info, || {
            format!("made {} pictures in {:.2?}", images.len(), self.started.elapsed())
        });
        Ok(images)
    }

    /// An embedding for each different text, `[T, width]`, and which of them each picture uses.
    fn texts(&self) -> Result<(Vec<Tensor>, Vec<Request>)> {
        let mut numbers: HashMap<&str, usize> = HashMap::new();
        let mut unique: Vec<&str> = Vec::new();
        let mut number = |text| {
            *numbers.entry(text).or_insert_with(|| {
                unique.push(text);
                unique.len() - 1
            })
        };
        let mut requests = Vec::with_capacity(self.options.image_count());
        for prompt in &self.options.prompts {
            let negative = number(prompt.negative.as_deref().unwrap_or(""));
            let prompt = number(&prompt.text);
            for _ in 0..self.options.images_per_prompt {
                let seed = self.options.seed.wrapping_add(requests.len() as u64);
                requests.push(Request { prompt, negative, seed });
            }
        }
        let mut embeddings = Vec::with_capacity(unique.len());
        for texts in unique.chunks(PROMPTS_AT_ONCE) {
            let hidden = self.model.embed_texts(&self.cx, texts)?;
            for i in 0..texts.len() {
                embeddings.push(hidden.narrow(i, 1)?);
            }
        }
        self.model.leave_stage(&self.model.inner.text.tower.weights);
        Ok((embeddings, requests))
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

    /// Stage C for all pictures: a view `[h, w, C]` each.
    fn latents(&self, texts: &[Tensor], requests: &[Request]) -> Result<Vec<Tensor>> {
        let (h, w) = self.model.latent_size(self.options.width, self.options.height);
        let walk = LatentWalk::new(self.model, self.options, &self.cx, (h, w))?;
        let mut latents = Vec::with_capacity(requests.len());
        let at_once = (LATENT_POSITIONS_AT_ONCE / (2 * h * w)).max(1);
        let chunks = requests.len().div_ceil(at_once);
        for (chunk, requests) in requests.chunks(at_once).enumerate() {
            let texts = self.select(texts, requests, walk.is_guided())?;
            let mut noise = SeededNoise::new(requests.iter().map(|r| r.seed).collect());
            let x = walk.run(&texts, &mut noise, None, &mut |step| {
                let done = (chunk * walk.steps() + step.done) as u32;
                let steps = (chunks * walk.steps()) as u32;
                let preview = self.preview_of_latents(done, &walk, &texts, step)?;
                self.tell(Stage::C, done, steps, preview);
                Ok(())
            })?;
            self.check_finite(&x, "Stage C", &self.model.inner.stage_c.weights)?;
            for i in 0..requests.len() {
                latents.push(x.narrow(i, 1)?);
            }
        }
        self.model.leave_stage(&self.model.inner.stage_c.weights);
        Ok(latents)
    }

    /// Stage B and Stage A, a few pictures at a time.
    fn pictures(&self, texts: &[Tensor], requests: &[Request], latents: &[Tensor]) -> Result<Vec<Image>> {
        let inner = &self.model.inner;
        let walk = TokenWalk::new(self.model, self.options, &self.cx)?;
        let at_once = (TOKEN_POSITIONS_AT_ONCE / (2 * walk.positions())).max(1);
        let (total, chunks) = (requests.len(), requests.len().div_ceil(at_once));
        let mut images = Vec::new();
        images.try_reserve_exact(total).map_err(|_| Error::out_of_memory("pictures", total))?;
        for (chunk, (requests, latents)) in requests.chunks(at_once).zip(latents.chunks(at_once)).enumerate()
        {
            let texts = self.select(texts, requests, walk.is_guided())?;
            let latents = concat(&self.cx, &latents.iter().collect::<Vec<_>>())?;
            let mut noise = SeededNoise::new(requests.iter().map(|r| r.seed).collect());
            let tokens = walk.run(&latents, &texts, &mut noise, &mut |done, tokens| {
                let done = (chunk * walk.steps() + done) as u32;
                let preview = self.preview_of_tokens(done, tokens)?;
                self.tell(Stage::B, done, (chunks * walk.steps()) as u32, preview);
                Ok(())
            })?;
            drop(texts);
            for i in 0..requests.len() {
                images.push(self.picture(&tokens.narrow(i, 1)?)?);
                self.tell(Stage::A, images.len() as u32, total as u32, None);
            }
        }
        self.model.leave_stage(&inner.stage_b.weights);
        self.model.leave_stage(&inner.stage_a.weights);
        Ok(images)
    }

    /// Stage A for one picture, with the kept part of an initial picture laid over it.
    fn picture(&self, tokens: &Tensor) -> Result<Image> {
        let inner = &self.model.inner;
        let pixels = inner.stage_a.network.decode_tokens(&self.cx, tokens)?;
        self.check_finite(&pixels, "Stage A", &inner.stage_a.weights)?;
        let image = from_pixels(&pixels)?;
        match (&self.options.init_image, &self.options.mask) {
            (Some((original, _)), Some(mask)) => {
                let (width, height) = (image.width(), image.height());
                let original = original.resized(&self.cx, width, height)?;
                let mask = mask.resized(&self.cx, width, height)?;
                image.over(&original, &mask)
            }
            _ => Ok(image),
        }
    }

    fn tell(&self, stage: Stage, step: u32, steps: u32, preview: Option<Image>) {
        let seconds = self.started.elapsed().as_secs_f64();
        self.model.log(LogLevel::Debug, || format!("{stage:?} {step}/{steps} at {seconds:.3} s"));
        (self.report)(&Progress { stage, step, steps, seconds, preview });
    }

    fn preview_is_due(&self, done: u32) -> bool {
        self.options.preview_every != 0 && done.is_multiple_of(self.options.preview_every)
    }

    /// One greedy Stage B step from the clean latents that the first picture's state implies.
    fn preview_of_latents(
        &self,
        done: u32,
        walk: &LatentWalk,
        texts: &Texts,
        step: crate::diffusion::latents::LatentStep,
    ) -> Result<Option<Image>> {
        if !self.preview_is_due(done) {
            return Ok(None);
        }
        let clean = walk.implied_clean(&step)?;
        let tokens = TokenWalk::preview(self.model, self.options, &self.cx)?.glance(&clean, texts)?;
        self.preview_of_tokens(done, &tokens)
    }

    fn preview_of_tokens(&self, done: u32, tokens: &Tensor) -> Result<Option<Image>> {
        if !self.preview_is_due(done) {
            return Ok(None);
        }
        let pixels = self.model.inner.stage_a.network.decode_tokens(&self.cx, &tokens.narrow(0, 1)?)?;
        from_pixels(&pixels).map(Some)
    }

    fn check_finite(&self, x: &Tensor, stage: &str, weights: &Weights) -> Result<()> {
        super::sampling::check_finite(x, stage, weights)
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
