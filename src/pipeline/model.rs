//! An opened model: mapped weights on one device, immutable, shared by any number of threads.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use super::generate_options::{GenerateOptions, StageBOptions, StageCOptions};
use super::load::{self, ImagePart, Part, TextPart};
use super::options::{Choice, LogLevel, ModelOptions, Progress, Residency, Sampler};
use crate::device::threads::{run_apart, run_apart_reporting};
use crate::device::{CancelToken, Device};
use crate::error::{Error, Result};
use crate::image::Image;
use crate::stages::stage_a::StageA;
use crate::stages::stage_b::StageB;
use crate::stages::stage_c::StageC;
use crate::weights::Weights;
use crate::weights::config::{ModelIndex, Pipeline};

/// The paper's values, where a model does not recommend its own (sections 3.3 and 4.2).
const DEFAULT_STAGE_C_STEPS: u32 = 60;
const DEFAULT_STAGE_C_GUIDANCE: f32 = 4.0;
const DEFAULT_STAGE_B_STEPS: u32 = 8;
const DEFAULT_STAGE_B_GUIDANCE: f32 = 2.0;
const DEFAULT_STAGE_B_TEMPERATURE: (f32, f32) = (0.7, 0.3);

/// How far EfficientNetV2 shrinks a picture, for folders without an image encoder.
const ENCODER_FACTOR: usize = 32;

/// A model folder, opened. Clones share it; it closes with the last of them, its options and its jobs.
#[derive(Clone)]
pub struct Model {
    pub(super) inner: Arc<Inner>,
}

pub(super) struct Inner {
    pub device: Device,
    pub index: ModelIndex,
    pub text: TextPart,
    pub stage_a: Part<StageA>,
    pub stage_b: Part<StageB>,
    pub stage_c: Part<StageC>,
    pub image: Option<ImagePart>,
    residency: Residency,
    log: Option<(LogLevel, super::LogFn)>,
}

/// What an opened model is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ModelInfo {
    /// 1 is the paper's.
    pub generation: u32,
    /// Weights of Stage A.
    pub stage_a_parameters: u64,
    /// Weights of Stage B.
    pub stage_b_parameters: u64,
    /// Weights of Stage C.
    pub stage_c_parameters: u64,
    /// Weights of the text tower.
    pub text_encoder_parameters: u64,
    /// Weights of the image encoder; 0 if there is none.
    pub image_encoder_parameters: u64,
    /// Recommended width in pixels.
    pub default_width: u32,
    /// Recommended height in pixels.
    pub default_height: u32,
    /// Channels of Stage C's latents.
    pub latent_channels: u32,
    /// Rows of the latents at the recommended size.
    pub latent_height: u32,
    /// Columns of the latents at the recommended size.
    pub latent_width: u32,
    /// Weight files mapped, in bytes; resident only as far as they were used.
    pub bytes_mapped: u64,
    /// Memory held beside the files, in bytes: activations kept for reuse.
    pub bytes_host: u64,
    /// Memory of an accelerator, in bytes.
    pub bytes_device: u64,
}

impl Model {
    /// Opens a model folder. Weights are mapped, not read.
    ///
    /// # Errors
    /// `InvalidArgument` for an empty path;
    /// `Io` and `Format` name the file, the tensor or field, what was expected and what was found;
    /// `Unsupported` for a generation that this version does not run; `OutOfMemory`.
    pub fn open(path: &Path, options: &ModelOptions) -> Result<Self> {
        if path.as_os_str().is_empty() {
            return Err(Error::argument("path", "a model folder", "an empty path"));
        }
        run_apart(|| Self::open_here(path, options))
    }

    fn open_here(path: &Path, options: &ModelOptions) -> Result<Self> {
        let started = Instant::now();
        let index = ModelIndex::read(path)?;
        if index.pipeline != Pipeline::V1 {
            let what = format!("generation {} of the model family", index.pipeline.generation());
            return Err(Error::unsupported(
                what,
                "this version runs the paper's model, WuerstchenV1Pipeline",
            ));
        }
        let inner = Inner {
            stage_a: load::stage_a(&path.join("stage_a"))?,
            stage_b: load::stage_b(&path.join("stage_b"))?,
            stage_c: load::stage_c(&path.join("stage_c"))?,
            // Text to image does without.
            image: match path.join("image_encoder") {
                folder if is_absent(&folder) => None,
                folder => Some(load::image_encoder(&folder)?),
            },
            text: load::text(path, &index)?,
            device: Device::cpu(options.threads)?,
            index,
            residency: options.residency,
            log: options.log.clone(),
        };
        inner.check_parts_fit(path)?;
        let model = Model { inner: Arc::new(inner) };
        model.log(LogLevel::Info, || {
            let threads = model.inner.device.threads();
            format!("opened {} in {:.1?} on {threads} CPU threads", path.display(), started.elapsed())
        });
        Ok(model)
    }

