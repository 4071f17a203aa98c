//! The blocks that the denoising networks share: ResBlock, TimestepBlock, AttnBlock, FeedForwardBlock, and the
//! ResBlock of v2's decoder, which an image embedding joins.
//!
//! What does not change from step to step is computed apart from `forward`, once per generation: a
//! TimestepBlock's [`Modulations`] for all times, an AttnBlock's keys and values of the conditioning
//! ([`Attended`]), and what an image embedding does to the first layer of the blocks that it joins
//! ([`Injection`]). The results are the same; the work is not done again.

mod attention;
mod residual;
mod run;
#[cfg(test)]
mod tests;

pub use attention::{Attended, AttnBlock, AttnConfig, KeysAndValues};
pub use residual::{FeedForwardBlock, FoldedImage, InjectedResBlock, ResBlock};
pub use run::{Blocks, Injection, Invariants, Joined, Joining, RunConfig, attend};

use crate::device::Context;
use crate::error::Result;
use crate::nn::{Linear, Params};
use crate::ops::layer_norm::{LayerNorm, layer_norm, layer_norm_in_place};
use crate::tensor::{DType, Tensor};

/// All LayerNorms of these networks: over channels, without weights.
pub const NORM_EPS: f32 = 1e-6;

const CHANNEL_NORM: LayerNorm = LayerNorm { eps: NORM_EPS, affine: None, scale: None, shift: None };

/// Times in 0..1 are spread over as many positions before they are embedded.
const TIME_POSITIONS: f32 = 10_000.0;

/// LayerNorm over channels without weights.
///
/// # Errors
/// `OutOfMemory`; `Cancelled`.
pub fn channel_norm(cx: &Context, x: &Tensor) -> Result<Tensor> {
    layer_norm(cx, x, &CHANNEL_NORM)
}

/// [`channel_norm`] of what is not needed afterwards, in its memory where that is possible.
///
/// # Errors
/// `OutOfMemory`; `Cancelled`.
pub fn channel_norm_in_place(cx: &Context, x: Tensor) -> Result<Tensor> {
    layer_norm_in_place(cx, x, &CHANNEL_NORM)
}

/// The sinusoidal embedding of times: concat(sin(t f), cos(t f)), f_i = exp(-i ln(10000) / (width/2 - 1)), a
/// zero appended if the width is odd.
///
/// Computed in `f32` like the reference: the phase is up to 10,000, and a wider type would move the sine by up
/// to 6e-4 against the embedding that the networks were trained with.
///
/// # Shapes
/// times `[N]` -> `[N, width]`
///
/// # Errors
/// `OutOfMemory`.
pub fn timestep_embedding(cx: &Context, times: &[f32], width: usize) -> Result<Tensor> {
    let half = width / 2;
    let decay = -((TIME_POSITIONS as f64).ln() / (half as f64 - 1.0)) as f32;
    let mut embedded = Tensor::new(cx, "timestep embedding", &[times.len(), width], DType::F32)?;
    // Of an odd width, the last number stays so.
    embedded.slice_mut::<f32>()?.fill(0.0);
    for (row, &time) in embedded.slice_mut::<f32>()?.chunks_exact_mut(width).zip(times) {
        for i in 0..half {
            let frequency = ((i as f32 * decay) as f64).exp() as f32;
            let phase = (time * TIME_POSITIONS * frequency) as f64;
            row[i] = phase.sin() as f32;
            row[half + i] = phase.cos() as f32;
        }
    }
    Ok(embedded)
}

/// x * (1 + a) + b with (a, b) = Linear(embedded time).
#[derive(Debug)]
pub struct TimestepBlock {
    mapper: Linear,
}

impl TimestepBlock {
    /// # Errors
    /// `Format` for missing or misshapen weights.
    pub fn load(p: &Params, channels: usize, time_width: usize) -> Result<Self> {
        Ok(TimestepBlock { mapper: Linear::load(&p.sub("mapper"), time_width, 2 * channels)? })
    }
}

/// What the TimestepBlocks of a network do at some times: per block `[times, 2 C]`.
#[derive(Debug, Clone)]
pub struct Modulations(Vec<Tensor>);

impl Modulations {
    /// Those of one time alone, for all samples of a batch.
    ///
    /// # Errors
    /// `InvalidArgument` if there is no such time.
    pub fn at(&self, time: usize) -> Result<Self> {
        Ok(Modulations(self.0.iter().map(|m| m.narrow(time, 1)).collect::<Result<_>>()?))
    }

    /// Per block, in the network's order.
    pub fn per_block(&self) -> &[Tensor] {
        &self.0
    }

    /// As [`Modulations::per_block`] gives them.
    pub fn of_blocks(modulations: &[Tensor]) -> Self {
        Modulations(modulations.to_vec())
    }
}

/// Everything beside x that a network's blocks take.
#[derive(Debug, Clone, Copy)]
pub struct Conditioning<'a> {
    /// One row for all samples, or one per sample.
    pub modulations: &'a Modulations,
    /// Token groups, concatenated over the sequence.
    pub attended: &'a [Attended],
}
