//! Host memory whose size depends on input: allocated fallibly, aligned for SIMD, and reused.
//!
//! `Vec` growth aborts the process when memory runs out, even inside `catch_unwind`. Every buffer of the
//! library whose size a caller or a file decides is a [`Buffer`] instead.

use std::alloc::Layout;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::reserve;
use crate::error::{Error, Result};

/// Alignment of every buffer: one cache line, one AVX-512 register.
pub const ALIGNMENT: usize = 64;

/// Blocks of at least this size ask for huge pages: walking rows that are 4 KiB pages apart otherwise costs more
/// than the arithmetic on them.
const HUGE_BLOCK: usize = 4 << 20;

/// Alignment of such blocks: one huge page.
const HUGE_PAGE: usize = 2 << 20;

/// A pooled block of this kind serves a request of at least this share of its size. What it leaves idle is there anyway; a
/// smaller share would let small requests drive large ones to blocks of their own.
const REUSE_SHARE: f64 = 0.25;

/// Smaller blocks have one of so many sizes between a power of two and the next, and serve requests of their size only:
/// then the same work, done again, finds every block that it needs.
const SIZES_PER_OCTAVE: usize = 8;

/// The raw allocation: initialised from the start, freed on drop.
#[derive(Debug)]
struct Block {
    data: NonNull<u8>,
    capacity: usize,
}

// SAFETY: a block is plain memory that only its owner reaches.
unsafe impl Send for Block {}
// SAFETY: shared access only reads.
unsafe impl Sync for Block {}

impl Block {
    fn allocate(what: &str, bytes: usize) -> Result<Self> {
        let layout = Self::capacity_for(bytes)
            .and_then(|capacity| Layout::from_size_align(capacity, Self::alignment(capacity)).ok())
            .ok_or_else(|| Error::out_of_memory(what, bytes))?;
        // SAFETY: the layout's size is at least ALIGNMENT, so not zero.
        let data = unsafe { reserve::allocate(layout) };
        let data = NonNull::new(data).ok_or_else(|| Error::out_of_memory(what, bytes))?;
        #[cfg(target_os = "linux")]
        if layout.size() >= HUGE_BLOCK {
            // SAFETY: advice about whole pages of our own block; it changes no content, and failing is fine.
            unsafe { libc::madvise(data.as_ptr().cast(), layout.size() & !4095, libc::MADV_HUGEPAGE) };
        }
        // SAFETY: the block has this size. After the advice, so that the first touch makes huge pages.
        unsafe { data.as_ptr().write_bytes(0, layout.size()) };
        Ok(Block { data, capacity: layout.size() })
    }

    /// The size of a block for `bytes` bytes: whole cache lines, at least one.
    fn capacity_for(bytes: usize) -> Option<usize> {
        let whole_lines = bytes.max(1).checked_next_multiple_of(ALIGNMENT)?;
        let step = ((1 << whole_lines.ilog2()) / SIZES_PER_OCTAVE).max(ALIGNMENT);
        Some(if whole_lines < HUGE_BLOCK { whole_lines.next_multiple_of(step) } else { whole_lines })
    }

    /// Whether it is to serve a request for which a block of its own would have `wanted` bytes.
    fn serves(&self, wanted: usize) -> bool {
        let large = wanted >= HUGE_BLOCK && self.capacity > wanted;
        self.capacity == wanted || large && wanted as f64 >= REUSE_SHARE * self.capacity as f64
    }

    fn alignment(capacity: usize) -> usize {
        if capacity >= HUGE_BLOCK { HUGE_PAGE } else { ALIGNMENT }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: allocated in `allocate` with exactly this layout, which was valid there.
        unsafe {
            let layout = Layout::from_size_align_unchecked(self.capacity, Self::alignment(self.capacity));
            reserve::free(self.data.as_ptr(), layout);
        }
    }
}

/// An owned, aligned run of initialised bytes. Goes back to its [`Pool`] on drop, if it came from one.
#[derive(Debug)]
pub struct Buffer {
    data: NonNull<u8>,
    len: usize,
    block: Option<Block>,
    pool: Weak<Pool>,
}

// SAFETY: `data` points into `block`, which moves along and is Send.
unsafe impl Send for Buffer {}
// SAFETY: shared access only reads.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// Zeroed memory outside any pool.
    ///
    /// # Errors
    /// `OutOfMemory`, naming `what`.
    pub fn new(what: &str, bytes: usize) -> Result<Self> {
        Ok(Self::over(Block::allocate(what, bytes)?, bytes, Weak::new()))
    }

    fn over(block: Block, len: usize, pool: Weak<Pool>) -> Self {
        debug_assert!(len <= block.capacity);
        Buffer { data: block.data, len, block: Some(block), pool }
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: `len` bytes of the block are allocated, were zeroed, and live as long as `self`.
        unsafe { std::slice::from_raw_parts(self.data.as_ptr(), self.len) }
    }

    /// The bytes, to write.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`; `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.data.as_ptr(), self.len) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let (Some(pool), Some(block)) = (self.pool.upgrade(), self.block.take()) {
            pool.give_back(block);
        }
    }
}

