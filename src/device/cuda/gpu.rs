//! One GPU and what all its users share: its context, compiled kernels, and memory that nobody uses.

use std::ffi::CStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use cudarc::driver::sys::{self, CUdevice_attribute as Attribute};

use super::compile::{Kernels, Module, Modules};
use super::driver::{self, Bound, check};
use super::memory::{Arena, Handle};
use crate::error::{Error, Result};

/// The oldest architecture that kernels are written for: Turing.
const OLDEST: Capability = Capability { major: 7, minor: 5 };

/// An architecture, as NVIDIA numbers them: 9.0 is Hopper.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Capability {
    /// Before the dot.
    pub major: u32,
    /// After it.
    pub minor: u32,
}

impl std::fmt::Display for Capability {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// What a GPU is.
#[derive(Debug, Clone)]
pub struct GpuInfo {
    /// As the driver says it.
    pub name: String,
    /// Its architecture.
    pub capability: Capability,
    /// Memory, in bytes.
    pub memory_bytes: usize,
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// The most shared memory that a block may ask for, in bytes.
    pub shared_bytes: u32,
    /// Whether memory can be taken and freed in the order of a stream.
    pub memory_pools: bool,
}

/// An opened GPU. There is one of each device in a process, as long as anybody uses it.
pub struct Gpu {
    ordinal: usize,
    info: GpuInfo,
    context: sys::CUcontext,
    device: sys::CUdevice,
    /// Where memory that is taken in the order of a stream comes from; null without such memory.
    pool: sys::CUmemoryPool,
    modules: Modules,
    arenas: Mutex<Vec<Weak<Arena>>>,
}

// SAFETY: the context is a handle that any thread may make current; the rest is behind locks.
unsafe impl Send for Gpu {}
// SAFETY: as above.
unsafe impl Sync for Gpu {}

impl std::fmt::Debug for Gpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({})", self.label(), self.info.name)
    }
}

/// How many GPUs there are.
///
/// # Errors
/// `Unsupported` without NVIDIA's driver; `Device` if it does not start.
pub fn gpus() -> Result<usize> {
    driver::start()?;
    let mut count = 0;
    // SAFETY: the driver was started; `count` outlives the call.
    check("cuda", "cuDeviceGetCount", unsafe { sys::cuDeviceGetCount(&mut count) })?;
    Ok(usize::try_from(count).unwrap_or(0))
}

/// What GPU number `ordinal` is, without opening it.
///
/// # Errors
/// As [`gpus`]; `InvalidArgument` if there is none of this number.
pub fn describe(ordinal: usize) -> Result<GpuInfo> {
    Ok(handle(ordinal)?.1)
}

fn handle(ordinal: usize) -> Result<(sys::CUdevice, GpuInfo)> {
    let (count, label) = (gpus()?, format!("cuda:{ordinal}"));
    if ordinal >= count {
        let expected =
            if count == 0 { "a machine with a GPU".into() } else { format!("a number below {count}") };
        return Err(Error::argument("device", expected, label));
    }
    let mut device = 0;
    // SAFETY: the driver was started; the ordinal is below the count; `device` outlives the call.
    check(&label, "cuDeviceGet", unsafe { sys::cuDeviceGet(&mut device, ordinal as i32) })?;
    let attribute = |attribute| {
        let mut value = 0;
        // SAFETY: as above.
        let result = unsafe { sys::cuDeviceGetAttribute(&mut value, attribute, device) };
        check(&label, "cuDeviceGetAttribute", result)?;
        Ok::<_, Error>(u32::try_from(value).unwrap_or(0))
    };
    let mut name = [0; 256];
    // SAFETY: the buffer is as long as is said; the driver ends the name in it.
    check(&label, "cuDeviceGetName", unsafe { sys::cuDeviceGetName(name.as_mut_ptr(), 255, device) })?;
    let mut memory_bytes = 0;
    // SAFETY: `memory_bytes` outlives the call.
    check(&label, "cuDeviceTotalMem", unsafe { sys::cuDeviceTotalMem_v2(&mut memory_bytes, device) })?;
    let info = GpuInfo {
        // SAFETY: the array was zeroed and its last byte left alone.
        name: unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned(),
        capability: Capability {
            major: attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            minor: attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        },
        memory_bytes,
        multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        shared_bytes: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        memory_pools: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED)? != 0,
    };
    Ok((device, info))
}

impl Gpu {
    /// Opens GPU number `ordinal`, or gives the one that is open.
    ///
    /// # Errors
    /// As [`describe`]; `Unsupported` for an architecture before 7.5; `Device`.
    pub fn open(ordinal: usize) -> Result<Arc<Self>> {
        static OPEN: Mutex<Vec<(usize, Weak<Gpu>)>> = Mutex::new(Vec::new());
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        open.retain(|(_, gpu)| gpu.strong_count() > 0);
        if let Some(gpu) = open.iter().find(|(of, _)| *of == ordinal).and_then(|(_, gpu)| gpu.upgrade()) {
            return Ok(gpu);
        }
        let gpu = Arc::new(Self::retain(ordinal)?);
        open.push((ordinal, Arc::downgrade(&gpu)));
        Ok(gpu)
    }

