//! Stage A: the VQGAN with a compression of 4 (paper, section 3.1; Esser et al. 2021).

use super::blocks::NORM_EPS;
use crate::device::Context;
use crate::error::{Error, Result};
use crate::nn::{BatchNorm, Linear, Mode, Params};
use crate::ops::conv_transpose2d::{ConvTranspose2d, conv_transpose2d};
use crate::ops::conv2d::{Conv2d, conv2d};
use crate::ops::depthwise_conv::{DepthwiseConv, Padding, Then, depthwise_conv};
use crate::ops::elementwise::{Rescale, rescale};
use crate::ops::embedding::embedding;
use crate::ops::layer_norm::{LayerNorm, layer_norm};
use crate::ops::linear::{Activation, Epilogue};
use crate::ops::pixel_shuffle::{pixel_shuffle, pixel_unshuffle};
use crate::ops::residual_mlp::{ResidualMlp, residual_mlp};
use crate::ops::vector_quantize::nearest;
use crate::tensor::Tensor;
use crate::tensor::autograd::{recompute, recomputes};

/// Pixels per side that the first layer folds into channels.
const PIXEL_FOLD: usize = 2;
/// Colours of a picture.
const PIXEL_CHANNELS: usize = 3;
/// Kernel, stride and padding of the convolutions between levels.
const RESAMPLE_KERNEL: usize = 4;
const RESAMPLE_STRIDE: usize = 2;
const RESAMPLE_PADDING: usize = 1;
/// How much wider the hidden layer of a block is.
const EXPANSION: usize = 4;
/// BatchNorm at the end of the encoder.
const BATCH_NORM_EPS: f32 = 1e-5;

/// The sizes of Stage A. The paper's: 2, 12, 384, 4, 8192, 0.3764, about 18e6 parameters.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StageAConfig {
    /// Resolutions; a token covers 2^levels pixels per side.
    pub levels: usize,
    /// Blocks of the decoder at the deepest level.
    pub bottleneck_blocks: usize,
    /// Channels at the deepest level; half as many at each finer one.
    pub channels: usize,
    /// Channels of a codebook vector.
    pub latent_channels: usize,
    /// Vectors in the codebook.
    pub codebook_size: usize,
    /// Latents outside are codebook vectors divided by this.
    pub scale_factor: f32,
}

impl StageAConfig {
    /// Pixels per token side.
    pub fn factor(&self) -> usize {
        PIXEL_FOLD.pow(self.levels as u32)
    }

    /// Channels of level `i`, the finest first.
    fn channels_at(&self, i: usize) -> usize {
        self.channels >> (self.levels - 1 - i)
    }
}

/// Encoder, quantiser and decoder.
#[derive(Debug)]
pub struct StageA {
    config: StageAConfig,
    encoder_in: Linear,
    encoder: Vec<Layer>,
    encoder_out: Linear,
    encoder_norm: BatchNorm,
    codebook: Tensor,
    decoder_in: Linear,
    decoder: Vec<Layer>,
    decoder_out: Linear,
}

// A decoder has about fifteen: boxing the blocks would save nothing that matters.
#[allow(clippy::large_enum_variant)]
#[derive(Debug)]
enum Layer {
    Block(Block),
    Down { weight: Tensor, bias: Tensor },
    Up { weight: Tensor, bias: Tensor },
}

/// Two residual halves with six learnt scalars: a depthwise convolution, then a pointwise MLP.
#[derive(Debug, Clone)]
struct Block {
    /// Scale - 1 and shift before, gain after; first for the convolution, then for the MLP.
    gammas: Tensor,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor,
    expand: Linear,
    project: Linear,
}

impl Block {
    fn load(p: &Params, channels: usize) -> Result<Self> {
        let hidden = EXPANSION * channels;
        Ok(Block {
            gammas: p.tensor("gammas", &[6])?,
            depthwise_weight: p.tensor("depthwise.weight", &[channels, 1, 3, 3])?,
            depthwise_bias: p.tensor("depthwise.bias", &[channels])?,
            expand: Linear::load(&p.sub("expand"), channels, hidden)?,
            project: Linear::load(&p.sub("project"), hidden, channels)?,
        })
    }

    fn forward(&self, cx: &Context, x: Tensor) -> Result<Tensor> {
        let gamma = |i| self.gammas.narrow(i, 1);
        let [scale_conv, shift_conv, gain_conv] = [gamma(0)?, gamma(1)?, gamma(2)?];
        let [scale_mlp, shift_mlp, gain_mlp] = [gamma(3)?, gamma(4)?, gamma(5)?];
        let norm =
            LayerNorm { eps: NORM_EPS, affine: None, scale: Some(&scale_conv), shift: Some(&shift_conv) };
        let conv = DepthwiseConv {
            weight: &self.depthwise_weight,
            bias: Some(&self.depthwise_bias),
            stride: 1,
            padding: Padding::Replicate,
            then: Then::ScaledResidual { gain: &gain_conv, residual: &x },
        };
        let mixed = depthwise_conv(cx, &layer_norm(cx, &x, &norm)?, None, &conv)?;
        drop(x);
        let mlp = ResidualMlp {
            norm: LayerNorm { scale: Some(&scale_mlp), shift: Some(&shift_mlp), ..norm },
            expand: self.expand.as_dense(),
            activation: Activation::Gelu,
            project: self.project.as_dense(),
            gain: &gain_mlp,
        };
        residual_mlp(cx, &mixed, &mlp)
    }

