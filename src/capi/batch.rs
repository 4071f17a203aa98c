//! Pictures of one size with their captions.

use std::ffi::{CString, c_char};
use std::sync::Arc;

use super::boundary::{Handle, get, release};
use super::error::c_text;
use super::image::wst_image;
use super::lists::reserved;
use crate::device::reserve;
use crate::error::Result;
use crate::training::data::Batch;

/// What the texts of a batch may hold beyond what the loader made.
const TEXTS_BYTES: usize = 16 << 20;

/// Pictures of one size with their captions. Immutable.
pub struct wst_batch {
    _images: Vec<Arc<wst_image>>,
    /// Those of `_images`.
    images: Vec<*const wst_image>,
    captions: Texts,
    keys: Texts,
}

/// Texts as C reads them.
struct Texts {
    _texts: Vec<CString>,
    /// Those of `_texts`.
    pointers: Vec<*const c_char>,
}

impl Handle for wst_batch {}

impl wst_batch {
    pub(super) fn new(batch: Batch) -> Result<Self> {
        reserve::with("a batch", TEXTS_BYTES, || {
            let mut kept: Vec<Arc<wst_image>> = reserved("a batch", batch.images.len())?;
            kept.extend(batch.images.into_iter().map(|image| Arc::new(wst_image::new(image))));
            let mut images = reserved("a batch", kept.len())?;
            images.extend(kept.iter().map(Arc::as_ptr));
            let (captions, keys) = (Texts::new(batch.captions)?, Texts::new(batch.keys)?);
            Ok(wst_batch { _images: kept, images, captions, keys })
        })
    }
}

impl Texts {
    fn new(texts: Vec<String>) -> Result<Self> {
        let mut kept: Vec<CString> = reserved("a batch", texts.len())?;
        kept.extend(texts.into_iter().map(c_text));
        let mut pointers = reserved("a batch", kept.len())?;
        pointers.extend(kept.iter().map(|text| text.as_ptr()));
        Ok(Texts { _texts: kept, pointers })
    }
}

/// How many pictures there are; 0 for NULL.
///
/// Owner: nothing changes hands.
/// Threads: any.
/// Errors: none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_batch_count(batch: *const wst_batch) -> usize {
    // SAFETY: NULL or a live batch, as the header asks.
    unsafe { get(batch, 0, |batch| batch.images.len()) }
}

/// The pictures, as wst_trainer_step takes them. NULL for NULL.
///
/// Owner: the array and the pictures belong to the batch and end with it.
/// Threads: any.
/// Errors: none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_batch_images(batch: *const wst_batch) -> *const *const wst_image {
    // SAFETY: NULL or a live batch, as the header asks.
    unsafe { get(batch, std::ptr::null(), |batch| batch.images.as_ptr()) }
}

/// The caption of each picture, without white space around it, as wst_trainer_step takes them. NULL for NULL.
///
/// Owner: the array and the texts belong to the batch and end with it.
/// Threads: any.
/// Errors: none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_batch_captions(batch: *const wst_batch) -> *const *const c_char {
    // SAFETY: NULL or a live batch, as the header asks.
    unsafe { get(batch, std::ptr::null(), |batch| batch.captions.pointers.as_ptr()) }
}

/// The name of each picture: its path within the folder, or "shard.tar/key". NULL for NULL.
///
/// Owner: the array and the texts belong to the batch and end with it.
/// Threads: any.
/// Errors: none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_batch_keys(batch: *const wst_batch) -> *const *const c_char {
    // SAFETY: NULL or a live batch, as the header asks.
    unsafe { get(batch, std::ptr::null(), |batch| batch.keys.pointers.as_ptr()) }
}

/// Frees a batch. NULL is a no-op.
///
/// Owner: takes the batch from the caller.
/// Threads: any.
/// Errors: none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_batch_free(batch: *mut wst_batch) {
    // SAFETY: NULL or a live batch, as the header asks.
    unsafe { release(batch) }
}
