//! What a caller may choose about training: values start as the paper's, and are validated when they are set.

use std::path::PathBuf;

use super::objectives::stage_c::TimeWeighting;
use super::optimizer::AdamW;
use crate::device::CancelToken;
use crate::error::{Error, Result};
use crate::tensor::DType;

/// The largest rate that is not a mistake.
const RATE_MAX: f32 = 10.0;
/// The most parts that a batch is cut into.
const ACCUMULATION_MAX: u32 = 65_536;
/// The largest rank of a LoRA adapter.
const LORA_RANK_MAX: u32 = 4096;

/// The names of all options, for the message about one that is none.
const KEYS: &str = "one of learning_rate, weight_decay, warmup_steps, grad_clip, grad_accumulation, text_dropout, \
                    seed, compute_dtype, beta1, beta2, adam_eps, ema_decay, ema_start, ema_every, recompute, \
                    p2_weighting, image_dropout, image_noise, train_encoder, lora_rank, lora_alpha, \
                    adversary_start, adversary_weight, adversary_channels, adversary_depth, perceptual, \
                    revive_codes, init_codebook, export_dtype";

/// What is trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Goal {
    /// The VQGAN.
    StageA,
    /// The token predictor, with the image encoder.
    StageB,
    /// The diffusion model of latents.
    StageC,
    /// The text tower and the image encoder's backbone as a contrastive pair, before all stages.
    Pair,
}

/// The average of the weights over the steps, which is what is exported.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ema {
    /// average = decay * average + (1 - decay) * weights.
    pub decay: f32,
    /// Before this step the average is a plain copy.
    pub start: u64,
    /// Steps between updates.
    pub every: u64,
}

/// A low-rank adapter (Hu et al. 2021, arXiv:2106.09685) of every attention projection of Stage C.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Lora {
    /// The rank of the update; 0 trains the weights themselves.
    pub rank: u32,
    /// The update is scaled by alpha / rank.
    pub alpha: f32,
}

/// The adversarial part of Stage A's loss (Esser et al. 2021).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Adversary {
    /// The step from which the discriminator joins; `u64::MAX` never.
    pub start: u64,
    /// Factor of the adaptive weight.
    pub weight: f32,
    /// Channels of the discriminator's last layer.
    pub channels: u32,
    /// Its layers of stride 2.
    pub depth: u32,
}

/// How one part of a model is trained.
#[derive(Debug, Clone)]
pub struct TrainOptions {
    pub(super) goal: Goal,
    /// AdamW, warm-up, clipping.
    pub(super) optimizer: AdamW,
    /// Parts that a batch is cut into, one after the other.
    pub(super) accumulation: u32,
    pub(super) ema: Ema,
    /// How likely a text is replaced by the empty one, per sample.
    pub(super) text_dropout: f32,
    /// Stage B: how likely an image embedding is zeroed, per sample.
    pub(super) image_dropout: f32,
    /// Stage B: how likely one that is not is noised.
    pub(super) image_noise: f32,
    pub(super) seed: u64,
    /// What weights are rounded to for computing; the masters stay `F32`.
    pub(super) compute_dtype: DType,
    /// Blocks keep only their inputs and are run again.
    pub(super) recompute: bool,
    pub(super) weighting: TimeWeighting,
    /// Stage B: the image encoder trains along.
    pub(super) train_encoder: bool,
    /// Stage C: adapters instead of the weights.
    pub(super) lora: Lora,
    /// Stage A.
    pub(super) adversary: Adversary,
    /// Stage A: VGG16 and the linear heads of LPIPS.
    pub(super) perceptual: Option<PathBuf>,
    /// Stage A: dead codes are put back to encoder outputs.
    pub(super) revive_codes: bool,
    /// Stage A: the codebook starts as encoder outputs, for a network that has learnt nothing.
    pub(super) init_codebook: bool,
    /// The type of exported weights.
    pub(super) export_dtype: DType,
    pub(super) cancel: Option<CancelToken>,
}

