//! Stage C: the text-conditional diffusion model in the 42x compressed latent space (paper, section 3.2).

use super::blocks::{
    Attended, AttnConfig, Blocks, Conditioning, Invariants, Joined, Joining, Modulations, RunConfig, attend,
    channel_norm_in_place,
};
use crate::device::Context;
use crate::error::Result;
use crate::nn::{Linear, Params};
use crate::ops::linear::{Activation, Epilogue};
use crate::ops::noise_head::noise_from_head;
use crate::tensor::Tensor;

/// Slope of the LeakyReLU between the two layers that map the text.
const TEXT_MAPPER_SLOPE: f32 = 0.2;

/// The sizes of Stage C. The paper's: 16, 1536, 1024, 64, 32, 24, about 1.0e9 parameters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StageCConfig {
    /// Channels of the latents.
    pub latent_channels: usize,
    /// Channels of every block.
    pub channels: usize,
    /// Channels of the text embedding.
    pub text_width: usize,
    /// Width of the time embedding.
    pub time_width: usize,
    /// How often ResBlock, TimestepBlock, AttnBlock are repeated.
    pub depth: usize,
    /// Attention heads.
    pub heads: usize,
}

/// Predicts the noise in x_t from x_t, the text and the time.
#[derive(Debug)]
pub struct StageC {
    config: StageCConfig,
    input: Linear,
    text_in: Linear,
    text_out: Linear,
    blocks: Blocks,
    output: Linear,
    invariants: Invariants,
}

impl StageC {
    /// # Errors
    /// `Format` for missing or misshapen weights.
    pub fn load(p: &Params, config: StageCConfig) -> Result<Self> {
        let channels = config.channels;
        let mut invariants = Invariants::default();
        let run = RunConfig {
            letters: "CTA",
            repeats: config.depth,
            attn: AttnConfig {
                channels,
                condition_width: channels,
                heads: config.heads,
                self_attention: true,
            },
            time_width: config.time_width,
            kernel: 3,
            joining: Joining::BeforeConvolution,
            skip_channels: 0,
            first: 0,
        };
        Ok(StageC {
            input: Linear::load_conv1x1(&p.sub("input"), config.latent_channels, channels)?,
            text_in: Linear::load(&p.sub("text.in"), config.text_width, channels)?,
            text_out: Linear::load(&p.sub("text.out"), channels, channels)?,
            blocks: Blocks::load(&p.sub("blocks"), &run, &mut invariants)?,
            output: Linear::load_conv1x1(&p.sub("output"), channels, 2 * config.latent_channels)?,
            config,
            invariants,
        })
    }

    /// The sizes.
    pub fn config(&self) -> &StageCConfig {
        &self.config
    }

    /// What the TimestepBlocks do at each of `times`, in 0..1.
    ///
    /// # Errors
    /// `OutOfMemory`; `Cancelled`.
    pub fn modulations(&self, cx: &Context, times: &[f32]) -> Result<Modulations> {
        self.invariants.modulations(cx, times, self.config.time_width)
    }

    /// Keys and values of the text for every AttnBlock.
    ///
    /// # Shapes
    /// text `[entries, T, text_width]`
    ///
    /// # Errors
    /// `InvalidArgument` for another width; `OutOfMemory`; `Cancelled`.
    pub fn attend_to_text(&self, cx: &Context, text: &Tensor) -> Result<Attended> {
        let leaky = Epilogue { activation: Activation::LeakyRelu(TEXT_MAPPER_SLOPE), ..Epilogue::default() };
        let hidden = self.text_in.forward_then(cx, text, leaky)?;
        let mapped = self.text_out.forward(cx, &hidden)?;
        attend(cx, std::iter::once(&self.blocks), &mapped)
    }

    /// The noise in `x`.
    ///
    /// # Shapes
    /// `[N, h, w, latent_channels] -> [N, h, w, latent_channels]`
    ///
    /// # Errors
    /// `InvalidArgument` for other shapes; `OutOfMemory`; `Cancelled`.
    pub fn forward(&self, cx: &Context, x: &Tensor, conditioning: Conditioning) -> Result<Tensor> {
        let hidden = self.input.forward(cx, x)?;
        let hidden = self.blocks.forward(cx, hidden, Joined::default(), conditioning)?;
        let head = self.output.forward_f32(cx, &channel_norm_in_place(cx, hidden)?)?;
        noise_from_head(cx, x, &head)
    }
}
