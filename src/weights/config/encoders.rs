//! The two encoders: EfficientNetV2 for pictures, CLIP's text tower for prompts.

use std::path::Path;

use super::fields::Fields;
use super::{CONFIG_FILE, DEPTH_MAX, VOCABULARY_MAX, WIDTH_MAX};
use crate::error::{Error, Result};

/// The mean and standard deviation of ImageNet's pictures, per colour.
const IMAGENET: ([f64; 3], [f64; 3]) = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]);

/// The most stages of an image encoder; each may halve the picture.
const STAGES_MAX: usize = 32;

/// The most channels inside a block, which are its input channels times `expand_ratio`.
const EXPANDED_MAX: usize = 1 << 20;

/// The longest prompt in tokens.
const POSITIONS_MAX: usize = 65_536;

/// How a stage of EfficientNetV2 expands its channels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EncoderBlockKind {
    /// One convolution that expands, one that projects.
    FusedMbConv,
    /// A 1x1 expansion, a depthwise convolution, squeeze-excitation, a projection.
    MbConv,
}

/// One stage of EfficientNetV2: the first of its layers has the stride and changes the channels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EncoderBlock {
    /// What the layers are.
    pub kind: EncoderBlockKind,
    /// Inner channels per input channel.
    pub expand_ratio: usize,
    /// Kernel of the spatial convolution.
    pub kernel: usize,
    /// Stride of the first layer.
    pub stride: usize,
    /// Channels before the stage.
    pub in_channels: usize,
    /// Channels after it.
    pub out_channels: usize,
    /// How many layers.
    pub layers: usize,
}

impl EncoderBlock {
    fn from_fields(fields: &Fields, in_channels: usize) -> Result<Self> {
        let kind = match fields.text("type")? {
            Some("FusedMBConv") => EncoderBlockKind::FusedMbConv,
            Some("MBConv") => EncoderBlockKind::MbConv,
            _ => return Err(fields.error("type", "\"FusedMBConv\" or \"MBConv\"")),
        };
        let block = EncoderBlock {
            kind,
            expand_ratio: fields.count("expand_ratio", None, 1..=64)?,
            kernel: fields.count("kernel", None, 1..=31)?,
            stride: fields.count("stride", None, 1..=4)?,
            in_channels: fields.count("in_channels", None, 1..=WIDTH_MAX)?,
            out_channels: fields.count("out_channels", None, 1..=WIDTH_MAX)?,
            layers: fields.count("layers", None, 1..=DEPTH_MAX)?,
        };
        if block.kernel.is_multiple_of(2) {
            return Err(fields.error("kernel", "an odd number"));
        }
        if block.in_channels != in_channels {
            return Err(fields.error("in_channels", format!("{in_channels}, what the layer before gives")));
        }
        if block.in_channels.max(block.out_channels) * block.expand_ratio > EXPANDED_MAX {
            return Err(fields.error("expand_ratio", format!("at most {EXPANDED_MAX} inner channels")));
        }
        Ok(block)
    }
}

/// The image encoder (`EfficientNetEncoder`).
#[derive(Debug, Clone, PartialEq)]
pub struct ImageEncoderConfig {
    /// Channels after the first convolution.
    pub stem_channels: usize,
    /// The stages between the first and the last convolution.
    pub blocks: Vec<EncoderBlock>,
    /// Channels after the last convolution of the backbone.
    pub last_channel: usize,
    /// Channels of the image latents.
    pub c_latent: usize,
    /// Epsilon of the backbone's batch normalisation (the mapper's is 1e-5).
    pub norm_eps: f32,
    /// How fast running statistics follow, in training.
    pub norm_momentum: f32,
    /// Probability that the last block is skipped, in training.
    pub stochastic_depth_prob: f32,
    /// Added to the mapper's output …
    pub output_add: f32,
    /// … which is then divided by this.
    pub output_div: f32,
    /// Subtracted from each colour of the picture.
    pub mean: [f32; 3],
    /// What each colour is divided by.
    pub std: [f32; 3],
}

