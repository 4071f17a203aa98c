//! Kernels compiled by the fake NVRTC, launched through the bindings that the library uses.
#![allow(dead_code, clippy::unwrap_used)]

use std::ffi::{CString, c_char};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::{CudaContext, CudaModule, LaunchConfig};
use cudarc::nvrtc::{Ptx, result, sys};

/// Loads the emulation. Settings and counts are the process's: the guard lets one test at a time at them.
pub fn alone() -> MutexGuard<'static, ()> {
    static LOCK: Mutex<()> = Mutex::new(());
    let guard = LOCK.lock().unwrap_or_else(PoisonError::into_inner);
    cuda_emulation::load().unwrap();
    cuda_emulation::fail_no_call();
    guard
}

/// Machine code for the architecture that the emulated device has, or the compiler's messages.
pub fn compile(source: &str, options: &[&str]) -> Result<Vec<u8>, String> {
    compile_for("sm_90", source, options)
}

pub fn compile_for(target: &str, source: &str, options: &[&str]) -> Result<Vec<u8>, String> {
    let program = result::create_program(&CString::new(source).unwrap(), Some(c"test.cu")).unwrap();
    let target = format!("--gpu-architecture={target}");
    let options: Vec<&str> = options.iter().copied().chain([target.as_str()]).collect();
    // SAFETY: the program lives until the end; the buffer is as long as the library says.
    unsafe {
        let compiled = result::compile_program(program, &options);
        let log = result::get_program_log(program).unwrap();
        let image = compiled.is_ok().then(|| {
            let mut bytes = 0;
            sys::nvrtcGetCUBINSize(program, &mut bytes).result().unwrap();
            let mut image = vec![0u8; bytes];
            sys::nvrtcGetCUBIN(program, image.as_mut_ptr().cast::<c_char>()).result().unwrap();
            image
        });
        result::destroy_program(program).unwrap();
        image.ok_or_else(|| log.iter().map(|c| *c as u8 as char).collect())
    }
}

pub fn module(context: &Arc<CudaContext>, source: &str) -> Arc<CudaModule> {
    let image = compile(source, &[]).unwrap_or_else(|log| panic!("{log}"));
    context.load_module(Ptx::from_binary(image)).unwrap()
}

pub fn shape(blocks: u32, threads: u32) -> LaunchConfig {
    LaunchConfig { grid_dim: (blocks, 1, 1), block_dim: (threads, 1, 1), shared_mem_bytes: 0 }
}

pub const ADD: &str = r#"
extern "C" __global__ void add(const float *a, const float *b, float *c, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) c[i] = a[i] + b[i];
}
CU_KERNEL(add)
extern "C" __global__ void increment(float *x, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) x[i] += 1.0f;
}
CU_KERNEL(increment)
"#;
