//! Which device a test program runs on: those called `cuda_*` on a GPU in f32, an emulated one unless
//! `WST_TEST_CUDA=real` asks for the machine's own; all others on the CPU, whatever the machine has.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used)]

use wuerstchen::device::cuda::{Accelerator, Gpu, Precision};
use wuerstchen::{Context, DType, Device, ModelOptions};

/// Threads of the CPU.
const THREADS: usize = 2;

/// Whether this program is for GPUs, and has one. Without a C++ compiler there is no emulation: it then runs on the CPU.
pub fn on_gpu() -> bool {
    env!("CARGO_CRATE_NAME").starts_with("cuda_") && has_gpu()
}

/// Whether there is a GPU, and it is the emulated one.
pub fn is_emulated() -> bool {
    std::env::var("WST_TEST_CUDA").as_deref() != Ok("real") && has_gpu()
}

fn has_gpu() -> bool {
    match std::env::var("WST_TEST_CUDA").as_deref() {
        Ok("none") => false,
        Ok("real") => true,
        _ => cuda_emulation::load().inspect_err(|reason| eprintln!("on the CPU: {reason}")).is_ok(),
    }
}

/// The device with what ops need to run.
pub fn context() -> Context {
    Context::new(&device(Precision::F32))
}

/// The device that computes in `precision`; the CPU, which has only F32, where the program is not for GPUs.
pub fn device(precision: Precision) -> Device {
    if !on_gpu() {
        return Device::cpu(THREADS).unwrap();
    }
    Device::cuda(Accelerator::new(Gpu::open(0).unwrap(), precision), THREADS).unwrap()
}

/// Options of a model on that device.
pub fn options() -> ModelOptions {
    let mut options = ModelOptions::default();
    options.set_device(if on_gpu() { "cuda" } else { "cpu" }).unwrap();
    options.set_compute_dtype(DType::F32).unwrap();
    options
}
