//! From the folder of a part to its network: config to sizes, names to weights. Nothing here reads a weight.

use std::path::Path;

use crate::error::{Error, Result};
use crate::image::Normalisation;
use crate::nn::Params;
use crate::ops::activation::Activation;
use crate::stages::image_encoder::{BlockKind, ImageEncoder, ImageEncoderConfig, StageConfig};
use crate::stages::stage_a::{StageA, StageAConfig};
use crate::stages::stage_b::{LevelConfig, StageB, StageBConfig};
use crate::stages::stage_c::{StageC, StageCConfig};
use crate::stages::text_encoder::{TextEncoder, TextEncoderConfig};
use crate::text::{SpecialIds, Tokenizer};
use crate::weights::config::{self, EncoderBlockKind, HiddenAct};
use crate::weights::{Renamed, STEMS, Weights, v1};

/// A network and the mapped file that its weights lie in.
#[derive(Debug)]
pub struct Part<T> {
    /// The network, over views of the file.
    pub network: T,
    /// The file.
    pub weights: Weights,
}

/// The text tower with its tokenizer.
pub(super) struct TextPart {
    pub tower: Part<TextEncoder>,
    pub tokenizer: Tokenizer,
    /// Tokens per prompt, padding included.
    pub length: usize,
    /// Whether padding is masked as keys.
    pub mask_padding: bool,
}

/// The image encoder with what pictures are normalised by.
#[derive(Debug)]
pub struct ImagePart {
    /// The network.
    pub encoder: Part<ImageEncoder>,
    /// How the colours of its input are normalised.
    pub normalisation: Normalisation,
}

fn open(folder: &Path) -> Result<Weights> {
    Weights::open(folder, STEMS)
}

/// The text tower and the tokenizer of a v1 model folder.
pub(super) fn text(root: &Path, index: &config::ModelIndex) -> Result<TextPart> {
    let tower = text_encoder(&root.join("text_encoder"))?;
    let max_length = tower.network.config().max_length;
    let length = index.text_length.unwrap_or(max_length);
    if length > max_length {
        let place = format!("{}: text_length", root.join(config::ModelIndex::FILE).display());
        return Err(Error::format(place, format!("at most {max_length}"), length));
    }
    let read = config::TextEncoderConfig::read(&root.join("text_encoder"))?;
    let id = |id: usize| u32::try_from(id).ok();
    let ids =
        SpecialIds { bos: id(read.bos_token_id), eos: id(read.eos_token_id), pad: id(read.pad_token_id) };
    let tokenizer = Tokenizer::open_with(&root.join("tokenizer"), ids)?;
    let vocabulary = tower.network.config().vocabulary;
    if tokenizer.largest_id() as usize >= vocabulary {
        let expected = format!("ids below {vocabulary}, as text_encoder: vocab_size says");
        return Err(Error::format(tokenizer.path().display().to_string(), expected, tokenizer.largest_id()));
    }
    Ok(TextPart { tower, tokenizer, length, mask_padding: index.text_attention_mask })
}

/// A CLIP text tower, as transformers saves it.
///
/// # Errors
/// `Io` and `Format`, naming the file and the field or tensor.
pub fn text_encoder(folder: &Path) -> Result<Part<TextEncoder>> {
    let read = config::TextEncoderConfig::read(folder)?;
    let sizes = TextEncoderConfig {
        vocabulary: read.vocab_size,
        width: read.hidden_size,
        hidden_width: read.intermediate_size,
        layers: read.num_hidden_layers,
        heads: read.num_attention_heads,
        max_length: read.max_position_embeddings,
        activation: match read.hidden_act {
            HiddenAct::Gelu => Activation::Gelu,
            HiddenAct::QuickGelu => Activation::QuickGelu,
        },
        norm_eps: read.layer_norm_eps,
    };
    let weights = open(folder)?;
    // Files written before transformers 5, and all with a projection.
    const PREFIX: &str = "text_model.";
    let prefixed = weights.has(&format!("{PREFIX}{}", v1::text_encoder("tokens.weight")));
    let prefix = if prefixed { PREFIX } else { "" };
    let source = Renamed::new(&weights, |name| format!("{prefix}{}", v1::text_encoder(name)));
    let network = TextEncoder::load(&Params::new(&source), sizes)?;
    drop(source);
    Ok(Part { network, weights })
}

