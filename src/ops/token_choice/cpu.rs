//! Choice of a token on the CPU: one row of logits, which lies in cache, at a time.

use crate::device::Context;
use crate::device::scratch::SharedMut;
use crate::device::simd::exp;
use crate::error::Result;
use crate::ops::kernels::{self, dot, maximum, mul_add, per_cpu};
use crate::ops::vector_quantize;

use super::NO_TOKEN;

/// Probabilities that are summed in one go. Fixed, so that the order of the whole sum is.
const BLOCK: usize = 64;

/// How a row of logits becomes a token.
pub enum Rule<'a> {
    /// One uniform number for each row of the whole call.
    Multinomial(&'a [f32]),
    Argmax,
    /// The codebook `[D, V']` and V', which is V or more.
    Quant((&'a [f32], usize)),
}

/// What all rows of one call share.
pub struct Chooser<'a> {
    pub guidance: f32,
    pub inverse_temperature: f32,
    pub rule: Rule<'a>,
}

/// Chooses `tokens`, of which the first is row `first_row` of the call: [`NO_TOKEN`] where the logits are not all
/// finite. `others` holds the logits without condition, or nothing; `means` has room for one code per row.
pub fn choose(
    cx: &Context,
    chooser: &Chooser,
    first_row: usize,
    logits: &mut [f32],
    others: &[f32],
    means: &mut [f32],
    tokens: &mut [i64],
) -> Result<()> {
    let (rows, classes) = (tokens.len(), logits.len() / tokens.len().max(1));
    let dim = match chooser.rule {
        Rule::Quant((table, row)) => table.len() / row,
        _ => 0,
    };
    let (logits, means) = (SharedMut::new(logits), SharedMut::new(means));
    kernels::parallel_chunks(cx, &mut tokens[..rows], 1, |r, token| {
        // SAFETY: each row number occurs once, and the parts of different rows are disjoint.
        let (logits, mean) = unsafe { (logits.part(r * classes, classes), means.part(r * dim, dim)) };
        if let Some(other) = others.get(r * classes..(r + 1) * classes) {
            guide(logits, other, chooser.guidance);
        }
        token[0] = match chooser.rule {
            _ if !all_finite(logits) => NO_TOKEN,
            Rule::Argmax => argmax(logits),
            Rule::Multinomial(uniforms) => {
                soften(logits, chooser.inverse_temperature);
                inverse_cdf(logits, uniforms[first_row + r])
            }
            Rule::Quant((table, row)) => {
                soften(logits, chooser.inverse_temperature);
                mean_code(logits, table, row, mean);
                if all_finite(mean) { vector_quantize::cpu::nearest(mean, table, row) } else { NO_TOKEN }
            }
        };
    })
}

#[inline(always)]
fn guide_body<const FMA: bool>(logits: &mut [f32], other: &[f32], guidance: f32) {
    for (v, other) in logits.iter_mut().zip(other) {
        *v = mul_add::<FMA>(*v, guidance, other * (1.0 - guidance));
    }
}

per_cpu! {
    /// `logits * g + other * (1 - g)` in place.
    fn guide(logits: &mut [f32], other: &[f32], guidance: f32) = guide_body
}

#[inline(always)]
fn all_finite_body<const FMA: bool>(x: &[f32]) -> bool {
    // Without its sign, what is infinite or no number is at least this.
    const INFINITE: u32 = f32::INFINITY.to_bits();
    let mut lanes = [0u32; 32];
    let magnitude = |v: f32| v.to_bits() & !(1 << 31);
    let chunks = x.chunks_exact(32);
    let rest = chunks.remainder().iter().map(|v| magnitude(*v)).fold(0, u32::max);
    for chunk in chunks {
        for i in 0..32 {
            lanes[i] = lanes[i].max(magnitude(chunk[i]));
        }
    }
    lanes.into_iter().fold(rest, u32::max) < INFINITE
}

per_cpu! {
    /// Whether every value is a finite number.
    fn all_finite(x: &[f32]) -> bool = all_finite_body
}

#[inline(always)]
fn argmax_body<const FMA: bool>(logits: &[f32]) -> i64 {
    let largest = maximum(logits);
    logits.iter().position(|&v| v == largest).unwrap_or(0) as i64
}

per_cpu! {
    /// The first place of the largest logit.
    fn argmax(logits: &[f32]) -> i64 = argmax_body
}

#[inline(always)]
fn soften_body<const FMA: bool>(logits: &mut [f32], inverse_temperature: f32) {
    let largest = maximum(logits);
    for v in logits {
        *v = exp::<FMA>((*v - largest) * inverse_temperature);
    }
}

per_cpu! {
    /// Logits become probabilities, up to a factor: `e^((l - max) / T)`.
    fn soften(logits: &mut [f32], inverse_temperature: f32) = soften_body
}

/// The sum of at most [`BLOCK`] probabilities.
#[inline(always)]
fn block_sum(block: &[f32]) -> f64 {
    let mut lanes = [0f64; 8];
    for chunk in block.chunks(8) {
        for (lane, v) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(*v);
        }
    }
    lanes.iter().sum()
}

#[inline(always)]
fn inverse_cdf_body<const FMA: bool>(weights: &[f32], uniform: f32) -> i64 {
    let total: f64 = weights.chunks(BLOCK).map(block_sum).sum();
    let target = f64::from(uniform) * total;
    let mut below = 0.0;
    for (i, block) in weights.chunks(BLOCK).enumerate() {
        let next = below + block_sum(block);
        if next > target {
            let mut running = below;
            let found = block.iter().position(|&v| {
                running += f64::from(v);
                running > target
            });
            let last = || block.iter().rposition(|&v| v > 0.0);
            return (i * BLOCK + found.or_else(last).unwrap_or(0)) as i64;
        }
        below = next;
    }
    weights.iter().rposition(|&v| v > 0.0).unwrap_or(0) as i64
}

per_cpu! {
    /// The first class up to which the weights sum to more than `uniform` of their total, summed in f64 by blocks
    /// in ascending order. If rounding leaves none, the last one with any weight.
    fn inverse_cdf(weights: &[f32], uniform: f32) -> i64 = inverse_cdf_body
}

#[inline(always)]
fn mean_code_body<const FMA: bool>(weights: &[f32], table: &[f32], row: usize, mean: &mut [f32]) {
    let total: f64 = weights.chunks(BLOCK).map(block_sum).sum();
    let inverse = (1.0 / total) as f32;
    for (mean, codes) in mean.iter_mut().zip(table.chunks_exact(row)) {
        *mean = dot::<FMA>(weights, &codes[..weights.len()]) * inverse;
    }
}

per_cpu! {
    /// The mean of the codes under the weights.
    fn mean_code(weights: &[f32], table: &[f32], row: usize, mean: &mut [f32]) = mean_code_body
}
