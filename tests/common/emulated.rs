//! For tests of the GPU as a host of the library meets it, which need the emulation and not a GPU.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use cudarc::driver::sys;

/// Memory of a device at first.
pub const MEMORY: usize = 4 << 30;

/// One test at a time: faults, counts and the size of the memory are the process's. None where there is no emulation.
pub fn alone() -> Option<MutexGuard<'static, ()>> {
    static ALONE: Mutex<()> = Mutex::new(());
    let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    if !super::folder::devices::is_emulated() {
        return None;
    }
    cuda_emulation::fail_no_call();
    cuda_emulation::set_memory(MEMORY);
    Some(alone)
}

/// The context that is current on this thread, as a number.
pub fn current_context() -> usize {
    let mut context = std::ptr::null_mut();
    // SAFETY: `context` outlives the call.
    match unsafe { sys::cuCtxGetCurrent(&mut context) } {
        sys::CUresult::CUDA_SUCCESS => context as usize,
        // Nobody has started the driver.
        sys::CUresult::CUDA_ERROR_NOT_INITIALIZED => 0,
        other => panic!("cuCtxGetCurrent: {other:?}"),
    }
}

/// The primary context of the first device, as a host holds it.
pub struct Host {
    pub context: sys::CUcontext,
}

impl Host {
    pub fn new() -> Self {
        let mut context = std::ptr::null_mut();
        // SAFETY: `context` outlives the calls.
        unsafe {
            sys::cuInit(0).result().unwrap();
            sys::cuDevicePrimaryCtxRetain(&mut context, 0).result().unwrap();
        }
        Host { context }
    }

    /// Makes it, or none, current on this thread.
    pub fn set_current(&self, current: bool) {
        let context = if current { self.context } else { std::ptr::null_mut() };
        // SAFETY: a context that is held.
        unsafe { sys::cuCtxSetCurrent(context) }.result().unwrap();
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // SAFETY: retained in `new`.
        unsafe { sys::cuDevicePrimaryCtxRelease_v2(0) }.result().unwrap();
    }
}

/// An empty folder, removed in the end.
pub struct Scratch(pub PathBuf);

impl Scratch {
    pub fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("wuerstchen-cuda-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Scratch(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

const CHILD: &str = "WST_TEST_CHILD";

/// Whether this process was started by [`in_child`].
pub fn is_child() -> bool {
    std::env::var_os(CHILD).is_some()
}

/// Runs one test of this program, alone, in a process of its own with these variables.
pub fn in_child(test: &str, variables: &[(&str, &Path)]) -> Output {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture", "--test-threads=1"]).env(CHILD, "1");
    command.envs(variables.iter().copied());
    let output = command.output().unwrap();
    let text =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && text.contains("1 passed"), "{test}: {}\n{text}", output.status);
    output
}