    /// What the model is and what it holds.
    pub fn info(&self) -> ModelInfo {
        let inner = &*self.inner;
        let (width, height) = self.default_size();
        let (latent_height, latent_width) = self.latent_size(width, height);
        let narrow = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        ModelInfo {
            generation: inner.index.pipeline.generation(),
            stage_a_parameters: inner.stage_a.weights.parameters(),
            stage_b_parameters: inner.stage_b.weights.parameters(),
            stage_c_parameters: inner.stage_c.weights.parameters(),
            text_encoder_parameters: inner.text.tower.weights.parameters(),
            image_encoder_parameters: inner.image.as_ref().map_or(0, |i| i.encoder.weights.parameters()),
            default_width: width,
            default_height: height,
            latent_channels: narrow(inner.stage_c.network.config().latent_channels),
            latent_height: narrow(latent_height),
            latent_width: narrow(latent_width),
            bytes_mapped: inner.weights().map(|w| w.bytes_mapped() as u64).sum(),
            bytes_host: inner.device.pool().idle_bytes() as u64,
            bytes_device: 0,
        }
    }

    /// Makes the pictures while the calling thread waits and hears the progress.
    ///
    /// # Errors
    /// `InvalidArgument` without a prompt or with options of another model; `Cancelled`; `OutOfMemory`, after
    /// which the model is as usable as before; `Format`, naming the tensor, for weights that are not finite.
    pub fn generate(&self, options: &GenerateOptions) -> Result<Vec<Image>> {
        self.check_options(options)?;
        self.apart_with_progress(options, |cancel, report| self.run_generation(options, cancel, report))
    }

    /// Runs `work` on a library thread while the options' progress is heard on this one. A receiver that
    /// panics stops the work before its panic goes on.
    pub(super) fn apart_with_progress<T: Send>(
        &self,
        options: &GenerateOptions,
        work: impl FnOnce(&CancelToken, &dyn Fn(&Progress)) -> Result<T> + Send,
    ) -> Result<T> {
        let cancel = CancelToken::new();
        let mut panic = None;
        let result = run_apart_reporting(
            |say| work(&cancel, &|progress: &Progress| say(progress.clone())),
            |progress| {
                let Some(listen) = options.progress.as_ref().filter(|_| panic.is_none()) else { return };
                if let Err(payload) = catch_unwind(AssertUnwindSafe(|| listen(&progress))) {
                    cancel.cancel();
                    panic = Some(payload);
                }
            },
        );
        match panic {
            Some(payload) => resume_unwind(payload),
            None => result,
        }
    }

    /// Starting values for [`GenerateOptions`].
    pub(super) fn default_options(&self) -> GenerateOptions {
        let recommended = &self.inner.index.defaults;
        let (width, height) = self.default_size();
        GenerateOptions {
            model: self.clone(),
            prompts: Vec::new(),
            images_per_prompt: 1,
            width,
            height,
            seed: 0,
            stage_c: StageCOptions {
                steps: recommended.stage_c_steps.unwrap_or(DEFAULT_STAGE_C_STEPS),
                guidance: recommended.stage_c_guidance.unwrap_or(DEFAULT_STAGE_C_GUIDANCE),
                sampler: match recommended.stage_c_sampler.as_deref() {
                    Some("ddim") => Sampler::Ddim,
                    _ => Sampler::Ddpm,
                },
                timesteps: None,
            },
            stage_b: StageBOptions {
                steps: recommended.stage_b_steps.unwrap_or(DEFAULT_STAGE_B_STEPS),
                guidance: recommended.stage_b_guidance.unwrap_or(DEFAULT_STAGE_B_GUIDANCE),
                temperature: recommended.stage_b_temperature.unwrap_or(DEFAULT_STAGE_B_TEMPERATURE),
                choice: match recommended.stage_b_choice.as_deref() {
                    Some("argmax") => Choice::Argmax,
                    Some("quant") => Choice::Quant,
                    _ => Choice::Multinomial,
                },
            },
            init_image: None,
            mask: None,
            progress: None,
            preview_every: 0,
            cancel: None,
        }
    }

