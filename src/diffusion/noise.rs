//! Where random numbers come from: counter-based, so that a picture depends on its own seed alone.

use crate::device::Context;
use crate::error::Result;
use crate::ops::sampler_step::Random;
use crate::tensor::rng::Generators;
use crate::tensor::{DType, Tensor};

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

    /// What draws these numbers, if generators do: an op may then draw them where it needs them.
    fn generators(&self, _draw: Draw, _step: usize) -> Option<Generators> {
        None
    }
}

/// Standard normal numbers for an op over `F32` of these dimensions.
///
/// # Errors
/// As [`NoiseSource::normal`].
pub fn normals(
    cx: &Context,
    noise: &mut dyn NoiseSource,
    (draw, step): (Draw, usize),
    dims: &[usize],
) -> Result<Random> {
    if let Some(generators) = noise.generators(draw, step) {
        return Ok(Random::Drawn(generators));
    }
    let mut given = Tensor::new(cx, "noise", dims, DType::F32)?;
    noise.normal(draw, step, &mut given)?;
    Ok(Random::Given(given))
}

/// Uniform numbers for an op over a tensor of these dimensions.
///
/// # Errors
/// As [`NoiseSource::uniform`].
pub fn uniforms(
    cx: &Context,
    noise: &mut dyn NoiseSource,
    (draw, step): (Draw, usize),
    dims: &[usize],
) -> Result<Random> {
    match noise.generators(draw, step) {
        Some(generators) => Ok(Random::Drawn(generators)),
        None => uniform_tensor(cx, noise, (draw, step), dims).map(Random::Given),
    }
}

/// Uniform numbers as a tensor.
///
/// # Errors
/// As [`NoiseSource::uniform`].
pub fn uniform_tensor(
    cx: &Context,
    noise: &mut dyn NoiseSource,
    (draw, step): (Draw, usize),
    dims: &[usize],
) -> Result<Tensor> {
    let _span = cx.span("noise");
    let mut uniforms = Tensor::new(cx, "uniform numbers", dims, DType::F32)?;
    noise.uniform(draw, step, &mut uniforms)?;
    Ok(uniforms)
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

    fn of(&self, draw: Draw, step: usize) -> Generators {
        Generators { seeds: self.seeds.clone(), stream: draw.stream(step), stride: 0 }
    }
}

impl NoiseSource for SeededNoise {
    fn normal(&mut self, draw: Draw, step: usize, out: &mut Tensor) -> Result<()> {
        self.of(draw, step).fill_normal(out)
    }

    fn uniform(&mut self, draw: Draw, step: usize, out: &mut Tensor) -> Result<()> {
        self.of(draw, step).fill_uniform(out)
    }

    fn below(&mut self, draw: Draw, step: usize, bound: u32, out: &mut Tensor) -> Result<()> {
        self.of(draw, step).fill_below(bound, out)
    }

    fn generators(&self, draw: Draw, step: usize) -> Option<Generators> {
        Some(self.of(draw, step))
    }
}
