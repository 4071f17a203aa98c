//! One task per head of a sample: the probabilities of a block of queries are computed again, and what they and the
//! gradients of the scores give each key and value is added up in scratch, transposed, so that no large matrix is.

use std::ops::Range;

use super::super::cpu::{Job, softmax_unscaled};
use crate::device::Context;
use crate::device::gemm::{Layout, MatrixB, Packed, Serial, Values};
use crate::device::scratch::{Scratch, SharedMut};
use crate::error::{Error, Result};
use crate::ops::kernels;
use crate::simd_dispatch;

/// Scores that one block of queries makes: they, their gradients and a packed copy should stay in the L2 cache.
const BLOCK_SCORES: usize = 48 * 1024;

/// The least and the most queries of a block.
const BLOCK_LEAST: usize = 12;
const BLOCK_MOST: usize = 144;

/// Where gradients go: `[N, T, width]`, for each sample apart; what nobody asks for is left out.
pub struct Outputs<'a> {
    pub q: Option<&'a mut [f32]>,
    /// Of each segment, keys and values.
    pub segments: Vec<[Option<&'a mut [f32]>; 2]>,
}

/// [`Outputs`] that tasks share.
struct Shared {
    q: Option<SharedMut<f32>>,
    segments: Vec<[Option<SharedMut<f32>>; 2]>,
}

/// What all tasks share.
struct Pass<'a> {
    job: &'a Job<'a>,
    /// Of the result.
    gradient: &'a [f32],
    out: Shared,
    serial: Serial,
    /// Queries of a block.
    rows: usize,
    /// Channels of a head.
    depth: usize,
}

/// One task's parts of scratch.
struct Parts<'a> {
    /// Keys or values of all segments, `[L, D]`.
    gathered: &'a mut [f32],
    /// Keys packed for `q k^T`, keys for `dS k`, values for `dy v^T`.
    keys: &'a mut [f32],
    keys_back: &'a mut [f32],
    values: &'a mut [f32],
    /// Sums of all queries, `[D, L]` both.
    of_keys: &'a mut [f32],
    of_values: &'a mut [f32],
    /// Of a block: probabilities, gradients of scores, either of them packed.
    weights: &'a mut [f32],
    of_scores: &'a mut [f32],
    packed: &'a mut [f32],
    /// The block's q or dy transposed, and its dq.
    turned: &'a mut [f32],
    of_q: &'a mut [f32],
    /// Of a product.
    block: &'a mut [f32],
}

/// Fills the outputs.
pub fn run(cx: &Context, job: &Job, gradient: &[f32], outputs: Outputs) -> Result<()> {
    let rows = (BLOCK_SCORES / job.keys.max(1)).clamp(BLOCK_LEAST, BLOCK_MOST) / BLOCK_LEAST * BLOCK_LEAST;
    let shared = |out: Option<&mut [f32]>| out.map(SharedMut::new);
    let out = Shared {
        q: shared(outputs.q),
        segments: outputs.segments.into_iter().map(|[k, v]| [shared(k), shared(v)]).collect(),
    };
    let depth = job.width / job.heads;
    let pass =
        Pass { job, gradient, out, serial: Serial::new(cx.device()), rows: rows.min(job.queries), depth };
    let pairs = job.samples * job.heads;
    let lengths = pass.lengths()?;
    let scratch = Scratch::new(cx.device(), "attention gradient", pairs, lengths.iter().sum())?;
    let failed = std::sync::Mutex::new(None);
    cx.parallel(pairs, |pair| {
        let result = scratch.with(|floats| {
            let parts = &mut Parts::of(floats, &lengths);
            pass.head(pair / job.heads, pair % job.heads, parts)
        });
        if let Err(error) = result {
            *failed.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(error);
        }
    })?;
    failed.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner).map_or(Ok(()), Err)
}

/// How many [`Parts`] there are.
const PARTS: usize = 12;

impl<'a> Parts<'a> {
    fn of(floats: &'a mut [f32], lengths: &[usize; PARTS]) -> Self {
        let mut rest = floats;
        let [
            gathered,
            keys,
            keys_back,
            values,
            of_keys,
            of_values,
            weights,
            of_scores,
            packed,
            turned,
            of_q,
            block,
        ] = lengths.map(|len| {
            let (part, after) = std::mem::take(&mut rest).split_at_mut(len);
            rest = after;
            part
        });
        Parts {
            gathered,
            keys,
            keys_back,
            values,
            of_keys,
            of_values,
            weights,
            of_scores,
            packed,
            turned,
            of_q,
            block,
        }
    }
}

