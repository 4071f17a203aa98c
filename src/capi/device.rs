//! The compute devices of this machine: the CPU, then NVIDIA's GPUs.

use std::ffi::c_char;

use super::boundary::{Sized32, StructOut, boundary};
use super::error::{wst_error, wst_status};
use crate::error::Error;
use crate::pipeline::devices;

/// A compute device. Set `struct_size` to `sizeof(wst_device_info_t)` before the call.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct wst_device_info_t {
    /// The size that the caller was compiled with, in bytes.
    pub struct_size: u32,
    /// Cores that this process may use; a GPU's multiprocessors.
    pub threads: u32,
    /// Memory of the device.
    pub memory_bytes: u64,
    /// What of it is available now.
    pub memory_available_bytes: u64,
    /// The name that wst_model_options_set_device takes: "cpu", "cuda:0".
    pub name: [c_char; 64],
    /// What the device calls itself, for people.
    pub description: [c_char; 128],
}

// SAFETY: repr(C), starts with `struct_size`, 4 + 4 + 8 + 8 + 64 + 128 bytes without padding, numbers only.
unsafe impl Sized32 for wst_device_info_t {
    const NAME: &'static str = "wst_device_info_t";
    const FIRST_END: usize = 8;
}

/// How many compute devices there are; at least 1, the CPU. GPUs come after it, where NVIDIA's driver is found.
///
/// Owner: nothing changes hands.
/// Threads: any.
/// Errors: none.
#[unsafe(no_mangle)]
pub extern "C" fn wst_device_count() -> usize {
    1 + gpus()
}

/// A panic of the bindings is no GPU.
fn gpus() -> usize {
    std::panic::catch_unwind(devices::gpu_count).unwrap_or(0)
}

/// Describes device `index`; the CPU is device 0.
///
/// Owner: the caller's struct is filled up to its `struct_size`.
/// Threads: any.
/// Errors: WST_INVALID_ARGUMENT for an index without a device, NULL, or a bad `struct_size`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_device_info(
    index: usize,
    out: *mut wst_device_info_t,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        boundary("wst_device_info", error, StructOut("out", out), |_| {
            let count = wst_device_count();
            if index >= count {
                return Err(Error::argument("index", format!("below {count}, the number of devices"), index));
            }
            match index.checked_sub(1) {
                None => Ok(cpu()),
                Some(number) => gpu(number),
            }
        })
    }
}

fn cpu() -> wst_device_info_t {
    let (memory_bytes, memory_available_bytes) = memory();
    let mut info = wst_device_info_t {
        struct_size: size_of::<wst_device_info_t>() as u32,
        threads: std::thread::available_parallelism().map_or(1, |n| n.get() as u32),
        memory_bytes,
        memory_available_bytes,
        name: [0; 64],
        description: [0; 128],
    };
    fill(&mut info.name, "cpu");
    fill(&mut info.description, &cpu_name());
    info
}

fn gpu(number: usize) -> Result<wst_device_info_t, Error> {
    let found = devices::gpu_info(number)?;
    let mut info = wst_device_info_t {
        struct_size: size_of::<wst_device_info_t>() as u32,
        threads: found.threads,
        memory_bytes: found.memory_bytes,
        memory_available_bytes: found.memory_available_bytes,
        name: [0; 64],
        description: [0; 128],
    };
    fill(&mut info.name, &found.name);
    fill(&mut info.description, &found.description);
    Ok(info)
}

/// Writes as many whole characters as fit, and a NUL byte.
fn fill(field: &mut [c_char], text: &str) {
    let end = whole_characters(text, field.len() - 1);
    for (to, from) in field.iter_mut().zip(&text.as_bytes()[..end]) {
        *to = *from as c_char;
    }
}

/// The length of the longest start of `text` that ends between characters and fits `limit` bytes.
fn whole_characters(text: &str, limit: usize) -> usize {
    (0..=limit.min(text.len())).rev().find(|&i| text.is_char_boundary(i)).unwrap_or(0)
}

/// All and available memory, in bytes; 0 if the system does not say.
fn memory() -> (u64, u64) {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let field = |key: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(key));
        let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
        kib.unwrap_or(0) * 1024
    };
    (field("MemTotal:"), field("MemAvailable:"))
}

fn cpu_name() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("model name"));
    line.and_then(|rest| rest.split_once(':'))
        .map_or(std::env::consts::ARCH, |(_, name)| name.trim())
        .to_owned()
}
