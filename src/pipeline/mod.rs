//! From a prompt to a picture: text -> Stage C -> Stage B -> Stage A -> pixels (paper, Figure 2).

#[cfg(test)]
mod cuda_tests;
mod defaults;
pub(crate) mod devices;
mod generate;
mod generate_options;
mod geometry;
mod halves;
mod job;
pub mod load;
mod model;
mod options;
mod stage_calls;
mod texts;
mod trainable;
mod walks;

/// What lists of a call (requests, layers, names) take in memory beside its tensors, at worst.
const LISTS_BYTES: usize = 8 << 20;

pub use generate_options::GenerateOptions;
pub use job::Job;
pub use model::{Model, ModelInfo};
pub use options::{Choice, LogFn, LogLevel, ModelOptions, Progress, ProgressFn, Residency, Sampler, Stage};
pub(crate) use trainable::TokenIds;
