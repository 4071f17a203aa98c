//! Philox 4x32-10, the counter-based random generator of Salmon et al., "Parallel Random Numbers: As Easy as
//! 1, 2, 3" (SC 2011).
//!
//! Element `e` of a stream is a pure function of (seed, stream, e): any part of a noise tensor can be made
//! anywhere, in any order, with the same bits. The normals use only IEEE f64 `+ - * / sqrt`, each rounded once,
//! so that a GPU kernel that forbids contraction gives the same bits too.

mod cuda;

#[allow(unused_imports)]
pub(crate) use cuda::{DeviceGenerators, HeldGenerators};

use super::Tensor;
use crate::error::Result;
use crate::simd_dispatch;

/// The generator of one stream. Copying it copies no state, since it has none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Philox {
    key: [u32; 2],
    stream: [u32; 2],
}

const ROUNDS: usize = 10;
const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// 2^-32 and 2^-24, exactly.
const TWO_POW_MINUS_32: f64 = 1.0 / 4_294_967_296.0;
const TWO_POW_MINUS_24: f32 = 1.0 / 16_777_216.0;

impl Philox {
    /// The generator with key `seed`, drawing from stream number `stream`.
    pub fn new(seed: u64, stream: u64) -> Self {
        Philox { key: words(seed), stream: words(stream) }
    }

    /// The four words of one block: the cipher of counter (block, stream) under the key.
    pub fn block(&self, block: u64) -> [u32; 4] {
        let [low, high] = words(block);
        philox(self.key, [low, high, self.stream[0], self.stream[1]])
    }

    /// Element `element` of the stream of words: lane `element % 4` of block `element / 4`.
    fn word(&self, element: u64) -> u32 {
        self.block(element >> 2)[(element & 3) as usize]
    }

    /// Writes elements `first_element..` of the stream of words.
    pub fn fill_words(&self, out: &mut [u32], first_element: u64) {
        let lead = (4 - (first_element & 3) as usize) % 4;
        let (head, body) = out.split_at_mut(lead.min(out.len()));
        for (i, word) in head.iter_mut().enumerate() {
            *word = self.word(first_element + i as u64);
        }
        let first_block = (first_element + 3) >> 2;
        let (groups, tail) = body.as_chunks_mut();
        fill_blocks(*self, first_block, groups);
        let first_block = first_block + (groups.len() * LANES) as u64;
        for (i, words) in tail.chunks_mut(4).enumerate() {
            words.copy_from_slice(&self.block(first_block + i as u64)[..words.len()]);
        }
    }

    /// A number in `[0, 1)`: a multiple of 2^-24.
    pub fn uniform(&self, element: u64) -> f32 {
        (self.word(element) >> 8) as f32 * TWO_POW_MINUS_24
    }

    /// An integer in `0..n` (0 if `n` is 0), each as likely as any other to within 2^-32.
    pub fn below(&self, element: u64, n: u32) -> u32 {
        ((u64::from(self.word(element)) * u64::from(n)) >> 32) as u32
    }

    /// A standard normal number.
    ///
    /// Box and Muller (1958): of a pair of words (a, b), with u = (a + 1/2) / 2^32 and v = b / 2^32, the even
    /// element is sqrt(-2 ln u) cos(2 pi v) and the odd one sqrt(-2 ln u) sin(2 pi v).
    pub fn normal(&self, element: u64) -> f32 {
        let words = self.block(element >> 2);
        let pair = (element & 2) as usize;
        normal_pair(words[pair], words[pair + 1])[(element & 1) as usize]
    }

    /// Writes elements `first_element..` of the stream of normals.
    pub fn fill_normal(&self, out: &mut [f32], first_element: u64) {
        let lead = (4 - (first_element & 3) as usize) % 4;
        let (head, body) = out.split_at_mut(lead.min(out.len()));
        for (i, value) in head.iter_mut().enumerate() {
            *value = self.normal(first_element + i as u64);
        }
        let first_block = (first_element + 3) >> 2;
        for (i, values) in body.chunks_mut(4).enumerate() {
            let [a, b, c, d] = self.block(first_block + i as u64);
            let ([p, q], [r, s]) = (normal_pair(a, b), normal_pair(c, d));
            values.copy_from_slice(&[p, q, r, s][..values.len()]);
        }
    }
}

/// The generators of a batch: one for each sample, which draws the tensor's own elements in their order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Generators {
    /// The seed of each sample.
    pub seeds: Vec<u64>,
    /// The stream of the first sample.
    pub stream: u64,
    /// From one sample's stream to the next one's.
    pub stride: u64,
}