impl TrainOptions {
    /// The paper's values (section 4.1): AdamW at 1e-4, a warm-up of 10,000 steps, clipping at 1, an
    /// average over every 100th step that starts at step 5,000.
    pub fn new(goal: Goal) -> Self {
        let second = if goal == Goal::StageB { 0.95 } else { 0.999 };
        TrainOptions {
            goal,
            optimizer: AdamW {
                learning_rate: 1e-4,
                betas: [0.9, second],
                eps: 1e-8,
                weight_decay: 0.01,
                warmup_steps: 10_000,
                clip: 1.0,
            },
            accumulation: 1,
            ema: Ema { decay: 0.9, start: 5_000, every: 100 },
            text_dropout: 0.05,
            image_dropout: 0.05,
            image_noise: 0.3,
            seed: 0,
            compute_dtype: DType::F32,
            recompute: false,
            weighting: TimeWeighting::Paper,
            train_encoder: true,
            lora: Lora { rank: 0, alpha: 1.0 },
            adversary: Adversary { start: u64::MAX, weight: 0.8, channels: 512, depth: 4 },
            perceptual: None,
            revive_codes: true,
            init_codebook: false,
            export_dtype: DType::F32,
            cancel: None,
        }
    }

    /// What is trained.
    pub fn goal(&self) -> Goal {
        self.goal
    }

    /// The rate after the warm-up.
    ///
    /// # Errors
    /// `InvalidArgument` outside 0 .. 10.
    pub fn set_learning_rate(&mut self, rate: f32) -> Result<()> {
        within("learning_rate", rate, 0.0, RATE_MAX)?;
        self.optimizer.learning_rate = rate;
        Ok(())
    }

    /// How slowly the moments follow.
    ///
    /// # Errors
    /// `InvalidArgument` outside 0 .. 1.
    pub fn set_betas(&mut self, first: f32, second: f32) -> Result<()> {
        below_one("beta1", first)?;
        below_one("beta2", second)?;
        self.optimizer.betas = [first, second];
        Ok(())
    }

    /// Decay of all parameters per unit of rate.
    ///
    /// # Errors
    /// `InvalidArgument` outside 0 .. 10.
    pub fn set_weight_decay(&mut self, decay: f32) -> Result<()> {
        within("weight_decay", decay, 0.0, RATE_MAX)?;
        self.optimizer.weight_decay = decay;
        Ok(())
    }

    /// Steps over which the rate grows from 0.
    pub fn set_warmup_steps(&mut self, steps: u64) {
        self.optimizer.warmup_steps = steps;
    }

    /// The largest norm of all gradients together; 0 does not clip.
    ///
    /// # Errors
    /// `InvalidArgument` below 0 or not finite.
    pub fn set_grad_clip(&mut self, norm: f32) -> Result<()> {
        within("grad_clip", norm, 0.0, f32::MAX)?;
        self.optimizer.clip = norm;
        Ok(())
    }

    /// Parts that each batch is cut into, run one after the other: the gradient of the whole batch in the memory of a
    /// part.
    ///
    /// # Errors
    /// `InvalidArgument` outside 1 .. 65536.
    pub fn set_grad_accumulation(&mut self, parts: u32) -> Result<()> {
        if !(1..=ACCUMULATION_MAX).contains(&parts) {
            return Err(Error::argument("grad_accumulation", format!("1 to {ACCUMULATION_MAX}"), parts));
        }
        self.accumulation = parts;
        Ok(())
    }

    /// The average of the weights.
    ///
    /// # Errors
    /// `InvalidArgument` for a decay outside 0 .. 1, or an update every 0 steps.
    pub fn set_ema(&mut self, ema: Ema) -> Result<()> {
        within("ema decay", ema.decay, 0.0, 1.0)?;
        if ema.every == 0 {
            return Err(Error::argument("ema every", "at least 1 step", 0));
        }
        self.ema = ema;
        Ok(())
    }

    /// How likely a text is replaced by the empty one, per sample.
    ///
    /// # Errors
    /// `InvalidArgument` outside 0 .. 1.
    pub fn set_text_dropout(&mut self, probability: f32) -> Result<()> {
        within("text_dropout", probability, 0.0, 1.0)?;
        self.text_dropout = probability;
        Ok(())
    }

