//! Memory of a GPU: taken in the order of a stream, kept for reuse, given back on drop.
//!
//! A block that was freed may still be read by work that waits in its stream. That is why it only goes to later work
//! of the same stream, which runs after.

use std::sync::{Arc, Mutex};

use cudarc::driver::sys;

use super::gpu::{Gpu, lock};
use crate::error::{Error, Result};

/// Blocks are whole multiples of this, so that requests of about one size share them.
const GRAIN: usize = 512;

/// A kept block serves a request of at least this share of its size.
const REUSE_SHARE: f64 = 0.75;

/// A stream's handle. It lives as long as memory of the stream does.
pub struct Handle {
    pub gpu: Arc<Gpu>,
    pub raw: sys::CUstream,
    /// Whether it is ours to destroy.
    pub owned: bool,
    pub capture: Mutex<Capture>,
}

/// Whether a stream is being recorded. Any thread may free a stream's memory, but not into a recording.
#[derive(Default)]
pub struct Capture {
    active: bool,
    /// To be freed when the recording has ended.
    deferred: Vec<Block>,
}

// SAFETY: the driver takes a stream's handle from any thread.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

impl Handle {
    /// Whether what is freed has to wait from now on.
    pub fn set_capturing(&self, active: bool) {
        let mut capture = lock(&self.capture);
        capture.active = active;
        if !active {
            let deferred = std::mem::take(&mut capture.deferred);
            self.free(&deferred);
        }
    }

    /// Frees blocks of the stream, in its order.
    fn release(&self, blocks: Vec<Block>) {
        // Held until they are free: no recording begins in between.
        let mut capture = lock(&self.capture);
        if capture.active {
            capture.deferred.extend(blocks);
        } else {
            self.free(&blocks);
        }
    }

    fn free(&self, blocks: &[Block]) {
        if blocks.is_empty() {
            return;
        }
        let Some(_bound) = self.gpu.bind_to_free() else { return };
        for block in blocks {
            // SAFETY: allocated in `Arena::try_allocate` in the same way, and in no list any more. A failure leaves
            // nothing to be done; the next call reports it.
            let _ = unsafe {
                match self.gpu.info().memory_pools {
                    true => sys::cuMemFreeAsync(block.address, self.raw),
                    false => sys::cuMemFree_v2(block.address),
                }
            };
        }
    }

    /// Waits until what was freed is free, unless the stream is being recorded.
    fn settle(&self) {
        let capture = lock(&self.capture);
        if let (false, Some(_bound)) = (capture.active, self.gpu.bind_to_free()) {
            // SAFETY: the stream is alive. A failure shows in the next call.
            let _ = unsafe { sys::cuStreamSynchronize(self.raw) };
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        if !self.owned {
            return;
        }
        if let Some(_bound) = self.gpu.bind_to_free() {
            // SAFETY: created by us; all memory of the stream holds the handle, so nothing of ours uses it.
            let _ = unsafe { sys::cuStreamDestroy_v2(self.raw) };
        }
    }
}

#[derive(Debug, Clone, Copy)]
pub struct Block {
    address: u64,
    capacity: usize,
}

/// Blocks of one stream.
pub struct Arena {
    stream: Arc<Handle>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    free: Vec<Block>,
    /// All blocks, free or in use.
    bytes: usize,
    /// Whether a recording uses the free ones too.
    recorded: bool,
}

impl std::fmt::Debug for Arena {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Arena of {} bytes", self.bytes())
    }
}

impl Arena {
    /// An empty one.
    pub fn new(stream: &Arc<Handle>) -> Arc<Self> {
        let arena = Arc::new(Arena { stream: stream.clone(), state: Mutex::default() });
        stream.gpu.register(&arena);
        arena
    }

