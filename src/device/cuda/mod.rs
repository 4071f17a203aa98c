//! NVIDIA GPUs: the driver, streams, memory, kernels and matrix products. Knows no op and no tensor.
//!
//! A [`Gpu`] is a device with what all its users share: compiled kernels and resident weights. A [`Stream`] is a line
//! of work on it, with memory of its own: one thread at a time uses it, through a [`Context`](super::Context). What is
//! freed is used again by what comes later in the same stream, so nothing waits for the device.
//!
//! `unsafe` calls into NVIDIA's libraries stand in this folder and in the `cuda` modules of ops, nowhere else.

mod accelerator;
mod cache;
mod compile;
mod copy;
mod driver;
pub(crate) mod gemm;
mod gpu;
mod graph;
mod images;
mod memory;
mod resident;
mod stream;

pub use accelerator::Accelerator;
pub use compile::Kernels;
pub use copy::Copy;
pub use gemm::{Batch, Matrix, Product, Tail};
pub use gpu::{Capability, Gpu, GpuInfo, describe, gpus};
pub use graph::{Graph, StepMemory};
pub use memory::{Memory, Taken};
pub(crate) use resident::convert;
pub use resident::{Residents, Source};
pub use stream::{Launch, Parameter, Stream};

/// How numbers are stored on a GPU. Sums are always in F32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Precision {
    /// 32-bit IEEE float.
    F32,
    /// 16-bit IEEE float.
    F16,
    /// 16-bit brain float.
    BF16,
}

impl Precision {
    /// Bytes per number.
    pub const fn size(self) -> usize {
        match self {
            Precision::F32 => 4,
            Precision::F16 | Precision::BF16 => 2,
        }
    }

    /// What the names of kernels over this type end in.
    pub const fn suffix(self) -> &'static str {
        match self {
            Precision::F32 => "f32",
            Precision::F16 => "f16",
            Precision::BF16 => "bf16",
        }
    }
}

/// Defines the kernels of one source file, which stands beside the op: `kernels!(KERNELS, "layer_norm")`. The names of
/// headers that stand there too follow.
macro_rules! kernels {
    ($name:ident, $file:literal $(, $header:literal)*) => {
        static $name: $crate::device::cuda::Kernels = $crate::device::cuda::Kernels::new(
            $file,
            include_str!(concat!($file, ".cu")),
            &[$(($header, include_str!($header))),*],
        );
    };
}
pub(crate) use kernels;
