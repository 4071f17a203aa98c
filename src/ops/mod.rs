//! ops

pub mod activation;
pub mod attention;
pub mod linear;
