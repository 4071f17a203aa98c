//! Which library this is.

use std::ffi::c_char;

const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "\0");

/// The version of the library that runs, "major.minor.patch"; compare with WST_VERSION, which was compiled in.
///
/// Owner: static text, never freed.
/// Threads: any.
/// Errors: none.
#[unsafe(no_mangle)]
pub extern "C" fn wst_version() -> *const c_char {
    VERSION.as_ptr().cast()
}
