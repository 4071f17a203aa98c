//! The configuration of every part of a model folder, checked number by number.

mod encoders;
mod fields;
mod index;
mod scheduler;
mod stages;

pub use encoders::{EncoderBlock, EncoderBlockKind, HiddenAct, ImageEncoderConfig, TextEncoderConfig};
pub use index::{GenerationDefaults, ModelIndex, Pipeline, V2Settings};
pub use scheduler::SchedulerConfig;
pub use stages::{DiffNeXtConfig, DiscriminatorConfig, StageAConfig, StageBConfig, StageCConfig, UNetConfig};

/// The file that describes a part of a model.
pub const CONFIG_FILE: &str = "config.json";

/// The widest layer that a configuration may ask for.
const WIDTH_MAX: usize = 65_536;

/// The most blocks or layers in a row.
const DEPTH_MAX: usize = 1024;

/// The largest vocabulary or codebook.
const VOCABULARY_MAX: usize = 1 << 24;

/// The most levels of a U-Net or VQGAN: each halves the picture.
const LEVELS_MAX: usize = 8;

#[cfg(test)]
mod tests;
