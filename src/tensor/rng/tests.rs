use super::*;
use crate::device::cuda::Precision;
use crate::ops::check;
use crate::tensor::DType;

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

#[test]
fn a_gpu_draws_the_same_bits() {
    let Some(cx) = check::cuda(Precision::F32) else { return };
    let generators = Generators { seeds: vec![3, u64::MAX, 1 << 40], stream: 5 << 32 | 9, stride: 1 };
    for dims in [&[3usize, 1][..], &[3, 5, 7], &[3, 4096], &[3, 0]] {
        let [mut here, mut there] = [check::cx(), cx.clone()].map(|cx| {
            [DType::F32, DType::F32, DType::I64].map(|of| Tensor::new(&cx, "x", dims, of).unwrap())
        });
        for [normal, uniform, below] in [&mut here, &mut there] {
            generators.fill_normal(normal).unwrap();
            generators.fill_uniform(uniform).unwrap();
            generators.fill_below(8191, below).unwrap();
        }
        for (here, there) in here.iter().zip(&there) {
            assert!(here.bytes().unwrap() == there.bytes().unwrap(), "{dims:?}");
        }
    }
    // Enough of them for rare words, too.
    let rng = Generators { seeds: vec![1], stream: 2, stride: 0 };
    let mut there = Tensor::new(&cx, "x", &[1, 200_001], DType::F32).unwrap();
    rng.fill_normal(&mut there).unwrap();
    let found = there.slice::<f32>().unwrap();
    assert!(found.iter().zip(0..).all(|(v, i)| v.to_bits() == rng.of(0).normal(i).to_bits()));
}
