//! The image encoder: EfficientNetV2 features (Tan and Le 2021) and a 1x1 head to the latents that Stage C
//! learns (paper, section 3.1).

use crate::device::Context;
use crate::error::Result;
use crate::nn::{BatchNorm, DepthDraw, Linear, Mode, Params};
use crate::ops::conv2d::{Conv2d, conv2d};
use crate::ops::depthwise_conv::{DepthwiseConv, Padding, Then, depthwise_conv};
use crate::ops::elementwise::{Rescale, activate, add, affine_channels, rescale, scale_channels};
use crate::ops::linear::{Activation, Epilogue};
use crate::ops::mix::scale_samples;
use crate::ops::pool::pool;
use crate::tensor::{Tensor, autograd};

/// BatchNorm of the head; the backbone's eps is in the config.
const HEAD_NORM_EPS: f32 = 1e-5;
/// The squeeze of an MBConv block has this fraction of the block's input channels.
const SQUEEZE_DIVISOR: usize = 4;
/// Kernel and stride of the stem.
const STEM_KERNEL: usize = 3;
const STEM_STRIDE: usize = 2;

/// The two kinds of block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockKind {
    /// A dense convolution that expands, then a 1x1 that projects.
    FusedMbConv,
    /// A 1x1 that expands, a depthwise convolution, squeeze and excitation, a 1x1 that projects.
    MbConv,
}

/// A run of blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StageConfig {
    /// The kind of every block.
    pub kind: BlockKind,
    /// Hidden channels per input channel.
    pub expand_ratio: usize,
    /// Kernel of the spatial convolution.
    pub kernel: usize,
    /// Stride of the first block; the others keep the grid.
    pub stride: usize,
    /// Channels going into the first block.
    pub inputs: usize,
    /// Channels coming out of every block.
    pub outputs: usize,
    /// Blocks.
    pub layers: usize,
}

/// The sizes of an image encoder.
#[derive(Debug, Clone, PartialEq)]
pub struct ImageEncoderConfig {
    /// Channels after the stem.
    pub stem_channels: usize,
    /// The runs of blocks.
    pub stages: Vec<StageConfig>,
    /// Channels of the features.
    pub feature_channels: usize,
    /// Channels of the latents.
    pub latent_channels: usize,
    /// Of every BatchNorm of the backbone.
    pub norm_eps: f32,
    /// How fast the running statistics of the backbone follow the batches, in training.
    pub norm_momentum: f32,
    /// How likely the block after the last would be left out in training; the first always stays.
    pub stochastic_depth: f32,
    /// latents = (head + add) / div: 0 and 1 in the paper's model, 1 and 42 later.
    pub output_add: f32,
    /// See `output_add`.
    pub output_div: f32,
}

impl ImageEncoderConfig {
    /// Pixels per latent and side, where the strides divide the picture.
    pub fn factor(&self) -> usize {
        self.strides().fold(1, usize::saturating_mul)
    }

    /// A BatchNorm of the backbone.
    fn norm(&self, p: &Params, channels: usize) -> Result<BatchNorm> {
        Ok(BatchNorm::load(p, channels, self.norm_eps)?.with_momentum(self.norm_momentum))
    }

    fn strides(&self) -> impl Iterator<Item = usize> {
        self.stages.iter().map(|s| s.stride).chain([STEM_STRIDE])
    }

    /// The latent side for a picture of `pixels` pixels: every layer of stride 2 halves it, rounding up.
    pub fn latent_side(&self, pixels: usize) -> usize {
        self.strides().fold(pixels, |side, stride| side.div_ceil(stride))
    }
}

/// Pictures to latents.
#[derive(Debug)]
pub struct ImageEncoder {
    config: ImageEncoderConfig,
    stem: ConvNorm,
    blocks: Vec<Block>,
    features: ConvNorm,
    head: Linear,
    head_norm: BatchNorm,
}

/// A dense convolution without bias and its BatchNorm.
#[derive(Debug)]
struct ConvNorm {
    weight: Tensor,
    norm: BatchNorm,
    stride: usize,
    activation: Activation,
}

/// What a block adds its result to.
#[derive(Debug, Clone, Copy)]
struct Residual<'a> {
    /// The block's input.
    input: &'a Tensor,
    /// What each sample's result is multiplied by, where stochastic depth drew.
    factors: Option<&'a [f32]>,
}

impl ConvNorm {
    fn load(
        p: &Params,
        [inputs, outputs]: [usize; 2],
        kernel: usize,
        config: &ImageEncoderConfig,
    ) -> Result<Self> {
        Ok(ConvNorm {
            weight: p.tensor("weight", &[outputs, inputs, kernel, kernel])?,
            norm: config.norm(&p.sub("norm"), outputs)?,
            stride: 1,
            activation: Activation::Silu,
        })
    }

