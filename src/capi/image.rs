//! Pictures.

use std::ffi::c_char;

use super::boundary::{Handle, HandleOut, boundary, get, handle_in, path_in, release};
use super::error::{wst_error, wst_status};
use crate::device::threads::run_apart;
use crate::error::Error;
use crate::image::{Image, MAX_SIDE_PX};

/// A picture: RGB, 8 bits per channel, rows top to bottom. Immutable.
pub struct wst_image {
    pub(super) image: Image,
}

impl wst_image {
    pub(super) fn new(image: Image) -> Self {
        wst_image { image }
    }
}

impl Handle for wst_image {}

/// A picture with a copy of `rgb`: `height` rows of `width` pixels of 3 bytes, `row_stride` bytes from row to
/// row (0: `3 * width`). A side has 1 to 16384 pixels.
///
/// Owner: the caller frees `*out` with wst_image_free.
/// Threads: any.
/// Errors: WST_INVALID_ARGUMENT, WST_OUT_OF_MEMORY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_image_new(
    width: u32,
    height: u32,
    rgb: *const u8,
    row_stride: usize,
    out: *mut *mut wst_image,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks; `rgb` has the bytes that the sizes tell.
    unsafe {
        boundary("wst_image_new", error, HandleOut("out", out), |_| {
            for (name, side) in [("width", width), ("height", height)] {
                if side == 0 || side > MAX_SIDE_PX {
                    return Err(Error::argument(name, format!("1 to {MAX_SIDE_PX} pixels"), side));
                }
            }
            if rgb.is_null() {
                return Err(Error::argument("rgb", "a pointer", "NULL"));
            }
            let row = width as usize * 3;
            let stride = if row_stride == 0 { row } else { row_stride };
            let bytes = stride.checked_mul(height as usize - 1).and_then(|bytes| bytes.checked_add(row));
            let Some(bytes) = bytes.filter(|&bytes| stride >= row && bytes <= isize::MAX as usize) else {
                let expected = format!("0, or at least {row} bytes and a size that memory can address");
                return Err(Error::argument("row_stride", expected, row_stride));
            };
            let rgb = std::slice::from_raw_parts(rgb, bytes);
            Image::from_rgb(width, height, rgb, stride).map(wst_image::new)
        })
    }
}

/// Reads a PNG, JPEG or WebP file.
///
/// Owner: the caller frees `*out` with wst_image_free.
/// Threads: any.
/// Errors: WST_INVALID_ARGUMENT, WST_IO, WST_FORMAT, WST_UNSUPPORTED, WST_OUT_OF_MEMORY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_image_read(
    path: *const c_char,
    out: *mut *mut wst_image,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        boundary("wst_image_read", error, HandleOut("out", out), |_| {
            let path = path_in("path", path)?;
            run_apart(|| Image::read(path)).map(wst_image::new)
        })
    }
}

/// Writes a PNG file, in place of one that is there.
///
/// Owner: nothing changes hands.
/// Threads: any.
/// Errors: WST_INVALID_ARGUMENT, WST_IO, WST_OUT_OF_MEMORY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_image_write_png(
    image: *const wst_image,
    path: *const c_char,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        boundary("wst_image_write_png", error, (), |_| {
            let image = handle_in("image", image)?;
            let path = path_in("path", path)?;
            run_apart(|| image.image.write_png(path))
        })
    }
}

/// Pixels per row; 0 for NULL.
///
/// Owner: nothing changes hands.
/// Threads: any.
/// Errors: none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_image_width(image: *const wst_image) -> u32 {
    // SAFETY: NULL or a live image, as the header asks.
    unsafe { get(image, 0, |image| image.image.width()) }
}

/// Rows; 0 for NULL.
///
/// Owner: nothing changes hands.
/// Threads: any.
/// Errors: none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_image_height(image: *const wst_image) -> u32 {
    // SAFETY: NULL or a live image, as the header asks.
    unsafe { get(image, 0, |image| image.image.height()) }
}

/// The pixels, `3 * width * height` bytes: red, green, blue; rows top to bottom, no padding. NULL for NULL.
///
/// Owner: the bytes belong to the image and end with it.
/// Threads: any.
/// Errors: none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_image_data(image: *const wst_image) -> *const u8 {
    // SAFETY: NULL or a live image, as the header asks.
    unsafe { get(image, std::ptr::null(), |image| image.image.data().as_ptr()) }
}

/// Frees an image. NULL is a no-op.
///
/// Owner: takes the image from the caller; options and jobs that were given it keep their own reference.
/// Threads: any.
/// Errors: none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_image_free(image: *mut wst_image) {
    // SAFETY: NULL or a live image, as the header asks.
    unsafe { release(image) }
}