impl Pass<'_> {
    /// Of the [`Parts`], in their order.
    fn lengths(&self) -> Result<[usize; PARTS]> {
        let (rows, depth, keys) = (self.rows, self.depth, self.job.keys);
        let packed_len = |n, k| self.serial.packed_len(n, k);
        let too_large = || Error::out_of_memory("attention gradient", usize::MAX);
        let scores = rows.checked_mul(keys).ok_or_else(too_large)?;
        let all = keys * depth;
        let (there, back) = (packed_len(keys, depth), packed_len(depth, keys));
        let (block, packed) = (self.serial.scratch_len(rows.max(depth)), packed_len(keys, rows));
        let queries = rows * depth;
        Ok([all, there, back, there, all, all, scores, scores, packed, queries, queries, block])
    }

    fn head(&self, sample: usize, head: usize, parts: &mut Parts) -> Result<()> {
        self.pack(sample, head, parts)?;
        parts.of_keys.fill(0.0);
        parts.of_values.fill(0.0);
        for first in (0..self.job.queries).step_by(self.rows.max(1)) {
            let rows = self.rows.min(self.job.queries - first);
            self.queries(sample, head, first..first + rows, parts)?;
        }
        let mut key = 0;
        for (segment, [of_keys, of_values]) in self.job.segments.iter().zip(&self.out.segments) {
            let tokens = segment.tokens()?;
            for (out, sums) in [(of_keys, &*parts.of_keys), (of_values, &*parts.of_values)] {
                let Some(out) = out else { continue };
                for j in 0..tokens {
                    let at = (sample * tokens + j) * self.job.width + head * self.depth;
                    // SAFETY: this task alone owns these columns of the sample; the slice outlives the loop.
                    let to = unsafe { out.part(at, self.depth) };
                    let from = sums.iter().skip(key + j).step_by(self.job.keys);
                    to.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
                }
            }
            key += tokens;
        }
        Ok(())
    }

    /// Gathers and packs the keys and values of all segments.
    fn pack(&self, sample: usize, head: usize, parts: &mut Parts) -> Result<()> {
        let (keys, depth) = (self.job.keys, self.depth);
        for part in 0..2 {
            let mut to = parts.gathered.chunks_exact_mut(depth);
            for segment in self.job.segments {
                let columns = if part == 0 { segment.keys } else { segment.values };
                let n = segment.index.map_or(sample, |index| index[sample]);
                let (from, stride) = columns.entry(n, head * depth)?;
                for (from, to) in from.chunks(stride).zip(to.by_ref().take(segment.tokens()?)) {
                    to.copy_from_slice(&from[..depth]);
                }
            }
            let b = |layout| MatrixB { values: Values::F32(parts.gathered), layout, leading: depth };
            let (outputs, inputs) = (b(Layout::RowsAreOutputs), b(Layout::RowsAreInputs));
            if part == 0 {
                self.serial.pack(&outputs, keys, depth, parts.keys)?;
                self.serial.pack(&inputs, depth, keys, parts.keys_back)?;
            } else {
                self.serial.pack(&outputs, keys, depth, parts.values)?;
            }
        }
        Ok(())
    }

    /// One block of queries.
    fn queries(&self, sample: usize, head: usize, block: Range<usize>, parts: &mut Parts) -> Result<()> {
        let (depth, width) = (self.depth, self.job.width);
        let (first, rows) = (block.start, block.len());
        let (q, stride) = self.job.q.entry(sample, head * depth)?;
        let q = (&q[first * stride..], stride);
        let dy = (&self.gradient[(sample * self.job.queries + first) * width + head * depth..], width);
        let of_keys = self.out.segments.iter().any(|[keys, _]| keys.is_some());
        let of_values = self.out.segments.iter().any(|[_, values]| values.is_some());
        let dy_of_scores = (of_keys || self.out.q.is_some()).then_some(dy);
        self.scores(sample, block, q, dy_of_scores, parts)?;
        if of_values {
            transpose(dy, rows, depth, parts.turned);
            self.add(rows, parts.turned, parts.weights, (parts.packed, parts.block), parts.of_values)?;
        }
        if of_keys {
            transpose(q, rows, depth, parts.turned);
            self.add(rows, parts.turned, parts.of_scores, (parts.packed, parts.block), parts.of_keys)?;
        }
        let Some(out) = &self.out.q else { return Ok(()) };
        let (a, lda, b) = (&*parts.of_scores, self.job.keys, &*parts.keys_back);
        let product = Packed { m: rows, n: depth, k: lda, a, lda, b, accumulate: false };
        self.serial.multiply(&product, parts.block, parts.of_q, depth)?;
        for (i, row) in parts.of_q.chunks_exact(depth).take(rows).enumerate() {
            let at = (sample * self.job.queries + first + i) * width + head * depth;
            // SAFETY: this task alone owns these columns of the sample; the slice outlives the loop.
            unsafe { out.part(at, depth) }.copy_from_slice(row);
        }
        Ok(())
    }

    /// The probabilities of a block, and with `dy` the gradients of its scores.
    fn scores(
        &self,
        sample: usize,
        block: Range<usize>,
        q: (&[f32], usize),
        dy: Option<(&[f32], usize)>,
        parts: &mut Parts,
    ) -> Result<()> {
        let (keys, depth) = (self.job.keys, self.depth);
        let product =
            |(a, lda), b| Packed { m: block.len(), n: keys, k: depth, a, lda, b, accumulate: false };
        self.serial.multiply(&product(q, parts.keys), parts.block, parts.weights, keys)?;
        if let Some(dy) = dy {
            self.serial.multiply(&product(dy, parts.values), parts.block, parts.of_scores, keys)?;
        }
        let scale = 1.0 / (depth as f32).sqrt();
        let both = parts.weights.chunks_exact_mut(keys).zip(parts.of_scores.chunks_exact_mut(keys));
        for (query, (weights, of_scores)) in block.zip(both) {
            let visible = self.job.mask.visible(sample, query, keys);
            let (seen, hidden) = weights.split_at_mut(visible);
            let sum = softmax_unscaled(seen, scale);
            divide(seen, sum);
            hidden.fill(0.0);
            if dy.is_some() {
                let (of_seen, of_hidden) = of_scores.split_at_mut(visible);
                through_softmax(seen, of_seen, scale);
                of_hidden.fill(0.0);
            }
        }
        Ok(())
    }

    /// sums\[i, j\] += sum over r of turned\[i, r\] scores\[r, j\]
    fn add(
        &self,
        rows: usize,
        turned: &[f32],
        scores: &[f32],
        (packed, block): (&mut [f32], &mut [f32]),
        sums: &mut [f32],
    ) -> Result<()> {
        let keys = self.job.keys;
        let b = MatrixB { values: Values::F32(scores), layout: Layout::RowsAreInputs, leading: keys };
        self.serial.pack(&b, keys, rows, packed)?;
        let (m, a, b) = (self.depth, turned, &*packed);
        let product = Packed { m, n: keys, k: rows, a, lda: rows, b, accumulate: true };
        self.serial.multiply(&product, block, sums, keys)
    }
}

/// `rows` rows of `depth` numbers, `stride` apart, as `[depth, rows]`.
fn transpose((from, stride): (&[f32], usize), rows: usize, depth: usize, to: &mut [f32]) {
    for (i, to) in to.chunks_exact_mut(rows).take(depth).enumerate() {
        to.iter_mut().zip(from[i..].iter().step_by(stride)).for_each(|(to, from)| *to = *from);
    }
}

simd_dispatch! {
    fn divide<const _FMA: bool>(x: &mut [f32], by: f32) {
        let factor = 1.0 / by;
        x.iter_mut().for_each(|x| *x *= factor);
    }
}

simd_dispatch! {
    /// The gradients `dp` of probabilities p become those of what `scale` multiplied before the softmax:
    /// p (dp - sum over j of p dp) scale.
    fn through_softmax<const FMA: bool>(p: &[f32], dp: &mut [f32], scale: f32) {
        let mean = kernels::dot::<FMA>(p, dp);
        dp.iter_mut().zip(p).for_each(|(dp, p)| *dp = *p * (*dp - mean) * scale);
    }
}
