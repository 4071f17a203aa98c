//! Stage B: the token predictor that decodes latents to VQGAN tokens (paper, section 3.1; Paella, Rampas et al.
//! 2023). A U-Net over the token grid.

use super::blocks::{
    Attended, AttnConfig, Blocks, Conditioning, Invariants, Modulations, RunConfig, attend, channel_norm,
};
use crate::device::Context;
use crate::error::{Error, Result};
use crate::nn::{Linear, Params};
use crate::ops::embedding::embedding;
use crate::ops::linear::{Epilogue, linear_transposed};
use crate::ops::pixel_shuffle::{pixel_shuffle, pixel_unshuffle};
use crate::ops::widen::widen;
use crate::tensor::{DType, Tensor};

/// Between two levels of the U-Net the grid shrinks by this factor.
const LEVEL_STRIDE: usize = 2;

/// The sizes of Stage B.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StageBConfig {
    /// Channels of a token's embedding, going in and coming out.
    pub embedding_width: usize,
    /// Tokens of the codebook.
    pub codebook_size: usize,
    /// Width of the time embedding.
    pub time_width: usize,
    /// Tokens per side that become one position.
    pub patch_size: usize,
    /// Channels of the conditioning tokens.
    pub condition_width: usize,
    /// Channels of the image latents.
    pub latent_channels: usize,
    /// Channels of the text embedding.
    pub text_width: usize,
    /// Kernel of the depthwise convolutions.
    pub kernel: usize,
    /// Whether positions attend to each other.
    pub self_attention: bool,
    /// The levels, from the finest to the deepest.
    pub levels: Vec<LevelConfig>,
}

/// One level of the U-Net.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LevelConfig {
    /// One letter per block: C, T, A, F.
    pub letters: String,
    /// How often the letters are repeated.
    pub repeats: usize,
    /// Channels.
    pub channels: usize,
    /// Attention heads; 1 where there is no attention.
    pub heads: usize,
}

impl StageBConfig {
    /// Token grids must be multiples of this in both directions.
    pub fn grid_multiple(&self) -> usize {
        self.patch_size * LEVEL_STRIDE.pow(self.levels.len().saturating_sub(1) as u32)
    }

    fn run(&self, level: usize) -> RunConfig<'_> {
        let LevelConfig { letters, repeats, channels, heads } = &self.levels[level];
        RunConfig {
            letters,
            repeats: *repeats,
            attn: AttnConfig {
                channels: *channels,
                condition_width: self.condition_width,
                heads: *heads,
                self_attention: self.self_attention,
            },
            time_width: self.time_width,
            kernel: self.kernel,
            skip_channels: 0,
            first: 0,
        }
    }
}

/// Predicts the tokens that noised tokens came from.
#[derive(Debug)]
pub struct StageB {
    config: StageBConfig,
    tokens: Tensor,
    input: Linear,
    latents: Linear,
    text: Linear,
    down: Vec<DownLevel>,
    up: Vec<UpLevel>,
    features: Linear,
    logits: Linear,
    invariants: Invariants,
}

/// A level on the way down: the grid shrinks first, except at the finest.
#[derive(Debug)]
struct DownLevel {
    resample: Option<Linear>,
    blocks: Blocks,
}

/// A level on the way up: the grid grows last, except at the finest.
#[derive(Debug)]
struct UpLevel {
    blocks: Blocks,
    resample: Option<Upsample>,
}

/// A transposed convolution whose kernel is its stride: a product, then a pixel shuffle.
#[derive(Debug)]
struct Upsample {
    /// `[inputs, outputs * stride^2]`: the checkpoint's own order, as it is the pixel shuffle's.
    weight: Tensor,
    bias: Tensor,
}

impl Upsample {
    fn load(p: &Params, inputs: usize, outputs: usize) -> Result<Self> {
        let weight = p.tensor("weight", &[inputs, outputs, LEVEL_STRIDE, LEVEL_STRIDE])?;
        let weight = weight.reshape(&[inputs, outputs * LEVEL_STRIDE * LEVEL_STRIDE])?;
        Ok(Upsample { weight, bias: p.tensor("bias", &[outputs])? })
    }

    fn forward(&self, cx: &Context, x: &Tensor) -> Result<Tensor> {
        // Each output channel is spread over a patch: so is its bias.
        let bias = repeat_each(cx, &widen(cx, &self.bias)?, LEVEL_STRIDE * LEVEL_STRIDE)?;
        let then = Epilogue { bias: Some(&bias), ..Epilogue::default() };
        pixel_shuffle(cx, &linear_transposed(cx, x, &self.weight, &then)?, LEVEL_STRIDE)
    }
}

