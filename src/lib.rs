//! Runs the Würstchen family of text-to-image models.

pub mod capi;
pub mod device;
pub mod diffusion;
mod error;
mod files;
pub mod image;
pub mod nn;
pub mod ops;
pub mod pipeline;
pub mod stages;
pub mod tensor;
pub mod text;
pub mod weights;

pub use device::{CancelToken, Context, Device};
pub use error::{Error, Result};
pub use image::Image;
pub use pipeline::{
    Choice, GenerateOptions, Job, LogLevel, Model, ModelInfo, ModelOptions, Progress, Residency, Sampler,
    Stage,
};
pub use tensor::{DType, Tensor};