/// The paper's Stage A.
///
/// # Errors
/// `Io` and `Format`, naming the file and the field or tensor.
pub fn stage_a(folder: &Path) -> Result<Part<StageA>> {
    let read = config::StageAConfig::read(folder)?;
    let sizes = StageAConfig {
        levels: read.levels,
        bottleneck_blocks: read.bottleneck_blocks,
        channels: read.c_hidden,
        latent_channels: read.c_latent,
        codebook_size: read.codebook_size,
        scale_factor: read.scale_factor,
    };
    let weights = open(folder)?;
    let source = Renamed::new(&weights, |name| v1::stage_a(name, sizes.levels));
    let network = StageA::load(&Params::new(&source), sizes)?;
    source.expect_all_used()?;
    drop(source);
    Ok(Part { network, weights })
}

/// The paper's Stage B.
///
/// # Errors
/// `Io` and `Format`, naming the file and the field or tensor.
pub fn stage_b(folder: &Path) -> Result<Part<StageB>> {
    let read = config::StageBConfig::read(folder)?;
    let levels: Vec<LevelConfig> = (0..read.c_hidden.len())
        .map(|i| LevelConfig {
            letters: read.level_config[i].clone(),
            repeats: read.blocks[i],
            channels: read.c_hidden[i],
            heads: read.nhead[i].unwrap_or(1),
        })
        .collect();
    // On the way up the deepest level comes first.
    let blocks_up: Vec<usize> = levels.iter().rev().map(|l| l.letters.len() * l.repeats).collect();
    let sizes = StageBConfig {
        embedding_width: read.c_in,
        codebook_size: read.num_labels,
        time_width: read.c_r,
        patch_size: read.patch_size,
        condition_width: read.c_cond,
        latent_channels: read.effnet_embd,
        text_width: read.byt5_embd,
        kernel: read.kernel_size,
        self_attention: read.self_attn,
        levels,
    };
    let weights = open(folder)?;
    let source = Renamed::new(&weights, |name| v1::stage_b(name, &blocks_up));
    let network = StageB::load(&Params::new(&source), sizes)?;
    source.expect_all_used()?;
    drop(source);
    Ok(Part { network, weights })
}

/// The paper's Stage C.
///
/// # Errors
/// `Io` and `Format`, naming the file and the field or tensor.
pub fn stage_c(folder: &Path) -> Result<Part<StageC>> {
    let read = config::StageCConfig::read(folder)?;
    let sizes = StageCConfig {
        latent_channels: read.c_in,
        channels: read.c,
        text_width: read.c_cond,
        time_width: read.c_r,
        depth: read.depth,
        heads: read.nhead,
    };
    let weights = open(folder)?;
    let source = Renamed::new(&weights, v1::stage_c);
    let network = StageC::load(&Params::new(&source), sizes)?;
    source.expect_all_used()?;
    drop(source);
    Ok(Part { network, weights })
}

/// The paper's image encoder.
///
/// # Errors
/// `Io` and `Format`, naming the file and the field or tensor.
pub fn image_encoder(folder: &Path) -> Result<ImagePart> {
    let read = config::ImageEncoderConfig::read(folder)?;
    let normalisation = Normalisation { mean: read.mean, std: read.std };
    let sizes = image_encoder_sizes(&read);
    let kinds: Vec<_> = sizes
        .stages
        .iter()
        .map(|s| v1::EncoderStage { fused: s.kind == BlockKind::FusedMbConv, expands: s.expand_ratio != 1 })
        .collect();
    let weights = open(folder)?;
    let source = Renamed::new(&weights, |name| v1::image_encoder(name, &kinds));
    let network = ImageEncoder::load(&Params::new(&source), sizes)?;
    source.expect_all_used()?;
    drop(source);
    Ok(ImagePart { encoder: Part { network, weights }, normalisation })
}

fn image_encoder_sizes(read: &config::ImageEncoderConfig) -> ImageEncoderConfig {
    let stage = |block: &config::EncoderBlock| StageConfig {
        kind: match block.kind {
            EncoderBlockKind::FusedMbConv => BlockKind::FusedMbConv,
            EncoderBlockKind::MbConv => BlockKind::MbConv,
        },
        expand_ratio: block.expand_ratio,
        kernel: block.kernel,
        stride: block.stride,
        inputs: block.in_channels,
        outputs: block.out_channels,
        layers: block.layers,
    };
    ImageEncoderConfig {
        stem_channels: read.stem_channels,
        stages: read.blocks.iter().map(stage).collect(),
        feature_channels: read.last_channel,
        latent_channels: read.c_latent,
        norm_eps: read.norm_eps,
        output_add: read.output_add,
        output_div: read.output_div,
    }
}