/// Each element `times` times in a row.
fn repeat_each(cx: &Context, x: &Tensor, times: usize) -> Result<Tensor> {
    let mut repeated = Tensor::new(cx, "a repeated bias", &[x.elements() * times], DType::F32)?;
    for (out, x) in repeated.slice_mut::<f32>()?.chunks_exact_mut(times).zip(x.slice::<f32>()?) {
        out.fill(*x);
    }
    Ok(repeated)
}

/// A convolution whose kernel is its stride: a pixel unshuffle, whose channel order is the checkpoint's own,
/// then a product.
fn load_downsample(p: &Params, inputs: usize, outputs: usize) -> Result<Linear> {
    let weight = p.tensor("weight", &[outputs, inputs, LEVEL_STRIDE, LEVEL_STRIDE])?;
    let weight = weight.reshape(&[outputs, inputs * LEVEL_STRIDE * LEVEL_STRIDE])?;
    Ok(Linear::from_parts(weight, Some(p.tensor("bias", &[outputs])?)))
}

impl StageB {
    /// # Errors
    /// `Format` for missing or misshapen weights; `InvalidArgument` for a config without levels.
    pub fn load(p: &Params, config: StageBConfig) -> Result<Self> {
        let Some(finest) = config.levels.first().map(|level| level.channels) else {
            return Err(Error::argument("stage_b levels", "at least one", 0));
        };
        let mut invariants = Invariants::default();
        let down = Self::load_down(&p.sub("down"), &config, &mut invariants)?;
        let up = Self::load_up(&p.sub("up"), &config, &mut invariants)?;
        let width = config.embedding_width;
        let patch = config.patch_size * config.patch_size;
        Ok(StageB {
            tokens: p.tensor("tokens.weight", &[config.codebook_size, width])?,
            input: Linear::load_conv1x1(&p.sub("input"), width * patch, finest)?,
            latents: Linear::load(&p.sub("latents"), config.latent_channels, config.condition_width)?,
            text: Linear::load(&p.sub("text"), config.text_width, config.condition_width)?,
            features: Linear::load_conv1x1(&p.sub("features"), finest, width * patch)?,
            logits: Linear::load_conv1x1_without_bias(&p.sub("logits"), width, config.codebook_size)?,
            down,
            up,
            config,
            invariants,
        })
    }

    fn load_down(p: &Params, config: &StageBConfig, invariants: &mut Invariants) -> Result<Vec<DownLevel>> {
        let mut levels = Vec::with_capacity(config.levels.len());
        for (i, level) in config.levels.iter().enumerate() {
            let p = p.sub(i);
            let resample = match i.checked_sub(1) {
                Some(finer) => {
                    let inputs = config.levels[finer].channels;
                    Some(load_downsample(&p.sub("resample"), inputs, level.channels)?)
                }
                None => None,
            };
            levels.push(DownLevel { resample, blocks: Blocks::load(&p, &config.run(i), invariants)? });
        }
        Ok(levels)
    }

    fn load_up(p: &Params, config: &StageBConfig, invariants: &mut Invariants) -> Result<Vec<UpLevel>> {
        let deepest = config.levels.len() - 1;
        let mut levels = Vec::with_capacity(config.levels.len());
        for (u, i) in (0..=deepest).rev().enumerate() {
            let p = p.sub(u);
            let channels = config.levels[i].channels;
            let skip_channels = if i < deepest { channels } else { 0 };
            let run = RunConfig { skip_channels, ..config.run(i) };
            let blocks = Blocks::load(&p, &run, invariants)?;
            let resample = match i.checked_sub(1) {
                Some(finer) => {
                    let outputs = config.levels[finer].channels;
                    Some(Upsample::load(&p.sub("resample"), channels, outputs)?)
                }
                None => None,
            };
            levels.push(UpLevel { blocks, resample });
        }
        Ok(levels)
    }

    /// The sizes.
    pub fn config(&self) -> &StageBConfig {
        &self.config
    }

    /// What the TimestepBlocks do at each of `times`, in 0..1.
    ///
    /// # Errors
    /// `OutOfMemory`; `Cancelled`.
    pub fn modulations(&self, cx: &Context, times: &[f32]) -> Result<Modulations> {
        self.invariants.modulations(cx, times, self.config.time_width)
    }

