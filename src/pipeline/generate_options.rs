//! What to generate: prompts, sizes, seeds, steps; validated when they are set.

use super::Model;
use super::options::{Choice, ProgressFn, Sampler, parse};
use crate::device::CancelToken;
use crate::diffusion::latents::check_times;
use crate::diffusion::schedule::linspace;
use crate::error::{Error, Result};
use crate::image::Image;
use crate::tensor::{DType, Tensor};

/// More steps than any schedule gains from.
const MAX_STEPS: u32 = 10_000;
/// More pictures than one call should hold in memory.
const MAX_IMAGES: usize = 4096;
/// The most pixels of one picture: 4096 x 4096.
const MAX_PIXELS: u64 = 1 << 24;
/// Beyond any prompt that a text tower reads; guards against a mistaken pointer.
const MAX_PROMPT_BYTES: usize = 1 << 20;

/// What to generate. Starts from the model's own recommended values.
#[derive(Clone)]
pub struct GenerateOptions {
    pub(super) model: Model,
    pub(super) prompts: Vec<Prompt>,
    pub(super) images_per_prompt: u32,
    pub(super) width: u32,
    pub(super) height: u32,
    pub(super) seed: u64,
    pub(super) stage_c: StageCOptions,
    pub(super) stage_b: StageBOptions,
    pub(super) init: Option<Init>,
    pub(super) mask: Option<Image>,
    pub(super) progress: Option<ProgressFn>,
    pub(super) preview_every: u32,
    pub(super) cancel: Option<CancelToken>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Prompt {
    pub text: String,
    pub negative: Option<String>,
}

/// How Stage C runs.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct StageCOptions {
    pub steps: u32,
    pub guidance: f32,
    pub sampler: Sampler,
    /// The times that the model was published with, until steps are set.
    pub recommended: Option<Vec<f32>>,
    /// The times that the caller has set.
    pub timesteps: Option<Vec<f32>>,
}

/// What Stage C starts from instead of noise.
#[derive(Debug, Clone)]
pub(super) struct Init {
    pub from: InitFrom,
    /// The time at which the walk starts.
    pub strength: f32,
}

#[derive(Debug, Clone)]
pub(super) enum InitFrom {
    Image(Image),
    /// `[1 or N, h, w, C]`, as Stage B takes them.
    Latents(Tensor),
}

/// How Stage B runs.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct StageBOptions {
    pub steps: u32,
    pub guidance: f32,
    pub temperature: (f32, f32),
    pub choice: Choice,
    /// v2: the times that the caller has set.
    pub timesteps: Option<Vec<f32>>,
}

impl GenerateOptions {
    /// The model's recommended values, and no prompt yet.
    ///
    /// # Errors
    /// None today.
    pub fn new(model: &Model) -> Result<Self> {
        Ok(model.default_options())
    }

    /// Adds a prompt, with what the picture should not show (by default, nothing in particular).
    ///
    /// # Errors
    /// `InvalidArgument` beyond 1 MiB of text or 4096 pictures.
    pub fn add_prompt(&mut self, text: &str, negative: Option<&str>) -> Result<()> {
        for (name, text) in [("prompt", Some(text)), ("negative prompt", negative)] {
            let bytes = text.map_or(0, str::len);
            if bytes > MAX_PROMPT_BYTES {
                return Err(Error::argument(name, format!("at most {MAX_PROMPT_BYTES} bytes"), bytes));
            }
        }
        check_image_count(self.prompts.len() + 1, self.images_per_prompt)?;
        self.prompts.push(Prompt { text: text.into(), negative: negative.map(Into::into) });
        Ok(())
    }

    /// Pictures of each prompt; picture i of the call has seed + i.
    ///
    /// # Errors
    /// `InvalidArgument` for 0 or beyond 4096 pictures.
    pub fn set_images_per_prompt(&mut self, count: u32) -> Result<()> {
        if count == 0 {
            return Err(Error::argument("images_per_prompt", "at least 1", count));
        }
        // Even a single prompt must fit.
        let most = (MAX_IMAGES / self.prompts.len().max(1)) as u32;
        if count > most {
            return Err(Error::argument("images_per_prompt", format!("at most {most}"), count));
        }
        self.images_per_prompt = count;
        Ok(())
    }

