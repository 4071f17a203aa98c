//! Memory, threads and matrix products of one compute device. Knows no op and no network.

mod cancel;
pub mod cuda;
pub mod gemm;
pub mod int8;
mod memory;
#[cfg(feature = "mpi")]
pub mod mpi;
pub mod profile;
mod reduce;
pub mod reserve;
pub mod scratch;
pub mod simd;
pub mod threads;

use std::any::Any;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

pub use cancel::CancelToken;
pub use memory::{ALIGNMENT, Buffer, Pool};
pub use reduce::Reduce;

use crate::error::{Error, Result};
use cuda::{Accelerator, Precision, Stream};
use int8::QuantisedWeights;
use scratch::SharedMut;
use threads::ThreadPool;

/// A compute device: threads and reusable memory, and the GPU that does the work if there is one. Clones share them.
#[derive(Debug, Clone)]
pub struct Device {
    inner: Arc<Inner>,
    products: Products,
}

/// What the CPU rounds the factors of products to. Sums are in f32, of eight bits in whole numbers.
#[derive(Debug, Clone)]
enum Products {
    /// Nothing.
    F32,
    /// bf16, where the processor has instructions for it.
    Bf16,
    /// Eight bits where [`Context::quantised`] says so, with the weights that are kept so; elsewhere as [`Products::Bf16`].
    EightBits(Arc<QuantisedWeights>),
}

#[derive(Debug)]
struct Inner {
    threads: ThreadPool,
    pool: Arc<Pool>,
    accelerator: Option<Accelerator>,
}

impl Device {
    /// The CPU with `threads` threads; 0 takes one per available core.
    ///
    /// # Errors
    /// `OutOfMemory` if the threads cannot be started.
    pub fn cpu(threads: usize) -> Result<Self> {
        Self::new(threads, None)
    }

    /// A GPU, with `threads` threads of the CPU for what is left to that.
    ///
    /// # Errors
    /// As [`Device::cpu`].
    pub fn cuda(accelerator: Accelerator, threads: usize) -> Result<Self> {
        Self::new(threads, Some(accelerator))
    }

    fn new(threads: usize, accelerator: Option<Accelerator>) -> Result<Self> {
        let threads = match threads {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            n => n,
        };
        let inner =
            Inner { threads: ThreadPool::new(threads)?, pool: Arc::new(Pool::default()), accelerator };
        Ok(Device { inner: Arc::new(inner), products: Products::F32 })
    }

    /// The CPU, where the factors of products are rounded to bf16 if it has instructions for that
    /// ([`gemm::multiplies_bf16`]); else as [`Device::cpu`].
    ///
    /// # Errors
    /// As [`Device::cpu`].
    pub fn cpu_in_bf16(threads: usize) -> Result<Self> {
        Ok(Device { products: Products::Bf16, ..Self::cpu(threads)? })
    }

    /// The CPU, where products of [`Context::quantised`] are computed in eight bits, and others as
    /// [`Device::cpu_in_bf16`] does.
    ///
    /// # Errors
    /// As [`Device::cpu`].
    pub fn cpu_in_eight_bits(threads: usize) -> Result<Self> {
        Ok(Device { products: Products::EightBits(Arc::default()), ..Self::cpu(threads)? })
    }

    /// The device as training needs it: one that keeps activations in F32 and rounds factors of products to `factors`. A
    /// GPU with streams and weights of its own; the CPU as [`Device::cpu_in_bf16`] or in F32.
    ///
    /// # Errors
    /// `OutOfMemory` if threads cannot be started.
    pub fn for_training(&self, factors: Precision) -> Result<Self> {
        match self.accelerator() {
            Some(on) if on.precision() != Precision::F32 || factors != Precision::F32 => {
                let accelerator = Accelerator::new(on.gpu().clone(), Precision::F32).with_factors(factors);
                Self::cuda(accelerator, self.threads())
            }
            _ => {
                let products = if factors == Precision::BF16 { Products::Bf16 } else { Products::F32 };
                Ok(Device { products, ..self.clone() })
            }
        }
    }

    /// For a log: the GPU or the CPU, and its threads.
    pub fn describe(&self) -> String {
        let threads = self.threads();
        match (self.accelerator(), &self.products) {
            (Some(on), _) => format!("{:?} in {:?}, with {threads} CPU threads", on.gpu(), on.precision()),
            (None, Products::F32) => format!("{threads} CPU threads"),
            (None, Products::Bf16) if gemm::multiplies_bf16() => format!("{threads} CPU threads, in BF16"),
            (None, Products::Bf16) => {
                format!("{threads} CPU threads, in F32 for want of instructions for BF16")
            }
            (None, Products::EightBits(_)) => format!("{threads} CPU threads, in eight bits"),
        }
    }

    /// How many threads take part in a loop.
    pub fn threads(&self) -> usize {
        self.inner.threads.threads()
    }

    /// Memory from the device's pool: arbitrary but initialised content.
    ///
    /// # Errors
    /// `OutOfMemory`, naming `what`.
    pub fn take(&self, what: &str, bytes: usize) -> Result<Buffer> {
        self.inner.pool.take(what, bytes)
    }

    /// The pool itself, to trim or to ask how much lies idle.
    pub fn pool(&self) -> &Arc<Pool> {
        &self.inner.pool
    }

    /// The GPU, if this is one.
    pub fn accelerator(&self) -> Option<&Accelerator> {
        self.inner.accelerator.as_ref()
    }

    /// The weights that it keeps in eight bits, if it does.
    pub fn quantised_weights(&self) -> Option<&QuantisedWeights> {
        match &self.products {
            Products::EightBits(weights) => Some(weights),
            Products::F32 | Products::Bf16 => None,
        }
    }