    /// Keys and values of the text. The LayerNorm over the concatenated conditioning is per token, so text and
    /// image tokens are mapped apart: samples of one prompt share the text's.
    ///
    /// # Shapes
    /// text `[entries, T, text_width]`
    ///
    /// # Errors
    /// `InvalidArgument` for another width; `OutOfMemory`; `Cancelled`.
    pub fn attend_to_text(&self, cx: &Context, text: &Tensor) -> Result<Attended> {
        self.attend(cx, &self.text.forward(cx, text)?)
    }

    /// Keys and values of the image latents, flattened row by row.
    ///
    /// # Shapes
    /// latents `[entries, h, w, latent_channels]`
    ///
    /// # Errors
    /// `InvalidArgument` for another width; `OutOfMemory`; `Cancelled`.
    pub fn attend_to_latents(&self, cx: &Context, latents: &Tensor) -> Result<Attended> {
        let [n, h, w, c] = latents.dims_of("stage_b latents")?;
        self.attend(cx, &self.latents.forward(cx, &latents.reshape(&[n, h * w, c])?)?)
    }

    fn attend(&self, cx: &Context, mapped: &Tensor) -> Result<Attended> {
        let runs = self.down.iter().map(|l| &l.blocks).chain(self.up.iter().map(|l| &l.blocks));
        attend(cx, runs, &channel_norm(cx, mapped)?)
    }

    /// The last features of every token, from which [`StageB::logits`] or a fused choice makes logits.
    ///
    /// # Shapes
    /// tokens `I64 [N, H, W]` -> `[N, H, W, embedding_width]`
    ///
    /// # Errors
    /// `InvalidArgument` for a grid that does not divide, or a token that is not in the codebook;
    /// `OutOfMemory`; `Cancelled`.
    pub fn features(&self, cx: &Context, tokens: &Tensor, conditioning: Conditioning) -> Result<Tensor> {
        let [_, h, w] = tokens.dims_of("stage_b tokens")?;
        let multiple = self.config.grid_multiple();
        if h == 0 || w == 0 || h % multiple != 0 || w % multiple != 0 {
            let expected = format!("a token grid in multiples of {multiple}");
            return Err(Error::argument("stage_b tokens", expected, format!("{h} x {w}")));
        }
        let embedded = channel_norm(cx, &embedding(cx, tokens, &self.tokens)?)?;
        let patches = pixel_unshuffle(cx, &embedded, self.config.patch_size)?;
        drop(embedded);
        let x = channel_norm(cx, &self.input.forward(cx, &patches)?)?;
        drop(patches);
        let x = self.forward_unet(cx, x, conditioning)?;
        let x = self.features.forward(cx, &channel_norm(cx, &x)?)?;
        channel_norm(cx, &pixel_shuffle(cx, &x, self.config.patch_size)?)
    }

    fn forward_unet(&self, cx: &Context, mut x: Tensor, conditioning: Conditioning) -> Result<Tensor> {
        let mut skips = Vec::with_capacity(self.down.len());
        for level in &self.down {
            if let Some(resample) = &level.resample {
                let patches = pixel_unshuffle(cx, &channel_norm(cx, &x)?, LEVEL_STRIDE)?;
                x = resample.forward(cx, &patches)?;
            }
            x = level.blocks.forward(cx, x, None, conditioning)?;
            skips.push(x.clone());
        }
        // The deepest level's output is x itself, not a skip.
        skips.pop();
        for (u, level) in self.up.iter().enumerate() {
            let skip = if u == 0 { None } else { skips.pop() };
            x = level.blocks.forward(cx, x, skip.as_ref(), conditioning)?;
            if let Some(resample) = &level.resample {
                x = resample.forward(cx, &channel_norm(cx, &x)?)?;
            }
        }
        Ok(x)
    }

    /// # Shapes
    /// features `[N, H, W, embedding_width]` -> `[N, H, W, codebook_size]`
    ///
    /// # Errors
    /// `InvalidArgument` for another width; `OutOfMemory`; `Cancelled`.
    pub fn logits(&self, cx: &Context, features: &Tensor) -> Result<Tensor> {
        self.logits.forward(cx, features)
    }

    /// The weight of the last layer, `[codebook_size, embedding_width]`.
    pub fn logits_weight(&self) -> &Tensor {
        self.logits.weight()
    }
}
