//! Weights and configurations from files: safetensors, mapped and never copied, and the model folder.
//!
//! The only code that knows the names and axis orders of checkpoints.

mod archive;
pub mod config;
mod file;
pub mod lora;
pub mod lpips;
mod names;
pub mod v1;
pub mod v2;
mod write;

pub use archive::{STEMS, Weights};
pub use file::WeightFile;
pub use names::{Key, Renamed};
pub use write::{stored_as, write_safetensors};
