//! From the folder of a part to its network: config to sizes, names to weights. Nothing here reads a weight.

mod v1;
mod v2;

use std::path::Path;

use crate::error::{Error, Result};
use crate::nn::Params;
use crate::ops::activation::Activation;
use crate::stages::text_encoder::{TextEncoder, TextEncoderConfig};
use crate::stages::unet::LevelConfig;
use crate::text::{SpecialIds, Tokenizer};
use crate::weights::config::{self, HiddenAct};
use crate::weights::{Key, Renamed, STEMS, Weights, v1 as names};

pub use v1::{ImagePart, image_encoder, stage_a, stage_b, stage_c};
pub use v2::{decoder, prior, scheduler, vq_model};

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

/// Opens the weights in `folder` and loads a network that has a place for all of them.
fn part<T, K: Into<Key>>(
    folder: &Path,
    rename: impl Fn(&str) -> K + Send + Sync,
    load: impl FnOnce(&Params) -> Result<T>,
) -> Result<Part<T>> {
    let weights = Weights::open(folder, STEMS)?;
    let source = Renamed::new(&weights, rename);
    let network = load(&Params::new(&source))?;
    source.expect_all_used()?;
    drop(source);
    Ok(Part { network, weights })
}

/// The levels of a U-Net.
fn levels(read: &config::UNetConfig) -> Vec<LevelConfig> {
    let level = |i: usize| LevelConfig {
        letters: read.level_config[i].clone(),
        repeats: read.blocks[i],
        channels: read.c_hidden[i],
        heads: read.nhead[i].unwrap_or(1),
    };
    (0..read.c_hidden.len()).map(level).collect()
}

/// The number of blocks of each level on the way up, where the deepest comes first.
fn blocks_up(levels: &[LevelConfig]) -> Vec<usize> {
    levels.iter().rev().map(|l| l.letters.len() * l.repeats).collect()
}

/// Where a text tower lies, and how prompts are given to it.
pub(super) struct TextSource<'a> {
    /// The tower's folder.
    pub tower: &'a Path,
    /// The tokenizer's folder.
    pub tokenizer: &'a Path,
    /// Tokens per prompt, padding included; without it as many as the tower has positions.
    pub length: Option<usize>,
    /// The file and field that say so, for errors.
    pub length_place: &'a dyn Fn() -> String,
    /// Whether padding is masked as keys.
    pub mask_padding: bool,
}

/// The text tower and the tokenizer of a v1 model folder.
pub(super) fn text(root: &Path, index: &config::ModelIndex) -> Result<TextPart> {
    text_from(&TextSource {
        tower: &root.join("text_encoder"),
        tokenizer: &root.join("tokenizer"),
        length: index.text_length,
        length_place: &|| format!("{}: text_length", root.join(config::ModelIndex::FILE).display()),
        mask_padding: index.text_attention_mask,
    })
}

/// A text tower with its tokenizer.
///
/// # Errors
/// `Io` and `Format`, naming the file and the field or tensor; `Unsupported` for another kind of tower.
pub(super) fn text_from(source: &TextSource) -> Result<TextPart> {
    let tower = text_encoder(source.tower)?;
    let max_length = tower.network.config().max_length;
    let length = source.length.unwrap_or(max_length);
    if length > max_length {
        return Err(Error::format((source.length_place)(), format!("at most {max_length}"), length));
    }
    let read = config::TextEncoderConfig::read(source.tower)?;
    let id = |id: usize| u32::try_from(id).ok();
    let ids =
        SpecialIds { bos: id(read.bos_token_id), eos: id(read.eos_token_id), pad: id(read.pad_token_id) };
    let tokenizer = Tokenizer::open_with(source.tokenizer, ids)?;
    let vocabulary = tower.network.config().vocabulary;
    if tokenizer.largest_id() as usize >= vocabulary {
        let tower = source.tower.file_name().unwrap_or_default().display();
        let expected = format!("ids below {vocabulary}, as {tower}: vocab_size says");
        return Err(Error::format(tokenizer.path().display().to_string(), expected, tokenizer.largest_id()));
    }
    Ok(TextPart { tower, tokenizer, length, mask_padding: source.mask_padding })
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
    let weights = Weights::open(folder, STEMS)?;
    // Files written before transformers 5, and all with a projection.
    const PREFIX: &str = "text_model.";
    let prefixed = weights.has(&format!("{PREFIX}{}", names::text_encoder("tokens.weight")));
    let prefix = if prefixed { PREFIX } else { "" };
    let source = Renamed::new(&weights, |name| format!("{prefix}{}", names::text_encoder(name)));
    let network = TextEncoder::load(&Params::new(&source), sizes)?;
    drop(source);
    Ok(Part { network, weights })
}