    /// Where the random numbers of training come from.
    pub fn set_seed(&mut self, seed: u64) {
        self.seed = seed;
    }

    /// What weights are rounded to for computing: `F32`, `F16` or `BF16`. The optimiser keeps `F32`, and so do
    /// activations and gradients; on a GPU, and with `BF16` on a CPU that is fast at it (AMD with AVX-512 BF16), those
    /// are rounded likewise where they are factors of matrix products, which makes a step faster.
    ///
    /// # Errors
    /// `InvalidArgument` for another type.
    pub fn set_compute_dtype(&mut self, dtype: DType) -> Result<()> {
        expect_float("compute_dtype", dtype)?;
        self.compute_dtype = dtype;
        Ok(())
    }

    /// The token that stops what trainers with these options do, with `Cancelled`.
    pub fn set_cancel(&mut self, cancel: Option<&CancelToken>) {
        self.cancel = cancel.cloned();
    }

    /// # Errors
    /// `InvalidArgument` for options that contradict each other.
    pub(super) fn check(&self) -> Result<()> {
        if self.lora.rank == 0 {
            return Ok(());
        }
        if self.goal != Goal::StageC {
            let expected = format!("0 for {:?}: adapters are for Stage C", self.goal);
            return Err(Error::argument("lora_rank", expected, self.lora.rank));
        }
        if self.lora.alpha == 0.0 {
            return Err(Error::argument("lora_alpha", "more than 0: nothing could be learnt", 0));
        }
        Ok(())
    }

    /// Any option by name, for configuration files: those that have a setter, and
    ///
    /// | key | value |
    /// |---|---|
    /// | `recompute` | `true`: activations inside blocks are computed again instead of kept |
    /// | `p2_weighting` | `paper` or `snr` |
    /// | `adam_eps` | a number |
    /// | `image_dropout`, `image_noise` | Stage B: probabilities per sample |
    /// | `train_encoder` | Stage B: `false` keeps the image encoder as it is |
    /// | `lora_rank`, `lora_alpha` | Stage C: adapters of this rank |
    /// | `adversary_start`, `adversary_weight`, `adversary_channels`, `adversary_depth` | Stage A: the discriminator |
    /// | `perceptual` | Stage A: path of LPIPS weights, as [`crate::pipeline::load::perceptual`] reads them |
    /// | `revive_codes` | Stage A: `true`, the default, puts codes that were the nearest of nothing for 100 steps, and for 100 encoder outputs per code, back to encoder outputs of the batch; ours, not the paper's |
    /// | `init_codebook` | Stage A: `true` begins with encoder outputs of the first batch as codes, for a network that has learnt nothing |
    /// | `export_dtype` | `f32`, `f16` or `bf16` |
    ///
    /// # Errors
    /// `InvalidArgument` for an unknown key or a value that does not fit.
    pub fn set(&mut self, key: &str, value: &str) -> Result<()> {
        match key {
            "learning_rate" => self.set_learning_rate(parsed(key, value)?)?,
            "weight_decay" => self.set_weight_decay(parsed(key, value)?)?,
            "warmup_steps" => self.set_warmup_steps(parsed(key, value)?),
            "grad_clip" => self.set_grad_clip(parsed(key, value)?)?,
            "grad_accumulation" => self.set_grad_accumulation(parsed(key, value)?)?,
            "text_dropout" => self.set_text_dropout(parsed(key, value)?)?,
            "seed" => self.set_seed(parsed(key, value)?),
            "compute_dtype" => self.set_compute_dtype(dtype(key, value)?)?,
            "beta1" => self.set_betas(parsed(key, value)?, self.optimizer.betas[1])?,
            "beta2" => self.set_betas(self.optimizer.betas[0], parsed(key, value)?)?,
            "adam_eps" => self.optimizer.eps = number(key, value, f32::MIN_POSITIVE, 1.0)?,
            "ema_decay" => self.set_ema(Ema { decay: parsed(key, value)?, ..self.ema })?,
            "ema_start" => self.set_ema(Ema { start: parsed(key, value)?, ..self.ema })?,
            "ema_every" => self.set_ema(Ema { every: parsed(key, value)?, ..self.ema })?,
            "recompute" => self.recompute = parsed(key, value)?,
            "p2_weighting" => self.weighting = weighting(key, value)?,
            "image_dropout" => self.image_dropout = number(key, value, 0.0, 1.0)?,
            "image_noise" => self.image_noise = number(key, value, 0.0, 1.0)?,
            "train_encoder" => self.train_encoder = parsed(key, value)?,
            "lora_rank" => self.lora.rank = number(key, value, 0, LORA_RANK_MAX)?,
            "lora_alpha" => self.lora.alpha = number(key, value, 0.0, 1e6)?,
            "adversary_start" => self.adversary.start = parsed(key, value)?,
            "adversary_weight" => self.adversary.weight = number(key, value, 0.0, 1e6)?,
            "adversary_channels" => self.adversary.channels = number(key, value, 8, 65_536)?,
            "adversary_depth" => self.adversary.depth = number(key, value, 4, 16)?,
            "perceptual" => self.perceptual = (!value.is_empty()).then(|| value.into()),
            "revive_codes" => self.revive_codes = parsed(key, value)?,
            "init_codebook" => self.init_codebook = parsed(key, value)?,
            "export_dtype" => self.export_dtype = dtype(key, value)?,
            _ => return Err(Error::argument("training option", KEYS, format!("{key:?}"))),
        }
        Ok(())
    }
}

