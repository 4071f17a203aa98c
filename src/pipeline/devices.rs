//! Which devices there are, and which one a model runs on.

use std::sync::Arc;

use crate::device::Device;
use crate::device::cuda::{self, Accelerator, Capability, Gpu, Precision, Stream};
use crate::error::{Error, Result};
use crate::tensor::DType;

/// From this architecture on, bf16 is as fast as f16, and has the range of f32.
const AMPERE: Capability = Capability { major: 8, minor: 0 };

/// Where a model is asked to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum DeviceChoice {
    /// The first GPU if it can be used, else the CPU.
    Auto,
    /// The CPU.
    Cpu,
    /// A GPU, by its number.
    Cuda(usize),
}

impl DeviceChoice {
    /// # Errors
    /// `InvalidArgument` for a name that is none.
    pub fn parse(name: &str) -> Result<Self> {
        let number = |text: &str| {
            let plain = text.len() < 4 && !text.is_empty() && text.bytes().all(|c| c.is_ascii_digit());
            plain.then(|| text.parse().ok()).flatten()
        };
        match (name, name.strip_prefix("cuda:").and_then(number)) {
            ("auto", _) => Ok(DeviceChoice::Auto),
            ("cpu", _) => Ok(DeviceChoice::Cpu),
            ("cuda", _) => Ok(DeviceChoice::Cuda(0)),
            (_, Some(number)) => Ok(DeviceChoice::Cuda(number)),
            _ => Err(Error::argument(
                "device",
                "\"auto\", \"cpu\", \"cuda\" or \"cuda:0\" and so on",
                format!("{name:?}"),
            )),
        }
    }
}

/// How a device is opened.
#[derive(Debug, Clone, Copy)]
pub(super) struct DeviceOptions {
    pub choice: DeviceChoice,
    /// Threads of the CPU; 0 takes one per core.
    pub threads: usize,
    /// The type of activations; `None` takes the device's best.
    pub dtype: Option<DType>,
    /// A stream of the host's, as an address; 0 for none.
    pub stream: usize,
}

impl DeviceOptions {
    /// Opens the device. Where "auto" finds a GPU that cannot be used, the second result says why.
    ///
    /// # Errors
    /// `Unsupported`, naming the libraries that were tried, or a type that the device does not compute in;
    /// `InvalidArgument` for a GPU that there is not, or a stream of another device; `Device`; `OutOfMemory`.
    pub fn open(&self) -> Result<(Device, Option<String>)> {
        match self.choice {
            DeviceChoice::Cpu => Ok((self.cpu()?, None)),
            DeviceChoice::Cuda(number) => Ok((self.cuda(number)?, None)),
            DeviceChoice::Auto => match cuda::gpus() {
                Ok(0) => Ok((self.cpu()?, None)),
                // No driver is no news.
                Err(Error::Unsupported { .. }) => Ok((self.cpu()?, None)),
                Err(error) => Ok((self.cpu()?, Some(error.to_string()))),
                Ok(_) => match self.cuda(0) {
                    Ok(device) => Ok((device, None)),
                    Err(error @ (Error::OutOfMemory { .. } | Error::InvalidArgument { .. })) => Err(error),
                    Err(error) => Ok((self.cpu()?, Some(error.to_string()))),
                },
            },
        }
    }

    fn cpu(&self) -> Result<Device> {
        if let Some(dtype @ DType::F16) = self.dtype {
            let reason = "the CPU computes in F32, BF16 or I8 (weights stay in their stored type)";
            return Err(Error::unsupported(format!("compute_dtype {dtype}"), reason));
        }
        if self.stream != 0 {
            return Err(Error::argument("cuda_stream", "a GPU as the device", "the CPU"));
        }
        match self.dtype {
            Some(DType::I8) => Device::cpu_in_eight_bits(self.threads),
            Some(DType::BF16) => Device::cpu_in_bf16(self.threads),
            _ => Device::cpu(self.threads),
        }
    }

    fn cuda(&self, number: usize) -> Result<Device> {
        if let Some(dtype @ DType::I8) = self.dtype {
            let reason = "a GPU computes in F32, F16 or BF16; only the CPU (device \"cpu\") does in I8";
            return Err(Error::unsupported(format!("compute_dtype {dtype}"), reason));
        }
        let gpu = Gpu::open(number)?;
        // Kernels that cannot be had are found out now, not in the middle of a picture.
        gpu.check_compiler()?;
        let precision = match self.dtype {
            Some(DType::F32) => Precision::F32,
            Some(DType::F16) => Precision::F16,
            Some(DType::BF16) => Precision::BF16,
            _ if gpu.info().capability >= AMPERE => Precision::BF16,
            _ => Precision::F16,
        };
        let accelerator = Accelerator::new(gpu.clone(), precision);
        let accelerator = match self.stream {
            0 => accelerator,
            // SAFETY: the option's setter makes the caller promise that this is a stream.
            raw => accelerator.on_stream(unsafe { Stream::external(&gpu, raw as *mut std::ffi::c_void)? }),
        };
        Device::cuda(accelerator, self.threads)
    }
}

/// A compute device of this machine.
#[derive(Debug, Clone)]
pub struct DeviceInfo {
    /// What options call it: `cpu`, `cuda:0`.
    pub name: String,
    /// What it calls itself.
    pub description: String,
    /// Memory in bytes; 0 if the system does not say.
    pub memory_bytes: u64,
    /// What of it is free now.
    pub memory_available_bytes: u64,
    /// Cores that this process may use; a GPU's multiprocessors.
    pub threads: u32,
}

/// How many GPUs can be used; none where NVIDIA's driver is not to be had.
pub fn gpu_count() -> usize {
    cuda::gpus().unwrap_or(0)
}

/// Describes GPU number `number`.
///
/// # Errors
/// `InvalidArgument` if there is none; `Device`.
pub fn gpu_info(number: usize) -> Result<DeviceInfo> {
    let info = cuda::describe(number)?;
    let open: Result<Arc<Gpu>> = Gpu::open(number);
    let available = open.and_then(|gpu| gpu.free_bytes()).unwrap_or(0);
    Ok(DeviceInfo {
        name: format!("cuda:{number}"),
        description: format!("{} (compute capability {})", info.name, info.capability),
        memory_bytes: info.memory_bytes as u64,
        memory_available_bytes: available as u64,
        threads: info.multiprocessors,
    })
}
