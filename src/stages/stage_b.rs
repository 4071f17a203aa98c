//! Stage B: the token predictor that decodes latents to VQGAN tokens (paper, section 3.1; Paella, Rampas et al.
//! 2023). A U-Net over the token grid.

use super::blocks::{Attended, Conditioning, Modulations, channel_norm_in_place};
use super::unet::{LevelConfig, UNet, UNetConfig, check_grid, grid_multiple};
use crate::device::Context;
use crate::error::{Error, Result};
use crate::nn::{Linear, Params};
use crate::ops::embedding::embedding;
use crate::ops::pixel_shuffle::{pixel_shuffle, pixel_unshuffle};
use crate::tensor::Tensor;

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

impl StageBConfig {
    /// Token grids must be multiples of this in both directions.
    pub fn grid_multiple(&self) -> usize {
        grid_multiple(self.patch_size, &self.levels)
    }

    fn unet(&self) -> UNetConfig<'_> {
        UNetConfig {
            levels: &self.levels,
            condition_width: self.condition_width,
            self_attention: self.self_attention,
            time_width: self.time_width,
            kernel: self.kernel,
            injects: None,
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
    unet: UNet,
    features: Linear,
    logits: Linear,
}

impl StageB {
    /// # Errors
    /// `Format` for missing or misshapen weights; `InvalidArgument` for a config without levels.
    pub fn load(p: &Params, config: StageBConfig) -> Result<Self> {
        let Some(finest) = config.levels.first().map(|level| level.channels) else {
            return Err(Error::argument("stage_b levels", "at least one", 0));
        };
        let width = config.embedding_width;
        let patch = config.patch_size * config.patch_size;
        Ok(StageB {
            tokens: p.tensor("tokens.weight", &[config.codebook_size, width])?,
            input: Linear::load_conv1x1(&p.sub("input"), width * patch, finest)?,
            latents: Linear::load(&p.sub("latents"), config.latent_channels, config.condition_width)?,
            text: Linear::load(&p.sub("text"), config.text_width, config.condition_width)?,
            features: Linear::load_conv1x1(&p.sub("features"), finest, width * patch)?,
            logits: Linear::load_conv1x1_without_bias(&p.sub("logits"), width, config.codebook_size)?,
            unet: UNet::load(p, &config.unet())?,
            config,
        })
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
        self.unet.modulations(cx, times)
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
        self.unet.attend(cx, &self.text.forward(cx, text)?)
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
        self.unet.attend(cx, &self.latents.forward(cx, &latents.reshape(&[n, h * w, c])?)?)
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
        check_grid("stage_b tokens", [h, w], self.config.grid_multiple())?;
        let embedded = channel_norm_in_place(cx, embedding(cx, tokens, &self.tokens)?)?;
        let patches = pixel_unshuffle(cx, &embedded, self.config.patch_size)?;
        drop(embedded);
        let x = channel_norm_in_place(cx, self.input.forward(cx, &patches)?)?;
        drop(patches);
        let x = self.unet.forward(cx, x, &[], conditioning)?;
        let x = self.features.forward(cx, &channel_norm_in_place(cx, x)?)?;
        channel_norm_in_place(cx, pixel_shuffle(cx, &x, self.config.patch_size)?)
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
