//! The C ABI: the only `extern "C"` of the library, one file per noun.
//!
//! `build.rs` makes `include/wuerstchen.h` from these files; their doc comments are written for the reader of
//! that header, with three fixed tags (`Owner:`, `Threads:`, `Errors:`). Every function goes through
//! `boundary`, which clears out-parameters, checks pointers, catches panics and makes error objects.
//! Handles are `Arc`s: a call holds the handles that it works on, so that the order of frees is free.
#![allow(non_camel_case_types)]
// What a caller must promise is said once in the header's introduction and by the tags.
#![allow(clippy::missing_safety_doc)]
// The comments are the header's: a shape in brackets is no link.
#![allow(rustdoc::broken_intra_doc_links, rustdoc::private_intra_doc_links)]

mod axes;
mod boundary;
mod hook;
mod host_reduce;
mod lists;

pub mod version;

pub mod error;

pub mod device;

pub mod cancel;

pub mod image;

pub mod tensor;

pub mod model;

pub mod generate;

pub mod job;

pub mod stages;

pub mod train_options;

pub mod samples;

pub mod trainer;

pub mod loader_options;

pub mod batch;

pub mod loader;

pub mod folders;
