//! Cancel tokens.

use super::boundary::{Handle, get, give, quietly, release};
use crate::device::CancelToken;

/// A flag that asks work to stop. Sticky: a request before the start counts. Any number of calls may share one.
pub struct wst_cancel {
    pub(super) token: CancelToken,
}

impl Handle for wst_cancel {}

/// A new token that nobody has cancelled. NULL only if memory ran out.
///
/// Owner: the caller frees it with wst_cancel_free; options and running work keep what they need of it.
/// Threads: any.
/// Errors: none.
#[unsafe(no_mangle)]
pub extern "C" fn wst_cancel_new() -> *mut wst_cancel {
    quietly(std::ptr::null_mut(), || give(wst_cancel { token: CancelToken::new() }))
}

/// Asks all work with this token to stop; it ends with WST_CANCELLED soon after. NULL is a no-op.
///
/// Owner: nothing changes hands.
/// Threads: any, callbacks and signal handlers too.
/// Errors: none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_cancel_request(cancel: *mut wst_cancel) {
    // One atomic store and nothing else: a signal handler may be running this.
    // SAFETY: NULL or a live token, as the header asks.
    unsafe { get(cancel, (), |cancel| cancel.token.cancel()) }
}

/// Takes the request back, so that the token serves another run. NULL is a no-op.
///
/// Owner: nothing changes hands.
/// Threads: any, callbacks and signal handlers too.
/// Errors: none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_cancel_reset(cancel: *mut wst_cancel) {
    // SAFETY: NULL or a live token, as the header asks.
    unsafe { get(cancel, (), |cancel| cancel.token.reset()) }
}

/// Frees a token; work that has it goes on. NULL is a no-op.
///
/// Owner: takes the token from the caller.
/// Threads: any.
/// Errors: none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_cancel_free(cancel: *mut wst_cancel) {
    // SAFETY: NULL or a live token, as the header asks.
    unsafe { release(cancel) }
}
