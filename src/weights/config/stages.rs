//! The constructor arguments of the networks, with the reference's defaults: the three stages of the paper, and
//! v2's, which are Stage A and C by other names and a U-Net in the place of Stage B.

use std::ops::RangeInclusive;
use std::path::Path;

use super::fields::{Fields, count_in};
use super::{CONFIG_FILE, DEPTH_MAX, LEVELS_MAX, VOCABULARY_MAX, WIDTH_MAX};
use crate::error::{Error, Result};

/// The largest convolution kernel.
const KERNEL_MAX: usize = 31;

/// The largest pixel-unshuffle factor.
const PATCH_MAX: usize = 16;

/// The narrowest timestep embedding: its frequencies are spaced by 1 / (c_r / 2 - 1).
const C_R_MIN: usize = 4;

/// The most layers of a discriminator: each halves the picture.
const DISCRIMINATOR_DEPTH_MAX: usize = 16;

/// The largest side of a latent picture.
const LATENT_MAX: usize = 4096;

const WIDTHS: RangeInclusive<usize> = 1..=WIDTH_MAX;

/// Pixels that v2's Stage A folds per side, and colours: its config names them, its networks have no other.
const PIXEL_FOLD: usize = 2;
const COLOURS: usize = 3;

/// Stage A: the VQGAN (`VQModel`, in v2 `PaellaVQModel`).
#[derive(Debug, Clone, PartialEq)]
pub struct StageAConfig {
    /// Halvings of the picture, the pixel-unshuffle included.
    pub levels: usize,
    /// Residual blocks of the decoder's deepest level.
    pub bottleneck_blocks: usize,
    /// Channels of the deepest level; each level above has half of them.
    pub c_hidden: usize,
    /// Channels of a code.
    pub c_latent: usize,
    /// How many codes there are.
    pub codebook_size: usize,
    /// What latents are divided by outside of Stage A.
    pub scale_factor: f32,
}

impl StageAConfig {
    /// Reads `folder/config.json`.
    ///
    /// # Errors
    /// `Io`; `Format`, naming the field.
    pub fn read(folder: &Path) -> Result<Self> {
        let fields = Fields::read(&folder.join(CONFIG_FILE))?;
        fields.expect_class("VQModel")?;
        Self::from_fields(&fields, ["c_hidden", "c_latent", "codebook_size"])
    }

    /// Reads `folder/config.json` of v2's Stage A.
    ///
    /// # Errors
    /// `Io`; `Format`, naming the field.
    pub fn read_v2(folder: &Path) -> Result<Self> {
        let fields = Fields::read(&folder.join(CONFIG_FILE))?;
        fields.expect_class("PaellaVQModel")?;
        fields.expect_count("in_channels", COLOURS)?;
        fields.expect_count("out_channels", COLOURS)?;
        fields.expect_count("up_down_scale_factor", PIXEL_FOLD)?;
        Self::from_fields(&fields, ["embed_dim", "latent_channels", "num_vq_embeddings"])
    }

    fn from_fields(fields: &Fields, [c_hidden, c_latent, codebook_size]: [&str; 3]) -> Result<Self> {
        let config = StageAConfig {
            levels: fields.count("levels", Some(2), 1..=LEVELS_MAX)?,
            bottleneck_blocks: fields.count("bottleneck_blocks", Some(12), 1..=DEPTH_MAX)?,
            c_hidden: fields.count(c_hidden, Some(384), WIDTHS)?,
            c_latent: fields.count(c_latent, Some(4), WIDTHS)?,
            codebook_size: fields.count(codebook_size, Some(8192), 1..=VOCABULARY_MAX)?,
            scale_factor: fields.number("scale_factor", 0.3764, 1e-6..=1e6)? as f32,
        };
        let halvings = 1 << (config.levels - 1);
        if !config.c_hidden.is_multiple_of(halvings) {
            let expected = format!("a multiple of {halvings} (2 to the power of levels - 1)");
            return Err(fields.clash(c_hidden, expected, config.c_hidden));
        }
        Ok(config)
    }
}

/// What Stage A was trained against (`Discriminator`).
#[derive(Debug, Clone, PartialEq)]
pub struct DiscriminatorConfig {
    /// Channels of a picture.
    pub c_in: usize,
    /// Length of the condition; 0 for none.
    pub c_cond: usize,
    /// Channels of the last layers.
    pub c_hidden: usize,
    /// Layers of stride 2.
    pub depth: usize,
}