    /// [`Block::forward`] as one unit of a tape that keeps what goes into a block and runs it again.
    fn forward_kept(&self, cx: &Context, x: Tensor) -> Result<Tensor> {
        if !recomputes(cx) {
            return self.forward(cx, x);
        }
        let block = self.clone();
        recompute(cx, &[Some(&x)], move |cx, kept| match kept {
            [Some(x)] => block.forward(cx, x.clone()),
            _ => Err(Error::internal("stage A block", "its input was not kept")),
        })
    }
}

impl Layer {
    /// What its span is called.
    fn name(&self) -> &'static str {
        match self {
            Layer::Block(_) => "block",
            Layer::Down { .. } => "down",
            Layer::Up { .. } => "up",
        }
    }

    fn forward(&self, cx: &Context, x: Tensor) -> Result<Tensor> {
        match self {
            Layer::Block(block) => block.forward_kept(cx, x),
            Layer::Down { weight, bias } => {
                let epilogue = Epilogue { bias: Some(bias), ..Epilogue::default() };
                let (stride, padding) = (RESAMPLE_STRIDE, RESAMPLE_PADDING);
                conv2d(cx, &x, &Conv2d { weight, stride, padding, epilogue })
            }
            Layer::Up { weight, bias } => {
                let (stride, padding) = (RESAMPLE_STRIDE, RESAMPLE_PADDING);
                let conv = ConvTranspose2d { weight, bias: Some(bias), stride, padding };
                conv_transpose2d(cx, &x, &conv)
            }
        }
    }
}

impl StageA {
    /// # Errors
    /// `Format` for missing or misshapen weights.
    pub fn load(p: &Params, config: StageAConfig) -> Result<Self> {
        let latent = config.latent_channels;
        let pixel_channels = PIXEL_CHANNELS * PIXEL_FOLD * PIXEL_FOLD;
        let (finest, deepest) = (config.channels_at(0), config.channels);
        let encoder_out = p.sub("encoder.out");
        Ok(StageA {
            encoder_in: Linear::load_conv1x1(&p.sub("encoder.in"), pixel_channels, finest)?,
            encoder: Self::load_encoder(&p.sub("encoder"), &config)?,
            encoder_out: Linear::load_conv1x1_without_bias(&encoder_out.sub("project"), deepest, latent)?,
            encoder_norm: BatchNorm::load(&encoder_out.sub("norm"), latent, BATCH_NORM_EPS)?,
            codebook: p.tensor("codebook.weight", &[config.codebook_size, latent])?,
            decoder_in: Linear::load_conv1x1(&p.sub("decoder.in"), latent, deepest)?,
            decoder: Self::load_decoder(&p.sub("decoder"), &config)?,
            decoder_out: Linear::load_conv1x1(&p.sub("decoder.out"), finest, pixel_channels)?,
            config,
        })
    }

    /// Per level a block, after a halving of the grid at all but the finest.
    fn load_encoder(p: &Params, config: &StageAConfig) -> Result<Vec<Layer>> {
        let mut layers = Vec::new();
        for i in 0..config.levels {
            let channels = config.channels_at(i);
            if i > 0 {
                let p = p.sub(layers.len());
                let (weight, bias) = resample(&p, [channels, config.channels_at(i - 1)], channels)?;
                layers.push(Layer::Down { weight, bias });
            }
            layers.push(Layer::Block(Block::load(&p.sub(layers.len()), channels)?));
        }
        Ok(layers)
    }

    /// From the deepest level: its bottleneck blocks, then per finer level a doubling of the grid and a block.
    fn load_decoder(p: &Params, config: &StageAConfig) -> Result<Vec<Layer>> {
        let mut layers = Vec::new();
        for i in (0..config.levels).rev() {
            let channels = config.channels_at(i);
            let blocks = if i == config.levels - 1 { config.bottleneck_blocks } else { 1 };
            for _ in 0..blocks {
                layers.push(Layer::Block(Block::load(&p.sub(layers.len()), channels)?));
            }
            if i > 0 {
                let p = p.sub(layers.len());
                let finer = config.channels_at(i - 1);
                let (weight, bias) = resample(&p, [channels, finer], finer)?;
                layers.push(Layer::Up { weight, bias });
            }
        }
        Ok(layers)
    }

    /// The sizes.
    pub fn config(&self) -> &StageAConfig {
        &self.config
    }

    /// The codebook `[codebook_size, latent_channels]`.
    pub fn codebook(&self) -> &Tensor {
        &self.codebook
    }