    fn forward(&self, cx: &Context, x: &Tensor, residual: Option<Residual>, mode: Mode) -> Result<Tensor> {
        match mode {
            Mode::Inference => {
                let [scale, shift] = self.norm.affine(cx)?;
                let then = Epilogue {
                    channel_scale: Some(&scale),
                    bias: Some(&shift),
                    activation: self.activation,
                    residual: residual.map(|r| r.input),
                    ..Epilogue::default()
                };
                self.convolve(cx, x, then)
            }
            Mode::Training(pass) => {
                let y = self.convolve(cx, x, Epilogue::default())?;
                let y = self.norm.forward_training(cx, &y, pass)?;
                let y = activate(cx, y, self.activation)?;
                match residual {
                    Some(residual) => residual.add(cx, y),
                    None => Ok(y),
                }
            }
        }
    }

    fn convolve(&self, cx: &Context, x: &Tensor, epilogue: Epilogue) -> Result<Tensor> {
        let [_, _, kernel, _] = self.weight.dims_of("convolution weight")?;
        let padding = (kernel - 1) / 2;
        conv2d(cx, x, &Conv2d { weight: &self.weight, stride: self.stride, padding, epilogue })
    }
}

impl Residual<'_> {
    fn add(&self, cx: &Context, y: Tensor) -> Result<Tensor> {
        let y = match self.factors {
            Some(factors) => scale_samples(cx, &y, factors)?,
            None => y,
        };
        add(cx, &y, self.input)
    }
}

#[derive(Debug)]
struct Block {
    expand: Option<ConvNorm>,
    spatial: Option<Depthwise>,
    project: Option<ConvNorm>,
    /// The input is added where the grid and the channels stay.
    residual: bool,
    /// Its number within the network, and how likely it is left out in training.
    number: usize,
    skip_probability: f32,
}

/// A depthwise convolution, its BatchNorm and SiLU, then squeeze and excitation.
#[derive(Debug)]
struct Depthwise {
    weight: Tensor,
    norm: BatchNorm,
    stride: usize,
    squeeze: Linear,
    excite: Linear,
}

impl Depthwise {
    fn load(
        p: &Params,
        channels: usize,
        squeezed: usize,
        s: &StageConfig,
        stride: usize,
        config: &ImageEncoderConfig,
    ) -> Result<Self> {
        let conv = p.sub("depthwise");
        Ok(Depthwise {
            weight: conv.tensor("weight", &[channels, 1, s.kernel, s.kernel])?,
            norm: config.norm(&conv.sub("norm"), channels)?,
            stride,
            squeeze: Linear::load_conv1x1(&p.sub("squeeze"), channels, squeezed)?,
            excite: Linear::load_conv1x1(&p.sub("excite"), squeezed, channels)?,
        })
    }

    fn forward(&self, cx: &Context, x: &Tensor, mode: Mode) -> Result<Tensor> {
        let conv = DepthwiseConv {
            weight: &self.weight,
            bias: None,
            stride: self.stride,
            padding: Padding::Zero,
            then: Then::None,
        };
        let mixed = match mode {
            Mode::Inference => {
                let [scale, shift] = self.norm.affine(cx)?;
                let then = Then::ChannelAffine { scale: &scale, shift: &shift, activation: Activation::Silu };
                depthwise_conv(cx, x, None, &DepthwiseConv { then, ..conv })?
            }
            Mode::Training(pass) => {
                let mixed = depthwise_conv(cx, x, None, &conv)?;
                activate(cx, self.norm.forward_training(cx, &mixed, pass)?, Activation::Silu)?
            }
        };
        let act = |activation| Epilogue { activation, ..Epilogue::default() };
        let squeezed = self.squeeze.forward_then(cx, &pool(cx, &mixed)?, act(Activation::Silu))?;
        let gates = self.excite.forward_then(cx, &squeezed, act(Activation::Sigmoid))?;
        scale_channels(cx, mixed, &gates)
    }
}

impl Block {
    fn load(
        p: &Params,
        stage: &StageConfig,
        first: bool,
        number: usize,
        config: &ImageEncoderConfig,
    ) -> Result<Self> {
        let (inputs, stride) = if first { (stage.inputs, stage.stride) } else { (stage.outputs, 1) };
        let hidden = inputs * stage.expand_ratio;
        let outputs = stage.outputs;
        let residual = stride == 1 && inputs == outputs;
        let plain = |conv: ConvNorm| ConvNorm { activation: Activation::None, ..conv };
        let blocks: usize = config.stages.iter().map(|stage| stage.layers).sum();
        let skip_probability = config.stochastic_depth * number as f32 / blocks as f32;
        let block =
            |expand, spatial, project| Block { expand, spatial, project, residual, number, skip_probability };
        Ok(match stage.kind {
            BlockKind::FusedMbConv if stage.expand_ratio == 1 => {
                let conv = ConvNorm::load(&p.sub("expand"), [inputs, outputs], stage.kernel, config)?;
                block(Some(ConvNorm { stride, ..conv }), None, None)
            }
            BlockKind::FusedMbConv => {
                let conv = ConvNorm::load(&p.sub("expand"), [inputs, hidden], stage.kernel, config)?;
                let project = ConvNorm::load(&p.sub("project"), [hidden, outputs], 1, config)?;
                let expand = Some(ConvNorm { stride, ..conv });
                block(expand, None, Some(plain(project)))
            }
            BlockKind::MbConv => {
                let expand = match stage.expand_ratio {
                    1 => None,
                    _ => Some(ConvNorm::load(&p.sub("expand"), [inputs, hidden], 1, config)?),
                };
                let squeezed = (inputs / SQUEEZE_DIVISOR).max(1);
                let spatial = Depthwise::load(p, hidden, squeezed, stage, stride, config)?;
                let project = ConvNorm::load(&p.sub("project"), [hidden, outputs], 1, config)?;
                block(expand, Some(spatial), Some(plain(project)))
            }
        })
    }

