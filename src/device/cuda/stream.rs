//! A line of work on a GPU, with memory of its own: launches, copies, waiting, recording.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use cudarc::driver::sys;

use super::gemm::Products;
use super::gpu::{Gpu, lock};
use super::memory::{Arena, Handle, Memory, Taken};
use super::{Kernels, Precision};
use crate::error::{Error, Result};

/// Small lists that kernels read (which entry a sample attends to) are kept on the device, as many as this.
const CONSTANTS: usize = 1024;

/// How a kernel is launched.
#[derive(Debug, Clone, Copy)]
pub struct Launch {
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: [u32; 3],
    /// Dynamic shared memory, in bytes.
    pub shared_bytes: u32,
}

impl Launch {
    /// A line of blocks.
    pub fn blocks(blocks: usize, threads: u32) -> Self {
        Launch {
            grid: [u32::try_from(blocks).unwrap_or(u32::MAX), 1, 1],
            block: [threads, 1, 1],
            shared_bytes: 0,
        }
    }

    /// A thread for each of `elements`, in blocks of 256.
    pub fn elements(elements: usize) -> Self {
        Self::blocks(elements.div_ceil(256).max(1), 256)
    }
}

/// A value that a kernel takes: a number, an address, or a struct of them.
///
/// # Safety
/// The type has the size and layout of the kernel's parameter.
pub unsafe trait Parameter {}
// SAFETY: `float` in kernels.
unsafe impl Parameter for f32 {}
// SAFETY: `double`.
unsafe impl Parameter for f64 {}
// SAFETY: `int`.
unsafe impl Parameter for i32 {}
// SAFETY: `unsigned int`.
unsafe impl Parameter for u32 {}
// SAFETY: `long long`.
unsafe impl Parameter for i64 {}
// SAFETY: a pointer, or `unsigned long long`.
unsafe impl Parameter for u64 {}

/// A stream. One thread at a time gives it work.
pub struct Stream {
    handle: Arc<Handle>,
    /// Where memory comes from: the stream's own arena, or that of a step that is recorded.
    arena: Mutex<Arc<Arena>>,
    /// The stream's own, for what outlives a step.
    own: Arc<Arena>,
    /// What a recorded step uses, while it is recorded.
    recording: Mutex<Option<Vec<Taken>>>,
    constants: Mutex<HashMap<Box<[u8]>, Taken>>,
    products: Products,
    launches: AtomicU64,
    downloads: AtomicU64,
}

impl std::fmt::Debug for Stream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "a stream of {:?}", self.handle.gpu)
    }
}

impl Stream {
    /// A new stream of `gpu`.
    ///
    /// # Errors
    /// `Device`.
    pub fn new(gpu: &Arc<Gpu>) -> Result<Arc<Self>> {
        let _bound = gpu.bind()?;
        let mut raw = std::ptr::null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: a context is current; `raw` outlives the call.
        gpu.check("cuStreamCreate", unsafe { sys::cuStreamCreate(&mut raw, flags) })?;
        Ok(Self::over(gpu, raw, true))
    }

    /// A stream that the host made, which must outlive everything that runs on it.
    ///
    /// # Safety
    /// `raw` is a `CUstream` (or `cudaStream_t`).
    ///
    /// # Errors
    /// `InvalidArgument` for a stream of another device; `Device`.
    pub unsafe fn external(gpu: &Arc<Gpu>, raw: *mut std::ffi::c_void) -> Result<Arc<Self>> {
        // The default streams have no handle of their own, cannot be recorded, and one of them is another in each
        // thread.
        if (raw as usize) < 4096 {
            let found = "a default stream";
            return Err(Error::argument("cuda_stream", "a stream that was created", found));
        }
        let raw = raw.cast();
        let _bound = gpu.bind()?;
        let mut context = std::ptr::null_mut();
        // SAFETY: the caller says that this is a stream.
        gpu.check("cuStreamGetCtx", unsafe { sys::cuStreamGetCtx(raw, &mut context) })?;
        if context != gpu.context() {
            let expected = format!("a stream of the primary context of {}", gpu.label());
            return Err(Error::argument("cuda_stream", expected, "one of another context"));
        }
        Ok(Self::over(gpu, raw, false))
    }

    fn over(gpu: &Arc<Gpu>, raw: sys::CUstream, owned: bool) -> Arc<Self> {
        let handle = Arc::new(Handle { gpu: gpu.clone(), raw, owned, capture: Mutex::default() });
        let own = Arena::new(&handle);
        Arc::new(Stream {
            arena: Mutex::new(own.clone()),
            own,
            handle,
            recording: Mutex::default(),
            constants: Mutex::default(),
            products: Products::default(),
            launches: AtomicU64::new(0),
            downloads: AtomicU64::new(0),
        })
    }