    fn retain(ordinal: usize) -> Result<Self> {
        let (device, info) = handle(ordinal)?;
        let label = format!("cuda:{ordinal}");
        if info.capability < OLDEST {
            let reason =
                format!("{} has compute capability {}, {OLDEST} is the least", info.name, info.capability);
            return Err(Error::unsupported(format!("device {label:?}"), reason));
        }
        let mut context = std::ptr::null_mut();
        // SAFETY: the driver was started; `context` outlives the call. Released on drop.
        let result = unsafe { sys::cuDevicePrimaryCtxRetain(&mut context, device) };
        check(&label, "cuDevicePrimaryCtxRetain", result)?;
        let (pool, modules, arenas) = (std::ptr::null_mut(), Mutex::default(), Mutex::default());
        let mut gpu = Gpu { ordinal, info, context, device, pool, modules, arenas };
        gpu.keep_freed_memory()?;
        Ok(gpu)
    }

    /// Lets the driver's pool hold what is freed: by default it gives all of it back whenever somebody waits.
    fn keep_freed_memory(&mut self) -> Result<()> {
        if !self.info.memory_pools {
            return Ok(());
        }
        // SAFETY: `pool` outlives the call.
        let result = unsafe { sys::cuDeviceGetDefaultMemPool(&mut self.pool, self.device) };
        self.check("cuDeviceGetDefaultMemPool", result)?;
        let mut most = u64::MAX;
        let threshold = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        // SAFETY: this attribute is a 64-bit number.
        let result = unsafe { sys::cuMemPoolSetAttribute(self.pool, threshold, (&raw mut most).cast()) };
        self.check("cuMemPoolSetAttribute", result)
    }

    /// `cuda:0`, as options name it.
    pub fn label(&self) -> String {
        format!("cuda:{}", self.ordinal)
    }

    /// What it is.
    pub fn info(&self) -> &GpuInfo {
        &self.info
    }

    /// Makes its context current on this thread while the result lives.
    ///
    /// # Errors
    /// `Device`.
    pub(super) fn bind(&self) -> Result<Bound> {
        Bound::new("cuda", self.context)
    }

    /// The same to give something back. Tried once more, since what is not given back is lost for good.
    pub(super) fn bind_to_free(&self) -> Option<Bound> {
        self.bind().or_else(|_| self.bind()).ok()
    }

    pub(super) fn context(&self) -> sys::CUcontext {
        self.context
    }

    /// # Errors
    /// `Device`, naming this device and the call, unless `result` is success.
    pub(super) fn check(&self, call: &str, result: sys::CUresult) -> Result<()> {
        if result == sys::CUresult::CUDA_SUCCESS { Ok(()) } else { check(&self.label(), call, result) }
    }

    /// The compiled kernels of a source file.
    ///
    /// # Errors
    /// `Unsupported` if there is no compiler; `Device` if they do not load; `Internal` if they do not compile.
    pub(super) fn module(&self, kernels: &'static Kernels) -> Result<Arc<Module>> {
        let mut modules = lock(&self.modules);
        if let Some(module) = modules.get(kernels.name()) {
            return Ok(module.clone());
        }
        let module = Arc::new(Module::load(self, kernels)?);
        modules.insert(kernels.name(), module.clone());
        Ok(module)
    }

    /// # Errors
    /// `Unsupported`, naming the libraries that were tried, if kernels are neither in this build nor can be compiled.
    pub fn check_compiler(&self) -> Result<()> {
        let _bound = self.bind()?;
        self.module(super::resident::kernels()).map(drop)
    }

    /// Notes an arena, so that what it holds for reuse is freed when memory runs out.
    pub(super) fn register(&self, arena: &Arc<Arena>) {
        let mut arenas = lock(&self.arenas);
        arenas.retain(|arena| arena.strong_count() > 0);
        if arenas.try_reserve(1).is_ok() {
            arenas.push(Arc::downgrade(arena));
        }
    }

    /// Memory that is held for work of a stream, in bytes: in use, kept for reuse, of recorded steps.
    pub(super) fn bytes_on(&self, stream: &Arc<Handle>) -> usize {
        let arenas: Vec<Arc<Arena>> = lock(&self.arenas).iter().filter_map(Weak::upgrade).collect();
        arenas.iter().filter(|arena| arena.is_on(stream)).map(|arena| arena.bytes()).sum()
    }

    /// Frees what is held for reuse anywhere on this device.
    pub fn trim(&self) {
        let arenas: Vec<Arc<Arena>> = lock(&self.arenas).iter().filter_map(Weak::upgrade).collect();
        arenas.iter().for_each(|arena| arena.trim());
        if !self.pool.is_null() {
            // What the pool keeps serves its own allocations alone.
            // SAFETY: the device's own pool, which lasts. A failure leaves things as they are.
            let _ = unsafe { sys::cuMemPoolTrimTo(self.pool, 0) };
        }
    }

    /// Memory that is free on the device, in bytes, whoever uses the rest.
    ///
    /// # Errors
    /// `Device`.
    pub fn free_bytes(&self) -> Result<usize> {
        let _bound = self.bind()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: both outlive the call.
        self.check("cuMemGetInfo", unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) })?;
        Ok(free)
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        // Modules are unloaded while the context lives.
        if let Some(_bound) = self.bind_to_free() {
            lock(&self.modules).clear();
        }
        // SAFETY: retained in `retain`. A failure leaves nothing to be done.
        let _ = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
    }
}

/// A lock whose holders leave its content whole, also by a panic: every change is one call.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