    /// Size of the pictures in pixels.
    ///
    /// # Errors
    /// `InvalidArgument` unless both are multiples of what the model's stages divide by (v1: 32, v2: 128), and at
    /// most 4096 x 4096 pixels together.
    pub fn set_size(&mut self, width: u32, height: u32) -> Result<()> {
        self.model.inner.geometry.check_side("width", width)?;
        self.model.inner.geometry.check_side("height", height)?;
        if u64::from(width) * u64::from(height) > MAX_PIXELS {
            let expected = format!("at most {MAX_PIXELS} pixels");
            return Err(Error::argument("size", expected, format!("{width} x {height}")));
        }
        (self.width, self.height) = (width, height);
        Ok(())
    }

    /// The seed of the first picture.
    ///
    /// # Errors
    /// None: every number is a seed.
    pub fn set_seed(&mut self, seed: u64) -> Result<()> {
        self.seed = seed;
        Ok(())
    }

    /// Steps, evenly spaced, and guidance weight of Stage C; a weight of 1 turns guidance off and halves the work.
    /// In v2 any weight up to 1 does, as in the reference.
    ///
    /// # Errors
    /// `InvalidArgument` for 0 or more than 10,000 steps, or a weight that is not finite.
    pub fn set_stage_c(&mut self, steps: u32, guidance: f32) -> Result<()> {
        check_steps("stage_c_steps", steps)?;
        check_finite("stage_c_guidance", guidance)?;
        (self.stage_c.steps, self.stage_c.guidance) = (steps, guidance);
        (self.stage_c.recommended, self.stage_c.timesteps) = (None, None);
        Ok(())
    }

    /// How Stage C steps.
    ///
    /// # Errors
    /// None today.
    pub fn set_stage_c_sampler(&mut self, sampler: Sampler) -> Result<()> {
        self.stage_c.sampler = sampler;
        Ok(())
    }

    /// The times of Stage C, from the start (1 is pure noise) to the end (usually 0): one step between each
    /// two. Replaces the number of steps; an empty list goes back to it.
    ///
    /// # Errors
    /// `InvalidArgument` unless there are at least two, decreasing, within 0..1.
    pub fn set_stage_c_timesteps(&mut self, times: &[f32]) -> Result<()> {
        self.stage_c.timesteps = given_times(times)?;
        Ok(())
    }

    /// Steps and guidance weight of Stage B; a weight of 1 (in v2: up to 1) turns guidance off.
    ///
    /// # Errors
    /// As [`GenerateOptions::set_stage_c`].
    pub fn set_stage_b(&mut self, steps: u32, guidance: f32) -> Result<()> {
        check_steps("stage_b_steps", steps)?;
        check_finite("stage_b_guidance", guidance)?;
        (self.stage_b.steps, self.stage_b.guidance, self.stage_b.timesteps) = (steps, guidance, None);
        Ok(())
    }

    /// The times of v2's Stage B, in place of evenly spaced ones, as [`GenerateOptions::set_stage_c_timesteps`]
    /// takes Stage C's.
    ///
    /// # Errors
    /// As there; `Unsupported` in v1, whose Stage B puts tokens back at evenly spaced times.
    pub fn set_stage_b_timesteps(&mut self, times: &[f32]) -> Result<()> {
        self.model.expect_latent_decoder()?;
        self.stage_b.timesteps = given_times(times)?;
        Ok(())
    }

    /// Temperature of Stage B's first and last step, linear between.
    ///
    /// # Errors
    /// `InvalidArgument` unless both are finite and at least [`f32::MIN_POSITIVE`], 1.2e-38; `Unsupported` in v2,
    /// whose Stage B chooses no tokens.
    pub fn set_stage_b_temperature(&mut self, start: f32, end: f32) -> Result<()> {
        self.model.token_predictor()?;
        for (name, value) in [("temperature start", start), ("temperature end", end)] {
            if !(value >= f32::MIN_POSITIVE && value.is_finite()) {
                let expected = format!("a positive number from {:e}", f32::MIN_POSITIVE);
                return Err(Error::argument(name, expected, value));
            }
        }
        self.stage_b.temperature = (start, end);
        Ok(())
    }

    /// How Stage B chooses tokens.
    ///
    /// # Errors
    /// `Unsupported` in v2, whose Stage B chooses no tokens.
    pub fn set_stage_b_choice(&mut self, choice: Choice) -> Result<()> {
        self.model.token_predictor()?;
        self.stage_b.choice = choice;
        Ok(())
    }

