//! From a prompt to a picture: text -> Stage C -> Stage B -> Stage A -> pixels (paper, Figure 2).

mod job;
mod model;
mod options;

pub use job::Job;
pub use model::{Model, ModelInfo};
pub use options::{Choice, GenerateOptions, LogLevel, ModelOptions, Progress, Residency, Sampler, Stage};
