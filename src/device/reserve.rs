//! What is left when the host's memory runs out: allocations of code that cannot fail are served from a reserve.
//!
//! Our own buffers fail with `OutOfMemory`, but parsers, maps and strings of other crates end the process when the
//! system refuses an allocation. Work that uses such code runs under a [`Reserve`]: address space that was mapped
//! beforehand and costs nothing while it is untouched. A refused allocation of that thread is served from it, and
//! the work ends with `OutOfMemory` instead of its result. Small allocations outside such work (an error's text, a
//! shape) are served from a fixed area, which carries them to the next allocation that can fail.
//!
//! Blocks of a reserve are counted: one that outlives the work (a cache of a thread, a global of a crate) keeps the
//! mapping, and whoever frees the last one, on whatever thread, frees the mapping.
//!
//! Without the feature `host-memory-guard` nothing is intercepted: a large reserve is then only the check that so
//! much memory could be had at its start, a small one is nothing.

use std::alloc::Layout;

use crate::error::{Error, Result};

#[cfg(feature = "host-memory-guard")]
mod allocator;
#[cfg(feature = "host-memory-guard")]
use allocator::Mapping;

/// Beside what the caller estimates: tables and caches whose size no input decides.
const SLACK_BYTES: usize = 16 << 20;

/// Blocks are not reused one by one: a growing vector leaves copies of half, a quarter, … of its size behind.
#[cfg(feature = "host-memory-guard")]
const COPIES: usize = 2;

/// Memory for one piece of work, in case the system has none.
#[derive(Debug)]
pub struct Reserve {
    what: String,
    bytes: usize,
    #[cfg(feature = "host-memory-guard")]
    mapping: Mapping,
}

impl Reserve {
    /// A reserve for work that is not expected to hold more than `bytes` bytes at a time.
    ///
    /// # Errors
    /// `OutOfMemory`, naming `what`, if not even the address space is to be had.
    pub fn new(what: &str, bytes: usize) -> Result<Self> {
        #[cfg(feature = "host-memory-guard")]
        let mapping = bytes
            .checked_mul(COPIES)
            .and_then(|bytes| Mapping::new(bytes.checked_add(SLACK_BYTES)?))
            .ok_or_else(|| Error::out_of_memory(what, bytes))?;
        #[cfg(not(feature = "host-memory-guard"))]
        check_headroom(what, bytes)?;
        Ok(Reserve {
            what: what.to_owned(),
            bytes,
            #[cfg(feature = "host-memory-guard")]
            mapping,
        })
    }

    /// Runs `work` on this thread with the reserve at hand.
    ///
    /// # Errors
    /// What `work` returns; `OutOfMemory` if the reserve was touched, whatever `work` returned.
    pub fn guard<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        #[cfg(feature = "host-memory-guard")]
        let _inside = self.mapping.enter();
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        if self.was_used() {
            // Its blocks lie in the reserve: they go first.
            match result {
                Ok(result) => drop(result),
                Err(payload) => drop(super::threads::panic_error(&self.what, payload)),
            }
            return Err(Error::out_of_memory(self.what.as_str(), self.bytes));
        }
        result.unwrap_or_else(|payload| std::panic::resume_unwind(payload))
    }

    /// Keeps the reserve at hand for the rest of this thread, the destructors of its thread-locals included.
    ///
    /// # Safety
    /// The reserve is dropped after the thread has been joined.
    pub(super) unsafe fn stay(&self) {
        #[cfg(feature = "host-memory-guard")]
        std::mem::forget(self.mapping.enter());
    }

    fn was_used(&self) -> bool {
        #[cfg(feature = "host-memory-guard")]
        return self.mapping.was_used();
        #[cfg(not(feature = "host-memory-guard"))]
        return false;
    }
}

/// Runs `work`, which is not expected to hold more than `bytes` bytes, on this thread under a reserve of its own.
/// Within other such work both reserves are at hand, the inner one first.
///
/// # Errors
/// What `work` returns; `OutOfMemory`, naming `what`, if there is no reserve or it was touched.
pub fn with<T>(what: &str, bytes: usize, work: impl FnOnce() -> Result<T>) -> Result<T> {
    Reserve::new(what, bytes)?.guard(work)
}

/// Checks that `bytes` bytes could be had, before code that allocates infallibly is called.
#[cfg(not(feature = "host-memory-guard"))]
fn check_headroom(what: &str, bytes: usize) -> Result<()> {
    if bytes <= SLACK_BYTES {
        return Ok(());
    }
    let layout = Layout::from_size_align(bytes, super::ALIGNMENT);
    let layout = layout.map_err(|_| Error::out_of_memory(what, bytes))?;
    // SAFETY: the size is not zero; the block is freed as it was made, untouched.
    unsafe {
        let block = allocate(layout);
        if block.is_null() {
            return Err(Error::out_of_memory(what, bytes));
        }
        free(std::hint::black_box(block), layout);
    }
    Ok(())
}

/// Memory for code that can fail: from no reserve.
///
/// # Safety
/// As [`std::alloc::GlobalAlloc::alloc`].
pub(super) unsafe fn allocate(layout: Layout) -> *mut u8 {
    #[cfg(feature = "host-memory-guard")]
    // SAFETY: the caller's promise is the one that is asked for.
    return unsafe { allocator::allocate(layout) };
    #[cfg(not(feature = "host-memory-guard"))]
    // SAFETY: as above.
    return unsafe { std::alloc::alloc(layout) };
}

/// Frees what [`allocate`] gave.
///
/// # Safety
/// As [`std::alloc::GlobalAlloc::dealloc`].
pub(super) unsafe fn free(block: *mut u8, layout: Layout) {
    #[cfg(feature = "host-memory-guard")]
    // SAFETY: the block came from the same allocator; the rest the caller promises.
    unsafe {
        allocator::free(block, layout);
    }
    #[cfg(not(feature = "host-memory-guard"))]
    // SAFETY: as above.
    unsafe {
        std::alloc::dealloc(block, layout);
    }
}

#[cfg(all(test, feature = "host-memory-guard"))]
mod tests;