    /// Starts from a picture: Stage C begins at time `strength` from the picture's latents, noised to that
    /// time, with that share of its steps. 1 keeps nothing of the picture but with a mask; 0 only decodes its
    /// latents again (image variation).
    ///
    /// # Errors
    /// `InvalidArgument` unless strength is within 0..1; `Unsupported` if the model has no image encoder.
    pub fn set_init_image(&mut self, image: &Image, strength: f32) -> Result<()> {
        check_strength(strength)?;
        self.model.image_encoder()?;
        self.init = Some(Init { from: InitFrom::Image(image.clone()), strength });
        Ok(())
    }

    /// The same from latents, as [`Model::encode_image`] or [`Model::stage_c_sample`] gives them: one for all
    /// pictures of the call, or one for each. Strength 0 needs no Stage C.
    ///
    /// # Shapes
    /// `F32 [1 or pictures, h, w, latent_channels]`
    ///
    /// # Errors
    /// `InvalidArgument` unless strength is within 0..1 and the latents have four dimensions, the model's channels
    /// and finite values; their grid is held to the pictures' size when these are made.
    pub fn set_init_latents(&mut self, latents: &Tensor, strength: f32) -> Result<()> {
        check_strength(strength)?;
        let channels = self.model.inner.latent_channels();
        let [_, _, _, found] = latents.dims_of("init latents")?;
        if found != channels || latents.elements() == 0 || latents.dtype() != DType::F32 {
            let found = format!("{} of {}", latents.shape(), latents.dtype());
            return Err(Error::argument("init latents", format!("F32 with {channels} channels"), found));
        }
        if let Some(value) = latents.slice::<f32>()?.iter().find(|v| !v.is_finite()) {
            return Err(Error::argument("init latents", "finite values", value));
        }
        self.init = Some(Init { from: InitFrom::Latents(latents.clone()), strength });
        Ok(())
    }

    /// Whether the initial latents, if there are any, suit `count` pictures of the options' size.
    ///
    /// # Errors
    /// `InvalidArgument`.
    pub(super) fn check_init_latents(&self, count: usize) -> Result<()> {
        let Some(Init { from: InitFrom::Latents(latents), .. }) = &self.init else { return Ok(()) };
        let [entries, h, w, _] = latents.dims_of("init latents")?;
        let (rows, columns) = self.model.inner.geometry.latent_size(self.width, self.height);
        if (entries != 1 && entries != count) || (h, w) != (rows, columns) {
            let expected = format!(
                "1 or {count} samples of {rows} x {columns}, as pictures of {} x {} have",
                self.width, self.height
            );
            return Err(Error::argument("init latents", expected, latents.shape()));
        }
        Ok(())
    }

    /// The times of Stage C: one step between each two, none if an initial picture is only decoded again. Without
    /// a mask an initial picture shortens the walk to its strength.
    pub(super) fn stage_c_times(&self) -> Vec<f32> {
        let StageCOptions { steps, recommended, timesteps, .. } = &self.stage_c;
        if let Some(times) = timesteps {
            return times.clone();
        }
        let whole = recommended.clone().unwrap_or_else(|| linspace(1.0, 0.0, *steps as usize));
        match &self.init {
            Some(Init { strength, .. }) if self.mask.is_none() && *strength < 1.0 => {
                if *strength == 0.0 {
                    vec![0.0]
                } else if recommended.is_some() {
                    let later = whole.into_iter().filter(|t| t < strength);
                    std::iter::once(*strength).chain(later).collect()
                } else {
                    let steps = ((*steps as f32 * strength).round() as usize).max(1);
                    linspace(*strength, 0.0, steps)
                }
            }
            _ => whole,
        }
    }

    /// The times of v2's Stage B: one step between each two.
    pub(super) fn stage_b_times(&self) -> Vec<f32> {
        let StageBOptions { steps, timesteps, .. } = &self.stage_b;
        timesteps.clone().unwrap_or_else(|| linspace(1.0, 0.0, *steps as usize))
    }

    /// Generates only where the mask is bright, and keeps the initial picture where it is dark.
    ///
    /// # Errors
    /// None today; generation asks for an initial picture or latents.
    pub fn set_mask(&mut self, mask: &Image) -> Result<()> {
        self.mask = Some(mask.clone());
        Ok(())
    }

    /// Who hears about every step, on the thread that generates; `None` for nobody.
    ///
    /// # Errors
    /// None today.
    pub fn set_progress(&mut self, progress: Option<ProgressFn>) -> Result<()> {
        self.progress = progress;
        Ok(())
    }

