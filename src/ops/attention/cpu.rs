//! One task per head (and part of the queries, if heads are few): scores of a block of queries against all
//! keys, softmax of whole rows, product with the values.

use super::{Columns, KeyValues, Mask};
use crate::device::Context;
use crate::device::gemm::{Layout, MatrixB, Packed, Serial, Values};
use crate::device::scratch::{Scratch, SharedMut};
use crate::device::simd::{exp, fma};
use crate::error::{Error, Result};
use crate::simd_dispatch;

/// Scores that one block of queries makes: they should stay in the L2 cache.
const BLOCK_SCORES: usize = 96 * 1024;

/// The least and the most queries of a block.
const BLOCK_LEAST: usize = 12;
const BLOCK_MOST: usize = 144;

/// Tasks per thread that even out threads of unequal speed.
const TASKS_PER_THREAD: usize = 3;

/// Partial sums and maxima of a row, so that the loop over it vectorises the same way on every processor.
const LANES: usize = 16;

/// One call of `attention`, checked.
pub(super) struct Job<'a> {
    pub q: Columns<'a>,
    pub width: usize,
    pub heads: usize,
    pub segments: &'a [KeyValues<'a>],
    pub mask: Mask<'a>,
    pub samples: usize,
    pub queries: usize,
    /// Of all segments.
    pub keys: usize,
}

/// Sizes of a task's parts of scratch, in floats.
struct Sizes {
    keys: usize,
    values: usize,
    scores: usize,
    result: usize,
    block: usize,
}

impl Job<'_> {
    /// Fills `out`, `[samples, queries, width]`.
    pub fn run(&self, cx: &Context, out: &mut [f32]) -> Result<()> {
        if out.is_empty() {
            return cx.check();
        }
        let serial = Serial::new(cx.device());
        let rows = (BLOCK_SCORES / self.keys).clamp(BLOCK_LEAST, BLOCK_MOST) / BLOCK_LEAST * BLOCK_LEAST;
        let rows = rows.min(self.queries);
        let pairs = self.samples * self.heads;
        let parts = (TASKS_PER_THREAD * cx.device().threads()).div_ceil(pairs);
        let per_part = self.queries.div_ceil(parts).next_multiple_of(rows);
        let parts = self.queries.div_ceil(per_part);
        let sizes = self.sizes(&serial, rows)?;
        let floats = sizes.keys + sizes.values + sizes.scores + sizes.result + sizes.block;
        let scratch = Scratch::new(cx.device(), "attention", pairs * parts, floats)?;
        let out = SharedMut::new(out);
        let failed = std::sync::Mutex::new(None);
        cx.parallel(pairs * parts, |task| {
            let (pair, first) = (task / parts, task % parts * per_part);
            let queries = first..(first + per_part).min(self.queries);
            let head = Head { job: self, serial, sample: pair / self.heads, head: pair % self.heads, rows };
            if let Err(error) = scratch.with(|floats| head.run(queries, &sizes, floats, &out)) {
                *failed.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(error);
            }
        })?;
        failed.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner).map_or(Ok(()), Err)
    }

    fn sizes(&self, serial: &Serial, rows: usize) -> Result<Sizes> {
        let d = self.width / self.heads;
        let (mut keys, mut values) = (0, 0);
        for segment in self.segments {
            let tokens = segment.tokens()?;
            keys += serial.packed_len(tokens, d);
            values += serial.packed_len(d, tokens);
        }
        let scores =
            rows.checked_mul(self.keys).ok_or_else(|| Error::out_of_memory("attention", usize::MAX))?;
        let block = serial.scratch_len(rows);
        Ok(Sizes { keys, values, scores, result: rows * d, block })
    }
}

impl KeyValues<'_> {
    pub(super) fn tokens(&self) -> Result<usize> {
        let [_, tokens, _] = self.keys.tensor.dims_of("attention: keys")?;
        Ok(tokens)
    }
}

/// One head of one sample.
struct Head<'a> {
    job: &'a Job<'a>,
    serial: Serial,
    sample: usize,
    head: usize,
    /// Queries of a block.
    rows: usize,
}

