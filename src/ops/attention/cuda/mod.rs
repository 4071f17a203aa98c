//! Attention on a GPU: no matrix of scores is written, and the keys of all segments are one sequence of tiles.

pub mod gradient;

use std::sync::Arc;

use super::Mask;
use super::cpu::Job;
use crate::device::Context;
use crate::device::cuda::{GpuInfo, Kernels, Launch, Parameter, Precision, Stream, Taken, kernels};
use crate::error::{Error, Result};
use crate::tensor::Tensor;

kernels!(PLAIN, "attention", "attention.cuh");
kernels!(TENSOR, "attention_tensor", "attention.cuh");

/// As attention.cuh has it.
const MOST_SEGMENTS: usize = 8;

/// `Segment` of attention.cuh.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct Segment {
    keys: u64,
    values: u64,
    index: u64,
    key_stride: i64,
    value_stride: i64,
    of_keys: u64,
    of_values: u64,
    tokens: i32,
    entries: i32,
}

/// `Attention` of attention.cuh.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct Call {
    segments: [Segment; MOST_SEGMENTS],
    q: u64,
    lengths: u64,
    q_stride: i64,
    segment_count: i32,
    samples: i32,
    queries: i32,
    keys: i32,
    heads: i32,
    depth: i32,
    causal: i32,
    wide: i32,
    scale: f32,
}

// SAFETY: the struct of the kernels, field by field.
unsafe impl Parameter for Call {}

/// A call as kernels take it, and the memory that it names.
struct Arguments {
    call: Call,
    held: Vec<Taken>,
    precision: Precision,
}

impl Arguments {
    /// # Errors
    /// `Unsupported` for more segments than kernels take; `OutOfMemory`; `Device`.
    fn new(cx: &Context, stream: &Arc<Stream>, job: &Job, precision: Precision) -> Result<Self> {
        let depth = job.width / job.heads;
        let mut arguments = Arguments { call: Call::default(), held: Vec::new(), precision };
        let call = Call {
            segment_count: 0,
            samples: job.samples as i32,
            queries: job.queries as i32,
            keys: job.keys as i32,
            heads: job.heads as i32,
            depth: depth as i32,
            scale: 1.0 / (depth as f32).sqrt(),
            ..Call::default()
        };
        arguments.call = call;
        (arguments.call.q, arguments.call.q_stride) = arguments.columns(cx, stream, &job.q)?;
        for segment in job.segments {
            if segment.tokens()? > 0 {
                arguments.add(cx, stream, segment)?;
            }
        }
        if !matches!(job.mask, Mask::None) {
            arguments.call.causal = 1;
        }
        if let Mask::CausalWithLengths(lengths) = job.mask {
            arguments.call.lengths = arguments.list(stream, lengths)?;
        }
        arguments.call.wide = i32::from(arguments.is_wide());
        Ok(arguments)
    }

    fn add(&mut self, cx: &Context, stream: &Arc<Stream>, segment: &super::KeyValues) -> Result<()> {
        let count = self.call.segment_count as usize;
        if count == MOST_SEGMENTS {
            let reason = format!("a GPU attends to at most {MOST_SEGMENTS}");
            return Err(Error::unsupported("attention: so many groups of keys", reason));
        }
        let (keys, key_stride) = self.columns(cx, stream, &segment.keys)?;
        let (values, value_stride) = self.columns(cx, stream, &segment.values)?;
        let index = segment.index.map_or(Ok(0), |index| self.list(stream, index))?;
        let [entries, tokens, _] = segment.keys.tensor.dims_of("attention: keys")?;
        self.call.segments[count] = Segment {
            keys,
            values,
            index,
            key_stride,
            value_stride,
            of_keys: 0,
            of_values: 0,
            tokens: tokens as i32,
            entries: entries as i32,
        };
        self.call.segment_count += 1;
        Ok(())
    }

    /// The address of the first column, and the distance between tokens.
    fn columns(
        &mut self,
        cx: &Context,
        stream: &Arc<Stream>,
        columns: &super::Columns,
    ) -> Result<(u64, i64)> {
        let taken = columns.tensor.on_as(cx, stream, "attention", self.precision)?;
        let address = taken.address() + (columns.start * self.precision.size()) as u64;
        self.held.push(taken);
        Ok((address, columns.tensor.shape().channels() as i64))
    }

    fn list(&mut self, stream: &Arc<Stream>, values: &[usize]) -> Result<u64> {
        // Entries and lengths are below sizes of tensors, which were checked against them.
        let values: Vec<u32> = values.iter().map(|&value| value as u32).collect();
        let taken = stream.constant(&values)?;
        let address = taken.address();
        self.held.push(taken);
        Ok(address)
    }