    /// # Errors
    /// `InvalidArgument` if the options were made for another model or have no prompt or lack what they need.
    pub(super) fn check_options(&self, options: &GenerateOptions) -> Result<()> {
        if !Arc::ptr_eq(&self.inner, &options.model.inner) {
            return Err(Error::argument("options", "options made for this model", "another model's"));
        }
        if options.prompts.is_empty() {
            return Err(Error::argument("options", "at least one prompt", "none"));
        }
        if options.mask.is_some() && options.init_image.is_none() {
            return Err(Error::argument("mask", "an initial image that it masks", "none"));
        }
        Ok(())
    }

    /// Sides of pictures are multiples of this many pixels.
    pub(super) fn size_multiple(&self) -> u32 {
        let multiple = self.inner.stage_a.network.config().factor()
            * self.inner.stage_b.network.config().grid_multiple();
        u32::try_from(multiple).unwrap_or(u32::MAX)
    }

    /// The model's own size, brought to what the stages divide by.
    fn default_size(&self) -> (u32, u32) {
        let multiple = self.size_multiple().max(1);
        let side = u32::try_from(self.inner.index.image_size).unwrap_or(u32::MAX);
        let side = (side / multiple).max(1) * multiple;
        (side, side)
    }

    /// The picture that the image encoder sees: height and width in pixels.
    pub(super) fn encoder_size(&self, width: u32, height: u32) -> (usize, usize) {
        let ModelIndex { image_size, image_encoder_size, .. } = self.inner.index;
        // Rounded to the nearest pixel, in integers.
        let scale = |side: u32| ((side as usize * image_encoder_size + image_size / 2) / image_size).max(1);
        (scale(height), scale(width))
    }

    /// Height and width of the latents of a picture.
    pub(super) fn latent_size(&self, width: u32, height: u32) -> (usize, usize) {
        let (height, width) = self.encoder_size(width, height);
        let side = |pixels: usize| match &self.inner.image {
            Some(image) => image.encoder.network.config().latent_side(pixels),
            None => pixels.div_ceil(ENCODER_FACTOR),
        };
        (side(height), side(width))
    }

    /// # Errors
    /// `Unsupported` if the folder has no image encoder.
    pub(super) fn image_encoder(&self) -> Result<&ImagePart> {
        self.inner
            .image
            .as_ref()
            .ok_or_else(|| Error::unsupported("a picture as input", "the model folder has no image_encoder"))
    }

    /// Gives the pages of a stage back to the system if only the running stage should stay.
    pub(super) fn leave_stage(&self, weights: &Weights) {
        if self.inner.residency == Residency::Stage {
            weights.advise_dont_need();
        }
    }

    pub(super) fn log(&self, level: LogLevel, message: impl FnOnce() -> String) {
        if let Some((heard, log)) = &self.inner.log
            && level <= *heard
            && level != LogLevel::Off
        {
            log(level, &message());
        }
    }
}

/// Whether there is nothing of this name. What is there but cannot be reached, as a link to nowhere, is not absent.
fn is_absent(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound)
}

impl Inner {
    fn weights(&self) -> impl Iterator<Item = &Weights> {
        let stages = [&self.stage_a.weights, &self.stage_b.weights, &self.stage_c.weights];
        let image = self.image.as_ref().map(|i| &i.encoder.weights);
        stages.into_iter().chain([&self.text.tower.weights]).chain(image)
    }

    /// # Errors
    /// `Format` if the sizes of one part contradict another's.
    fn check_parts_fit(&self, path: &Path) -> Result<()> {
        let (a, b) = (self.stage_a.network.config(), self.stage_b.network.config());
        let (c, text) = (self.stage_c.network.config(), self.text.tower.network.config());
        let mut pairs = vec![
            ("stage_b: num_labels", b.codebook_size, "stage_a: codebook_size", a.codebook_size),
            ("stage_b: effnet_embd", b.latent_channels, "stage_c: c_in", c.latent_channels),
            ("stage_b: byt5_embd", b.text_width, "text_encoder: hidden_size", text.width),
            ("stage_c: c_cond", c.text_width, "text_encoder: hidden_size", text.width),
        ];
        if let Some(image) = &self.image {
            let latent = image.encoder.network.config().latent_channels;
            pairs.push(("stage_c: c_in", c.latent_channels, "image_encoder: c_latent", latent));
        }
        for (name, value, other, expected) in pairs {
            if value != expected {
                let place = format!("{}: {name}", path.display());
                return Err(Error::format(place, format!("{expected}, as {other} says"), value));
            }
        }
        Ok(())
    }
}