impl DiscriminatorConfig {
    /// Reads `folder/config.json`.
    ///
    /// # Errors
    /// `Io`; `Format`, naming the field.
    pub fn read(folder: &Path) -> Result<Self> {
        let fields = Fields::read(&folder.join(CONFIG_FILE))?;
        fields.expect_class("Discriminator")?;
        Ok(DiscriminatorConfig {
            c_in: fields.count("c_in", Some(COLOURS), WIDTHS)?,
            c_cond: fields.count("c_cond", Some(0), 0..=WIDTH_MAX)?,
            c_hidden: fields.count("c_hidden", Some(512), WIDTHS)?,
            depth: fields.count("depth", Some(6), 1..=DISCRIMINATOR_DEPTH_MAX)?,
        })
    }
}

/// What the U-Nets of Stage B and of v2's decoder have in common. The lists have one element per level.
#[derive(Debug, Clone, PartialEq)]
pub struct UNetConfig {
    /// Width of what goes in: a token's embedding or a latent.
    pub c_in: usize,
    /// Width of what comes out; always `c_in`.
    pub c_out: usize,
    /// Width of the timestep embedding.
    pub c_r: usize,
    /// The pixel-unshuffle factor.
    pub patch_size: usize,
    /// Width of the condition.
    pub c_cond: usize,
    /// Width of each level.
    pub c_hidden: Vec<usize>,
    /// Attention heads of each level; none where it has no attention.
    pub nhead: Vec<Option<usize>>,
    /// How often each level's sequence of blocks is repeated.
    pub blocks: Vec<usize>,
    /// The blocks of each level: `C`, `T`, `A`, in Stage B also `F`.
    pub level_config: Vec<String>,
    /// Channels of the image latents.
    pub effnet_embd: usize,
    /// Kernel of the depthwise convolutions.
    pub kernel_size: usize,
    /// Dropout of each level, in training.
    pub dropout: Vec<f32>,
}

/// The defaults of a [`UNetConfig`], where the two networks differ.
struct UNetDefaults {
    c_in: usize,
    c_hidden: &'static [usize],
    nhead: &'static [Option<usize>],
    blocks: &'static [usize],
    level_config: &'static [&'static str],
    /// The blocks that a level may have.
    letters: &'static str,
}

impl UNetConfig {
    fn from_fields(fields: &Fields, defaults: &UNetDefaults) -> Result<Self> {
        let counts = |name, range: RangeInclusive<usize>, default: &[usize]| {
            let expected = format!("a number from {} to {}", range.start(), range.end());
            let list = fields.list(name, &expected, LEVELS_MAX, |value| count_in(value, &range))?;
            Ok::<_, Error>(list.unwrap_or_else(|| default.to_vec()))
        };
        let c_hidden = counts("c_hidden", WIDTHS, defaults.c_hidden)?;
        let nhead =
            fields.list("nhead", "a number of heads, or -1 for no attention", LEVELS_MAX, |value| {
                if value.as_i64() == Some(-1) { Some(None) } else { count_in(value, &WIDTHS).map(Some) }
            })?;
        let letters = defaults.letters;
        let expected = format!("a text of the letters {}", enumerated(letters));
        let level_config = fields.list("level_config", &expected, LEVELS_MAX, |value| {
            let text = value.as_str().filter(|text| (1..=LEVELS_MAX).contains(&text.len()))?;
            text.chars().all(|c| letters.contains(c)).then(|| text.to_owned())
        })?;
        let config = UNetConfig {
            c_in: fields.count("c_in", Some(defaults.c_in), WIDTHS)?,
            c_out: fields.count("c_out", Some(defaults.c_in), WIDTHS)?,
            c_r: fields.count("c_r", Some(64), C_R_MIN..=WIDTH_MAX)?,
            patch_size: fields.count("patch_size", Some(2), 1..=PATCH_MAX)?,
            c_cond: fields.count("c_cond", Some(1024), WIDTHS)?,
            nhead: nhead.unwrap_or_else(|| defaults.nhead.to_vec()),
            blocks: counts("blocks", 1..=DEPTH_MAX, defaults.blocks)?,
            level_config: level_config
                .unwrap_or_else(|| defaults.level_config.iter().map(|&level| level.to_owned()).collect()),
            effnet_embd: fields.count("effnet_embd", Some(16), WIDTHS)?,
            kernel_size: kernel(fields)?,
            dropout: dropouts(fields, c_hidden.len())?,
            c_hidden,
        };
        config.check_levels(fields)?;
        Ok(config)
    }