    /// At least `bytes` bytes of arbitrary content. Only kept blocks are used if `kept_only`.
    ///
    /// # Errors
    /// `OutOfMemory`, naming `what`, after everything that is kept on the device was freed; `Device`.
    pub fn take(self: &Arc<Self>, what: &str, bytes: usize, kept_only: bool) -> Result<Memory> {
        let wanted =
            bytes.max(1).checked_next_multiple_of(GRAIN).ok_or_else(|| Error::out_of_memory(what, bytes))?;
        let kept = {
            let mut state = lock(&self.state);
            let fits = |block: &Block| {
                block.capacity >= wanted && wanted as f64 >= REUSE_SHARE * block.capacity as f64
            };
            let free = state.free.iter().enumerate().filter(|(_, block)| fits(block));
            let best = free.min_by_key(|(_, block)| block.capacity).map(|(i, _)| i);
            best.map(|i| state.free.swap_remove(i))
        };
        let block = match kept {
            Some(block) => block,
            None if kept_only => {
                return Err(Error::internal(
                    "a recorded step",
                    format!("takes {bytes} bytes more for {what}"),
                ));
            }
            None => {
                let address = self.allocate(what, wanted)?;
                lock(&self.state).bytes += wanted;
                Block { address, capacity: wanted }
            }
        };
        Ok(Memory { block, bytes, arena: self.clone() })
    }

    fn allocate(&self, what: &str, bytes: usize) -> Result<u64> {
        let gpu = &self.stream.gpu;
        let _bound = gpu.bind()?;
        match self.try_allocate(bytes) {
            (sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY, _) => gpu.trim(),
            (result, address) => return gpu.check("cuMemAlloc", result).map(|()| address),
        }
        match self.try_allocate(bytes) {
            (sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY, _) => Err(Error::out_of_memory(what, bytes)),
            (result, address) => gpu.check("cuMemAlloc", result).map(|()| address),
        }
    }

    fn try_allocate(&self, bytes: usize) -> (sys::CUresult, u64) {
        let mut address = 0;
        // SAFETY: a context is current, the stream is alive, `address` outlives the call.
        let result = unsafe {
            match self.stream.gpu.info().memory_pools {
                true => sys::cuMemAllocAsync(&mut address, bytes, self.stream.raw),
                false => sys::cuMemAlloc_v2(&mut address, bytes),
            }
        };
        (result, address)
    }

    /// Keeps all blocks until the arena is dropped: a recording has their addresses.
    pub fn keep(&self) {
        lock(&self.state).recorded = true;
    }

    /// Frees what is not in use, and waits until it is free.
    pub fn trim(&self) {
        let free = {
            let mut state = lock(&self.state);
            if state.recorded {
                return;
            }
            let free = std::mem::take(&mut state.free);
            state.bytes -= free.iter().map(|block| block.capacity).sum::<usize>();
            free
        };
        if !free.is_empty() {
            self.stream.release(free);
            self.stream.settle();
        }
    }

    /// Whether it is one of the stream's.
    pub fn is_on(&self, stream: &Arc<Handle>) -> bool {
        Arc::ptr_eq(&self.stream, stream)
    }

    /// Memory held, in use or not, in bytes.
    pub fn bytes(&self) -> usize {
        lock(&self.state).bytes
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        let free = std::mem::take(&mut lock(&self.state).free);
        self.stream.release(free);
    }
}

/// A run of bytes on a device, of a stream's own. Goes back to its arena on drop.
#[derive(Debug)]
pub struct Memory {
    block: Block,
    bytes: usize,
    arena: Arc<Arena>,
}

impl Memory {
    /// Its address on the device.
    pub fn address(&self) -> u64 {
        self.block.address
    }

    /// Whether it came from `arena`.
    pub(super) fn is_of(&self, arena: &Arc<Arena>) -> bool {
        Arc::ptr_eq(&self.arena, arena)
    }

    /// How many bytes were asked for.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let mut state = lock(&self.arena.state);
        if state.free.try_reserve(1).is_ok() {
            state.free.push(self.block);
        } else {
            state.bytes -= self.block.capacity;
            drop(state);
            self.arena.stream.release(vec![self.block]);
        }
    }
}

/// Device memory that a launch reads or writes, held until the launch is on its way.
#[derive(Debug, Clone)]
pub struct Taken {
    address: u64,
    /// Whoever owns the memory.
    _owner: Arc<dyn std::any::Any + Send + Sync>,
}

impl Taken {
    /// `offset` bytes into what `owner` owns, which lies at `base`.
    pub fn new(base: u64, offset: usize, owner: Arc<dyn std::any::Any + Send + Sync>) -> Self {
        Taken { address: base + offset as u64, _owner: owner }
    }

    /// The address on the device, as kernels take it.
    pub fn address(&self) -> u64 {
        self.address
    }
}
