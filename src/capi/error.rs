//! Statuses and error objects.

use std::ffi::{CString, c_char};

use super::boundary::{Handle, get, release};
use crate::error::Error;

/// How a call ended: WST_OK or the kind of failure. New kinds may be added; treat unknown ones as failures.
pub type wst_status = i32;

/// The call succeeded.
pub const WST_OK: wst_status = 0;
/// An argument is NULL, out of range, of a wrong shape or type, broken UTF-8.
pub const WST_INVALID_ARGUMENT: wst_status = 1;
/// A file could not be opened, read, mapped or written.
pub const WST_IO: wst_status = 2;
/// A file does not hold what it should.
pub const WST_FORMAT: wst_status = 3;
/// This build, device or model cannot serve a valid request.
pub const WST_UNSUPPORTED: wst_status = 4;
/// Host or device memory ran out; the handles stay usable.
pub const WST_OUT_OF_MEMORY: wst_status = 5;
/// The compute device failed.
pub const WST_DEVICE: wst_status = 6;
/// The work was cancelled.
pub const WST_CANCELLED: wst_status = 7;
/// An exclusive handle is in use by another call.
pub const WST_BUSY: wst_status = 8;
/// A defect of the library; the handle that was used can only be freed.
pub const WST_INTERNAL: wst_status = 9;

/// Why a call failed: a status, a message, and the place it came from.
pub struct wst_error {
    status: wst_status,
    message: CString,
    place: CString,
}

impl Handle for wst_error {}

/// The status that stands for an error.
pub(super) fn status_of(error: &Error) -> wst_status {
    match error {
        Error::InvalidArgument { .. } => WST_INVALID_ARGUMENT,
        Error::Io { source, .. } if source.kind() == std::io::ErrorKind::OutOfMemory => WST_OUT_OF_MEMORY,
        Error::Io { .. } => WST_IO,
        Error::Format { .. } => WST_FORMAT,
        Error::Unsupported { .. } => WST_UNSUPPORTED,
        Error::OutOfMemory { .. } => WST_OUT_OF_MEMORY,
        Error::Device { .. } => WST_DEVICE,
        Error::Cancelled => WST_CANCELLED,
        Error::Busy { .. } => WST_BUSY,
        Error::Internal { .. } => WST_INTERNAL,
    }
}

impl wst_error {
    pub(super) fn new(error: &Error) -> Self {
        let place = match error {
            Error::InvalidArgument { name, .. } => name.clone(),
            Error::Io { path, .. } => path.display().to_string(),
            Error::Format { place, .. } | Error::Internal { place, .. } => place.clone(),
            Error::Unsupported { what, .. } | Error::OutOfMemory { what, .. } | Error::Busy { what } => {
                what.clone()
            }
            Error::Device { device, .. } => device.clone(),
            Error::Cancelled => String::new(),
        };
        wst_error { status: status_of(error), message: c_text(error.to_string()), place: c_text(place) }
    }
}

/// A text for C: a NUL byte inside, which C would take for the end, becomes U+FFFD.
pub(super) fn c_text(text: String) -> CString {
    CString::new(text).unwrap_or_else(|error| {
        let text = String::from_utf8_lossy(&error.into_vec()).replace('\0', "\u{fffd}");
        CString::new(text).unwrap_or_default()
    })
}

/// The name of a status, "WST_OK" and so on; "unknown status" for a number that is none.
///
/// Owner: static text, never freed.
/// Threads: any.
/// Errors: none.
#[unsafe(no_mangle)]
pub extern "C" fn wst_status_name(status: wst_status) -> *const c_char {
    let name = match status {
        WST_OK => c"WST_OK",
        WST_INVALID_ARGUMENT => c"WST_INVALID_ARGUMENT",
        WST_IO => c"WST_IO",
        WST_FORMAT => c"WST_FORMAT",
        WST_UNSUPPORTED => c"WST_UNSUPPORTED",
        WST_OUT_OF_MEMORY => c"WST_OUT_OF_MEMORY",
        WST_DEVICE => c"WST_DEVICE",
        WST_CANCELLED => c"WST_CANCELLED",
        WST_BUSY => c"WST_BUSY",
        WST_INTERNAL => c"WST_INTERNAL",
        _ => c"unknown status",
    };
    name.as_ptr()
}

/// The status that the failed call returned. WST_OK for NULL.
///
/// Owner: nothing changes hands.
/// Threads: any.
/// Errors: none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_error_status(error: *const wst_error) -> wst_status {
    // SAFETY: NULL or a live error, as the header asks.
    unsafe { get(error, WST_OK, |error| error.status) }
}

/// What was asked, what was expected and what was found, in UTF-8. "" for NULL.
///
/// Owner: the text belongs to the error and ends with it.
/// Threads: any.
/// Errors: none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_error_message(error: *const wst_error) -> *const c_char {
    // SAFETY: NULL or a live error, as the header asks.
    unsafe { get(error, c"".as_ptr(), |error| error.message.as_ptr()) }
}

/// Where it came from: the parameter, file, tensor or stage, in UTF-8. "" if there is none, and for NULL.
///
/// Owner: the text belongs to the error and ends with it.
/// Threads: any.
/// Errors: none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_error_place(error: *const wst_error) -> *const c_char {
    // SAFETY: NULL or a live error, as the header asks.
    unsafe { get(error, c"".as_ptr(), |error| error.place.as_ptr()) }
}

/// Frees an error. NULL is a no-op.
///
/// Owner: takes the error from the caller.
/// Threads: any.
/// Errors: none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_error_free(error: *mut wst_error) {
    // SAFETY: NULL or a live error, as the header asks.
    unsafe { release(error) }
}