    /// A preview with every n-th progress report; 0 for none. Each one costs a short Stage B and a Stage A run
    /// on the first picture of the call.
    ///
    /// # Errors
    /// None today.
    pub fn set_preview(&mut self, every_n_steps: u32) -> Result<()> {
        self.preview_every = every_n_steps;
        Ok(())
    }

    /// The token that stops the generation; `None` for no token.
    ///
    /// # Errors
    /// None today.
    pub fn set_cancel(&mut self, token: Option<&CancelToken>) -> Result<()> {
        self.cancel = token.cloned();
        Ok(())
    }

    /// How many pictures the call makes: prompts times pictures per prompt.
    pub fn image_count(&self) -> usize {
        self.prompts.len() * self.images_per_prompt as usize
    }

    /// Any plain value by name, for configuration files and scripting languages. Two numbers are separated by
    /// a comma.
    ///
    /// # Errors
    /// `InvalidArgument` for an unknown key or a value that does not parse; what the named setter returns.
    pub fn set(&mut self, key: &str, value: &str) -> Result<()> {
        match key {
            "prompt" => self.add_prompt(value, None),
            "images_per_prompt" => self.set_images_per_prompt(parse(key, value)?),
            "width" => self.set_size(parse(key, value)?, self.height),
            "height" => self.set_size(self.width, parse(key, value)?),
            "seed" => self.set_seed(parse(key, value)?),
            "stage_c_steps" => self.set_stage_c(parse(key, value)?, self.stage_c.guidance),
            "stage_c_guidance" => {
                check_finite(key, parse(key, value)?)?;
                self.stage_c.guidance = parse(key, value)?;
                Ok(())
            }
            "stage_c_sampler" => self.set_stage_c_sampler(match value {
                "ddpm" => Sampler::Ddpm,
                "ddim" => Sampler::Ddim,
                _ => return Err(Error::argument(key, "ddpm or ddim", format!("{value:?}"))),
            }),
            "stage_b_steps" => self.set_stage_b(parse(key, value)?, self.stage_b.guidance),
            "stage_b_guidance" => {
                check_finite(key, parse(key, value)?)?;
                self.stage_b.guidance = parse(key, value)?;
                Ok(())
            }
            "stage_b_temperature" => {
                let (start, end) = value.split_once(',').unwrap_or((value, value));
                self.set_stage_b_temperature(parse(key, start)?, parse(key, end)?)
            }
            "stage_b_choice" => self.set_stage_b_choice(match value {
                "multinomial" => Choice::Multinomial,
                "argmax" => Choice::Argmax,
                "quant" => Choice::Quant,
                _ => return Err(Error::argument(key, "multinomial, argmax or quant", format!("{value:?}"))),
            }),
            "preview" => self.set_preview(parse(key, value)?),
            _ => {
                let keys = "one of prompt, images_per_prompt, width, height, seed, stage_c_steps, \
                            stage_c_guidance, stage_c_sampler, stage_b_steps, stage_b_guidance, \
                            stage_b_temperature, stage_b_choice, preview";
                Err(Error::argument("generate option", keys, format!("{key:?}")))
            }
        }
    }
}

fn check_steps(name: &str, steps: u32) -> Result<()> {
    match steps {
        1..=MAX_STEPS => Ok(()),
        _ => Err(Error::argument(name, format!("1 to {MAX_STEPS}"), steps)),
    }
}

/// Times that a caller sets; none in an empty list.
fn given_times(times: &[f32]) -> Result<Option<Vec<f32>>> {
    if times.is_empty() {
        return Ok(None);
    }
    check_times(times)?;
    check_steps("timesteps", (times.len() - 1).try_into().unwrap_or(u32::MAX))?;
    Ok(Some(times.to_vec()))
}

fn check_strength(strength: f32) -> Result<()> {
    match (0.0..=1.0).contains(&strength) {
        true => Ok(()),
        false => Err(Error::argument("strength", "a number from 0 to 1", strength)),
    }
}

fn check_finite(name: &str, value: f32) -> Result<()> {
    if value.is_finite() { Ok(()) } else { Err(Error::argument(name, "a finite number", value)) }
}

fn check_image_count(prompts: usize, per_prompt: u32) -> Result<()> {
    let images = prompts.saturating_mul(per_prompt as usize);
    if images > MAX_IMAGES {
        return Err(Error::argument("images", format!("at most {MAX_IMAGES} in one call"), images));
    }
    Ok(())
}
