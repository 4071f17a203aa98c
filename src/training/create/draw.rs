//! Tensors of random numbers as PyTorch's initialisers spread them.

use crate::device::Context;
use crate::error::{Error, Result};
use crate::ops::kernels::parallel_chunks;
use crate::tensor::rng::Philox;

/// Numbers that one task draws.
const CHUNK: usize = 64 << 10;
/// Uniform numbers that are drawn at once.
const WORDS: usize = 1024;
/// 2^-24: uniform numbers are multiples of it.
const UNIFORM_STEP: f64 = 1.0 / 16_777_216.0;

/// How the weights of one tensor begin.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Rule {
    /// All alike.
    Constant(f32),
    /// Normal with mean 0 and this standard deviation.
    Normal(f64),
    /// Uniform from minus to plus this.
    Uniform(f64),
    /// `xavier_uniform_` with this gain (Glorot and Bengio 2010): uniform within gain sqrt(6 / (fan in + fan out)).
    Xavier(f64),
    /// `xavier_uniform_` of a tensor that holds this many weights like this one.
    XavierPacked(usize),
    /// `kaiming_normal_` by the outputs (He et al. 2015): normal with variance 2 / fan out.
    KaimingOut,
    /// What PyTorch's own layers do: uniform within 1 / sqrt(fan in), the bias by the fan of its weight.
    Layer,
}

/// A distribution with its numbers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(in crate::training) enum Spread {
    Constant(f32),
    Normal(f64),
    Uniform(f64),
}

impl Rule {
    /// The distribution for a tensor of these dimensions. `weight` gives those of the weight beside a bias.
    ///
    /// # Errors
    /// `Internal` for a rule that needs a fan where there is none.
    pub fn spread<'a>(
        self,
        dims: &'a [usize],
        weight: impl FnOnce() -> Option<&'a [usize]>,
    ) -> Result<Spread> {
        let fans = |dims: &[usize]| {
            Fans::of(dims).ok_or_else(|| Error::internal("a new weight", format!("{dims:?} has no fan")))
        };
        Ok(match self {
            Rule::Constant(value) => Spread::Constant(value),
            Rule::Normal(deviation) => Spread::Normal(deviation),
            Rule::Uniform(bound) => Spread::Uniform(bound),
            Rule::Xavier(gain) => {
                let Fans { inputs, outputs } = fans(dims)?;
                Spread::Uniform(gain * (6.0 / (inputs + outputs)).sqrt())
            }
            Rule::XavierPacked(parts) => {
                let Fans { inputs, outputs } = fans(dims)?;
                Spread::Uniform((6.0 / (inputs + outputs * parts as f64)).sqrt())
            }
            Rule::KaimingOut => Spread::Normal((2.0 / fans(dims)?.outputs).sqrt()),
            Rule::Layer => {
                let weight = if dims.len() > 1 { Some(dims) } else { weight() };
                Spread::Uniform(1.0 / fans(weight.unwrap_or(dims))?.inputs.sqrt())
            }
        })
    }
}

/// What one output sums over and what one input goes to, as PyTorch counts them: from the first two dimensions, whatever
/// the groups of a convolution, and also where a transposed one has its inputs first.
struct Fans {
    inputs: f64,
    outputs: f64,
}

impl Fans {
    fn of(dims: &[usize]) -> Option<Self> {
        let [outputs, inputs, kernel @ ..] = dims else { return None };
        let positions: usize = kernel.iter().product();
        Some(Fans { inputs: (inputs * positions) as f64, outputs: (outputs * positions) as f64 })
    }
}

/// The random numbers of the tensor `name`: each name has a stream of its own.
pub(in crate::training) fn stream(seed: u64, name: &str) -> Philox {
    // FNV-1a: any even spread of names over numbers would do.
    let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    Philox::new(seed, hash)
}

/// Draws all elements.
///
/// # Errors
/// `Cancelled`.
pub(in crate::training) fn fill(cx: &Context, out: &mut [f32], rng: Philox, spread: Spread) -> Result<()> {
    parallel_chunks(cx, out, CHUNK, |i, part| {
        let first = (i * CHUNK) as u64;
        match spread {
            Spread::Constant(value) => part.fill(value),
            Spread::Normal(deviation) => {
                rng.fill_normal(part, first);
                part.iter_mut().for_each(|x| *x = (f64::from(*x) * deviation) as f32);
            }
            Spread::Uniform(bound) => {
                let mut words = [0; WORDS];
                for (i, part) in part.chunks_mut(WORDS).enumerate() {
                    let words = &mut words[..part.len()];
                    rng.fill_words(words, first + (i * WORDS) as u64);
                    for (x, word) in part.iter_mut().zip(words) {
                        *x = ((f64::from(*word >> 8) * UNIFORM_STEP * 2.0 - 1.0) * bound) as f32;
                    }
                }
            }
        }
    })
}
