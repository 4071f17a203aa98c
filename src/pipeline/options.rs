//! What a caller may choose: opaque options, validated when they are set.

use std::path::PathBuf;
use std::sync::Arc;

use super::devices::{DeviceChoice, DeviceOptions};
pub use crate::diffusion::latents::Sampler;
pub use crate::diffusion::tokens::Choice;
use crate::error::{Error, Result};
use crate::image::Image;
use crate::tensor::DType;

/// A stage of the paper.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// The VQGAN: tokens to pixels (section 3.1).
    A,
    /// The decoder of latents, to tokens (section 3.1) or, in v2, to Stage A's latents.
    B,
    /// The text-conditional diffusion model: noise to latents (section 3.2).
    C,
}

/// Which weights are kept ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Residency {
    /// Whatever the device does best.
    Auto,
    /// All stages.
    All,
    /// Only the stage that runs; pages of the others are given back to the system.
    Stage,
}

/// How much the log callback hears.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum LogLevel {
    /// Nothing.
    Off,
    /// What went wrong although the call succeeded.
    Warning,
    /// What was chosen and how long it took.
    Info,
    /// Every stage and step.
    Debug,
}

/// A log receiver. It may be called from any thread of the library.
pub type LogFn = Arc<dyn Fn(LogLevel, &str) + Send + Sync>;

/// A progress receiver: called after every step, on the thread that generates.
pub type ProgressFn = Arc<dyn Fn(&Progress) + Send + Sync>;

/// Where a generation stands.
#[derive(Debug, Clone)]
pub struct Progress {
    /// The stage that runs.
    pub stage: Stage,
    /// Steps of this stage that are done.
    pub step: u32,
    /// Steps of this stage in all.
    pub steps: u32,
    /// Time since the generation started.
    pub seconds: f64,
    /// A rough view of the picture so far, if asked for and due in this step.
    pub preview: Option<Image>,
}

/// How a model is opened.
#[derive(Clone)]
pub struct ModelOptions {
    device: DeviceChoice,
    threads: usize,
    compute_dtype: Option<DType>,
    /// A CUDA stream's address; 0 for none.
    cuda_stream: usize,
    pub(super) residency: Residency,
    pub(super) log: Option<(LogLevel, LogFn)>,
    pub(super) prior_path: Option<PathBuf>,
    pub(super) decoder_path: Option<PathBuf>,
    /// Adapters of Stage C: a file or folder, and how strongly it is applied.
    pub(super) lora: Vec<(PathBuf, f32)>,
    /// The scale that came before the adapter that it is for.
    lora_scale: Option<f32>,
}

impl Default for ModelOptions {
    fn default() -> Self {
        ModelOptions {
            device: DeviceChoice::Auto,
            threads: 0,
            compute_dtype: None,
            cuda_stream: 0,
            residency: Residency::Auto,
            log: None,
            prior_path: None,
            decoder_path: None,
            lora: Vec::new(),
            lora_scale: None,
        }
    }
}

/// More threads than any machine of today has; a larger number is a mistake.
const MAX_THREADS: u32 = 1024;

impl ModelOptions {
    /// `auto` (the first GPU if it can be used, else the CPU), `cpu`, `cuda` (the first GPU) or `cuda:1` and so on.
    ///
    /// # Errors
    /// `InvalidArgument` for a name that is none. Whether the machine has it is found out when a model is opened.
    pub fn set_device(&mut self, device: &str) -> Result<()> {
        self.device = DeviceChoice::parse(device)?;
        Ok(())
    }

    /// All that a device is opened with.
    pub(super) fn device_options(&self) -> DeviceOptions {
        DeviceOptions {
            choice: self.device,
            threads: self.threads,
            dtype: self.compute_dtype,
            stream: self.cuda_stream,
        }
    }

    /// A CUDA stream of the host's, a `CUstream` or `cudaStream_t` as a number, in the device's primary context: all
    /// work runs on it, in the order in which the host gives it work, one call at a time (another gets `Busy`). 0, the
    /// default: streams of the library's own, one for each call that runs.
    ///
    /// # Safety
    /// The stream outlives the model and everything made with it.
    ///
    /// # Errors
    /// None here: the stream is looked at when a model is opened.
    pub unsafe fn set_cuda_stream(&mut self, stream: usize) -> Result<()> {
        self.cuda_stream = stream;
        Ok(())
    }

    /// Threads of the CPU device; 0 takes one per core.
    ///
    /// # Errors
    /// `InvalidArgument` above 1024.
    pub fn set_threads(&mut self, threads: u32) -> Result<()> {
        if threads > MAX_THREADS {
            return Err(Error::argument("threads", format!("at most {MAX_THREADS}"), threads));
        }
        self.threads = threads as usize;
        Ok(())
    }