    /// Codebook space: what the quantiser sees.
    ///
    /// # Shapes
    /// pixels `[N, H, W, 3]` in 0..1 -> `[N, H/f, W/f, latent_channels]`
    ///
    /// # Errors
    /// `InvalidArgument` unless H and W are multiples of the factor; `OutOfMemory`; `Cancelled`.
    pub fn encode(&self, cx: &Context, pixels: &Tensor, mode: Mode) -> Result<Tensor> {
        let [_, h, w, _] = pixels.dims_of("stage_a pixels")?;
        let factor = self.config.factor();
        if h % factor != 0 || w % factor != 0 {
            let expected = format!("sides in multiples of {factor} pixels");
            return Err(Error::argument("stage_a pixels", expected, format!("{w} x {h}")));
        }
        let mut x = self.encoder_in.forward(cx, &pixel_unshuffle(cx, pixels, PIXEL_FOLD)?)?;
        for (i, layer) in self.encoder.iter().enumerate() {
            let _span = cx.span_of(layer.name(), i);
            x = layer.forward(cx, x)?;
        }
        match mode {
            Mode::Inference => {
                let [scale, shift] = self.encoder_norm.affine(cx)?;
                self.encoder_out.forward_scaled(cx, &x, &scale, &shift, Activation::None)
            }
            Mode::Training(pass) => {
                self.encoder_norm.forward_training(cx, &self.encoder_out.forward(cx, &x)?, pass)
            }
        }
    }

    /// The nearest codebook vector's number for each position.
    ///
    /// # Shapes
    /// `[N, h, w, latent_channels]` -> tokens `I64 [N, h, w]`
    ///
    /// # Errors
    /// `InvalidArgument` for another number of channels; `OutOfMemory`; `Cancelled`.
    pub fn quantize(&self, cx: &Context, encoded: &Tensor) -> Result<Tensor> {
        nearest(cx, encoded, &self.codebook)
    }

    /// Pixels of tokens, not clamped. The codebook's vectors go in as they are, without the scale factor.
    ///
    /// # Shapes
    /// tokens `I64 [N, h, w]` -> `[N, f h, f w, 3]`
    ///
    /// # Errors
    /// `InvalidArgument` for a token that is not in the codebook; `OutOfMemory`; `Cancelled`.
    pub fn decode_tokens(&self, cx: &Context, tokens: &Tensor) -> Result<Tensor> {
        self.decode(cx, &embedding(cx, tokens, &self.codebook)?)
    }

    /// Pixels of latents as they are used outside: divided by the scale factor.
    ///
    /// # Shapes
    /// `[N, h, w, latent_channels]` -> `[N, f h, f w, 3]`
    ///
    /// # Errors
    /// `InvalidArgument` for another number of channels; `OutOfMemory`; `Cancelled`.
    pub fn decode_latents(&self, cx: &Context, latents: &Tensor) -> Result<Tensor> {
        let by = Rescale { factor: self.config.scale_factor, ..Rescale::default() };
        self.decode(cx, &rescale(cx, latents.clone(), by)?)
    }

    /// The weight of the decoder's last layer: where the weight of an adversarial loss is measured.
    pub fn last_weight(&self) -> &Tensor {
        self.decoder_out.weight()
    }

    /// Pixels of codebook vectors, not clamped.
    ///
    /// # Shapes
    /// `[N, h, w, latent_channels]` -> `[N, f h, f w, 3]`
    ///
    /// # Errors
    /// `InvalidArgument` for another number of channels; `OutOfMemory`; `Cancelled`.
    pub fn decode(&self, cx: &Context, x: &Tensor) -> Result<Tensor> {
        self.last_layer(cx, &self.decoder_features(cx, x)?)
    }

    /// What the last layer of the decoder sees.
    ///
    /// # Shapes
    /// `[N, h, w, latent_channels]` -> `[N, f h / 2, f w / 2, channels]` with the channels of the finest level
    ///
    /// # Errors
    /// As [`StageA::decode`].
    pub fn decoder_features(&self, cx: &Context, x: &Tensor) -> Result<Tensor> {
        let mut x = self.decoder_in.forward(cx, x)?;
        for (i, layer) in self.decoder.iter().enumerate() {
            let _span = cx.span_of(layer.name(), i);
            x = layer.forward(cx, x)?;
        }
        Ok(x)
    }

    /// The last layer of the decoder: features to pixels.
    ///
    /// # Shapes
    /// `[N, h, w, channels] -> [N, 2 h, 2 w, 3]`
    ///
    /// # Errors
    /// As [`StageA::decode`].
    pub fn last_layer(&self, cx: &Context, features: &Tensor) -> Result<Tensor> {
        pixel_shuffle(cx, &self.decoder_out.forward_f32(cx, features)?, PIXEL_FOLD)
    }
}

/// Weight `[outer, inner, 4, 4]` (outputs first in a convolution, inputs first in a transposed one) and bias.
fn resample(p: &Params, [outer, inner]: [usize; 2], outputs: usize) -> Result<(Tensor, Tensor)> {
    let weight = p.tensor("weight", &[outer, inner, RESAMPLE_KERNEL, RESAMPLE_KERNEL])?;
    Ok((weight, p.tensor("bias", &[outputs])?))
}
