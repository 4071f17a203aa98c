//! Training against the reference, once more on a GPU: the same tests as on the CPU.
//! Paths, so that what they share is found where it lies.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::duplicate_mod)]

#[path = "training_parity.rs"]
mod training_parity;
#[path = "training_run.rs"]
mod training_run;
