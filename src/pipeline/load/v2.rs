//! The parts of v2, as diffusers saves them.

use std::path::Path;

use super::v1::{stage_a_sizes, stage_c_sizes};
use super::{Part, blocks_up, levels, part};
use crate::diffusion::schedule::CosineSchedule;
use crate::error::Result;
use crate::stages::diffnext::{DiffNeXt, DiffNeXtConfig};
use crate::stages::stage_a::StageA;
use crate::stages::stage_c::StageC;
use crate::weights::config;
use crate::weights::v2 as names;

/// The prior: Stage C.
///
/// # Errors
/// `Io` and `Format`, naming the file and the field or tensor.
pub fn prior(folder: &Path) -> Result<Part<StageC>> {
    let sizes = stage_c_sizes(&config::StageCConfig::read_v2(folder)?);
    part(folder, names::prior, |p| StageC::load(p, sizes))
}

/// The decoder, in the place of Stage B.
///
/// # Errors
/// `Io` and `Format`, naming the file and the field or tensor.
pub fn decoder(folder: &Path) -> Result<Part<DiffNeXt>> {
    let read = config::DiffNeXtConfig::read(folder)?;
    let levels = levels(&read.unet);
    let blocks_up = blocks_up(&levels);
    let sizes = DiffNeXtConfig {
        latent_channels: read.unet.c_in,
        image_channels: read.unet.effnet_embd,
        text_width: read.clip_embd,
        time_width: read.unet.c_r,
        patch_size: read.unet.patch_size,
        condition_width: read.unet.c_cond,
        kernel: read.unet.kernel_size,
        levels,
        injects: read.inject_effnet,
    };
    part(folder, move |name| names::decoder(name, &blocks_up), |p| DiffNeXt::load(p, sizes))
}

/// The VQGAN: Stage A.
///
/// # Errors
/// `Io` and `Format`, naming the file and the field or tensor.
pub fn vq_model(folder: &Path) -> Result<Part<StageA>> {
    let sizes = stage_a_sizes(&config::StageAConfig::read_v2(folder)?);
    part(folder, move |name| names::vq_model(name, sizes.levels), |p| StageA::load(p, sizes))
}

/// The noise schedule of a denoising network.
///
/// # Errors
/// `Io`; `Format`, naming the file and the field.
pub fn scheduler(folder: &Path) -> Result<CosineSchedule> {
    let read = config::SchedulerConfig::read(folder)?;
    Ok(CosineSchedule::new(read.s, read.scaler))
}