fn parsed<T: std::str::FromStr>(key: &str, value: &str) -> Result<T> {
    let kind = std::any::type_name::<T>();
    value
        .trim()
        .parse()
        .map_err(|_| Error::argument(key, format!("a value of type {kind}"), format!("{value:?}")))
}

fn number<T>(key: &str, value: &str, least: T, most: T) -> Result<T>
where
    T: std::str::FromStr + PartialOrd + std::fmt::Display + Copy,
{
    let number = parsed(key, value)?;
    within(key, number, least, most)?;
    Ok(number)
}

fn within<T: PartialOrd + std::fmt::Display + Copy>(name: &str, value: T, least: T, most: T) -> Result<()> {
    if value >= least && value <= most {
        return Ok(());
    }
    Err(Error::argument(name, format!("a number from {least} to {most}"), value))
}

fn below_one(name: &str, value: f32) -> Result<()> {
    if (0.0..1.0).contains(&value) {
        return Ok(());
    }
    Err(Error::argument(name, "a number from 0 to below 1", value))
}

fn weighting(key: &str, value: &str) -> Result<TimeWeighting> {
    match value {
        "paper" => Ok(TimeWeighting::Paper),
        "snr" => Ok(TimeWeighting::Snr),
        _ => Err(Error::argument(key, "\"paper\" or \"snr\"", format!("{value:?}"))),
    }
}

fn dtype(key: &str, value: &str) -> Result<DType> {
    match value {
        "f32" => Ok(DType::F32),
        "f16" => Ok(DType::F16),
        "bf16" => Ok(DType::BF16),
        _ => Err(Error::argument(key, "\"f32\", \"f16\" or \"bf16\"", format!("{value:?}"))),
    }
}

fn expect_float(name: &str, dtype: DType) -> Result<()> {
    if dtype.is_float() { Ok(()) } else { Err(Error::argument(name, "F32, F16 or BF16", dtype)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_listed_key_is_known() {
        let mut options = TrainOptions::new(Goal::StageC);
        let unknown = options.set("flavour", "sweet").unwrap_err().to_string();
        assert!(unknown.starts_with("training option: expected one of learning_rate, "), "{unknown}");
        for key in KEYS.trim_start_matches("one of ").split(", ").map(str::trim) {
            if let Err(error) = options.set(key, "?") {
                assert!(!error.to_string().starts_with("training option"), "{error}");
            }
        }
    }
}
