use std::sync::Mutex;

use half::{bf16, f16};

use super::*;
use crate::device::gemm::{Layout, MatrixB, Values};
use crate::device::{CancelToken, Device};

/// Numbers between -1 and 1, each row of a size of its own.
fn numbers(rows: usize, columns: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_769) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        f64::from(state) / f64::from(u32::MAX) * 2.0 - 1.0
    };
    (0..rows * columns).map(|i| (next() * (1.0 + (i / columns % 5) as f64)) as f32).collect()
}

fn context(threads: usize) -> Context {
    Context::new(&Device::cpu(threads).unwrap())
}

fn rows_are_outputs(values: &[f32], k: usize) -> MatrixB<'_> {
    MatrixB { values: Values::F32(values), layout: Layout::RowsAreOutputs, leading: k }
}

fn packed(weights: &[f32], n: usize, k: usize) -> Packed {
    Packed::new(&context(2), &rows_are_outputs(weights, k), n, k).unwrap().unwrap()
}

/// The definition: whole numbers and their scale.
fn quantised(row: &[f32]) -> (Vec<i64>, f32) {
    let largest = row.iter().fold(0f32, |most, v| most.max(v.abs()));
    if largest == 0.0 {
        return (vec![0; row.len()], 0.0);
    }
    let inverse = 127.0 / largest;
    (row.iter().map(|v| (v * inverse).round_ties_even() as i64).collect(), largest / 127.0)
}

/// A product by its definition: sums of whole numbers, then the scales.
fn definition(a: &[f32], b: &[f32], k: usize) -> Vec<f32> {
    let weights: Vec<_> = b.chunks(k).map(quantised).collect();
    let mut c = Vec::new();
    for (q, scale) in a.chunks(k).map(quantised) {
        for (w, of_output) in &weights {
            let sum: i64 = q.iter().zip(w).map(|(q, w)| q * w).sum();
            c.push(sum as f32 * scale * of_output);
        }
    }
    c
}