    /// Its device.
    pub fn gpu(&self) -> &Arc<Gpu> {
        &self.handle.gpu
    }

    pub(super) fn handle(&self) -> &Arc<Handle> {
        &self.handle
    }

    /// Memory for work of this stream: arbitrary content.
    ///
    /// # Errors
    /// `OutOfMemory`, naming `what`; `Device`.
    pub fn take(&self, what: &str, bytes: usize) -> Result<Memory> {
        let arena = lock(&self.arena).clone();
        arena.take(what, bytes, self.is_recording())
    }

    pub(super) fn products(&self) -> &Products {
        &self.products
    }

    /// Takes memory from `arena` from now on; gives the one before.
    pub(super) fn exchange_arena(&self, arena: Arc<Arena>) -> Arc<Arena> {
        std::mem::replace(&mut *lock(&self.arena), arena)
    }

    /// Frees what is kept for reuse.
    pub fn trim(&self) {
        let arena = lock(&self.arena).clone();
        arena.trim();
    }

    /// Memory held for work of this stream, in use or not, in bytes.
    pub fn bytes(&self) -> usize {
        self.gpu().bytes_on(&self.handle)
    }

    /// Launches the kernel `name` of `kernels`, in its version for `precision` if it has one for each. The call returns
    /// before the kernel has run.
    ///
    /// # Safety
    /// The parameters are those that the kernel declares, in number, order and type; the addresses hold what it reads,
    /// and room for what it writes; and memory that is not of this stream stays until the stream has done its work.
    ///
    /// # Errors
    /// `Device`; those of compiling the source when it is used first.
    pub unsafe fn launch(
        &self,
        kernels: &'static Kernels,
        name: &'static str,
        precision: Option<Precision>,
        launch: Launch,
        parameters: &[&dyn Parameter],
    ) -> Result<()> {
        let gpu = self.gpu();
        let _bound = gpu.bind()?;
        let function = gpu.module(kernels)?.function(gpu, name, precision)?;
        function.check_parameters(name, parameters)?;
        if launch.shared_bytes > 0 {
            function.allow_shared(gpu, launch.shared_bytes)?;
        }
        let mut addresses = [std::ptr::null_mut(); MOST_PARAMETERS];
        if parameters.len() > MOST_PARAMETERS {
            return Err(Error::internal(name, format!("{} parameters", parameters.len())));
        }
        for (address, parameter) in addresses.iter_mut().zip(parameters) {
            *address = (std::ptr::from_ref(*parameter)).cast_mut().cast();
        }
        self.count_launch();
        let (grid, block) = (launch.grid, launch.block);
        // SAFETY: the function is loaded, the stream alive; the driver copies the parameters before it returns, and
        // they are what the kernel declares by this function's contract.
        let result = unsafe {
            sys::cuLaunchKernel(
                function.raw(),
                grid[0],
                grid[1],
                grid[2],
                block[0],
                block[1],
                block[2],
                launch.shared_bytes,
                self.handle.raw,
                addresses.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        };
        gpu.check(name, result)
    }

    /// Copies bytes to the device. They may be changed as soon as the call returns.
    ///
    /// # Errors
    /// `Device`; `Internal` while a step is recorded, which would copy the same again.
    pub fn upload(&self, bytes: &[u8], to: &Memory, offset: usize) -> Result<()> {
        self.expect_no_recording("copies from the host")?;
        if to.bytes() < offset || to.bytes() - offset < bytes.len() {
            return Err(Error::internal("a copy to a GPU", "more than there is room for"));
        }
        if bytes.is_empty() {
            return Ok(());
        }
        let _bound = self.gpu().bind()?;
        let address = to.address() + offset as u64;
        // SAFETY: the source is readable, the target was checked. Memory that is not pinned was read when the call
        // returns.
        let result = unsafe {
            sys::cuMemcpyHtoDAsync_v2(address, bytes.as_ptr().cast(), bytes.len(), self.handle.raw)
        };
        self.gpu().check("cuMemcpyHtoDAsync", result)
    }

    /// Copies bytes to the host, after all work of the stream so far.
    ///
    /// # Errors
    /// `Device`, also for what earlier work did wrong; `Internal` while a step is recorded.
    pub fn download(&self, from: &Memory, to: &mut [u8]) -> Result<()> {
        self.expect_no_recording("copies to the host")?;
        if from.bytes() < to.len() {
            return Err(Error::internal("a copy from a GPU", "more than there is"));
        }
        self.downloads.fetch_add(1, Ordering::Relaxed);
        let _bound = self.gpu().bind()?;
        if !to.is_empty() {
            // SAFETY: both ranges are as long as that; the call waits for the copy below.
            let result = unsafe {
                sys::cuMemcpyDtoHAsync_v2(to.as_mut_ptr().cast(), from.address(), to.len(), self.handle.raw)
            };
            self.gpu().check("cuMemcpyDtoHAsync", result)?;
        }
        self.wait()
    }

    /// Copies within the device.
    ///
    /// # Safety
    /// Both addresses have that many bytes, which do not overlap.
    ///
    /// # Errors
    /// `Device`.
    pub unsafe fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        let _bound = self.gpu().bind()?;
        // SAFETY: by this function's contract.
        let result = unsafe { sys::cuMemcpyDtoDAsync_v2(to, from, bytes, self.handle.raw) };
        self.gpu().check("cuMemcpyDtoDAsync", result)
    }

