//! Kernels that were compiled with the library, by the names of their files: none where there was no compiler.
//! `build.rs` in this folder makes them.

include!(concat!(env!("OUT_DIR"), "/cuda_images.rs"));