impl Generators {
    /// The generator of a sample.
    pub fn of(&self, sample: usize) -> Philox {
        let stream = self.stream.wrapping_add(self.stride.wrapping_mul(sample as u64));
        Philox::new(self.seeds.get(sample).copied().unwrap_or(0), stream)
    }

    /// Standard normal numbers for `F32 [N, ..]`. Like the others it draws where the tensor lies: a GPU gives the same
    /// bits.
    ///
    /// # Errors
    /// `InvalidArgument` for another type; those of writing a tensor.
    pub fn fill_normal(&self, out: &mut Tensor) -> Result<()> {
        if let Some(stream) = out.stream() {
            return cuda::fill(self, &stream, out, cuda::Kind::Normal);
        }
        let samples = self.samples(out.slice_mut::<f32>()?);
        samples.for_each(|(generator, sample)| generator.fill_normal(sample, 0));
        Ok(())
    }

    /// Uniform numbers in [0, 1) for `F32 [N, ..]`.
    ///
    /// # Errors
    /// As [`Generators::fill_normal`].
    pub fn fill_uniform(&self, out: &mut Tensor) -> Result<()> {
        if let Some(stream) = out.stream() {
            return cuda::fill(self, &stream, out, cuda::Kind::Uniform);
        }
        for (generator, sample) in self.samples(out.slice_mut::<f32>()?) {
            sample.iter_mut().zip(0..).for_each(|(u, i)| *u = generator.uniform(i));
        }
        Ok(())
    }

    /// Integers below `bound` for `I64 [N, ..]`.
    ///
    /// # Errors
    /// As [`Generators::fill_normal`].
    pub fn fill_below(&self, bound: u32, out: &mut Tensor) -> Result<()> {
        if let Some(stream) = out.stream() {
            return cuda::fill(self, &stream, out, cuda::Kind::Below(bound));
        }
        for (generator, sample) in self.samples(out.slice_mut::<i64>()?) {
            sample.iter_mut().zip(0..).for_each(|(token, i)| *token = generator.below(i, bound).into());
        }
        Ok(())
    }

    /// The samples of a batch, each with its generator.
    fn samples<'a, T>(&'a self, out: &'a mut [T]) -> impl Iterator<Item = (Philox, &'a mut [T])> {
        let per_sample = out.len() / self.seeds.len().max(1);
        let samples = out.chunks_exact_mut(per_sample.max(1)).take(self.seeds.len()).enumerate();
        samples.map(|(n, sample)| (self.of(n), sample))
    }
}

/// The low and the high word.
fn words(value: u64) -> [u32; 2] {
    [value as u32, (value >> 32) as u32]
}

