//! The numerical operations: one folder per op with its definition, checks and tests, and its kernel beside it.

pub mod activation;
pub mod adamw;
pub mod attention;
pub mod batch;
pub mod batch_norm;
#[cfg(test)]
pub(crate) mod check;
pub mod contrast;
pub mod conv2d;
pub mod conv_transpose2d;
pub mod cross_entropy;
pub mod depthwise_conv;
pub mod dropout;
pub mod elementwise;
pub mod embedding;
pub mod fold_norm;
pub mod instance_norm;
pub(crate) mod kernels;
pub mod layer_norm;
pub mod linear;
pub mod mix;
pub mod noise_head;
pub mod pixel_shuffle;
pub mod pool;
pub mod repeat;
pub(crate) mod reduce;
pub mod regression;
pub mod residual_mlp;
pub mod resize;
pub mod response_norm;
pub mod select;
pub(crate) mod standardise;
pub mod straight_through;
pub mod token_choice;
pub mod vector_quantize;
pub mod widen;
