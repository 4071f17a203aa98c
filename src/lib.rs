//! Draws pictures from text with the Würstchen family of models ([arXiv:2306.00637]), and trains them, on the CPU.
//!
//! Three stages make a picture. The expensive one, which follows the text, works on a very small grid:
//!
//! ```text
//!  "a red apple"
//!       |  text tower (CLIP)
//!       v
//!   c_text [T, 1024] ----------------.
//!       |                            |
//!       v                            v
//!  noise -> Stage C -> latents -> Stage B -> tokens -> Stage A -> pixels
//!           60 steps   12x12x16   8 steps    128x128   once       512x512x3
//!           diffusion  (f42)      tokens     (f4)      VQGAN
//! ```
//!
//! Stage C is a diffusion model of latents 42 times smaller than the picture in each direction, Stage B turns
//! them into the tokens of a VQGAN by predicting all of them again and again, Stage A decodes the tokens. The
//! sizes are the paper's; a model folder brings its own.
//!
//! ```no_run
//! use std::path::Path;
//! use wuerstchen::{GenerateOptions, Model, ModelOptions};
//!
//! fn main() -> wuerstchen::Result<()> {
//!     // Weights are mapped, not read: this takes milliseconds.
//!     let model = Model::open(Path::new("examples/models/emoji-v1"), &ModelOptions::default())?;
//!
//!     // Steps, sizes and guidance start as the model recommends them.
//!     let mut options = GenerateOptions::new(&model)?;
//!     options.add_prompt("a red apple", None)?;
//!     options.set_seed(7)?;
//!
//!     model.generate(&options)?[0].write_png("apple.png")
//! }
//! ```
//!
//! Same model, options and seed give the same bits on the same kind of processor, whatever the number of threads
//! and the neighbours in a batch. Nothing prints, and nothing aborts: what can fail returns an [`Error`].
//!
//! From the top to the bottom; a module knows only those below it:
//!
//! | module | what |
//! |---|---|
//! | [`capi`] | the C ABI, `include/wuerstchen.h` |
//! | [`training`] | [`training::Trainer`]: steps, optimiser, checkpoints, adapters, data |
//! | [`pipeline`] | [`Model`], [`GenerateOptions`], [`Job`]; each stage alone |
//! | [`stages`] | the paper's networks |
//! | [`diffusion`] | schedule, samplers, guidance, token resampling |
//! | [`weights`] | safetensors and configurations; the names of checkpoints |
//! | [`text`] | CLIP's tokenizer |
//! | [`image`] | [`Image`], its files, resizing |
//! | [`nn`] | layers: weights and ops |
//! | [`ops`] | the operations, a folder each |
//! | [`tensor`] | [`Tensor`], the tape of gradients, the random numbers |
//! | [`device`] | memory, threads, matrix products; [`Context`] |
//!
//! # Features
//! `host-memory-guard`, on by default: a global allocator, the system's with a reserve behind it, so that running out
//! of memory is [`Error::OutOfMemory`] also in the crates that parse files and prompts (see [`device::reserve`]).
//! A Rust program with a `#[global_allocator]` of its own must use `default-features = false`; such code then aborts
//! when memory runs out, and there is only a check beforehand that as much as it may need could be had.
//!
//! `mpi`, off by default: several processes train together, as `mpirun` started them (`training::MpiRanks`). Needs an
//! MPI to build with, and libclang.
//!
//! [arXiv:2306.00637]: https://arxiv.org/abs/2306.00637

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
pub mod training;
pub mod weights;

pub use device::{CancelToken, Context, Device};
pub use error::{Error, Result};
pub use image::Image;
pub use pipeline::{
    Choice, GenerateOptions, Job, LogLevel, Model, ModelInfo, ModelOptions, Progress, Residency, Sampler,
    Stage,
};
pub use tensor::{DType, Tensor};
