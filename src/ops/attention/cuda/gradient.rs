//! The gradient of attention on a GPU.

use std::sync::Arc;

use super::super::Columns;
use super::super::cpu::Job;
use super::super::gradient::Kept;
use super::{Arguments, is_wide, too_deep};
use crate::device::Context;
use crate::device::cuda::{Launch, Parameter, Precision, Stream, Taken, kernels};
use crate::error::{Error, Result};
use crate::tensor::{DType, Tensor};

kernels!(KERNELS, "attention_gradient", "attention.cuh");

const THREADS: u32 = 256;
const WARPS: usize = 8;

/// The gradients of whole tensors, of those that are tracked.
pub struct Gradients {
    pub q: Option<Tensor>,
    /// Of each segment, keys and values.
    pub segments: Vec<[Option<Tensor>; 2]>,
}

/// `Known` of attention_gradient.cu.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Known {
    dy: u64,
    logs: u64,
    deltas: u64,
}

// SAFETY: the struct of the kernels, field by field.
unsafe impl Parameter for Known {}

/// The kernels for a size of heads.
struct Version {
    of_queries: &'static str,
    of_keys: &'static str,
    /// A head's channels in shared memory.
    padded: usize,
    /// Queries that a block owns, and the keys that it reads at a time.
    queries: [usize; 2],
    /// Keys that a block owns, and the queries that it reads at a time.
    keys: [usize; 2],
}

impl Version {
    /// As attention_gradient.cu has them.
    fn of(depth: usize) -> Result<Self> {
        let (of_queries, of_keys, padded, queries, keys) = match depth {
            0..=32 => ("attention_of_queries_32", "attention_of_keys_32", 32, [64, 32], [64, 32]),
            33..=64 => ("attention_of_queries_64", "attention_of_keys_64", 64, [64, 32], [64, 32]),
            65..=128 => ("attention_of_queries_128", "attention_of_keys_128", 128, [32, 32], [32, 16]),
            129..=256 => ("attention_of_queries_256", "attention_of_keys_256", 256, [16, 16], [16, 16]),
            _ => return Err(too_deep(depth)),
        };
        Ok(Version { of_queries, of_keys, padded, queries, keys })
    }

    fn launch(&self, blocks: usize, rows: usize, [own, other]: [usize; 2]) -> Launch {
        let floats = rows * (self.padded + 4) + own * (other + 4);
        Launch { shared_bytes: 4 * floats as u32, ..Launch::blocks(blocks, THREADS) }
    }
}

/// What one call works on.
struct Pass<'a> {
    stream: &'a Arc<Stream>,
    job: &'a Job<'a>,
    version: Version,
    arguments: Arguments,
    known: Known,
    _held: [Taken; 2],
}

/// The gradients from that of the result, `dy`.
///
/// # Errors
/// `Unsupported` for D above 256, and above 128 on GPUs with 64 KiB of shared memory (before sm_80); `OutOfMemory`;
/// `Device`.
pub fn gradients(
    cx: &Context,
    stream: &Arc<Stream>,
    job: &Job,
    kept: &Kept,
    dy: &Tensor,
) -> Result<Gradients> {
    let mut segments = Vec::with_capacity(job.segments.len());
    for segment in job.segments {
        segments.push([room(cx, job, &segment.keys)?, room(cx, job, &segment.values)?]);
    }
    let mut found = Gradients { q: room(cx, job, &job.q)?, segments };
    if dy.elements() == 0 {
        return Ok(found);
    }
    let held = [dy.on(cx, stream)?, kept.logs.on(cx, stream)?];
    let mut pass = Pass {
        stream,
        job,
        version: Version::of(job.width / job.heads)?,
        arguments: Arguments::new(cx, stream, job, Precision::F32)?,
        known: Known { dy: held[0].address(), logs: held[1].address(), deltas: 0 },
        _held: held,
    };
    pass.arguments.call.wide &= i32::from(is_wide(pass.known.dy));
    let deltas = pass.deltas(cx, &kept.y)?;
    pass.known.deltas = deltas.on(cx, stream)?.address();
    if let Some(of_q) = &mut found.q {
        pass.of_queries(of_q)?;
    }
    pass.of_keys(&mut found.segments)?;
    Ok(found)
}

