//! Weights in eight bits: quantised when they are used first, kept as long as they are used.

use std::any::Any;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::kernel::{magnitude, quantise};
use super::{COLUMNS, GROUP, Scale};
use crate::device::gemm::{Layout, MatrixB, Values};
use crate::device::scratch::SharedMut;
use crate::device::{Buffer, Context};
use crate::error::{Error, Result};

/// Weights of an output that are quantised in one go, on the stack.
const RUN: usize = 256;

/// What activations have too much: see [`super`].
const BIAS: i32 = 128;

/// Quantised weights of a product, outputs in panels of `COLUMNS`: group after group of `GROUP` values of each
/// output, then the outputs' scales, then 128 times the sums of their quantised weights.
#[derive(Debug)]
pub struct Packed {
    k: usize,
    n: usize,
    buffer: Buffer,
}

impl Packed {
    /// Quantises the `n` outputs of `k` inputs of `b`. Nothing if a weight is not finite.
    ///
    /// # Errors
    /// `OutOfMemory`; `Cancelled`.
    pub fn new(cx: &Context, b: &MatrixB, n: usize, k: usize) -> Result<Option<Self>> {
        let stride = panel_bytes(k);
        let panels = n.div_ceil(COLUMNS);
        let mut buffer = Buffer::new("weights in eight bits", panels.saturating_mul(stride))?;
        let shared = SharedMut::new(buffer.bytes_mut());
        let finite = std::sync::atomic::AtomicBool::new(true);
        cx.parallel(panels, |panel| {
            // SAFETY: each task has its own panel of the buffer, which outlives the loop.
            let bytes = unsafe { shared.part(panel * stride, stride) };
            let first = panel * COLUMNS;
            for column in 0..COLUMNS.min(n - first) {
                if !pack(b, first + column, k, column, bytes) {
                    finite.store(false, std::sync::atomic::Ordering::Relaxed);
                }
            }
        })?;
        Ok(finite.into_inner().then_some(Packed { k, n, buffer }))
    }

    /// Inputs.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Outputs.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Groups of inputs.
    pub(super) fn groups(&self) -> usize {
        self.k.div_ceil(GROUP)
    }

    #[cfg(test)]
    pub(super) fn buffer(&self) -> &[u8] {
        self.buffer.bytes()
    }

    /// One panel.
    pub(super) fn panel(&self, panel: usize) -> &[u8] {
        let stride = panel_bytes(self.k);
        &self.buffer.bytes()[panel * stride..][..stride]
    }
}

fn panel_bytes(k: usize) -> usize {
    k.div_ceil(GROUP) * GROUP * COLUMNS + COLUMNS * (size_of::<f32>() + size_of::<i32>())
}

/// Quantises output `n` to column `column` of a panel of zeros. False if a weight is not finite.
fn pack(b: &MatrixB, n: usize, k: usize, column: usize, panel: &mut [u8]) -> bool {
    let mut values = [0f32; RUN];
    let mut largest = 0;
    for first in (0..k).step_by(RUN) {
        let values = &mut values[..RUN.min(k - first)];
        read(b, n, first, values);
        largest = largest.max(magnitude(values));
    }
    let scale = Scale::of(largest);
    let (groups, tail) = panel.split_at_mut(k.div_ceil(GROUP) * GROUP * COLUMNS);
    let mut sum = 0;
    for (first, groups) in (0..k).step_by(RUN).zip(groups.chunks_mut(RUN * COLUMNS)) {
        let values = &mut values[..RUN.min(k - first)];
        read(b, n, first, values);
        let mut quantised = [0u8; RUN];
        quantise(values, scale.inverse, 0, &mut quantised[..values.len()]);
        sum += quantised.iter().map(|&q| i32::from(q as i8)).sum::<i32>();
        let groups = groups.chunks_exact_mut(COLUMNS * GROUP);
        for (group, four) in groups.zip(quantised.chunks_exact(GROUP)) {
            group[column * GROUP..][..GROUP].copy_from_slice(four);
        }
    }
    let (scales, offsets) = tail.split_at_mut(COLUMNS * size_of::<f32>());
    scales[column * 4..][..4].copy_from_slice(&scale.scale.to_ne_bytes());
    offsets[column * 4..][..4].copy_from_slice(&(BIAS * sum).to_ne_bytes());
    scale.scale.is_finite()
}

