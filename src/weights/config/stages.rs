//! The constructor arguments of the three stages, with the reference's defaults.

use std::ops::RangeInclusive;
use std::path::Path;

use super::fields::{Fields, count_in};
use super::{CONFIG_FILE, DEPTH_MAX, LEVELS_MAX, VOCABULARY_MAX, WIDTH_MAX};
use crate::error::Result;

/// The largest convolution kernel.
const KERNEL_MAX: usize = 31;

/// The largest pixel-unshuffle factor.
const PATCH_MAX: usize = 16;

/// The narrowest timestep embedding: its frequencies are spaced by 1 / (c_r / 2 - 1).
const C_R_MIN: usize = 4;

/// The largest side of a latent picture.
const LATENT_MAX: usize = 4096;

const WIDTHS: RangeInclusive<usize> = 1..=WIDTH_MAX;

/// Stage A: the VQGAN (`VQModel`).
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
        let config = StageAConfig {
            levels: fields.count("levels", Some(2), 1..=LEVELS_MAX)?,
            bottleneck_blocks: fields.count("bottleneck_blocks", Some(12), 1..=DEPTH_MAX)?,
            c_hidden: fields.count("c_hidden", Some(384), WIDTHS)?,
            c_latent: fields.count("c_latent", Some(4), WIDTHS)?,
            codebook_size: fields.count("codebook_size", Some(8192), 1..=VOCABULARY_MAX)?,
            scale_factor: fields.number("scale_factor", 0.3764, 1e-6..=1e6)? as f32,
        };
        let halvings = 1 << (config.levels - 1);
        if !config.c_hidden.is_multiple_of(halvings) {
            let expected = format!("a multiple of {halvings} (2 to the power of levels - 1)");
            return Err(fields.clash("c_hidden", expected, config.c_hidden));
        }
        Ok(config)
    }
}

/// Stage B: the token predictor (`Paella`). The lists have one element per level.
#[derive(Debug, Clone, PartialEq)]
pub struct StageBConfig {
    /// Width of a token's embedding.
    pub c_in: usize,
    /// Width before the logits; always `c_in`.
    pub c_out: usize,
    /// How many tokens there are: Stage A's codebook size.
    pub num_labels: usize,
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
    /// The blocks of each level: `C`, `T`, `A` and `F`.
    pub level_config: Vec<String>,
    /// Channels of the image latents.
    pub effnet_embd: usize,
    /// Width of the text embedding.
    pub byt5_embd: usize,
    /// Kernel of the depthwise convolutions.
    pub kernel_size: usize,
    /// Dropout of each level, in training.
    pub dropout: Vec<f32>,
    /// Whether attention sees the picture's own tokens too.
    pub self_attn: bool,
}

impl StageBConfig {
    /// Reads `folder/config.json`.
    ///
    /// # Errors
    /// `Io`; `Format`, naming the field.
    pub fn read(folder: &Path) -> Result<Self> {
        let fields = Fields::read(&folder.join(CONFIG_FILE))?;
        fields.expect_class("Paella")?;
        let counts = |name, range: RangeInclusive<usize>| {
            let expected = format!("a number from {} to {}", range.start(), range.end());
            fields.list(name, &expected, LEVELS_MAX, |value| count_in(value, &range))
        };
        let c_hidden = counts("c_hidden", WIDTHS)?.unwrap_or_else(|| vec![640, 1280, 1280]);
        let nhead =
            fields.list("nhead", "a number of heads, or -1 for no attention", LEVELS_MAX, |value| {
                if value.as_i64() == Some(-1) { Some(None) } else { count_in(value, &WIDTHS).map(Some) }
            })?;
        let level_config = fields.list("level_config", "a text of C, T, A and F", LEVELS_MAX, |value| {
            let text = value.as_str().filter(|text| (1..=LEVELS_MAX).contains(&text.len()))?;
            text.chars().all(|c| "CTAF".contains(c)).then(|| text.to_owned())
        })?;
        let config = StageBConfig {
            c_in: fields.count("c_in", Some(256), WIDTHS)?,
            c_out: fields.count("c_out", Some(256), WIDTHS)?,
            num_labels: fields.count("num_labels", Some(8192), 1..=VOCABULARY_MAX)?,
            c_r: fields.count("c_r", Some(64), C_R_MIN..=WIDTH_MAX)?,
            patch_size: fields.count("patch_size", Some(2), 1..=PATCH_MAX)?,
            c_cond: fields.count("c_cond", Some(1024), WIDTHS)?,
            nhead: nhead.unwrap_or_else(|| vec![None, Some(16), Some(16)]),
            blocks: counts("blocks", 1..=DEPTH_MAX)?.unwrap_or_else(|| vec![4, 12, 4]),
            level_config: level_config.unwrap_or_else(|| ["CT", "CTA", "CTA"].map(str::to_owned).into()),
            effnet_embd: fields.count("effnet_embd", Some(16), WIDTHS)?,
            byt5_embd: fields.count("byt5_embd", Some(1536), WIDTHS)?,
            kernel_size: kernel(&fields)?,
            dropout: dropouts(&fields, c_hidden.len())?,
            self_attn: fields.flag("self_attn", true)?,
            c_hidden,
        };
        config.check_levels(&fields)?;
        Ok(config)
    }

    fn check_levels(&self, fields: &Fields) -> Result<()> {
        let levels = self.c_hidden.len();
        if levels == 0 {
            return Err(fields.error("c_hidden", "at least one level"));
        }
        let lengths = [
            ("nhead", self.nhead.len()),
            ("blocks", self.blocks.len()),
            ("level_config", self.level_config.len()),
            ("dropout", self.dropout.len()),
        ];
        for (name, length) in lengths {
            if length != levels {
                return Err(fields.clash(name, format!("{levels} elements, as c_hidden has"), length));
            }
        }
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

/// Stage C: the text-conditional diffusion model (`Prior`).
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
    /// Height and width of the latents that the model was trained on. The network does not use it.
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
        let fields = Fields::read(&folder.join(CONFIG_FILE))?;
        fields.expect_class("Prior")?;
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
