//! An opened model: mapped weights on one device, immutable, shared by any number of threads.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use super::defaults;
use super::generate_options::GenerateOptions;
use super::geometry::Geometry;
use super::halves::{Decoder, Halves, Prior, StageBPart};
use super::load::{ImagePart, Part, TextPart};
use super::options::{LogLevel, ModelOptions, Progress, Residency, Stage};
use crate::device::int8::QuantisedWeights;
use crate::device::profile::Recorder;
use crate::device::threads::{reporting_with_reserve, run_apart_with_reserve};
use crate::device::{CancelToken, Device};
use crate::error::{Error, Result};
use crate::image::Image;
use crate::stages::stage_b::StageB;
use crate::weights::Weights;

/// The share of a GPU's free memory that weights may take before only the running stage keeps its own: the rest is
/// for activations.
const WEIGHTS_SHARE: f64 = 0.6;

/// What the lists of layers and messages about them take in memory beside the weights, at worst.
const NETWORKS_BYTES: usize = 16 << 20;

/// A model folder, opened. Clones share it; it closes with the last of them, its options and its jobs.
#[derive(Clone)]
pub struct Model {
    pub(super) inner: Arc<Inner>,
    pub(super) recorder: Option<Arc<Recorder>>,
}

pub(super) struct Inner {
    /// The folder that was opened.
    pub root: PathBuf,
    pub device: Device,
    pub halves: Halves,
    pub geometry: Geometry,
    residency: Residency,
    /// Whether the weights of all stages together take more of a GPU than is good.
    pub fills_gpu: bool,
    log: Option<(LogLevel, super::LogFn)>,
}

/// What an opened model is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ModelInfo {
    /// 1 is the paper's; 2 the published weights' (diffusers' layout).
    pub generation: u32,
    /// Weights of Stage A.
    pub stage_a_parameters: u64,
    /// Weights of Stage B.
    pub stage_b_parameters: u64,
    /// Weights of Stage C.
    pub stage_c_parameters: u64,
    /// Weights of the text towers.
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
    /// Memory held beside the files, in bytes: activations kept for reuse, and weights in eight bits.
    pub bytes_host: u64,
    /// Memory of an accelerator, in bytes.
    pub bytes_device: u64,
}

impl Model {
    /// Opens a model folder: v1's own layout, or one or both halves of v2 as diffusers saves them. The options may
    /// name the folder of the other half. A part that no folder holds is missed only by calls that need it. Weights
    /// are mapped, not read.
    ///
    /// # Errors
    /// `InvalidArgument` for an empty path, or option paths that do not fit the folder;
    /// `Io` and `Format` name the file, the tensor or field, what was expected and what was found;
    /// `Unsupported` for a generation that this version does not run; `OutOfMemory`.
    pub fn open(path: &Path, options: &ModelOptions) -> Result<Self> {
        if path.as_os_str().is_empty() {
            return Err(Error::argument("path", "a model folder", "an empty path"));
        }
        run_apart_with_reserve("a model", NETWORKS_BYTES, || Self::open_here(path, options))
    }

    fn open_here(path: &Path, options: &ModelOptions) -> Result<Self> {
        let started = Instant::now();
        let halves = Halves::open(path, options)?;
        let (device, without_gpu) = options.device_options().open()?;
        let inner = Inner {
            root: path.to_owned(),
            geometry: Geometry::new(&halves),
            halves,
            device,
            residency: options.residency,
            fills_gpu: false,
            log: options.log.clone(),
        };
        let inner = Inner { fills_gpu: inner.fills_gpu()?, ..inner };
        let model = Model { inner: Arc::new(inner), recorder: None };
        model.log(LogLevel::Info, || {
            format!(
                "opened {} in {:.1?} on {}",
                path.display(),
                started.elapsed(),
                model.inner.device.describe()
            )
        });
        if let Some(reason) = without_gpu {
            model.log(LogLevel::Warning, || format!("the GPU is not used: {reason}"));
        }
        Ok(model)
    }

    /// The same model, of whose calls `recorder` hears where their time goes. One call at a time. On a GPU a call
    /// returns before its work ran, and a recorded step is one launch: times are then those of the calls.
    #[must_use]
    pub fn recorded_by(&self, recorder: &Arc<Recorder>) -> Self {
        Model { recorder: Some(recorder.clone()), ..self.clone() }
    }

