//! NVIDIA's driver library, found when it is first wanted. Nothing of it is touched before it was probed: the bindings
//! panic where a library or symbol is missing.

use std::ffi::{CStr, c_char, c_void};
use std::sync::{Mutex, PoisonError};

use cudarc::driver::sys;

use crate::error::{Error, Result};

/// The library, under the names that the bindings try.
const NAMES: [&CStr; 2] = [c"libcuda.so", c"libcuda.so.1"];

/// Every symbol that this backend calls.
const SYMBOLS: [&CStr; 39] = [
    c"cuInit",
    c"cuDeviceGetCount",
    c"cuDeviceGet",
    c"cuDeviceGetName",
    c"cuDeviceTotalMem_v2",
    c"cuDeviceGetAttribute",
    c"cuDevicePrimaryCtxRetain",
    c"cuDevicePrimaryCtxRelease_v2",
    c"cuCtxPushCurrent_v2",
    c"cuCtxPopCurrent_v2",
    c"cuGetErrorName",
    c"cuGetErrorString",
    c"cuStreamCreate",
    c"cuStreamDestroy_v2",
    c"cuStreamSynchronize",
    c"cuStreamGetCtx",
    c"cuStreamBeginCapture_v2",
    c"cuStreamEndCapture",
    c"cuMemAlloc_v2",
    c"cuMemFree_v2",
    c"cuMemAllocAsync",
    c"cuMemFreeAsync",
    c"cuMemGetInfo_v2",
    c"cuDeviceGetDefaultMemPool",
    c"cuMemPoolSetAttribute",
    c"cuMemPoolTrimTo",
    c"cuMemcpyHtoDAsync_v2",
    c"cuMemcpyDtoHAsync_v2",
    c"cuMemcpyDtoDAsync_v2",
    c"cuMemsetD8Async",
    c"cuModuleLoadData",
    c"cuModuleUnload",
    c"cuModuleGetFunction",
    c"cuFuncSetAttribute",
    c"cuLaunchKernel",
    c"cuGraphInstantiateWithFlags",
    c"cuGraphLaunch",
    c"cuGraphExecDestroy",
    c"cuGraphDestroy",
];

/// Finds the driver and starts it. Cheap once it succeeded.
///
/// # Errors
/// `Unsupported`, naming the libraries that were tried, or the symbol that the driver lacks; `Device` if it does not
/// start (no device, or a driver that does not fit its kernel module).
pub fn start() -> Result<()> {
    static STARTED: Mutex<bool> = Mutex::new(false);
    let mut started = STARTED.lock().unwrap_or_else(PoisonError::into_inner);
    if !*started {
        probe()?;
        // SAFETY: the symbol is there; the call takes no pointers.
        check("cuda", "cuInit", unsafe { sys::cuInit(0) })?;
        *started = true;
    }
    Ok(())
}

/// The library. Its handle is kept: the bindings find the same library by its name.
fn library() -> Option<*mut c_void> {
    NAMES.iter().find_map(|name| {
        // SAFETY: loading NVIDIA's library runs its initialisers, which is what the caller asked for.
        let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        (!handle.is_null()).then_some(handle)
    })
}

/// Whether a started driver has a symbol that not all drivers have.
pub fn has(symbol: &CStr) -> bool {
    // SAFETY: the handle is open, the name is a string.
    library().is_some_and(|handle| !unsafe { libc::dlsym(handle, symbol.as_ptr()) }.is_null())
}

fn probe() -> Result<()> {
    let Some(handle) = library() else {
        let names = NAMES.map(|name| name.to_string_lossy().into_owned()).join(" and ");
        let reason = format!("the NVIDIA driver was not found: tried {names}");
        return Err(Error::unsupported("device \"cuda\"", reason));
    };
    // SAFETY: the handle is open, names are strings.
    let missing = SYMBOLS.iter().find(|name| unsafe { libc::dlsym(handle, name.as_ptr()) }.is_null());
    match missing {
        None => Ok(()),
        Some(name) => {
            let reason = format!("the NVIDIA driver is too old: it lacks {}", name.to_string_lossy());
            Err(Error::unsupported("device \"cuda\"", reason))
        }
    }
}

/// # Errors
/// `Device`, naming the call and NVIDIA's code, unless it succeeded.
pub fn check(device: &str, call: &str, result: sys::CUresult) -> Result<()> {
    if result == sys::CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let (mut name, mut text): (*const c_char, *const c_char) = (std::ptr::null(), std::ptr::null());
    // SAFETY: both are probed, and write pointers to constant strings, or null for an unknown code.
    unsafe {
        let _ = sys::cuGetErrorName(result, &mut name);
        let _ = sys::cuGetErrorString(result, &mut text);
    }
    let read = |text: *const c_char| {
        if text.is_null() {
            return String::from("unknown");
        }
        // SAFETY: not null, so a constant string of the driver's.
        unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
    };
    Err(Error::device(device, format!("{call}: {} ({})", read(name), read(text))))
}

/// Makes a context current on this thread until it is dropped; then the caller's is current again.
#[derive(Debug)]
pub struct Bound {
    /// Not to be dropped on another thread.
    _thread: std::marker::PhantomData<*const ()>,
}

impl Bound {
    /// # Errors
    /// `Device`.
    pub fn new(device: &str, context: sys::CUcontext) -> Result<Self> {
        // SAFETY: the context is retained by whoever calls.
        check(device, "cuCtxPushCurrent", unsafe { sys::cuCtxPushCurrent_v2(context) })?;
        Ok(Bound { _thread: std::marker::PhantomData })
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        let mut popped = std::ptr::null_mut();
        // SAFETY: takes what `new` pushed. It fails only with the device, which the next call reports.
        let _ = unsafe { sys::cuCtxPopCurrent_v2(&mut popped) };
    }
}