impl ImageEncoderConfig {
    /// Reads `folder/config.json`.
    ///
    /// # Errors
    /// `Io`; `Format`, naming the field.
    pub fn read(folder: &Path) -> Result<Self> {
        let fields = Fields::read(&folder.join(CONFIG_FILE))?;
        fields.expect_class("EfficientNetEncoder")?;
        let stem_channels = fields.count("stem_channels", None, 1..=WIDTH_MAX)?;
        let mut blocks: Vec<EncoderBlock> = Vec::new();
        for fields in fields.objects("blocks", STAGES_MAX)? {
            let in_channels = blocks.last().map_or(stem_channels, |block| block.out_channels);
            blocks.push(EncoderBlock::from_fields(&fields, in_channels)?);
        }
        if blocks.is_empty() {
            return Err(fields.error("blocks", "at least one stage"));
        }
        let colours = |name, range, default: [f64; 3]| {
            Ok::<_, Error>(fields.numbers::<3>(name, range)?.unwrap_or(default).map(|n| n as f32))
        };
        Ok(ImageEncoderConfig {
            stem_channels,
            blocks,
            last_channel: fields.count("last_channel", Some(1280), 1..=WIDTH_MAX)?,
            c_latent: fields.count("c_latent", Some(16), 1..=WIDTH_MAX)?,
            norm_eps: fields.number("norm_eps", 1e-3, 1e-12..=1.0)? as f32,
            norm_momentum: fields.number("norm_momentum", 0.1, 0.0..=1.0)? as f32,
            stochastic_depth_prob: fields.number("stochastic_depth_prob", 0.2, 0.0..=1.0)? as f32,
            // The v1 of the paper; the later 1 and 42 stand in the files that want them.
            output_add: fields.number("output_add", 0.0, -1e6..=1e6)? as f32,
            output_div: fields.number("output_div", 1.0, 1e-6..=1e6)? as f32,
            mean: colours("mean", -1e3..=1e3, IMAGENET.0)?,
            std: colours("std", 1e-6..=1e3, IMAGENET.1)?,
        })
    }
}

/// The activation of CLIP's feed-forward layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HiddenAct {
    /// The exact GELU.
    Gelu,
    /// x * sigmoid(1.702 x).
    QuickGelu,
}

/// CLIP's text tower, as transformers describes it.
#[derive(Debug, Clone, PartialEq)]
pub struct TextEncoderConfig {
    /// How many tokens there are.
    pub vocab_size: usize,
    /// Width.
    pub hidden_size: usize,
    /// Width inside the feed-forward layers.
    pub intermediate_size: usize,
    /// Width of the projected pooled output.
    pub projection_dim: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Attention heads.
    pub num_attention_heads: usize,
    /// The longest prompt in tokens.
    pub max_position_embeddings: usize,
    /// Activation of the feed-forward layers.
    pub hidden_act: HiddenAct,
    /// Epsilon of the layer normalisation.
    pub layer_norm_eps: f32,
    /// The token before every prompt.
    pub bos_token_id: usize,
    /// The token after every prompt. 2 in old files, where it means "the largest id".
    pub eos_token_id: usize,
    /// The token that fills prompts up; tokenizers may say otherwise.
    pub pad_token_id: usize,
    /// What the spread of all weights that are made anew is multiplied by.
    pub initializer_factor: f64,
}

impl TextEncoderConfig {
    /// Reads `folder/config.json`: of a text encoder, or of a whole CLIP, whose `text_config` is taken.
    ///
    /// # Errors
    /// `Io`; `Format`, naming the field; `Unsupported` for an activation that Würstchen's encoders do not use.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join(CONFIG_FILE);
        let whole = Fields::read(&path)?;
        let inner = whole.object("text_config")?;
        let fields = inner.as_ref().unwrap_or(&whole);
        let hidden_act = match fields.text("hidden_act")? {
            None | Some("quick_gelu") => HiddenAct::QuickGelu,
            Some("gelu") => HiddenAct::Gelu,
            Some(other) => {
                let what = format!("{}: hidden_act {other:?}", path.display());
                return Err(Error::unsupported(what, "text encoders have gelu or quick_gelu"));
            }
        };
        let id = |name, default| fields.count(name, Some(default), 0..=VOCABULARY_MAX);
        let config = TextEncoderConfig {
            vocab_size: fields.count("vocab_size", Some(49_408), 1..=VOCABULARY_MAX)?,
            hidden_size: fields.count("hidden_size", Some(512), 1..=WIDTH_MAX)?,
            intermediate_size: fields.count("intermediate_size", Some(2048), 1..=WIDTH_MAX * 4)?,
            projection_dim: fields.count("projection_dim", Some(512), 1..=WIDTH_MAX)?,
            num_hidden_layers: fields.count("num_hidden_layers", Some(12), 1..=DEPTH_MAX)?,
            num_attention_heads: fields.count("num_attention_heads", Some(8), 1..=WIDTH_MAX)?,
            max_position_embeddings: fields.count("max_position_embeddings", Some(77), 2..=POSITIONS_MAX)?,
            hidden_act,
            layer_norm_eps: fields.number("layer_norm_eps", 1e-5, 1e-12..=1.0)? as f32,
            bos_token_id: id("bos_token_id", 49_406)?,
            eos_token_id: id("eos_token_id", 49_407)?,
            pad_token_id: id("pad_token_id", 1)?,
            initializer_factor: fields.number("initializer_factor", 1.0, 0.0..=1e3)?,
        };
        if !config.hidden_size.is_multiple_of(config.num_attention_heads) {
            let expected = format!("a divisor of hidden_size, {}", config.hidden_size);
            return Err(fields.clash("num_attention_heads", expected, config.num_attention_heads));
        }
        Ok(config)
    }
}