    /// The type in which the networks compute, whatever the weights are stored in. Sums are always in F32.
    ///
    /// On a GPU, the type of activations: `BF16` (the default from compute capability 8.0 on), `F16` (before it) or
    /// `F32`.
    ///
    /// On the CPU activations are `F32`, and this is the type of the factors of matrix products:
    /// - `F32`, the default.
    /// - `BF16`: of all products. Nearly twice as fast where the processor has fast instructions for it (AMD's with
    ///   AVX-512 BF16); elsewhere the same as `F32`.
    /// - `I8`: of those in the blocks of Stages B and C, weights rounded by output and activations by row; others as with
    ///   `BF16`. Faster still, in less memory, and less exact.
    ///
    /// Training with such a model computes as its own options say.
    ///
    /// # Errors
    /// `InvalidArgument` for types that are neither floats nor `I8`. `F16` on the CPU, or `I8` on a GPU, is `Unsupported`
    /// when a model is opened.
    pub fn set_compute_dtype(&mut self, dtype: DType) -> Result<()> {
        if !dtype.is_float() && dtype != DType::I8 {
            return Err(Error::argument("compute_dtype", "a float type or I8", dtype));
        }
        self.compute_dtype = Some(dtype);
        Ok(())
    }

    /// Which weights are kept ready.
    ///
    /// # Errors
    /// None today.
    pub fn set_residency(&mut self, residency: Residency) -> Result<()> {
        self.residency = residency;
        Ok(())
    }

    /// Who hears what happens, and how much of it. Nothing is logged otherwise.
    pub fn set_log(&mut self, level: LogLevel, log: Option<LogFn>) {
        self.log = log.map(|log| (level, log));
    }

    /// The folder of v2's text-to-latents half, where the folder that is opened does not hold it or another one
    /// is wanted; an empty path for none.
    ///
    /// # Errors
    /// None here: the folder is looked at when the model is opened.
    pub fn set_prior_path(&mut self, path: impl Into<PathBuf>) -> Result<()> {
        self.prior_path = Some(path.into()).filter(|path| !path.as_os_str().is_empty());
        Ok(())
    }

    /// The folder of v2's latents-to-pixels half, in the same way.
    ///
    /// # Errors
    /// None here.
    pub fn set_decoder_path(&mut self, path: impl Into<PathBuf>) -> Result<()> {
        self.decoder_path = Some(path.into()).filter(|path| !path.as_os_str().is_empty());
        Ok(())
    }

    /// Adds a LoRA adapter of Stage C's attention projections, as diffusers or training writes it: a `.safetensors`
    /// file, or a folder with `pytorch_lora_weights.safetensors`. Its updates are multiplied by `scale`, beside what
    /// the file says. Those of several adapters add up.
    ///
    /// # Errors
    /// `InvalidArgument` for a scale that is not finite. The file is looked at when the model is opened.
    pub fn add_lora(&mut self, path: impl Into<PathBuf>, scale: f32) -> Result<()> {
        check_scale(scale)?;
        self.lora.push((path.into(), scale));
        Ok(())
    }

    /// `lora`: an adapter of scale 1, or of the `lora_scale` before it; an empty path for none at all.
    fn set_lora(&mut self, path: &str) -> Result<()> {
        let scale = self.lora_scale.take().unwrap_or(1.0);
        if path.is_empty() {
            self.lora.clear();
            return Ok(());
        }
        self.add_lora(path, scale)
    }

    /// `lora_scale`: of the adapter that was named last or, before any was, of the first.
    fn set_lora_scale(&mut self, scale: f32) -> Result<()> {
        check_scale(scale)?;
        match self.lora.last_mut() {
            Some((_, of_last)) => *of_last = scale,
            None => self.lora_scale = Some(scale),
        }
        Ok(())
    }

    /// Any of the above by name, for configuration files: `device`, `threads`, `compute_dtype` (`f32`, `f16`,
    /// `bf16`, `i8`), `residency` (`auto`, `all`, `stage`), `prior_path`, `decoder_path`; `lora`, each time another adapter, and
    /// `lora_scale`, of the adapter that was named last (1 unless it is given).
    ///
    /// # Errors
    /// `InvalidArgument` for an unknown key or a value that does not parse; what the named setter returns.
    pub fn set(&mut self, key: &str, value: &str) -> Result<()> {
        match key {
            "device" => self.set_device(value),
            "threads" => self.set_threads(parse(key, value)?),
            "compute_dtype" => self.set_compute_dtype(match value {
                "f32" => DType::F32,
                "f16" => DType::F16,
                "bf16" => DType::BF16,
                "i8" => DType::I8,
                _ => return Err(Error::argument(key, "f32, f16, bf16 or i8", format!("{value:?}"))),
            }),
            "residency" => self.set_residency(match value {
                "auto" => Residency::Auto,
                "all" => Residency::All,
                "stage" => Residency::Stage,
                _ => return Err(Error::argument(key, "auto, all or stage", format!("{value:?}"))),
            }),
            "prior_path" => self.set_prior_path(value),
            "decoder_path" => self.set_decoder_path(value),
            "lora" => self.set_lora(value),
            "lora_scale" => self.set_lora_scale(parse(key, value)?),
            _ => {
                let keys = "one of device, threads, compute_dtype, residency, prior_path, decoder_path, lora, lora_scale";
                Err(Error::argument("model option", keys, format!("{key:?}")))
            }
        }
    }
}

fn check_scale(scale: f32) -> Result<()> {
    if scale.is_finite() { Ok(()) } else { Err(Error::argument("lora_scale", "a finite number", scale)) }
}

/// The number that a text option holds.
///
/// # Errors
/// `InvalidArgument`, naming the key.
pub(super) fn parse<T: std::str::FromStr>(key: &str, value: &str) -> Result<T> {
    value.trim().parse().map_err(|_| Error::argument(key, "a number in range", format!("{value:?}")))
}
