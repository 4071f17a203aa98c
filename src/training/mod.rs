//! Training the networks.

pub mod data;
