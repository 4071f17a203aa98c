//! Lists of texts and pictures on their way in.

use std::ffi::c_char;
use std::sync::Arc;

use super::boundary::{handles_in, slice_in, text_in};
use super::image::wst_image;
use crate::error::{Error, Result};
use crate::image::Image;

/// An empty list with room for `count` entries.
pub(super) fn reserved<T>(name: &str, count: usize) -> Result<Vec<T>> {
    let mut list = Vec::new();
    list.try_reserve_exact(count)
        .map_err(|_| Error::out_of_memory(name, count.saturating_mul(size_of::<T>())))?;
    Ok(list)
}

/// `count` texts, at least one.
///
/// # Safety
/// As [`slice_in`]; the entries are NULL or end with a NUL byte.
pub(super) unsafe fn texts_in<'a>(
    name: &str,
    texts: *const *const c_char,
    count: usize,
) -> Result<Vec<&'a str>> {
    if count == 0 {
        return Err(Error::argument("count", "at least 1", 0));
    }
    // SAFETY: as the caller of this function promises.
    let pointers = unsafe { slice_in((name, texts), ("count", count))? };
    let mut texts = reserved(name, count)?;
    for (i, &text) in pointers.iter().enumerate() {
        // SAFETY: as the caller of this function promises.
        texts.push(unsafe { text_in(&format!("{name}[{i}]"), text)? });
    }
    Ok(texts)
}

/// Calls `work` with an array of pictures, at least one.
///
/// # Safety
/// As [`handles_in`].
pub(super) unsafe fn with_images<T>(
    images: *const *const wst_image,
    count: usize,
    work: impl FnOnce(&[&Image]) -> Result<T>,
) -> Result<T> {
    // SAFETY: as the caller of this function promises.
    let kept: Vec<Arc<wst_image>> = unsafe { handles_in("images", images, count)? };
    let mut images = reserved("images", count)?;
    images.extend(kept.iter().map(|image| &image.image));
    work(&images)
}
