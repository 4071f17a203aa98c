//! Philox 4x32-10, the counter-based random generator of Salmon et al., "Parallel Random Numbers: As Easy as
//! 1, 2, 3" (SC 2011).
//!
//! Element `e` of a stream is a pure function of (seed, stream, e): any part of a noise tensor can be made
//! anywhere, in any order, with the same bits. The normals use only IEEE f64 `+ - * / sqrt`, each rounded once,
//! so that a GPU kernel that forbids contraction gives the same bits too.

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
mod tests {
    use super::*;

    /// The known-answer vectors of Random123 (`kat_vectors`, philox4x32-10).
    #[test]
    fn known_answers() {
        let ones = u32::MAX;
        assert_eq!(philox([0; 2], [0; 4]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox([ones; 2], [ones; 4]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        let pi = Philox::new(0x299f_31d0_a409_3822, 0x0370_7344_1319_8a2e);
        assert_eq!(pi.block(0x85a3_08d3_243f_6a88), [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]);
    }

    #[test]
    fn functions_agree_with_std() {
        let words = Philox::new(1, 2);
        for i in 0..100_000u64 {
            let w = words.block(i)[0];
            let u = (f64::from(w) + 0.5) * TWO_POW_MINUS_32;
            assert!((ln(u) - u.ln()).abs() < 1e-14, "ln {u}");
            let (sin, cos) = sin_cos_of_word(w);
            let angle = f64::from(w) * TWO_POW_MINUS_32 * std::f64::consts::TAU;
            assert!((sin - angle.sin()).abs() < 1e-14, "sin {angle}");
            assert!((cos - angle.cos()).abs() < 1e-14, "cos {angle}");
        }
        for w in [0, 1, 1 << 29, 1 << 30, 1 << 31, 3 << 30, u32::MAX] {
            let (sin, cos) = sin_cos_of_word(w);
            let angle = f64::from(w) * TWO_POW_MINUS_32 * std::f64::consts::TAU;
            assert!((sin - angle.sin()).abs() < 1e-14 && (cos - angle.cos()).abs() < 1e-14);
            let [p, q] = normal_pair(w, w);
            assert!(p.is_finite() && q.is_finite());
        }
    }

    #[test]
    fn elements_are_the_same_however_they_are_drawn() {
        let rng = Philox::new(42, 7);
        for first in 0..9u64 {
            for len in [0, 1, 2, 3, 5, 8, 13] {
                let mut out = vec![0f32; len];
                rng.fill_normal(&mut out, first);
                for (i, value) in out.iter().enumerate() {
                    assert_eq!(value.to_bits(), rng.normal(first + i as u64).to_bits());
                }
            }
        }
        assert_ne!(rng.normal(0), Philox::new(42, 8).normal(0));
        assert_ne!(rng.normal(0), Philox::new(43, 7).normal(0));
    }

    #[test]
    fn words_are_the_same_however_they_are_drawn() {
        let rng = Philox::new(42, 7);
        for first in [0u64, 1, 3, 4, (1 << 34) - 70, u64::from(u32::MAX)] {
            for len in [0, 1, 5, 64, 67, 300] {
                let mut out = vec![0; len];
                rng.fill_words(&mut out, first);
                assert!(out.iter().enumerate().all(|(i, &word)| word == rng.word(first + i as u64)));
            }
        }
    }

    #[test]
    fn uniforms_and_integers_are_even() {
        let rng = Philox::new(3, 0);
        let (draws, bins) = (200_000u64, 100u32);
        let (mut of_uniform, mut of_below) = (vec![0f64; bins as usize], vec![0f64; bins as usize]);
        for e in 0..draws {
            let u = rng.uniform(e);
            assert!((0.0..1.0).contains(&u));
            of_uniform[(u * bins as f32) as usize] += 1.0;
            of_below[rng.below(e + draws, bins) as usize] += 1.0;
        }
        let expected = draws as f64 / f64::from(bins);
        for counts in [of_uniform, of_below] {
            let chi2: f64 = counts.iter().map(|n| (n - expected).powi(2) / expected).sum();
            // 99 degrees of freedom: 60..160 leaves out less than 1 in 2,000.
            assert!((60.0..160.0).contains(&chi2), "chi-square {chi2}");
        }
        assert_eq!(rng.below(0, 0), 0);
        assert_eq!(rng.below(0, 1), 0);
    }

    /// The normal distribution function by Marsaglia's series.
    fn phi(x: f64) -> f64 {
        let (mut sum, mut term, mut k) = (x, x, 1.0);
        while term.abs() > 1e-17 {
            k += 2.0;
            term *= x * x / k;
            sum += term;
        }
        0.5 + sum * (-x * x / 2.0).exp() / std::f64::consts::TAU.sqrt()
    }

    #[test]
    fn normals_are_normal() {
        let n = 200_000usize;
        let mut draws = vec![0f32; n];
        Philox::new(2023, 1).fill_normal(&mut draws, 5);
        let moment = |p: i32| draws.iter().map(|&x| f64::from(x).powi(p)).sum::<f64>() / n as f64;
        assert!(moment(1).abs() < 0.01 && (moment(2) - 1.0).abs() < 0.015, "{} {}", moment(1), moment(2));
        assert!(moment(3).abs() < 0.04 && (moment(4) - 3.0).abs() < 0.12, "{} {}", moment(3), moment(4));
        let pairs: f64 = draws.chunks_exact(2).map(|p| f64::from(p[0] * p[1])).sum();
        assert!((pairs / (n / 2) as f64).abs() < 0.015, "correlation {pairs}");
        draws.sort_by(f32::total_cmp);
        let distance = draws
            .iter()
            .enumerate()
            .map(|(i, &x)| (phi(f64::from(x)) - (i as f64 + 0.5) / n as f64).abs())
            .fold(0.0, f64::max);
        // Kolmogorov: beyond 1.95 / sqrt(n) once in a thousand.
        assert!(distance * (n as f64).sqrt() < 1.95, "Kolmogorov-Smirnov {distance}");
    }
}