/// Room for the gradient of a whole tensor, if anybody asks for it: 0 in the columns that nobody reads.
fn room(cx: &Context, job: &Job, columns: &Columns) -> Result<Option<Tensor>> {
    let dims = columns.tensor.dims();
    let whole = columns.tensor.shape().channels() == job.width && job.queries > 0 && job.samples > 0;
    let new = |_| match whole {
        true => Tensor::new(cx, "attention gradient", dims, DType::F32),
        false => Tensor::zeros(cx, "attention gradient", dims, DType::F32),
    };
    columns.tensor.tracked().map(new).transpose()
}

/// The address of the first column in the gradient of a whole tensor.
fn first_column(stream: &Arc<Stream>, columns: &Columns, whole: &mut Option<Tensor>) -> Result<u64> {
    let Some(whole) = whole else { return Ok(0) };
    Ok(whole.on_mut(stream)? + 4 * columns.start as u64)
}

impl Pass<'_> {
    /// The sums over channels of `dy * y`, `[N, heads, T]`.
    fn deltas(&self, cx: &Context, y: &Tensor) -> Result<Tensor> {
        let job = self.job;
        let dims = [job.samples, job.heads, job.queries];
        let mut deltas = Tensor::new(cx, "attention gradient", &dims, DType::F32)?;
        let y = y.on_as(cx, self.stream, "attention: result", Precision::F32)?;
        let to = deltas.on_mut(self.stream)?;
        let rows = deltas.elements();
        let call = &self.arguments.call;
        // SAFETY: as the kernel declares; y and dy have a row of so many channels for each head of each query.
        unsafe {
            self.stream.launch(
                &KERNELS,
                "attention_deltas",
                None,
                Launch::blocks(rows.div_ceil(WARPS), THREADS),
                &[&y.address(), &self.known.dy, &to, &(rows as i64), &call.heads, &call.queries, &call.depth],
            )?;
        }
        Ok(deltas)
    }

    fn of_queries(&self, of_q: &mut Tensor) -> Result<()> {
        let (job, version) = (self.job, &self.version);
        let of_q = of_q.on_mut(self.stream)? + 4 * job.q.start as u64;
        let [own, keys] = version.queries;
        let blocks = job.queries.div_ceil(own) * job.heads * job.samples;
        let launch = version.launch(blocks, 2 * own + keys, version.queries);
        let parameters: [&dyn Parameter; 3] = [&self.arguments.call, &self.known, &of_q];
        // SAFETY: as the kernel declares; the gradient is laid out as q is.
        unsafe { self.stream.launch(&KERNELS, version.of_queries, None, launch, &parameters) }
    }

    fn of_keys(&mut self, found: &mut [[Option<Tensor>; 2]]) -> Result<()> {
        let (own, queries) = (self.version.keys[0], self.version.keys[1]);
        let mut blocks = 0;
        let mut used = self.arguments.call.segments.iter_mut();
        for (segment, [keys, values]) in self.job.segments.iter().zip(found) {
            let tokens = segment.tokens()?;
            let Some(used) = (tokens > 0).then(|| used.next()).flatten() else { continue };
            used.of_keys = first_column(self.stream, &segment.keys, keys)?;
            used.of_values = first_column(self.stream, &segment.values, values)?;
            if used.of_keys != 0 || used.of_values != 0 {
                blocks += tokens.div_ceil(own) * self.job.heads * used.entries as usize;
            }
        }
        if blocks == 0 {
            return Ok(());
        }
        let launch = self.version.launch(blocks, 2 * (own + queries), self.version.keys);
        let most = self.stream.gpu().info().shared_bytes;
        if launch.shared_bytes > most {
            let what = format!("attention gradient: heads of {} channels", self.arguments.call.depth);
            let reason = format!("{} has {most} bytes of shared memory for them", self.stream.gpu().label());
            return Err(Error::unsupported(what, reason));
        }
        let parameters: [&dyn Parameter; 2] = [&self.arguments.call, &self.known];
        // SAFETY: as the kernel declares; the gradients are laid out as keys and values are.
        unsafe { self.stream.launch(&KERNELS, self.version.of_keys, None, launch, &parameters) }
    }
}