/// The block cipher itself.
fn philox(mut key: [u32; 2], mut counter: [u32; 4]) -> [u32; 4] {
    for _ in 0..ROUNDS {
        let a = u64::from(MULTIPLIERS[0]) * u64::from(counter[0]);
        let b = u64::from(MULTIPLIERS[1]) * u64::from(counter[2]);
        counter = [
            (b >> 32) as u32 ^ counter[1] ^ key[0],
            b as u32,
            (a >> 32) as u32 ^ counter[3] ^ key[1],
            a as u32,
        ];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    counter
}

/// Blocks that are computed side by side.
const LANES: usize = 16;

simd_dispatch! {
    /// The words of [`LANES`] blocks for each group, from block `first` on.
    fn fill_blocks<const FMA: bool>(rng: Philox, first: u64, groups: &mut [[u32; 4 * LANES]]) {
        for (i, group) in groups.iter_mut().enumerate() {
            let first = first + (i * LANES) as u64;
            let blocks: [u64; LANES] = std::array::from_fn(|lane| first + lane as u64);
            let stream = rng.stream.map(|word| [u64::from(word); LANES]);
            let mut counters = [blocks.map(|b| b & LOW), blocks.map(|b| b >> 32), stream[0], stream[1]];
            philox_lanes(rng.key, &mut counters);
            let [c0, c1, c2, c3] = counters;
            for (lane, block) in group.as_chunks_mut::<4>().0.iter_mut().enumerate() {
                *block = [c0[lane] as u32, c1[lane] as u32, c2[lane] as u32, c3[lane] as u32];
            }
        }
    }
}

/// The lower of a number's two words.
const LOW: u64 = u32::MAX as u64;

/// [`philox`] of several counters, word by word; each word alone in a number twice as wide, as vectors multiply them.
#[inline(always)]
fn philox_lanes(mut key: [u32; 2], counters: &mut [[u64; LANES]; 4]) {
    for _ in 0..ROUNDS {
        let [c0, c1, c2, c3] = *counters;
        for lane in 0..LANES {
            let a = u64::from(MULTIPLIERS[0]) * (c0[lane] & LOW);
            let b = u64::from(MULTIPLIERS[1]) * (c2[lane] & LOW);
            counters[0][lane] = (b >> 32) ^ c1[lane] ^ u64::from(key[0]);
            counters[1][lane] = b & LOW;
            counters[2][lane] = (a >> 32) ^ c3[lane] ^ u64::from(key[1]);
            counters[3][lane] = a & LOW;
        }
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
}

/// Two independent normals of two words.
fn normal_pair(a: u32, b: u32) -> [f32; 2] {
    let u = (f64::from(a) + 0.5) * TWO_POW_MINUS_32;
    let radius = (-2.0 * ln(u)).sqrt();
    let (sin, cos) = sin_cos_of_word(b);
    [(radius * cos) as f32, (radius * sin) as f32]
}

/// 1/3, 1/5, ..: the series of artanh(s) after s, divided by s.
const ARTANH: [f64; 11] = {
    let mut terms = [0.0; 11];
    let mut i = 0;
    while i < terms.len() {
        terms[i] = 1.0 / (2 * i + 3) as f64;
        i += 1;
    }
    terms
};

/// (-1)^i / (2i+1)! and (-1)^i / (2i)!: Taylor's coefficients of sin and cos. The factorials are exact in f64.
const SIN_COS: [[f64; 2]; 10] = {
    let mut terms = [[0.0; 2]; 10];
    let (mut i, mut factorial, mut sign) = (0, 1.0, 1.0);
    while i < terms.len() {
        let odd = factorial * (2 * i + 1) as f64;
        terms[i] = [sign / odd, sign / factorial];
        factorial = odd * (2 * i + 2) as f64;
        sign = -sign;
        i += 1;
    }
    terms
};

/// The natural logarithm of a positive normal number.
///
/// x = m 2^e with m in [sqrt(1/2), sqrt(2)); ln m = 2 artanh(s), s = (m-1)/(m+1), by its series.
fn ln(x: f64) -> f64 {
    const SQRT_HALF_BITS: u64 = 0x3FE6_A09E_667F_3BCD;
    const ONE_BITS: u64 = 0x3FF0_0000_0000_0000;
    /// ln 2 = HIGH + LOW; HIGH ends in zeros, so that e * HIGH is exact.
    const LN2_HIGH: f64 = f64::from_bits(0x3FE6_2E42_FEE0_0000);
    const LN2_LOW: f64 = f64::from_bits(0x3DEA_39EF_3579_3C76);
    let bits = x.to_bits() + (ONE_BITS - SQRT_HALF_BITS);
    let e = f64::from((bits >> 52) as i32 - 1023);
    let m = f64::from_bits((bits & 0x000F_FFFF_FFFF_FFFF) + SQRT_HALF_BITS);
    let s = (m - 1.0) / (m + 1.0);
    let z = s * s;
    let mut series = 0.0;
    for coefficient in ARTANH.iter().rev() {
        series = (series + coefficient) * z;
    }
    let ln_m = 2.0 * s + 2.0 * s * series;
    e * LN2_HIGH + (e * LN2_LOW + ln_m)
}

/// sin and cos of 2 pi w / 2^32.
///
/// The nearest quarter turn is split off in integers; what is left is an angle within pi/4, by Taylor's series.
fn sin_cos_of_word(w: u32) -> (f64, f64) {
    let quarter = (u64::from(w) + (1 << 29)) >> 30;
    let turns = (i64::from(w) - (quarter << 30) as i64) as f64 * TWO_POW_MINUS_32;
    let angle = turns * std::f64::consts::TAU;
    let z = angle * angle;
    let (mut sin, mut cos) = (0.0, 0.0);
    for [of_sin, of_cos] in SIN_COS.iter().rev() {
        sin = sin * z + of_sin;
        cos = cos * z + of_cos;
    }
    sin *= angle;
    match quarter & 3 {
        0 => (sin, cos),
        1 => (cos, -sin),
        2 => (-sin, -cos),
        _ => (-cos, sin),
    }
}

#[cfg(test)]
mod tests;
