//! Training: one step per stage, the optimiser, checkpoints, data.
//!
//! A [`Trainer`] takes a [`Model`](crate::Model) and changes copies of one stage's weights, step by step. The networks
//! are the same code that draws pictures; a [tape](crate::tensor::autograd) records what they do.
//!
//! | stage | learns | from |
//! |---|---|---|
//! | (pair) | which text belongs to which picture ([`objectives::contrast`]) | pictures, texts |
//! | A | pictures after its quantiser ([`objectives::stage_a`]) | pictures |
//! | B | tokens from noised tokens ([`objectives::stage_b`]) | tokens of the frozen Stage A, latents, texts |
//! | C | the noise in latents ([`objectives::stage_c`]) | latents of the frozen image encoder, texts |

mod adapter;
mod average;
mod checkpoint;
mod create;
#[cfg(test)]
mod cuda_tests;
pub mod data;
mod draws;
mod export;
mod feeding;
pub mod objectives;
pub mod optimizer;
mod options;
mod pair;
pub mod parameters;
mod reduction;
mod retrieval;
mod tasks;
mod trainer;

#[cfg(feature = "mpi")]
pub use crate::device::mpi::MpiRanks;
pub use adapter::merge_adapter;
pub use average::Average;
pub use create::create_model;
pub use options::{Adversary, Ema, Goal, Lora, TrainOptions};
pub use retrieval::{Retrieval, RetrievalScore};
pub use tasks::Sample;
pub use trainer::{Progress, TrainMetrics, Trainer};