    /// Sets all bytes to zero.
    ///
    /// # Errors
    /// `Device`.
    pub fn clear(&self, memory: &Memory) -> Result<()> {
        if memory.bytes() == 0 {
            return Ok(());
        }
        let _bound = self.gpu().bind()?;
        // SAFETY: the memory has this many bytes.
        let result = unsafe { sys::cuMemsetD8Async(memory.address(), 0, memory.bytes(), self.handle.raw) };
        self.gpu().check("cuMemsetD8Async", result)
    }

    /// Waits for all work so far.
    ///
    /// # Errors
    /// `Device`, for whatever went wrong in it; `Internal` while a step is recorded.
    pub fn wait(&self) -> Result<()> {
        self.expect_no_recording("waits")?;
        let _bound = self.gpu().bind()?;
        // SAFETY: the stream is alive.
        self.gpu().check("cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(self.handle.raw) })
    }

    /// A small list on the device. Equal lists are uploaded once.
    ///
    /// # Errors
    /// `OutOfMemory`; `Device`; `Internal` if it is new while a step is recorded.
    pub fn constant(&self, values: &[u32]) -> Result<Taken> {
        let key: Box<[u8]> = values.iter().flat_map(|value| value.to_ne_bytes()).collect();
        let found = lock(&self.constants).get(&key).cloned();
        if let Some(taken) = found {
            return Ok(self.using(taken));
        }
        let memory = self.own.take("a list", key.len(), self.is_recording())?;
        self.upload(&key, &memory, 0)?;
        let taken = Taken::new(memory.address(), 0, Arc::new(memory));
        let mut constants = lock(&self.constants);
        if constants.len() >= CONSTANTS {
            constants.clear();
        }
        constants.insert(key, taken.clone());
        Ok(self.using(taken))
    }

    /// Notes that what is recorded, if anything is, uses this memory: it must live as long as the recording.
    #[must_use]
    pub fn using(&self, taken: Taken) -> Taken {
        if let Some(used) = lock(&self.recording).as_mut() {
            used.push(taken.clone());
        }
        taken
    }

    /// As [`Stream::using`], for memory of a stream. What a recorded step took itself is the recording's already, and
    /// goes back when it is dropped, to be used again within the step.
    #[must_use]
    pub fn using_part(&self, memory: &Memory, taken: Taken) -> Taken {
        if memory.is_of(&lock(&self.arena)) { taken } else { self.using(taken) }
    }

    /// All of some memory, to be used once.
    #[must_use]
    pub fn using_memory(&self, memory: Arc<Memory>) -> Taken {
        self.using_part(&memory, Taken::new(memory.address(), 0, memory.clone()))
    }

    /// Whether launches are recorded and not run.
    pub fn is_recording(&self) -> bool {
        lock(&self.recording).is_some()
    }

    pub(super) fn start_recording(&self) {
        *lock(&self.recording) = Some(Vec::new());
    }

    pub(super) fn end_recording(&self) -> Vec<Taken> {
        lock(&self.recording).take().unwrap_or_default()
    }

    fn expect_no_recording(&self, what: &str) -> Result<()> {
        match self.is_recording() {
            false => Ok(()),
            true => Err(Error::internal("a recorded step", what)),
        }
    }

    pub(super) fn count_launch(&self) {
        self.launches.fetch_add(1, Ordering::Relaxed);
    }

    /// How many kernels were launched on it.
    pub fn launches(&self) -> u64 {
        self.launches.load(Ordering::Relaxed)
    }

    /// How often the host read what lies on the device.
    pub fn downloads(&self) -> u64 {
        self.downloads.load(Ordering::Relaxed)
    }
}

/// The most parameters of a kernel.
const MOST_PARAMETERS: usize = 32;
