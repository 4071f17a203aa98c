//! What a caller may choose: opaque options, validated when they are set.

use std::sync::Arc;

use super::Model;
use crate::device::CancelToken;
use crate::error::{Error, Result};
use crate::image::Image;
use crate::tensor::DType;

/// A stage of the paper.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// The VQGAN: tokens to pixels (section 3.1).
    A,
    /// The token predictor: latents to tokens (section 3.1).
    B,
    /// The text-conditional diffusion model: noise to latents (section 3.2).
    C,
}

/// How Stage C walks from noise to latents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sampler {
    /// Ho et al. 2020: fresh noise in every step but the last.
    Ddpm,
    /// Song et al. 2021 with eta 0: no noise after the start.
    Ddim,
}

/// How Stage B turns logits into tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    /// Sampled from softmax(logits / temperature).
    Multinomial,
    /// The largest logit; ties go to the lowest token.
    Argmax,
    /// The codebook's mean under softmax(logits / temperature), quantised again.
    Quant,
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
    pub(crate) device: String,
    pub(crate) threads: usize,
    pub(crate) compute_dtype: DType,
    pub(crate) residency: Residency,
    pub(crate) log: Option<(LogLevel, LogFn)>,
}

impl Default for ModelOptions {
    fn default() -> Self {
        ModelOptions {
            device: "auto".into(),
            threads: 0,
            compute_dtype: DType::F32,
            residency: Residency::Auto,
            log: None,
        }
    }
}

/// What to generate. Starts from the model's own recommended values.
#[derive(Clone)]
pub struct GenerateOptions {
    pub(crate) model: Model,
    pub(crate) prompts: Vec<(String, Option<String>)>,
    pub(crate) images_per_prompt: u32,
    pub(crate) width: u32,
    pub(crate) height: u32,
    pub(crate) seed: u64,
    pub(crate) stage_c_steps: u32,
    pub(crate) stage_c_guidance: f32,
    pub(crate) stage_c_sampler: Sampler,
    pub(crate) stage_c_timesteps: Option<Vec<f32>>,
    pub(crate) stage_b_steps: u32,
    pub(crate) stage_b_guidance: f32,
    pub(crate) stage_b_temperature: (f32, f32),
    pub(crate) stage_b_choice: Choice,
    pub(crate) init_image: Option<(Image, f32)>,
    pub(crate) mask: Option<Image>,
    pub(crate) progress: Option<ProgressFn>,
    pub(crate) preview_every: u32,
    pub(crate) cancel: Option<CancelToken>,
}