fn multiply(threads: usize, way: Way, m: usize, n: usize, terms: &[Factors]) -> Vec<f32> {
    let mut out = vec![f32::NAN; m * n];
    run(&context(threads), &Product { m, n, terms }, way, &mut out, &|_, _, _| ()).unwrap();
    out
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// Odd sizes, one of each, full tiles, more than one block of rows and group of panels.
const SIZES: &[[usize; 3]] = &[
    [1, 1, 1],
    [1, 33, 3],
    [12, 32, 4],
    [13, 31, 5],
    [11, 65, 257],
    [25, 16, 1030],
    [40, 600, 64],
    [700, 40, 700],
];

#[test]
fn every_kernel_agrees_with_the_definition_bit_for_bit() {
    for &[m, n, k] in SIZES {
        let (a, b) = (numbers(m, k, 1), numbers(n, k, 2));
        let weight = packed(&b, n, k);
        let want = definition(&a, &b, k);
        for way in Way::available() {
            for threads in [1, 3] {
                let terms = [Factors { rows: &a, leading: k, weight: &weight }];
                let got = multiply(threads, way, m, n, &terms);
                assert!(bits(&got) == bits(&want), "{way:?} {m} {n} {k}, {threads} threads");
            }
        }
    }
}

#[test]
fn it_is_close_to_the_product() {
    let [m, n, k] = [30, 50, 500];
    let (a, b) = (numbers(m, k, 3), numbers(n, k, 4));
    let weight = packed(&b, n, k);
    let got = multiply(2, Way::best(), m, n, &[Factors { rows: &a, leading: k, weight: &weight }]);
    let (mut error, mut norm) = (0.0, 0.0);
    for (i, got) in got.iter().enumerate() {
        let row = a[i / n * k..][..k].iter().zip(&b[i % n * k..][..k]);
        let want: f64 = row.map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
        error += (f64::from(*got) - want).powi(2);
        norm += want * want;
    }
    // A step of the grid is 1/127 of the largest number; its error is evenly spread, 1/sqrt(12) of it. Relative to
    // evenly spread numbers that is 1/127/2, of both factors together sqrt(2) times as much.
    let bound = 2.0 * f64::sqrt(2.0) / 127.0 / 2.0;
    assert!((error / norm).sqrt() < bound, "{}", (error / norm).sqrt());
    assert!(error > 0.0);
}

#[test]
fn the_longest_sums_neither_saturate_nor_overflow() {
    let k = MAX_DEPTH;
    let (mut b, m, n) = (vec![1f32; 3 * k], 2, 3);
    b[k..2 * k].fill(-1.0);
    b[2 * k + 1..].fill(0.0);
    let mut a = vec![0.5f32; 2 * k];
    a[k..].fill(-0.5);
    let weight = packed(&b, n, k);
    let unit = |sign: f32, count: usize| (count * 127 * 127) as f32 * sign * (0.5 / 127.0) * (1.0 / 127.0);
    for way in Way::available() {
        let got = multiply(1, way, m, n, &[Factors { rows: &a, leading: k, weight: &weight }]);
        let want = [unit(1., k), unit(-1., k), unit(1., 1), unit(-1., k), unit(1., k), unit(-1., 1)];
        assert_eq!(got, want, "{way:?}");
    }
}

#[test]
fn terms_have_scales_of_their_own() {
    let [m, n] = [29, 70];
    let depths = [130, 7, 64];
    let a: Vec<_> = depths.iter().map(|&k| numbers(m, k, k as u32)).collect();
    let b: Vec<_> = depths.iter().map(|&k| numbers(n, k, 9 + k as u32)).collect();
    let weights: Vec<_> = b.iter().zip(depths).map(|(b, k)| packed(b, n, k)).collect();
    let terms: Vec<_> =
        (0..3).map(|i| Factors { rows: &a[i], leading: depths[i], weight: &weights[i] }).collect();
    let parts: Vec<_> = (0..3).map(|i| definition(&a[i], &b[i], depths[i])).collect();
    let want: Vec<f32> = (0..m * n).map(|i| parts[0][i] + parts[1][i] + parts[2][i]).collect();
    for way in Way::available() {
        assert_eq!(bits(&multiply(2, way, m, n, &terms)), bits(&want), "{way:?}");
    }
}

#[test]
fn layouts_and_types_of_weights_make_no_difference() {
    let [n, k] = [45, 300];
    // f16 and bf16 hold these exactly.
    let weights: Vec<f32> = (0..n * k).map(|i| ((i * 37 % 255) as f32 - 127.0) / 128.0).collect();
    let want = packed(&weights, n, k);
    let halves: Vec<f16> = weights.iter().map(|&v| f16::from_f32(v)).collect();
    let brains: Vec<bf16> = weights.iter().map(|&v| bf16::from_f32(v)).collect();
    // Other numbers beside those of the matrix.
    let leading = n + 3;
    let mut transposed = vec![f32::NAN; k * leading];
    for i in 0..n * k {
        transposed[i % k * leading + i / k] = weights[i];
    }
    let same = |values: Values, layout: Layout, leading: usize| {
        let matrix = MatrixB { values, layout, leading };
        let got = Packed::new(&context(3), &matrix, n, k).unwrap().unwrap();
        assert_eq!(got.buffer(), want.buffer());
    };
    same(Values::F16(&halves), Layout::RowsAreOutputs, k);
    same(Values::BF16(&brains), Layout::RowsAreOutputs, k);
    same(Values::F32(&transposed), Layout::RowsAreInputs, leading);
}

#[test]
fn zeros_and_numbers_that_are_none() {
    let [m, n, k] = [14, 40, 70];
    let mut b = numbers(n, k, 5);
    b[3 * k..4 * k].fill(0.0);
    let weight = packed(&b, n, k);
    let mut a = numbers(m, k, 6);
    let clean = definition(&a, &b, k);
    a[2 * k..3 * k].fill(0.0);
    a[5 * k + 69] = f32::NAN;
    a[7 * k] = f32::NEG_INFINITY;
    a[9 * k..10 * k].fill(f32::MIN_POSITIVE);
    for way in Way::available() {
        let got = multiply(2, way, m, n, &[Factors { rows: &a, leading: k, weight: &weight }]);
        for (row, (got, clean)) in got.chunks(n).zip(clean.chunks(n)).enumerate() {
            match row {
                2 | 9 => assert!(got.iter().all(|&v| v == 0.0), "{way:?} {row}"),
                5 | 7 => assert!(got.iter().all(|v| v.is_nan()), "{way:?} {row}"),
                _ => assert!(got == clean && got[3] == 0.0, "{way:?} {row}"),
            }
        }
    }
    for bad in [f32::NAN, f32::INFINITY] {
        b[39 * k + 69] = bad;
        assert!(Packed::new(&context(1), &rows_are_outputs(&b, k), n, k).unwrap().is_none());
    }
}

#[test]
fn the_epilogue_sees_every_element_once() {
    for &[m, n, k] in SIZES {
        let (a, b) = (numbers(m, k, 7), numbers(n, k, 8));
        let weight = packed(&b, n, k);
        let terms = [Factors { rows: &a, leading: k, weight: &weight }];
        let (mut out, seen) = (vec![0f32; m * n], Mutex::new(vec![0u8; m * n]));
        gemm(&context(2), &Product { m, n, terms: &terms }, &mut out, |row, column, run| {
            let first = row * n + column;
            seen.lock().unwrap()[first..first + run.len()].iter_mut().for_each(|count| *count += 1);
            run.iter_mut().for_each(|v| *v = *v * 2.0 + 1.0);
        })
        .unwrap();
        assert!(seen.into_inner().unwrap().iter().all(|&count| count == 1), "{m} {n} {k}");
        let want: Vec<f32> = definition(&a, &b, k).iter().map(|v| v * 2.0 + 1.0).collect();
        assert_eq!(out, want);
    }
}

#[test]
fn what_does_not_fit_is_an_error() {
    let (a, weight) = (numbers(4, 10, 1), packed(&numbers(6, 10, 2), 6, 10));
    let term = Factors { rows: &a, leading: 10, weight: &weight };
    let call = |m: usize, n: usize, terms: &[Factors], out: usize| {
        gemm(&context(1), &Product { m, n, terms }, &mut vec![0.0; out], |_, _, _| ())
    };
    assert!(call(4, 6, &[term], 24).is_ok());
    assert!(call(0, 6, &[term], 0).is_ok());
    assert!(call(4, 6, &[term], 23).is_err());
    assert!(call(5, 6, &[term], 30).is_err());
    assert!(call(4, 5, &[term], 24).is_err());
    assert!(call(4, 6, &[], 24).is_err());
    assert!(call(4, 6, &[term; MAX_TERMS + 1], 24).is_err());
    let cancel = CancelToken::new();
    cancel.cancel();
    let cx = context(1).cancelled_by(&cancel);
    let cancelled = gemm(&cx, &Product { m: 4, n: 6, terms: &[term] }, &mut [0.0; 24], |_, _, _| ());
    assert!(matches!(cancelled, Err(Error::Cancelled)));
}

#[test]
fn weights_are_quantised_once_and_evicted() {
    let (cx, kept) = (context(2), QuantisedWeights::default());
    let weights = numbers(40, 70, 3);
    let source = Source { matrix: rows_are_outputs(&weights, 70), n: 40, k: 70 };
    let file = std::sync::Arc::new(());
    let first = kept.get(&cx, &source, || file.clone()).unwrap().unwrap();
    let again = kept.get(&cx, &source, || unreachable!("it is there")).unwrap().unwrap();
    assert!(std::sync::Arc::ptr_eq(&first, &again));
    // Other columns of the same rows are another matrix.
    let part = Source { matrix: source.matrix, n: 40, k: 64 };
    let part = kept.get(&cx, &part, || file.clone()).unwrap().unwrap();
    assert_eq!((part.k(), part.n()), (64, 40));
    assert_eq!(kept.bytes(), first.buffer().len() + part.buffer().len());
    assert!(kept.bytes() < 2 * weights.len() * size_of::<f32>());
    let address = weights.as_ptr() as usize;
    kept.evict(0..address);
    assert!(kept.bytes() > 0);
    kept.evict(address..address + 1);
    assert_eq!(kept.bytes(), 0);
    assert_eq!(std::sync::Arc::strong_count(&file), 1);
}
