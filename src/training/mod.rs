//! Training.
pub mod optimizer;
pub mod parameters;
