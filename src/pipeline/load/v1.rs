//! The parts of a v1 model folder: the paper's networks in this library's own layout.

use std::path::Path;

use super::{Keys, Layout, Part, blocks_up, levels, part_of};
use crate::error::Result;
use crate::image::Normalisation;
use crate::stages::discriminator::{Discriminator, DiscriminatorConfig};
use crate::stages::image_encoder::{BlockKind, ImageEncoder, ImageEncoderConfig, StageConfig};
use crate::stages::stage_a::{StageA, StageAConfig};
use crate::stages::stage_b::{StageB, StageBConfig};
use crate::stages::stage_c::{StageC, StageCConfig};
use crate::weights::config::{self, EncoderBlockKind};
use crate::weights::v1 as names;

/// The image encoder with what pictures are normalised by.
#[derive(Debug)]
pub struct ImagePart {
    /// The network.
    pub encoder: Part<ImageEncoder>,
    /// How the colours of its input are normalised.
    pub normalisation: Normalisation,
}

/// The paper's Stage A.
///
/// # Errors
/// `Io` and `Format`, naming the file and the field or tensor.
pub fn stage_a(folder: &Path) -> Result<Part<StageA>> {
    let Layout { sizes, keys } = stage_a_layout(folder)?;
    part_of(folder, keys, |p| StageA::load(p, sizes))
}

/// What the config.json of the paper's Stage A says.
///
/// # Errors
/// `Io` and `Format`, naming the file and the field.
pub fn stage_a_layout(folder: &Path) -> Result<Layout<StageAConfig>> {
    let sizes = stage_a_sizes(&config::StageAConfig::read(folder)?);
    Ok(Layout { sizes, keys: Keys::new(move |name| names::stage_a(name, sizes.levels)) })
}

pub(super) fn stage_a_sizes(read: &config::StageAConfig) -> StageAConfig {
    StageAConfig {
        levels: read.levels,
        bottleneck_blocks: read.bottleneck_blocks,
        channels: read.c_hidden,
        latent_channels: read.c_latent,
        codebook_size: read.codebook_size,
        scale_factor: read.scale_factor,
    }
}

/// The discriminator that Stage A was trained against.
///
/// # Errors
/// `Io` and `Format`, naming the file and the field or tensor; `InvalidArgument` for sizes that do not go together.
pub fn discriminator(folder: &Path) -> Result<Part<Discriminator>> {
    let read = config::DiscriminatorConfig::read(folder)?;
    let sizes = DiscriminatorConfig {
        inputs: read.c_in,
        condition: read.c_cond,
        channels: read.c_hidden,
        depth: read.depth,
    };
    part_of(folder, Keys::new(names::discriminator), |p| Discriminator::load(p, sizes))
}

/// The paper's Stage B.
///
/// # Errors
/// `Io` and `Format`, naming the file and the field or tensor.
pub fn stage_b(folder: &Path) -> Result<Part<StageB>> {
    let Layout { sizes, keys } = stage_b_layout(folder)?;
    part_of(folder, keys, |p| StageB::load(p, sizes))
}

/// What the config.json of the paper's Stage B says.
///
/// # Errors
/// `Io` and `Format`, naming the file and the field.
pub fn stage_b_layout(folder: &Path) -> Result<Layout<StageBConfig>> {
    let read = config::StageBConfig::read(folder)?;
    let levels = levels(&read.unet);
    let blocks_up = blocks_up(&levels);
    let sizes = StageBConfig {
        embedding_width: read.unet.c_in,
        codebook_size: read.num_labels,
        time_width: read.unet.c_r,
        patch_size: read.unet.patch_size,
        condition_width: read.unet.c_cond,
        latent_channels: read.unet.effnet_embd,
        text_width: read.byt5_embd,
        kernel: read.unet.kernel_size,
        self_attention: read.self_attn,
        levels,
    };
    Ok(Layout { sizes, keys: Keys::new(move |name| names::stage_b(name, &blocks_up)) })
}

/// The paper's Stage C.
///
/// # Errors
/// `Io` and `Format`, naming the file and the field or tensor.
pub fn stage_c(folder: &Path) -> Result<Part<StageC>> {
    let Layout { sizes, keys } = stage_c_layout(folder)?;
    part_of(folder, keys, |p| StageC::load(p, sizes))
}

/// What the config.json of the paper's Stage C says.
///
/// # Errors
/// `Io` and `Format`, naming the file and the field.
pub fn stage_c_layout(folder: &Path) -> Result<Layout<StageCConfig>> {
    let sizes = stage_c_sizes(&config::StageCConfig::read(folder)?);
    Ok(Layout { sizes, keys: Keys::new(names::stage_c) })
}

pub(super) fn stage_c_sizes(read: &config::StageCConfig) -> StageCConfig {
    StageCConfig {
        latent_channels: read.c_in,
        channels: read.c,
        text_width: read.c_cond,
        time_width: read.c_r,
        depth: read.depth,
        heads: read.nhead,
    }
}

/// The paper's image encoder.
///
/// # Errors
/// `Io` and `Format`, naming the file and the field or tensor.
pub fn image_encoder(folder: &Path) -> Result<ImagePart> {
    let read = config::ImageEncoderConfig::read(folder)?;
    let normalisation = Normalisation { mean: read.mean, std: read.std };
    let Layout { sizes, keys } = image_encoder_layout(folder)?;
    let encoder = part_of(folder, keys, |p| ImageEncoder::load(p, sizes))?;
    Ok(ImagePart { encoder, normalisation })
}

/// What the config.json of the paper's image encoder says.
///
/// # Errors
/// `Io` and `Format`, naming the file and the field.
pub fn image_encoder_layout(folder: &Path) -> Result<Layout<ImageEncoderConfig>> {
    let sizes = image_encoder_sizes(&config::ImageEncoderConfig::read(folder)?);
    let kinds: Vec<_> = sizes
        .stages
        .iter()
        .map(|s| names::EncoderStage {
            fused: s.kind == BlockKind::FusedMbConv,
            expands: s.expand_ratio != 1,
        })
        .collect();
    Ok(Layout { sizes, keys: Keys::new(move |name| names::image_encoder(name, &kinds)) })
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
        norm_momentum: read.norm_momentum,
        stochastic_depth: read.stochastic_depth_prob,
        output_add: read.output_add,
        output_div: read.output_div,
    }
}
