//! The numerical operations: one folder per op with its definition, checks and tests, and its kernel beside it.

#[cfg(test)]
pub(crate) mod check;
pub(crate) mod kernels;
pub mod layer_norm;