    /// Whether factors of products are rounded to bf16, if the processor has instructions for that.
    pub fn rounds_factors(&self) -> bool {
        !matches!(self.products, Products::F32)
    }
}

/// What an op needs to run: the device, the tokens that may stop it, the tape it records on and who hears where its time
/// goes, if any. Passed to every op and layer.
#[derive(Debug, Clone)]
pub struct Context {
    device: Device,
    cancels: Vec<CancelToken>,
    attachment: Option<Attachment>,
    recorder: Option<Arc<profile::Recorder>>,
    lane: Arc<Lane>,
    /// Whether what is computed bears eight bits.
    coarse: bool,
}

/// The stream of a context and its clones, taken when the first op asks for it.
#[derive(Debug)]
struct Lane {
    device: Device,
    stream: OnceLock<Arc<Stream>>,
    taking: Mutex<()>,
}

impl Lane {
    fn stream(&self, accelerator: &Accelerator) -> Result<&Arc<Stream>> {
        let _taking = self.taking.lock().unwrap_or_else(PoisonError::into_inner);
        match self.stream.get() {
            Some(stream) => Ok(stream),
            None => {
                let stream = accelerator.lend()?;
                Ok(self.stream.get_or_init(|| stream))
            }
        }
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        if let (Some(accelerator), Some(stream)) = (self.device.accelerator(), self.stream.take()) {
            accelerator.give_back(stream);
        }
    }
}

/// Something that a layer above hands down to those between: `tensor::autograd` attaches its tape. The device does
/// not look at it.
#[derive(Clone)]
struct Attachment(Arc<dyn Any + Send + Sync>);

impl std::fmt::Debug for Attachment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Attachment")
    }
}

impl Context {
    /// A context that nothing cancels.
    pub fn new(device: &Device) -> Self {
        let lane = Lane { device: device.clone(), stream: OnceLock::new(), taking: Mutex::new(()) };
        Context {
            device: device.clone(),
            cancels: Vec::new(),
            attachment: None,
            recorder: None,
            lane: Arc::new(lane),
            coarse: false,
        }
    }

    /// The same context with `attachment` in the place of what was attached.
    #[must_use]
    pub fn attached(&self, attachment: Option<Arc<dyn Any + Send + Sync>>) -> Self {
        Context { attachment: attachment.map(Attachment), ..self.clone() }
    }

    /// The same context for work that bears products in eight bits, if the device computes in them.
    #[must_use]
    pub fn coarse(&self) -> Self {
        Context { coarse: true, ..self.clone() }
    }

    /// The weights in eight bits, if products are computed in them here.
    pub fn quantised(&self) -> Option<&QuantisedWeights> {
        self.device.quantised_weights().filter(|_| self.coarse)
    }

    /// What is attached, if it is a `T`.
    pub fn attachment<T: Any>(&self) -> Option<&T> {
        self.attachment.as_ref().and_then(|attached| attached.0.downcast_ref())
    }

    /// The same context, stopped by `token` too.
    #[must_use]
    pub fn cancelled_by(mut self, token: &CancelToken) -> Self {
        self.cancels.push(token.clone());
        self
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The stream that work goes to, if the device is a GPU.
    ///
    /// # Errors
    /// `Device`; `Busy` if the host gave a stream, which another call uses.
    pub fn cuda(&self) -> Result<Option<&Arc<Stream>>> {
        self.device.accelerator().map(|accelerator| self.lane.stream(accelerator)).transpose()
    }

    /// # Errors
    /// `Cancelled` if a token asked to stop.
    pub fn check(&self) -> Result<()> {
        if self.cancels.iter().any(CancelToken::is_cancelled) { Err(Error::Cancelled) } else { Ok(()) }
    }

    /// Calls `body` once with each number below `tasks`, spread over the device's threads.
    ///
    /// # Errors
    /// `Cancelled` if a token asked to stop, seen before the loop and before each task (outputs are then
    /// incomplete and must be thrown away); `Internal` if a task panicked.
    pub fn parallel(&self, tasks: usize, body: impl Fn(usize) + Sync) -> Result<()> {
        self.check()?;
        self.device.inner.threads.parallel(tasks, &|task| {
            if self.check().is_ok() {
                body(task);
            }
        })?;
        self.check()
    }

    /// Calls `body(i, part)` for each part of `chunk` elements of `out` (the last may be shorter), in parallel.
    ///
    /// # Errors
    /// As [`Context::parallel`].
    pub fn parallel_chunks<T: Send>(
        &self,
        out: &mut [T],
        chunk: usize,
        body: impl Fn(usize, &mut [T]) + Sync,
    ) -> Result<()> {
        self.parallel_chunks_of([out], chunk, |i, [part]| body(i, part))
    }

    /// As [`Context::parallel_chunks`], over the same parts of several slices. Their lengths must be the same.
    ///
    /// # Errors
    /// As [`Context::parallel`]; `Internal` for slices of different lengths.
    pub fn parallel_chunks_of<T: Send, const N: usize>(
        &self,
        slices: [&mut [T]; N],
        chunk: usize,
        body: impl Fn(usize, [&mut [T]; N]) + Sync,
    ) -> Result<()> {
        let (len, chunk) = (slices.first().map_or(0, |slice| slice.len()), chunk.max(1));
        if slices.iter().any(|slice| slice.len() != len) {
            return Err(Error::internal("a parallel loop", "slices of different lengths"));
        }
        let shared = slices.map(SharedMut::new);
        self.parallel(len.div_ceil(chunk), |i| {
            let (start, count) = (i * chunk, chunk.min(len - i * chunk));
            // SAFETY: each task number occurs once, and the ranges of different numbers are disjoint.
            body(i, std::array::from_fn(|n| unsafe { shared[n].part(start, count) }));
        })
    }
}
