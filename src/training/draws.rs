//! The random numbers of training: counter-based, by the number of the sample since training began. So they depend
//! neither on how a batch is cut, nor on how many ranks share it, nor on whether training was interrupted.

use crate::device::Context;
use crate::error::Result;
use crate::tensor::rng::{Generators, Philox};
use crate::tensor::{DType, Tensor};

/// What a random number is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub enum Use {
    /// The time of a sample.
    Time = 1,
    /// The noise in latents.
    Noise,
    /// Whether a text is replaced.
    TextDropout,
    /// Which tokens are replaced.
    TokenMask,
    /// What they are replaced by.
    TokenValue,
    /// Whether an image embedding is zeroed, or noised, and how much.
    Embedding,
    /// Its noise.
    EmbeddingNoise,
    /// Which residual blocks are left out.
    Depth,
    /// Which encoder outputs dead codes become.
    Codes,
    /// What adapters begin with.
    Adapters,
}

/// The samples of one batch, or of a part of it.
#[derive(Debug, Clone, Copy)]
pub struct Draws {
    /// Of the whole training.
    pub seed: u64,
    /// The number of the first sample.
    pub first: u64,
    /// How many there are.
    pub count: usize,
}

/// Fills the matrix that narrows the input of layer number `layer` in an adapter: uniform within 1 / sqrt(inputs) of
/// 0, which is Kaiming's for a leaky slope of sqrt(5), as peft begins.
pub fn narrowing(seed: u64, layer: usize, inputs: usize, out: &mut [f32]) {
    let generator = Philox::new(seed, (Use::Adapters as u64) << 48 | layer as u64);
    let bound = 1.0 / (inputs as f32).sqrt();
    out.iter_mut().zip(0..).for_each(|(v, i)| *v = (2.0 * generator.uniform(i) - 1.0) * bound);
}

/// Times in training reach a little beyond 1, and are clamped: 7.5 % of the samples are pure noise.
const TIME_SPREAD: f32 = 1.08;
const TIME_MIN: f32 = 0.001;

impl Draws {
    fn generators(self, what: Use) -> impl Iterator<Item = Philox> {
        // 48 bits count samples: more than anybody trains on.
        (0..self.count as u64).map(move |i| Philox::new(self.seed, (what as u64) << 48 | (self.first + i)))
    }

    /// The numbers of the first sample.
    pub fn first(self, what: Use) -> Philox {
        Philox::new(self.seed, (what as u64) << 48 | self.first)
    }

    /// Number `place` in [0, 1) of each sample.
    pub fn uniform(self, what: Use, place: u64) -> Vec<f32> {
        self.generators(what).map(|generator| generator.uniform(place)).collect()
    }

    /// The time of each sample: ((1 - u) 1.08 + 0.001), clamped to 0.001 .. 1.
    pub fn times(self) -> Vec<f32> {
        let time = |u: f32| ((1.0 - u) * TIME_SPREAD + TIME_MIN).clamp(TIME_MIN, 1.0);
        self.uniform(Use::Time, 0).into_iter().map(time).collect()
    }

    /// Which samples an event of this probability befalls.
    pub fn chosen(self, what: Use, place: u64, probability: f32) -> Vec<bool> {
        self.uniform(what, place).into_iter().map(|u| u < probability).collect()
    }

    /// Standard normal numbers for `[count, ..]`.
    ///
    /// # Errors
    /// `OutOfMemory`.
    pub fn normal(self, cx: &Context, what: Use, dims: &[usize]) -> Result<Tensor> {
        let mut out = Tensor::new(cx, "noise", dims, DType::F32)?;
        let stream = (what as u64) << 48 | self.first;
        Generators { seeds: vec![self.seed; self.count], stream, stride: 1 }.fill_normal(&mut out)?;
        Ok(out)
    }

    /// Tokens `I64 [count, ..]` with each replaced, with the probability of its sample's time, by one that is drawn
    /// from `codes`; and which were.
    ///
    /// # Errors
    /// `OutOfMemory`.
    pub fn noised_tokens(
        self,
        cx: &Context,
        tokens: &Tensor,
        times: &[f32],
        codes: u32,
    ) -> Result<(Tensor, Vec<bool>)> {
        let mut noised = Tensor::new(cx, "noised tokens", tokens.dims(), DType::I64)?;
        let per_sample = tokens.elements() / self.count.max(1);
        let mut replaced = Vec::with_capacity(tokens.elements());
        let samples = noised.slice_mut::<i64>()?.chunks_exact_mut(per_sample.max(1));
        let samples = samples.zip(tokens.slice::<i64>()?.chunks_exact(per_sample.max(1))).zip(times);
        let generators = self.generators(Use::TokenMask).zip(self.generators(Use::TokenValue));
        for (((noised, tokens), &time), (mask, value)) in samples.zip(generators) {
            for ((noised, &token), i) in noised.iter_mut().zip(tokens).zip(0..) {
                let replace = mask.uniform(i) <= time;
                *noised = if replace { value.below(i, codes).into() } else { token };
                replaced.push(replace);
            }
        }
        Ok((noised, replaced))
    }
}
