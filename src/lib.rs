//! Runs the Würstchen family of text-to-image models.
//!
//! # Features
//! `host-memory-guard`, on by default: a global allocator, the system's with a reserve behind it, so that running out
//! of memory is [`Error::OutOfMemory`] also in the crates that parse files and prompts (see [`device::reserve`]).
//! A Rust program with a `#[global_allocator]` of its own must use `default-features = false`; such code then aborts
//! when memory runs out, and there is only a check beforehand that as much as it may need could be had.

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