/// Freed buffers, kept for the next request of about their size: in the steady state nothing is allocated.
#[derive(Debug, Default)]
pub struct Pool {
    free: Mutex<Vec<Block>>,
}

impl Pool {
    /// Memory of at least `bytes` bytes. Its content is arbitrary but initialised.
    ///
    /// # Errors
    /// `OutOfMemory`, naming `what`. The pool frees what it holds and tries again before it gives up.
    pub fn take(self: &Arc<Self>, what: &str, bytes: usize) -> Result<Buffer> {
        let wanted = Block::capacity_for(bytes).ok_or_else(|| Error::out_of_memory(what, bytes))?;
        let reused = {
            let mut free = self.lock();
            let best = free
                .iter()
                .enumerate()
                .filter(|(_, block)| block.serves(wanted))
                .min_by_key(|(_, b)| b.capacity)
                .map(|(i, _)| i);
            best.map(|i| free.swap_remove(i))
        };
        let block = match reused {
            Some(block) => block,
            None => Block::allocate(what, bytes).or_else(|_| {
                self.trim();
                Block::allocate(what, bytes)
            })?,
        };
        Ok(Buffer::over(block, bytes, Arc::downgrade(self)))
    }

    /// Frees everything that is not in use.
    pub fn trim(&self) {
        self.lock().clear();
    }

    /// Bytes held for reuse.
    pub fn idle_bytes(&self) -> usize {
        self.lock().iter().map(|block| block.capacity).sum()
    }

    fn give_back(&self, block: Block) {
        let mut free = self.lock();
        if free.try_reserve(1).is_ok() {
            free.push(block);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Block>> {
        // A panic while the list was locked leaves it whole: every change to it is one call.
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_returned_buffer_is_reused() {
        let pool = Arc::new(Pool::default());
        let first = pool.take("test", 1000).unwrap();
        let address = first.bytes().as_ptr();
        drop(first);
        assert_eq!(pool.idle_bytes(), 1024);
        assert_eq!(pool.take("test", 1000).unwrap().bytes().as_ptr(), address);
        let small = pool.take("test", 10).unwrap();
        assert_eq!(small.bytes().len(), 10);
        let address = small.bytes().as_ptr();
        drop(small);
        for bytes in [0, 1, 10, 64] {
            assert_eq!(pool.take("test", bytes).unwrap().bytes().as_ptr(), address, "{bytes} bytes");
        }
    }

    #[test]
    fn a_large_block_serves_much_smaller_requests() {
        let pool = Arc::new(Pool::default());
        drop(pool.take("test", 64 << 20).unwrap());
        let idle = pool.idle_bytes();
        let smaller = pool.take("test", 16 << 20).unwrap();
        assert_eq!(pool.idle_bytes(), 0);
        drop(smaller);
        let small = pool.take("test", 15 << 20).unwrap();
        assert_eq!(pool.idle_bytes(), idle);
        drop(small);
        // Of several, the one that leaves the least idle.
        drop(pool.take("test", 14 << 20).unwrap());
        assert_eq!(pool.idle_bytes(), idle + (15 << 20));
    }

    #[test]
    fn the_same_work_again_needs_nothing_new() {
        // Requests that overlap: one of nearly the same size must not take what a later one will miss.
        let sizes = [4352, 5440, 4352, 5000, 200_000, 190_000, 3 << 20, 70];
        let pool = Arc::new(Pool::default());
        let work = |held: usize| {
            let mut buffers = std::collections::VecDeque::new();
            for bytes in sizes.into_iter().cycle().take(40) {
                buffers.push_back(pool.take("test", bytes).unwrap());
                if buffers.len() > held {
                    buffers.pop_front();
                }
            }
        };
        work(3);
        let idle = pool.idle_bytes();
        work(3);
        work(2);
        assert_eq!(pool.idle_bytes(), idle);
    }

    #[test]
    fn an_absurd_size_is_an_error() {
        let pool = Arc::new(Pool::default());
        let error = pool.take("a tensor", usize::MAX / 2).unwrap_err();
        assert!(matches!(error, Error::OutOfMemory { .. }), "{error}");
        assert!(pool.take("a tensor", usize::MAX).is_err());
    }
}
