//! The networks and walks against the reference, once more on a GPU, in f32: the same tests as on the CPU.
//! Paths, so that what they share is found where it lies.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::duplicate_mod)]

#[path = "diffnext.rs"]
mod diffnext;
#[path = "parity_networks.rs"]
mod parity_networks;
#[path = "parity_sampling.rs"]
mod parity_sampling;
#[path = "parity_v2.rs"]
mod parity_v2;
#[path = "v2_latents.rs"]
mod v2_latents;
