//! Kernels that were compiled with the library, by the names of their files: none where there was no compiler.

/// Images for the common architectures, each with its file's name.
pub static IMAGES: &[(&str, &[u8])] = &[];
