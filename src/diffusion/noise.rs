//! Where random numbers come from: counter-based, so that a picture depends on its own seed alone.

use crate::error::Result;
use crate::tensor::Tensor;
use crate::tensor::rng::Philox;

/// What a random number is for. Each use has streams of its own, one per step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Draw {
    /// The noise that Stage C starts from.
    LatentStart,
    /// The noise that a DDPM step of Stage C adds.
    LatentStep,
    /// The noise that a kept region is noised with before each step of inpainting.
    LatentKept,
    /// The tokens that Stage B starts from.
    TokenStart,
    /// Whether a token is put back to its start.
    TokenRenoise,
    /// The multinomial choice of a token.
    TokenChoice,
    /// The noise that v2's Stage B starts from.
    DecoderStart,
    /// The noise that a step of v2's Stage B adds.
    DecoderStep,
}

impl Draw {
    /// The Philox stream: the use in the upper half, the step in the lower.
    fn stream(self, step: usize) -> u64 {
        let number: u64 = match self {
            Draw::LatentStart => 0,
            Draw::LatentStep => 1,
            Draw::LatentKept => 2,
            Draw::TokenStart => 3,
            Draw::TokenRenoise => 4,
            Draw::TokenChoice => 5,
            Draw::DecoderStart => 6,
            Draw::DecoderStep => 7,
        };
        number << 32 | step as u64
    }
}

/// A source of the random numbers of a batch. Element order is the tensor's own (channels last).
pub trait NoiseSource {
    /// Standard normal numbers for `F32` `[N, ..]`.
    ///
    /// # Errors
    /// `Internal` if the source does not have them.
    fn normal(&mut self, draw: Draw, step: usize, out: &mut Tensor) -> Result<()>;

    /// Uniform numbers in [0, 1) for `F32` `[N, ..]`.
    ///
    /// # Errors
    /// `Internal` if the source does not have them.
    fn uniform(&mut self, draw: Draw, step: usize, out: &mut Tensor) -> Result<()>;

    /// Integers below `bound` for `I64` `[N, ..]`.
    ///
    /// # Errors
    /// `Internal` if the source does not have them.
    fn below(&mut self, draw: Draw, step: usize, bound: u32, out: &mut Tensor) -> Result<()>;
}

/// Philox 4x32-10 with one seed per sample of the batch.
#[derive(Debug, Clone)]
pub struct SeededNoise {
    seeds: Vec<u64>,
}

impl SeededNoise {
    /// Sample n draws from `seeds[n]`.
    pub fn new(seeds: Vec<u64>) -> Self {
        SeededNoise { seeds }
    }

    fn generators(&self, draw: Draw, step: usize) -> impl Iterator<Item = Philox> {
        let stream = draw.stream(step);
        self.seeds.iter().map(move |&seed| Philox::new(seed, stream))
    }
}

impl NoiseSource for SeededNoise {
    fn normal(&mut self, draw: Draw, step: usize, out: &mut Tensor) -> Result<()> {
        let per_sample = out.elements() / self.seeds.len().max(1);
        let samples = out.slice_mut::<f32>()?.chunks_exact_mut(per_sample.max(1));
        for (sample, generator) in samples.zip(self.generators(draw, step)) {
            generator.fill_normal(sample, 0);
        }
        Ok(())
    }

    fn uniform(&mut self, draw: Draw, step: usize, out: &mut Tensor) -> Result<()> {
        let per_sample = out.elements() / self.seeds.len().max(1);
        let samples = out.slice_mut::<f32>()?.chunks_exact_mut(per_sample.max(1));
        for (sample, generator) in samples.zip(self.generators(draw, step)) {
            sample.iter_mut().zip(0..).for_each(|(u, i)| *u = generator.uniform(i));
        }
        Ok(())
    }

    fn below(&mut self, draw: Draw, step: usize, bound: u32, out: &mut Tensor) -> Result<()> {
        let per_sample = out.elements() / self.seeds.len().max(1);
        let samples = out.slice_mut::<i64>()?.chunks_exact_mut(per_sample.max(1));
        for (sample, generator) in samples.zip(self.generators(draw, step)) {
            sample.iter_mut().zip(0..).for_each(|(token, i)| *token = generator.below(i, bound).into());
        }
        Ok(())
    }
}