/// The weights of output `n` from input `k` on.
fn read(b: &MatrixB, n: usize, k: usize, to: &mut [f32]) {
    if b.layout == Layout::RowsAreInputs {
        to.iter_mut().enumerate().for_each(|(i, to)| *to = b.values.get((k + i) * b.leading + n));
        return;
    }
    let range = n * b.leading + k..n * b.leading + k + to.len();
    match b.values {
        Values::F32(v) => to.copy_from_slice(&v[range]),
        Values::F16(v) => half::slice::HalfFloatSliceExt::convert_to_f32_slice(&v[range], to),
        Values::BF16(v) => to.iter_mut().zip(&v[range]).for_each(|(to, v)| *to = v.to_f32()),
    }
}

/// A matrix of weights in a mapped file.
#[derive(Debug, Clone, Copy)]
pub struct Source<'a> {
    /// The numbers.
    pub matrix: MatrixB<'a>,
    /// Outputs.
    pub n: usize,
    /// Inputs.
    pub k: usize,
}

/// Where a matrix lies, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    address: usize,
    bytes_each: usize,
    by_inputs: bool,
    leading: usize,
    sides: [usize; 2],
}

impl Key {
    fn of(source: &Source) -> Self {
        let (address, bytes_each) = match source.matrix.values {
            Values::F32(v) => (v.as_ptr() as usize, 4),
            Values::F16(v) => (v.as_ptr() as usize, 2),
            Values::BF16(v) => (v.as_ptr() as usize, 2),
        };
        Key {
            address,
            bytes_each,
            by_inputs: source.matrix.layout == Layout::RowsAreInputs,
            leading: source.matrix.leading,
            sides: [source.n, source.k],
        }
    }
}

#[derive(Debug)]
struct Entry {
    /// Nothing where a weight is not finite.
    packed: Option<Arc<Packed>>,
    /// The mapping that it was read from: as long as it stands, no other file has these addresses.
    _file: Arc<dyn Any + Send + Sync>,
}

/// The weights that a device keeps in eight bits.
#[derive(Debug, Default)]
pub struct QuantisedWeights {
    entries: Mutex<HashMap<Key, Entry>>,
}

impl QuantisedWeights {
    /// The weights of `source`, which are part of a file, in eight bits; nothing if one is not finite. `file` is called
    /// once they have been read for the first time.
    ///
    /// # Errors
    /// `OutOfMemory`; `Cancelled`.
    pub fn get(
        &self,
        cx: &Context,
        source: &Source,
        file: impl FnOnce() -> Arc<dyn Any + Send + Sync>,
    ) -> Result<Option<Arc<Packed>>> {
        let key = Key::of(source);
        // Held while they are quantised: nobody else begins the same.
        let mut entries = self.lock();
        if let Some(entry) = entries.get(&key) {
            return Ok(entry.packed.clone());
        }
        entries
            .try_reserve(1)
            .map_err(|_| Error::out_of_memory("the list of weights", size_of::<Entry>()))?;
        let packed = Packed::new(cx, &source.matrix, source.n, source.k)?.map(Arc::new);
        entries.insert(key, Entry { packed: packed.clone(), _file: file() });
        Ok(packed)
    }

    /// Frees the weights that lie in `range` of addresses.
    pub fn evict(&self, range: Range<usize>) {
        self.lock().retain(|key, _| !range.contains(&key.address));
    }

    /// Memory that they take, in bytes.
    pub fn bytes(&self) -> usize {
        let bytes = |entry: &Entry| entry.packed.as_ref().map_or(0, |packed| packed.buffer.bytes().len());
        self.lock().values().map(bytes).sum()
    }

    /// Every change of the list is one call: a panic elsewhere leaves it whole.
    fn lock(&self) -> MutexGuard<'_, HashMap<Key, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
