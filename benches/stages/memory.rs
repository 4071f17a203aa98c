//! What is allocated and what is resident.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::Outcome;

/// Allocations at least this large are listed one by one.
const LARGE_BYTES: usize = 4096;
const LISTED: usize = 256;

/// The system allocator, counting between `start` and `stop`.
pub struct Counter {
    on: AtomicBool,
    allocations: AtomicUsize,
    bytes: AtomicUsize,
    large: AtomicUsize,
    sizes: [AtomicUsize; LISTED],
}

pub struct Counted {
    pub allocations: usize,
    pub bytes: usize,
    pub large_count: usize,
    /// The first [`LISTED`] of them.
    pub large: Vec<usize>,
}

// The library's own takes this place unless its default features are off, as in `run.py`; nothing is counted then.
#[cfg_attr(not(feature = "host-memory-guard"), global_allocator)]
#[cfg_attr(feature = "host-memory-guard", allow(dead_code))]
pub static COUNTER: Counter = Counter {
    on: AtomicBool::new(false),
    allocations: AtomicUsize::new(0),
    bytes: AtomicUsize::new(0),
    large: AtomicUsize::new(0),
    sizes: [const { AtomicUsize::new(0) }; LISTED],
};

impl Counter {
    pub fn start(&self) {
        for counter in [&self.allocations, &self.bytes, &self.large] {
            counter.store(0, Ordering::SeqCst);
        }
        self.on.store(true, Ordering::SeqCst);
    }

    pub fn stop(&self) -> Counted {
        self.on.store(false, Ordering::SeqCst);
        let large_count = self.large.load(Ordering::SeqCst);
        let listed = &self.sizes[..large_count.min(LISTED)];
        Counted {
            allocations: self.allocations.load(Ordering::SeqCst),
            bytes: self.bytes.load(Ordering::SeqCst),
            large_count,
            large: listed.iter().map(|size| size.load(Ordering::SeqCst)).collect(),
        }
    }

    fn count(&self, bytes: usize) {
        if !self.on.load(Ordering::Relaxed) {
            return;
        }
        self.allocations.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        if bytes >= LARGE_BYTES {
            let at = self.large.fetch_add(1, Ordering::Relaxed);
            if let Some(size) = self.sizes.get(at) {
                size.store(bytes, Ordering::Relaxed);
            }
        }
    }
}

// SAFETY: every call is passed on to the system allocator unchanged; counting touches only atomics.
unsafe impl GlobalAlloc for Counter {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        self.count(layout.size());
        // SAFETY: the caller's promises are the ones that `System` asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        self.count(layout.size());
        // SAFETY: as in `alloc`.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        self.count(new_size);
        // SAFETY: as in `alloc`.
        unsafe { System.realloc(block, layout, new_size) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: as in `alloc`.
        unsafe { System.dealloc(block, layout) }
    }
}

/// What the kernel says of this process's resident memory, in MiB.
pub struct Memory {
    pub rss_mib: f64,
    pub peak_mib: f64,
    pub anonymous_mib: f64,
    pub file_mib: f64,
}

impl Memory {
    pub fn now() -> Outcome<Self> {
        let status = std::fs::read_to_string("/proc/self/status")?;
        let field = |name: &str| -> Outcome<f64> {
            let line = status.lines().find(|line| line.starts_with(name)).ok_or(name.to_owned())?;
            let kib = line.split_whitespace().nth(1).ok_or(name.to_owned())?;
            Ok(kib.parse::<f64>()? / 1024.)
        };
        Ok(Memory {
            rss_mib: field("VmRSS:")?,
            peak_mib: field("VmHWM:")?,
            anonymous_mib: field("RssAnon:")?,
            file_mib: field("RssFile:")?,
        })
    }
}

/// Makes the kernel's peak start again at the present size; where that is forbidden it includes opening.
pub fn reset_peak() {
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

// ---------------------------------------------------------------- small helpers