    /// What the model is and what it holds. A half that is not there counts nothing.
    pub fn info(&self) -> ModelInfo {
        let inner = &*self.inner;
        let Halves { index, prior, decoder, image } = &inner.halves;
        let (width, height) = inner.geometry.default_size();
        let (latent_height, latent_width) = inner.geometry.latent_size(width, height);
        let narrow = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let quantised = inner.device.quantised_weights().map_or(0, QuantisedWeights::bytes);
        let parameters = |weights: Option<&Weights>| weights.map_or(0, Weights::parameters);
        ModelInfo {
            generation: index.pipeline.generation(),
            stage_a_parameters: parameters(decoder.as_ref().map(|d| &d.stage_a.weights)),
            stage_b_parameters: parameters(decoder.as_ref().map(|d| d.stage_b.weights())),
            stage_c_parameters: parameters(prior.as_ref().map(|p| &p.stage_c.weights)),
            text_encoder_parameters: inner.texts().map(|text| text.tower.weights.parameters()).sum(),
            image_encoder_parameters: parameters(image.as_ref().map(|i| &i.encoder.weights)),
            default_width: width,
            default_height: height,
            latent_channels: narrow(inner.latent_channels()),
            latent_height: narrow(latent_height),
            latent_width: narrow(latent_width),
            bytes_mapped: inner.weights().map(|w| w.bytes_mapped() as u64).sum(),
            bytes_host: (inner.device.pool().idle_bytes() + quantised) as u64,
            bytes_device: inner.device.accelerator().map_or(0, |a| a.bytes()) as u64,
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
        let result = reporting_with_reserve(
            "a generation",
            super::LISTS_BYTES,
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
        let (width, height) = self.inner.geometry.default_size();
        let index = &self.inner.halves.index;
        GenerateOptions {
            model: self.clone(),
            prompts: Vec::new(),
            images_per_prompt: 1,
            width,
            height,
            seed: 0,
            stage_c: defaults::stage_c(index),
            stage_b: defaults::stage_b(index),
            init: None,
            mask: None,
            progress: None,
            preview_every: 0,
            cancel: None,
        }
    }

    /// # Errors
    /// `InvalidArgument` if the options were made for another model or have no prompt or lack what they need;
    /// `Unsupported` if they ask for a half that the model does not have.
    pub(super) fn check_options(&self, options: &GenerateOptions) -> Result<()> {
        if !Arc::ptr_eq(&self.inner, &options.model.inner) {
            return Err(Error::argument("options", "options made for this model", "another model's"));
        }
        if options.prompts.is_empty() {
            return Err(Error::argument("options", "at least one prompt", "none"));
        }
        if options.mask.is_some() && options.init.is_none() {
            return Err(Error::argument("mask", "an initial image or latents that it masks", "none"));
        }
        self.decoder()?;
        if options.stage_c_times().len() > 1 {
            self.prior()?;
        }
        options.check_init_latents(options.image_count())
    }

    /// Text to latents.
    ///
    /// # Errors
    /// `Unsupported` if no folder holds that half.
    pub(super) fn prior(&self) -> Result<&Prior> {
        self.inner.halves.prior.as_ref().ok_or_else(|| {
            Error::unsupported("Stage C", "the folder holds only the decoder; name a prior by prior_path")
        })
    }

    /// Latents to pixels.
    ///
    /// # Errors
    /// `Unsupported` if no folder holds that half.
    pub(super) fn decoder(&self) -> Result<&Decoder> {
        self.inner.halves.decoder.as_ref().ok_or_else(|| {
            Error::unsupported(
                "decoding latents",
                "the folder holds only the prior; name a decoder by decoder_path",
            )
        })
    }

    /// Stage B as a predictor of tokens.
    ///
    /// # Errors
    /// `Unsupported` in v2, where it predicts noise, or if no folder holds it.
    pub(super) fn token_predictor(&self) -> Result<&Part<StageB>> {
        match &self.decoder()?.stage_b {
            StageBPart::Tokens(part) => Ok(part),
            StageBPart::Latents(..) => {
                let reason = "Stage B of generation 2 predicts noise in Stage A's latents, not tokens";
                Err(Error::unsupported("a choice of tokens", reason))
            }
        }
    }

    /// # Errors
    /// `Unsupported` unless Stage B is a diffusion over latents, as in v2.
    pub(super) fn expect_latent_decoder(&self) -> Result<()> {
        match &self.decoder()?.stage_b {
            StageBPart::Latents(..) => Ok(()),
            StageBPart::Tokens(_) => {
                let reason = "Stage B of generation 1 resamples tokens at evenly spaced times";
                Err(Error::unsupported("times of Stage B", reason))
            }
        }
    }

    /// The text tower that a stage reads.
    ///
    /// # Errors
    /// `InvalidArgument` for Stage A, which reads none; `Unsupported` if no folder holds the stage.
    pub(super) fn text_of(&self, stage: Stage) -> Result<&TextPart> {
        match stage {
            Stage::C => Ok(&self.prior()?.text),
            Stage::B => Ok(&self.decoder()?.text),
            Stage::A => Err(Error::argument("stage", "stage B or C, which read text", "stage A")),
        }
    }

    /// # Errors
    /// `Unsupported` if the folder has no image encoder.
    pub(super) fn image_encoder(&self) -> Result<&ImagePart> {
        self.inner
            .halves
            .image
            .as_ref()
            .ok_or_else(|| Error::unsupported("a picture as input", "the model folder has no image_encoder"))
    }

    /// Gives the pages of a stage back to the system if only the running stage should stay.
    pub(super) fn leave_stage(&self, weights: &Weights) {
        let (device, residency) = (&self.inner.device, self.inner.residency);
        let evicts = match (device.accelerator(), residency) {
            (_, Residency::All) => false,
            (None, residency) => residency == Residency::Stage,
            (Some(_), Residency::Stage) => true,
            (Some(_), Residency::Auto) => self.inner.fills_gpu,
        };
        if !evicts {
            return;
        }
        if let Some(accelerator) = device.accelerator() {
            weights.address_ranges().for_each(|range| accelerator.residents().evict(range));
        }
        if let Some(quantised) = device.quantised_weights() {
            weights.address_ranges().for_each(|range| quantised.evict(range));
        }
        weights.advise_dont_need();
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

impl Inner {
    /// Both text towers, or the one that both stages share.
    fn texts(&self) -> impl Iterator<Item = &TextPart> {
        let prior = self.halves.prior.as_ref().map(|prior| &prior.text);
        let decoder = self.halves.decoder.as_ref().map(|decoder| &decoder.text);
        let shared = prior.zip(decoder).is_some_and(|(a, b)| Arc::ptr_eq(a, b));
        prior.into_iter().chain(decoder.filter(|_| !shared)).map(|text| &**text)
    }

    /// Whether the weights take more than [`WEIGHTS_SHARE`] of what is free on the GPU.
    fn fills_gpu(&self) -> Result<bool> {
        let Some(accelerator) = self.device.accelerator() else { return Ok(false) };
        let parameters: u64 = self.weights().map(Weights::parameters).sum();
        let bytes = parameters as f64 * accelerator.precision().size() as f64;
        Ok(bytes > WEIGHTS_SHARE * accelerator.gpu().free_bytes()? as f64)
    }

    fn weights(&self) -> impl Iterator<Item = &Weights> {
        let Halves { prior, decoder, image, .. } = &self.halves;
        let prior = prior.iter().flat_map(Prior::stage_c_weights);
        let decoder = decoder.iter().flat_map(|d| [d.stage_b.weights(), &d.stage_a.weights]);
        let image = image.iter().map(|image| &image.encoder.weights);
        prior.chain(decoder).chain(image).chain(self.texts().map(|text| &text.tower.weights))
    }

    /// Channels of the latents between Stage C and Stage B.
    pub fn latent_channels(&self) -> usize {
        let Halves { prior, decoder, .. } = &self.halves;
        let of_prior = prior.as_ref().map(|p| p.stage_c.network.config().latent_channels);
        of_prior.or_else(|| decoder.as_ref().map(|d| d.stage_b.latent_channels())).unwrap_or(0)
    }
}