impl Head<'_> {
    fn run(
        &self,
        queries: std::ops::Range<usize>,
        sizes: &Sizes,
        scratch: &mut [f32],
        out: &SharedMut<f32>,
    ) -> Result<()> {
        let (keys, rest) = scratch.split_at_mut(sizes.keys);
        let (values, rest) = rest.split_at_mut(sizes.values);
        let (scores, rest) = rest.split_at_mut(sizes.scores);
        let (result, block) = rest.split_at_mut(sizes.result);
        self.pack(keys, values)?;
        let d = self.job.width / self.job.heads;
        for first in queries.clone().step_by(self.rows) {
            let rows = self.rows.min(queries.end - first);
            self.scores(first, rows, keys, scores, block)?;
            let scale = 1.0 / (d as f32).sqrt();
            let mut sums = [0f32; BLOCK_MOST];
            for (i, row) in scores.chunks_exact_mut(self.job.keys).take(rows).enumerate() {
                let visible = self.job.mask.visible(self.sample, first + i, self.job.keys);
                let (seen, hidden) = row.split_at_mut(visible);
                sums[i] = softmax_unscaled(seen, scale);
                hidden.fill(0.0);
            }
            self.weigh(rows, scores, values, result, block)?;
            for (i, row) in result.chunks_exact(d).take(rows).enumerate() {
                let token = self.sample * self.job.queries + first + i;
                // SAFETY: this task alone owns these columns of its queries; `out` outlives the loop.
                let to = unsafe { out.part(token * self.job.width + self.head * d, d) };
                divide(to, row, sums[i]);
            }
        }
        Ok(())
    }

    /// Packs the keys and values of all segments, one after the other.
    fn pack(&self, mut keys: &mut [f32], mut values: &mut [f32]) -> Result<()> {
        let d = self.job.width / self.job.heads;
        for segment in self.job.segments {
            let (n, tokens) = (segment.index.map_or(self.sample, |i| i[self.sample]), segment.tokens()?);
            let (k, stride) = segment.keys.entry(n, self.head * d)?;
            let b = MatrixB { values: Values::F32(k), layout: Layout::RowsAreOutputs, leading: stride };
            self.serial.pack(&b, tokens, d, keys)?;
            keys = &mut keys[self.serial.packed_len(tokens, d)..];
            let (v, stride) = segment.values.entry(n, self.head * d)?;
            let b = MatrixB { values: Values::F32(v), layout: Layout::RowsAreInputs, leading: stride };
            self.serial.pack(&b, d, tokens, values)?;
            values = &mut values[self.serial.packed_len(d, tokens)..];
        }
        Ok(())
    }

    /// scores\[i, j\] = q\[first + i\] . k\[j\]
    fn scores(
        &self,
        first: usize,
        rows: usize,
        mut keys: &[f32],
        scores: &mut [f32],
        block: &mut [f32],
    ) -> Result<()> {
        let d = self.job.width / self.job.heads;
        let (q, lda) = self.job.q.entry(self.sample, self.head * d)?;
        let a = &q[first * lda..];
        let mut column = 0;
        for segment in self.job.segments {
            let n = segment.tokens()?;
            let product = Packed { m: rows, n, k: d, a, lda, b: keys, accumulate: false };
            self.serial.multiply(&product, block, &mut scores[column..], self.job.keys)?;
            keys = &keys[self.serial.packed_len(n, d)..];
            column += n;
        }
        Ok(())
    }

    /// result\[i\] = sum over j of weights\[i, j\] v\[j\]
    fn weigh(
        &self,
        rows: usize,
        weights: &[f32],
        mut values: &[f32],
        result: &mut [f32],
        block: &mut [f32],
    ) -> Result<()> {
        let d = self.job.width / self.job.heads;
        let mut column = 0;
        for segment in self.job.segments {
            let k = segment.tokens()?;
            let (a, lda, accumulate) = (&weights[column..], self.job.keys, column > 0);
            let product = Packed { m: rows, n: d, k, a, lda, b: values, accumulate };
            self.serial.multiply(&product, block, result, d)?;
            values = &values[self.serial.packed_len(d, k)..];
            column += k;
        }
        Ok(())
    }
}

simd_dispatch! {
    /// x\[j\] <- e^(scale (x\[j\] - max x)); returns their sum.
    pub(super) fn softmax_unscaled<const FMA: bool>(x: &mut [f32], scale: f32) -> f32 {
        let mut most = [f32::NEG_INFINITY; LANES];
        let (chunks, rest) = x.as_chunks::<LANES>();
        for chunk in chunks {
            for (most, v) in most.iter_mut().zip(chunk) {
                *most = if *v > *most { *v } else { *most };
            }
        }
        let most = most.iter().chain(rest).fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a });
        let shift = -most * scale;
        let mut sums = [0f32; LANES];
        let (chunks, rest) = x.as_chunks_mut::<LANES>();
        for chunk in chunks {
            for (sum, v) in sums.iter_mut().zip(chunk) {
                *v = exp::<FMA>(fma::<FMA>(*v, scale, shift));
                *sum += *v;
            }
        }
        for (sum, v) in sums.iter_mut().zip(rest) {
            *v = exp::<FMA>(fma::<FMA>(*v, scale, shift));
            *sum += *v;
        }
        sums.iter().sum()
    }
}

simd_dispatch! {
    fn divide<const _FMA: bool>(to: &mut [f32], from: &[f32], by: f32) {
        let factor = 1.0 / by;
        for (to, from) in to.iter_mut().zip(from) {
            *to = from * factor;
        }
    }
}
