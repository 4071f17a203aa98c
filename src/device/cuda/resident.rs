//! Weights on the device: uploaded from the mapped file when they are used first, in the type in which they are used.

use std::any::Any;
use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use cudarc::driver::sys;

use super::gpu::{Gpu, lock};
use super::memory::Taken;
use super::stream::{Launch, Stream};
use super::{Precision, kernels};
use crate::error::{Error, Result};

kernels!(KERNELS, "convert");

/// The kernels that every use of a GPU needs.
pub(super) fn kernels() -> &'static super::Kernels {
    &KERNELS
}

/// Bytes of a weight that are uploaded at a time where it has to be converted.
const TRANSIT_BYTES: usize = 32 << 20;

/// Numbers on the host.
#[derive(Debug, Clone, Copy)]
pub struct Source<'a> {
    /// What they are, for errors.
    pub what: &'a str,
    /// Their bytes.
    pub bytes: &'a [u8],
    /// Their type; `None` for what is no float, which is never converted.
    pub precision: Option<Precision>,
}

/// Where a weight lies in which file, and as what it is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    address: usize,
    bytes: usize,
    wanted: Option<Precision>,
}

/// A weight on a device: memory of no stream.
#[derive(Debug)]
struct Resident {
    gpu: Arc<Gpu>,
    address: u64,
    bytes: usize,
    /// The mapping that it was read from: as long as it stands, no other file has these addresses.
    _file: Arc<dyn Any + Send + Sync>,
}

impl Resident {
    fn allocate(gpu: &Arc<Gpu>, what: &str, bytes: usize, file: Arc<dyn Any + Send + Sync>) -> Result<Self> {
        let _bound = gpu.bind()?;
        let mut address = 0;
        let mut allocate = || {
            // SAFETY: a context is current; `address` outlives the call.
            unsafe { sys::cuMemAlloc_v2(&mut address, bytes.max(1)) }
        };
        let mut result = allocate();
        if result == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            gpu.trim();
            result = allocate();
        }
        match result {
            sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => Err(Error::out_of_memory(what, bytes)),
            result => {
                gpu.check("cuMemAlloc", result)?;
                Ok(Resident { gpu: gpu.clone(), address, bytes, _file: file })
            }
        }
    }
}

impl Drop for Resident {
    fn drop(&mut self) {
        if let Some(_bound) = self.gpu.bind_to_free() {
            // SAFETY: allocated in `allocate`. The call waits for work that may still read it.
            let _ = unsafe { sys::cuMemFree_v2(self.address) };
        }
    }
}

/// The weights that lie on a device.
#[derive(Debug, Default)]
pub struct Residents {
    entries: Mutex<HashMap<Key, Arc<Resident>>>,
}

impl Residents {
    /// The numbers of `source`, which are part of `file`, as `wanted`.
    ///
    /// # Errors
    /// `OutOfMemory`, naming the weight; `Device`; `Internal` if they are not here while a step is recorded.
    pub fn get(
        &self,
        stream: &Stream,
        source: Source,
        wanted: Option<Precision>,
        file: impl FnOnce() -> Arc<dyn Any + Send + Sync>,
    ) -> Result<Taken> {
        let key = Key { address: source.bytes.as_ptr() as usize, bytes: source.bytes.len(), wanted };
        // Held during the upload: nobody else begins the same one.
        let mut entries = lock(&self.entries);
        if let Some(resident) = entries.get(&key) {
            return Ok(stream.using(Taken::new(resident.address, 0, resident.clone())));
        }
        if stream.is_recording() {
            return Err(Error::internal("a recorded step", format!("{} is not on the device", source.what)));
        }
        let count = source.precision.map_or(0, |precision| source.bytes.len() / precision.size());
        let bytes = match (source.precision, wanted) {
            (Some(_), Some(wanted)) => count * wanted.size(),
            _ => source.bytes.len(),
        };
        let resident = Arc::new(Resident::allocate(stream.gpu(), source.what, bytes, file())?);
        fill(stream, source, wanted, resident.address)?;
        // Other streams will read it.
        stream.wait()?;
        let taken = Taken::new(resident.address, 0, resident.clone());
        entries.try_reserve(1).map_err(|_| Error::out_of_memory("the list of weights", size_of::<Key>()))?;
        entries.insert(key, resident);
        Ok(stream.using(taken))
    }

    /// Frees the weights that lie in `range` of the host's addresses.
    pub fn evict(&self, range: std::ops::Range<usize>) {
        let gone: Vec<Arc<Resident>> = {
            let mut entries = lock(&self.entries);
            entries.extract_if(|key, _| range.contains(&key.address)).map(|(_, resident)| resident).collect()
        };
        drop(gone);
    }

    /// Memory that weights take, in bytes.
    pub fn bytes(&self) -> usize {
        lock(&self.entries).values().map(|resident| resident.bytes).sum()
    }
}

/// Brings numbers to the device, converted on it where their type is not the one wanted.
fn fill(stream: &Stream, source: Source, wanted: Option<Precision>, to: u64) -> Result<()> {
    let (from, wanted) = match (source.precision, wanted) {
        (Some(from), Some(wanted)) if from != wanted => (from, wanted),
        _ => {
            return in_parts(stream, source, |part, offset, bytes| {
                // SAFETY: `to` has as many bytes as the source, the part as many as it says.
                unsafe { stream.copy(part, to + offset as u64, bytes) }
            });
        }
    };
    in_parts(stream, source, |part, offset, bytes| {
        let target = to + (offset / from.size() * wanted.size()) as u64;
        // SAFETY: the part has this many numbers, and `to` room for all of the source's.
        unsafe { convert(stream, (part, from), (target, wanted), bytes / from.size()) }
    })
}

/// Uploads `source` a part at a time to memory in transit, whose address, with the part's offset and length, `place`
/// gets.
fn in_parts(
    stream: &Stream,
    source: Source,
    mut place: impl FnMut(u64, usize, usize) -> Result<()>,
) -> Result<()> {
    for (i, part) in source.bytes.chunks(TRANSIT_BYTES).enumerate() {
        let transit = stream.take(source.what, part.len())?;
        stream.upload(part, &transit, 0)?;
        place(transit.address(), i * TRANSIT_BYTES, part.len())?;
    }
    Ok(())
}

/// Converts `count` numbers on the device.
///
/// # Safety
/// Both addresses have as many numbers of their types.
///
/// # Errors
/// `Device`.
pub(crate) unsafe fn convert(
    stream: &Stream,
    (from, of): (u64, Precision),
    (to, wanted): (u64, Precision),
    count: usize,
) -> Result<()> {
    if count == 0 {
        return Ok(());
    }
    let name = match of {
        Precision::F32 => "convert_from_f32_to",
        Precision::F16 => "convert_from_f16_to",
        Precision::BF16 => "convert_from_bf16_to",
    };
    // SAFETY: as the kernel declares; the numbers are there by this function's contract.
    unsafe {
        stream.launch(&KERNELS, name, Some(wanted), Launch::elements(count), &[&from, &to, &(count as i64)])
    }
}
