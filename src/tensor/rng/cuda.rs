//! Random numbers on a GPU: a thread for each block of four. The bits are those of the CPU.

use std::sync::Arc;

use super::Generators;
use crate::device::cuda::{Launch, Parameter, Stream, Taken, kernels};
use crate::error::{Error, Result};
use crate::tensor::{DType, Tensor};

kernels!(KERNELS, "rng");

/// [`Generators`] as kernels take them.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct DeviceGenerators {
    keys: u64,
    stream: u64,
    stride: u64,
}

impl DeviceGenerators {
    /// In the place of some.
    pub const NONE: Self = DeviceGenerators { keys: 0, stream: 0, stride: 0 };
}

// SAFETY: laid out as `Generators` in kernel.cuh.
unsafe impl Parameter for DeviceGenerators {}

/// [`DeviceGenerators`], and the list of seeds that they point to.
pub(crate) struct HeldGenerators {
    /// What a kernel takes.
    pub parameter: DeviceGenerators,
    _seeds: Taken,
}

impl Generators {
    /// The generators on the device.
    ///
    /// # Errors
    /// `OutOfMemory`; `Device`; `Internal` if the seeds are new while a step is recorded.
    pub(crate) fn on(&self, stream: &Stream) -> Result<HeldGenerators> {
        let words: Vec<u32> = self.seeds.iter().flat_map(|&seed| super::words(seed)).collect();
        let seeds = stream.constant(&words)?;
        let parameter = DeviceGenerators { keys: seeds.address(), stream: self.stream, stride: self.stride };
        Ok(HeldGenerators { parameter, _seeds: seeds })
    }
}

/// What is drawn.
#[derive(Debug, Clone, Copy)]
pub enum Kind {
    Normal,
    Uniform,
    Below(u32),
}

/// Fills `out`, `[N, ..]`.
pub fn fill(generators: &Generators, stream: &Arc<Stream>, out: &mut Tensor, kind: Kind) -> Result<()> {
    let (name, bound, dtype) = match kind {
        Kind::Normal => ("random_normal", None, DType::F32),
        Kind::Uniform => ("random_uniform", None, DType::F32),
        Kind::Below(bound) => ("random_below", Some(bound), DType::I64),
    };
    if out.dtype() != dtype {
        return Err(Error::argument("random numbers", format!("elements of type {dtype}"), out.dtype()));
    }
    let samples = generators.seeds.len();
    let per_sample = out.elements() / samples.max(1);
    if per_sample == 0 {
        return Ok(());
    }
    let held = generators.on(stream)?;
    let at = out.on_mut(stream)?;
    let launch = Launch::elements(samples * per_sample.div_ceil(4));
    let (samples, per_sample) = (samples as i64, per_sample as i64);
    let mut parameters: Vec<&dyn Parameter> = vec![&at, &held.parameter, &samples, &per_sample];
    parameters.extend(bound.iter().map(|bound| bound as &dyn Parameter));
    // SAFETY: as the kernels declare; there is a seed for each sample, and room for the numbers of all.
    unsafe { stream.launch(&KERNELS, name, None, launch, &parameters) }
}