    fn is_wide(&self) -> bool {
        let bytes = self.precision.size() as u64;
        let of = |s: &Segment| [s.keys, s.values, bytes * s.key_stride as u64, bytes * s.value_stride as u64];
        let queries = [self.call.q, bytes * self.call.q_stride as u64, bytes * self.call.depth as u64];
        self.call.segments.iter().flat_map(of).chain(queries).all(is_wide)
    }
}

/// Whether 16 bytes at a time can be read from here, or this many bytes on.
fn is_wide(bytes: u64) -> bool {
    bytes.is_multiple_of(16)
}

/// A kernel in its version for a size of heads.
struct Version {
    kernels: &'static Kernels,
    name: &'static str,
    threads: u32,
    /// Queries of a block.
    queries: usize,
    shared_bytes: usize,
}

/// What runs for any type and any address, as attention.cu has it.
fn plain(depth: usize) -> Result<Version> {
    let (name, padded, queries, keys) = match depth {
        0..=32 => ("attention_32", 32, 64, 32),
        33..=64 => ("attention_64", 64, 64, 32),
        65..=128 => ("attention_128", 128, 64, 32),
        129..=256 => ("attention_256", 256, 32, 16),
        _ => return Err(too_deep(depth)),
    };
    let floats = (queries + keys) * (padded + 4) + queries * (keys + 4);
    Ok(Version { kernels: &PLAIN, name, threads: 256, queries, shared_bytes: 4 * floats })
}

/// What runs on tensor cores, as attention_tensor.cu has it: half precision in runs of 16 bytes.
fn on_tensor_cores(gpu: &GpuInfo, arguments: &Arguments) -> Option<Version> {
    let call = &arguments.call;
    if arguments.precision == Precision::F32 || gpu.capability.major < 8 || call.wide == 0 {
        return None;
    }
    // A tall tile reads keys and values once for twice as many queries, where there are enough tiles for the device.
    let tall_tiles = (call.queries as usize).div_ceil(128) * call.heads as usize * call.samples as usize;
    let tall = tall_tiles >= 2 * gpu.multiprocessors as usize;
    let (name, padded, queries) = match call.depth {
        0..=32 => ("attention_tensor_32", 32, 64),
        33..=64 if tall => ("attention_tensor_64_tall", 64, 128),
        33..=64 => ("attention_tensor_64", 64, 64),
        65..=96 => ("attention_tensor_96", 96, 64),
        97..=128 => ("attention_tensor_128", 128, 64),
        _ => return None,
    };
    // Two tiles of 64 keys and two of as many values, of 2 bytes each number.
    let shared_bytes = 4 * 64 * (padded + 8) * 2;
    Some(Version { kernels: &TENSOR, name, threads: 128, queries, shared_bytes })
}

fn too_deep(depth: usize) -> Error {
    Error::unsupported(format!("attention: heads of {depth} channels"), "on a GPU they have at most 256")
}

/// [`super::attention`] into `y`, without recording; with `logs`, `[N, heads, T]`, log2 of the sum of e^score over the
/// keys of each query goes there.
pub fn attend(
    cx: &Context,
    stream: &Arc<Stream>,
    job: &Job,
    y: &mut Tensor,
    logs: Option<&mut Tensor>,
) -> Result<()> {
    let precision = y.precision("attention: q")?;
    if y.elements() == 0 {
        return Ok(());
    }
    let arguments = Arguments::new(cx, stream, job, precision)?;
    // The logs are for gradients, which are in F32.
    let fast = if logs.is_none() { on_tensor_cores(stream.gpu().info(), &arguments) } else { None };
    let takes_logs = fast.is_none();
    let version = fast.map_or_else(|| plain(job.width / job.heads), Ok)?;
    let to = y.on_mut(stream)?;
    let logs = logs.map_or(Ok(0), |logs| logs.on_mut(stream))?;
    let blocks = job.queries.div_ceil(version.queries) * job.heads * job.samples;
    let mut launch = Launch::blocks(blocks, version.threads);
    launch.shared_bytes = version.shared_bytes as u32;
    let with_logs: [&dyn Parameter; 3] = [&arguments.call, &to, &logs];
    // SAFETY: as the kernel declares; all columns, indices and lengths were checked, `y` has the heads' columns of each
    // query, `logs` a number for each head of it.
    unsafe {
        stream.launch(
            version.kernels,
            version.name,
            Some(precision),
            launch,
            if takes_logs { &with_logs } else { &with_logs[..2] },
        )
    }
}