    fn check_levels(&self, fields: &Fields) -> Result<()> {
        let levels = self.c_hidden.len();
        if levels == 0 {
            return Err(fields.error("c_hidden", "at least one level"));
        }
        self.expect_per_level(fields, "nhead", self.nhead.len())?;
        self.expect_per_level(fields, "blocks", self.blocks.len())?;
        self.expect_per_level(fields, "level_config", self.level_config.len())?;
        self.expect_per_level(fields, "dropout", self.dropout.len())?;
        if self.c_out != self.c_in {
            return Err(fields.clash("c_out", format!("{}, as c_in", self.c_in), self.c_out));
        }
        for level in 0..levels {
            if !self.level_config[level].contains('A') {
                continue;
            }
            let width = self.c_hidden[level];
            let expected = format!("a divisor of {width}, the width of level {level}, which has attention");
            match self.nhead[level] {
                Some(heads) if width.is_multiple_of(heads) => {}
                heads => return Err(fields.clash("nhead", expected, heads.map_or(-1, |n| n as i64))),
            }
        }
        Ok(())
    }

    fn expect_per_level(&self, fields: &Fields, name: &str, length: usize) -> Result<()> {
        let levels = self.c_hidden.len();
        if length != levels {
            return Err(fields.clash(name, format!("{levels} elements, as c_hidden has"), length));
        }
        Ok(())
    }
}

/// Stage B: the token predictor (`Paella`).
#[derive(Debug, Clone, PartialEq)]
pub struct StageBConfig {
    /// The U-Net; `c_in` is the width of a token's embedding.
    pub unet: UNetConfig,
    /// How many tokens there are: Stage A's codebook size.
    pub num_labels: usize,
    /// Width of the text embedding.
    pub byt5_embd: usize,
    /// Whether attention sees the picture's own tokens too.
    pub self_attn: bool,
}

impl StageBConfig {
    /// Reads `folder/config.json`.
    ///
    /// # Errors
    /// `Io`; `Format`, naming the field.
    pub fn read(folder: &Path) -> Result<Self> {
        const DEFAULTS: UNetDefaults = UNetDefaults {
            c_in: 256,
            c_hidden: &[640, 1280, 1280],
            nhead: &[None, Some(16), Some(16)],
            blocks: &[4, 12, 4],
            level_config: &["CT", "CTA", "CTA"],
            letters: "CTAF",
        };
        let fields = Fields::read(&folder.join(CONFIG_FILE))?;
        fields.expect_class("Paella")?;
        Ok(StageBConfig {
            unet: UNetConfig::from_fields(&fields, &DEFAULTS)?,
            num_labels: fields.count("num_labels", Some(8192), 1..=VOCABULARY_MAX)?,
            byt5_embd: fields.count("byt5_embd", Some(1536), WIDTHS)?,
            self_attn: fields.flag("self_attn", true)?,
        })
    }
}

/// The decoder of v2, in the place of Stage B (`WuerstchenDiffNeXt`).
#[derive(Debug, Clone, PartialEq)]
pub struct DiffNeXtConfig {
    /// The U-Net; `c_in` are the channels of Stage A's latents.
    pub unet: UNetConfig,
    /// Whether the image latents join each level.
    pub inject_effnet: Vec<bool>,
    /// Width of the text embedding.
    pub clip_embd: usize,
}

impl DiffNeXtConfig {
    /// Reads `folder/config.json`.
    ///
    /// # Errors
    /// `Io`; `Format`, naming the field.
    pub fn read(folder: &Path) -> Result<Self> {
        const DEFAULTS: UNetDefaults = UNetDefaults {
            c_in: 4,
            c_hidden: &[320, 640, 1280, 1280],
            nhead: &[None, Some(10), Some(20), Some(20)],
            blocks: &[4, 4, 14, 4],
            level_config: &["CT", "CTA", "CTA", "CTA"],
            letters: "CTA",
        };
        const INJECTS: [bool; 4] = [false, true, true, true];
        let fields = Fields::read(&folder.join(CONFIG_FILE))?;
        fields.expect_class("WuerstchenDiffNeXt")?;
        let injects = fields.list("inject_effnet", "true or false", LEVELS_MAX, |value| value.as_bool())?;
        let config = DiffNeXtConfig {
            unet: UNetConfig::from_fields(&fields, &DEFAULTS)?,
            inject_effnet: injects.unwrap_or_else(|| INJECTS.to_vec()),
            clip_embd: fields.count("clip_embd", Some(1024), WIDTHS)?,
        };
        config.unet.expect_per_level(&fields, "inject_effnet", config.inject_effnet.len())?;
        Ok(config)
    }
}

