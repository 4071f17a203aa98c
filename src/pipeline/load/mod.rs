//! From the folder of a part to its network: config to sizes, names to weights. Nothing here reads a weight.

mod lpips;
mod v1;
mod v2;

use std::path::Path;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::nn::Params;
use crate::ops::activation::Activation;
use crate::stages::text_encoder::{TextEncoder, TextEncoderConfig};
use crate::stages::unet::LevelConfig;
use crate::text::{SpecialIds, Tokenizer};
use crate::weights::config::{self, HiddenAct};
use crate::weights::{Key, Renamed, STEMS, Weights, v1 as names};

pub use lpips::perceptual;
pub use v1::{
    ImagePart, discriminator, image_encoder, image_encoder_layout, stage_a, stage_a_layout, stage_b,
    stage_b_layout, stage_c, stage_c_layout,
};
pub use v2::{decoder, prior, scheduler, vq_model};

/// A network and the mapped file that its weights lie in.
#[derive(Debug)]
pub struct Part<T> {
    /// The network, over views of the file.
    pub network: T,
    /// The file.
    pub weights: Weights,
    /// What the file calls the weights that layers ask for.
    pub keys: Keys,
}

/// What a part's config.json alone says: the sizes of the network, and what a file calls its weights.
#[derive(Debug)]
pub struct Layout<C> {
    /// The sizes.
    pub sizes: C,
    /// What the file calls the weights that layers ask for.
    pub keys: Keys,
}

/// From structural names to the keys of a checkpoint.
#[derive(Clone)]
pub struct Keys(Arc<dyn Fn(&str) -> Key + Send + Sync>);

impl Keys {
    /// Those that `rename` gives.
    pub fn new<K: Into<Key>>(rename: impl Fn(&str) -> K + Send + Sync + 'static) -> Self {
        Keys(Arc::new(move |name| rename(name).into()))
    }

    /// Where a checkpoint has the weight `name`.
    pub fn key(&self, name: &str) -> Key {
        (self.0)(name)
    }

    /// Weights, seen under structural names.
    pub fn source<'a>(&self, weights: &'a Weights) -> Renamed<'a> {
        let keys = self.clone();
        Renamed::new(weights, move |name| keys.key(name))
    }
}

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Keys")
    }
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
    rename: impl Fn(&str) -> K + Send + Sync + 'static,
    load: impl FnOnce(&Params) -> Result<T>,
) -> Result<Part<T>> {
    part_of(folder, Keys::new(rename), load)
}

/// As [`part`], under these names.
fn part_of<T>(folder: &Path, keys: Keys, load: impl FnOnce(&Params) -> Result<T>) -> Result<Part<T>> {
    let weights = Weights::open(folder, STEMS)?;
    let source = keys.source(&weights);
    let network = load(&Params::new(&source))?;
    source.expect_all_used()?;
    drop(source);
    Ok(Part { network, weights, keys })
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

/// The text tower and the tokenizer of a v1 model folder. The index says how long prompts are, and whether padding is
/// masked.
pub(super) fn text_v1(root: &Path, index: &config::ModelIndex) -> Result<TextPart> {
    let part = text_part(&root.join("text_encoder"), &root.join("tokenizer"))?;
    let most = part.length;
    let length = index.text_length.unwrap_or(most);
    if length > most {
        let place = format!("{}: text_length", root.join(config::ModelIndex::FILE).display());
        return Err(Error::format(place, format!("at most {most}"), length));
    }
    Ok(TextPart { length, mask_padding: index.text_attention_mask, ..part })
}

/// A text tower and the tokenizer of v2. The tokenizer says how long prompts are.
pub(super) fn text_v2(tower: &Path, tokenizer: &Path) -> Result<TextPart> {
    let part = text_part(tower, tokenizer)?;
    let most = part.length;
    match part.tokenizer.max_length() {
        Some(length @ 0..2) => {
            let place = format!("{}: model_max_length", tokenizer.display());
            Err(Error::format(place, "at least 2: the marks at the beginning and the end", length))
        }
        length => Ok(TextPart { length: length.map_or(most, |length| length.min(most)), ..part }),
    }
}

/// A text tower with its tokenizer, for prompts as long as the tower has positions.
///
/// # Errors
/// `Io` and `Format`, naming the file and the field or tensor; `Unsupported` for another kind of tower.
fn text_part(tower_folder: &Path, tokenizer_folder: &Path) -> Result<TextPart> {
    let tower = text_encoder(tower_folder)?;
    let read = config::TextEncoderConfig::read(tower_folder)?;
    let id = |id: usize| u32::try_from(id).ok();
    let ids =
        SpecialIds { bos: id(read.bos_token_id), eos: id(read.eos_token_id), pad: id(read.pad_token_id) };
    let tokenizer = Tokenizer::open_with(tokenizer_folder, ids)?;
    let vocabulary = tower.network.config().vocabulary;
    if tokenizer.largest_id() as usize >= vocabulary {
        let tower = tower_folder.file_name().unwrap_or_default().display();
        let expected = format!("ids below {vocabulary}, as {tower}: vocab_size says");
        return Err(Error::format(tokenizer.path().display().to_string(), expected, tokenizer.largest_id()));
    }
    let length = tower.network.config().max_length;
    Ok(TextPart { tower, tokenizer, length, mask_padding: true })
}

/// A CLIP text tower, as transformers saves it.
///
/// # Errors
/// `Io` and `Format`, naming the file and the field or tensor.
pub fn text_encoder(folder: &Path) -> Result<Part<TextEncoder>> {
    let sizes = text_encoder_layout(folder)?.sizes;
    let weights = Weights::open(folder, STEMS)?;
    // Files written before transformers 5, and all with a projection.
    const PREFIX: &str = "text_model.";
    let prefixed = weights.has(&format!("{PREFIX}{}", names::text_encoder("tokens.weight")));
    let prefix = if prefixed { PREFIX } else { "" };
    let keys = Keys::new(move |name| format!("{prefix}{}", names::text_encoder(name)));
    let source = keys.source(&weights);
    let network = TextEncoder::load(&Params::new(&source), sizes)?;
    drop(source);
    Ok(Part { network, weights, keys })
}

/// The sizes of a CLIP text tower, and the names that transformers gives its weights today.
///
/// # Errors
/// `Io` and `Format`, naming the file and the field.
pub fn text_encoder_layout(folder: &Path) -> Result<Layout<TextEncoderConfig>> {
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
    Ok(Layout { sizes, keys: Keys::new(names::text_encoder) })
}
