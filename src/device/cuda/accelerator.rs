//! A GPU as one device of the library uses it: its streams, the weights on it, the type it computes in.

use std::sync::{Arc, Mutex};

use super::gpu::lock;
use super::{Gpu, Precision, Residents, Stream};
use crate::error::{Error, Result};

/// A GPU in use.
#[derive(Debug)]
pub struct Accelerator {
    gpu: Arc<Gpu>,
    precision: Precision,
    factors: Precision,
    residents: Residents,
    idle: Mutex<Vec<Arc<Stream>>>,
    /// The host's own stream: all work runs on it, one call at a time.
    external: Option<Arc<Stream>>,
}

impl Accelerator {
    /// Over `gpu`, with activations of type `precision`.
    pub fn new(gpu: Arc<Gpu>, precision: Precision) -> Self {
        let (residents, idle) = (Residents::default(), Mutex::default());
        Accelerator { gpu, precision, factors: precision, residents, idle, external: None }
    }

    /// The same, with factors of matrix products rounded to `factors`. Sums and results stay what they are: mixed
    /// precision, for training.
    #[must_use]
    pub fn with_factors(self, factors: Precision) -> Self {
        Accelerator { factors, ..self }
    }

    /// The same, on a stream of the host's.
    #[must_use]
    pub fn on_stream(self, external: Arc<Stream>) -> Self {
        Accelerator { idle: Mutex::new(vec![external.clone()]), external: Some(external), ..self }
    }

    /// The GPU.
    pub fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }

    /// The type of activations.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// The type of the factors of matrix products.
    pub fn factors(&self) -> Precision {
        self.factors
    }

    /// Weights that lie on it.
    pub fn residents(&self) -> &Residents {
        &self.residents
    }

    /// A stream that nobody uses.
    ///
    /// # Errors
    /// `Busy` if there is only the host's, and it is in use; `Device`.
    pub(in crate::device) fn lend(&self) -> Result<Arc<Stream>> {
        match (lock(&self.idle).pop(), &self.external) {
            (Some(stream), _) => Ok(stream),
            (None, None) => Stream::new(&self.gpu),
            (None, Some(_)) => Err(Error::Busy { what: "the stream that was given as cuda_stream".into() }),
        }
    }

    /// Takes a stream back.
    pub(in crate::device) fn give_back(&self, stream: Arc<Stream>) {
        let mut idle = lock(&self.idle);
        if idle.try_reserve(1).is_ok() {
            idle.push(stream);
        }
    }

    /// How many kernels idle streams have launched, and how often the host has read what lies on the device.
    pub fn traffic(&self) -> (u64, u64) {
        let of = |stream: &Arc<Stream>| (stream.launches(), stream.downloads());
        lock(&self.idle).iter().map(of).fold((0, 0), |sum, of| (sum.0 + of.0, sum.1 + of.1))
    }

    /// Memory held on the device, in bytes: weights, and what idle streams keep for reuse.
    pub fn bytes(&self) -> usize {
        self.residents.bytes() + lock(&self.idle).iter().map(|stream| stream.bytes()).sum::<usize>()
    }
}