/// Letters as a sentence names them: C, T and A.
fn enumerated(letters: &str) -> String {
    let names: Vec<String> = letters.chars().map(String::from).collect();
    match names.split_last() {
        Some((last, first)) if !first.is_empty() => format!("{} and {last}", first.join(", ")),
        _ => letters.to_owned(),
    }
}

fn kernel(fields: &Fields) -> Result<usize> {
    let kernel = fields.count("kernel_size", Some(3), 1..=KERNEL_MAX)?;
    if kernel % 2 == 0 { Err(fields.error("kernel_size", "an odd number")) } else { Ok(kernel) }
}

fn dropouts(fields: &Fields, levels: usize) -> Result<Vec<f32>> {
    // A list has one value per level, a single number is every level's.
    if let Ok(one) = fields.number("dropout", 0.1, 0.0..=1.0) {
        return Ok(vec![one as f32; levels]);
    }
    let list = fields.list("dropout", "a number from 0 to 1", LEVELS_MAX, |value| {
        value.as_f64().filter(|p| (0.0..=1.0).contains(p)).map(|p| p as f32)
    })?;
    Ok(list.unwrap_or_default())
}

/// Stage C: the text-conditional diffusion model (`Prior`, in v2 `WuerstchenPrior`).
#[derive(Debug, Clone, PartialEq)]
pub struct StageCConfig {
    /// Channels of the image latents.
    pub c_in: usize,
    /// Width.
    pub c: usize,
    /// Width of the text embedding.
    pub c_cond: usize,
    /// Width of the timestep embedding.
    pub c_r: usize,
    /// How many groups of three blocks.
    pub depth: usize,
    /// Attention heads.
    pub nhead: usize,
    /// Height and width of the latents that the model was trained on, in v1. The network does not use it.
    pub latent_size: [usize; 2],
    /// Dropout, in training.
    pub dropout: f32,
}

impl StageCConfig {
    /// Reads `folder/config.json`.
    ///
    /// # Errors
    /// `Io`; `Format`, naming the field.
    pub fn read(folder: &Path) -> Result<Self> {
        Self::read_class(folder, "Prior")
    }

    /// Reads `folder/config.json` of v2's Stage C.
    ///
    /// # Errors
    /// `Io`; `Format`, naming the field.
    pub fn read_v2(folder: &Path) -> Result<Self> {
        Self::read_class(folder, "WuerstchenPrior")
    }

    fn read_class(folder: &Path, class: &str) -> Result<Self> {
        let fields = Fields::read(&folder.join(CONFIG_FILE))?;
        fields.expect_class(class)?;
        let size = fields.list("latent_size", &format!("a number from 1 to {LATENT_MAX}"), 2, |value| {
            count_in(value, &(1..=LATENT_MAX))
        })?;
        let config = StageCConfig {
            c_in: fields.count("c_in", Some(16), WIDTHS)?,
            c: fields.count("c", Some(1280), WIDTHS)?,
            c_cond: fields.count("c_cond", Some(1024), WIDTHS)?,
            c_r: fields.count("c_r", Some(64), C_R_MIN..=WIDTH_MAX)?,
            depth: fields.count("depth", Some(16), 1..=DEPTH_MAX)?,
            nhead: fields.count("nhead", Some(16), WIDTHS)?,
            latent_size: size
                .unwrap_or_else(|| vec![12, 12])
                .try_into()
                .map_err(|_| fields.error("latent_size", "two numbers"))?,
            dropout: fields.number("dropout", 0.1, 0.0..=1.0)? as f32,
        };
        if !config.c.is_multiple_of(config.nhead) {
            return Err(fields.clash("nhead", format!("a divisor of c, {}", config.c), config.nhead));
        }
        Ok(config)
    }
}