    fn forward(&self, cx: &Context, x: &Tensor, mode: Mode) -> Result<Tensor> {
        let factors = match mode {
            Mode::Training(pass) if self.residual => {
                let (block, samples) = (self.number, x.dims().first().copied().unwrap_or(0));
                pass.depth_factors(DepthDraw { block, probability: self.skip_probability, samples })
            }
            _ => None,
        };
        let residual = self.residual.then_some(Residual { input: x, factors: factors.as_deref() });
        let hidden = match (&self.expand, &self.project) {
            (Some(only), None) => {
                // SiLU comes before the sum, and the epilogue adds the residual after the activation.
                return only.forward(cx, x, residual, mode);
            }
            (Some(expand), _) => expand.forward(cx, x, None, mode)?,
            (None, _) => x.clone(),
        };
        let hidden = match &self.spatial {
            Some(spatial) => spatial.forward(cx, &hidden, mode)?,
            None => hidden,
        };
        match (&self.project, residual) {
            (Some(project), _) => project.forward(cx, &hidden, residual, mode),
            (None, Some(residual)) => residual.add(cx, hidden),
            (None, None) => Ok(hidden),
        }
    }
}

impl ImageEncoder {
    /// # Errors
    /// `Format` for missing or misshapen weights.
    pub fn load(p: &Params, config: ImageEncoderConfig) -> Result<Self> {
        let stem = ConvNorm::load(&p.sub("stem"), [3, config.stem_channels], STEM_KERNEL, &config)?;
        let mut blocks = Vec::new();
        for (i, stage) in config.stages.iter().enumerate() {
            for layer in 0..stage.layers {
                let p = p.sub("stages").sub(i).sub(layer);
                blocks.push(Block::load(&p, stage, layer == 0, blocks.len(), &config)?);
            }
        }
        let last = config.stages.last().map_or(config.stem_channels, |stage| stage.outputs);
        let head = p.sub("head");
        Ok(ImageEncoder {
            stem: ConvNorm { stride: STEM_STRIDE, ..stem },
            blocks,
            features: ConvNorm::load(&p.sub("features"), [last, config.feature_channels], 1, &config)?,
            head: Linear::load_conv1x1_without_bias(&head, config.feature_channels, config.latent_channels)?,
            head_norm: BatchNorm::load(&head.sub("norm"), config.latent_channels, HEAD_NORM_EPS)?,
            config,
        })
    }

    /// The sizes.
    pub fn config(&self) -> &ImageEncoderConfig {
        &self.config
    }

    /// # Shapes
    /// pixels `[N, H, W, 3]`, normalised -> `[N, H/32, W/32, feature_channels]`
    ///
    /// # Errors
    /// `InvalidArgument` for other shapes; `OutOfMemory`; `Cancelled`.
    pub fn features(&self, cx: &Context, pixels: &Tensor, mode: Mode) -> Result<Tensor> {
        let mut x = self.stem.forward(cx, pixels, None, mode)?;
        for (i, block) in self.blocks.iter().enumerate() {
            let _span = cx.span_of("block", i);
            x = block.forward(cx, &x, mode)?;
        }
        self.features.forward(cx, &x, None, mode)
    }

    /// # Shapes
    /// pixels `[N, H, W, 3]`, normalised -> `[N, h, w, latent_channels]`
    ///
    /// # Errors
    /// As [`ImageEncoder::features`].
    pub fn forward(&self, cx: &Context, pixels: &Tensor, mode: Mode) -> Result<Tensor> {
        let features = self.features(cx, pixels, mode)?;
        let (add, div) = (self.config.output_add, self.config.output_div);
        let output = |head: Tensor| {
            let constant = |value: f32| {
                Tensor::from_slice(&[self.config.latent_channels], &vec![value; self.config.latent_channels])
            };
            affine_channels(cx, head, &constant(1.0 / div)?, &constant(add / div)?)
        };
        if let Mode::Training(pass) = mode {
            let head = self.head.forward(cx, &features)?;
            return output(self.head_norm.forward_training(cx, &head, pass)?);
        }
        let [scale, shift] = self.head_norm.affine(cx)?;
        if autograd::records(cx, &[Some(&features), Some(self.head.weight()), Some(&scale), Some(&shift)]) {
            return output(self.head.forward_scaled(cx, &features, &scale, &shift, Activation::None)?);
        }
        let scale = rescale(cx, scale, Rescale { divisor: div, ..Rescale::default() })?;
        let shift = rescale(cx, shift, Rescale { summand: add, divisor: div, ..Rescale::default() })?;
        self.head.forward_scaled(cx, &features, &scale, &shift, Activation::None)
    }
}
