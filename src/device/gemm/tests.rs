use half::{bf16, f16};

use super::*;
use crate::device::simd::tests::at_level;
use crate::device::{CancelToken, Device};

/// Numbers between -1 and 1 that f16 and bf16 hold exactly, so that one reference serves all types.
fn numbers(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_769) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        (state >> 8) as i32 % 128
    };
    (0..count).map(|_| next() as f32 / 128.0).collect()
}

struct Case {
    m: usize,
    n: usize,
    k: usize,
    a: Vec<f32>,
    lda: usize,
    b: Vec<f32>,
    leading: usize,
    layout: Layout,
}

impl Case {
    /// `gap` floats lie between rows; the slices end with the last element.
    fn new(m: usize, n: usize, k: usize, layout: Layout, gap: usize) -> Self {
        let (rows, columns) = if layout == Layout::RowsAreOutputs { (n, k) } else { (k, n) };
        let size = |rows: usize, columns: usize| {
            if rows == 0 || columns == 0 { 0 } else { (rows - 1) * (columns + gap) + columns }
        };
        let (a, b) = (numbers(size(m, k), 1), numbers(size(rows, columns), 2));
        Case { m, n, k, a, lda: k + gap, b, leading: columns + gap, layout }
    }

    fn product<'a>(&'a self, values: Values<'a>) -> Gemm<'a> {
        let b = MatrixB { values, layout: self.layout, leading: self.leading };
        Gemm { m: self.m, n: self.n, k: self.k, a: &self.a, lda: self.lda, b }
    }

    fn reference(&self) -> Vec<f64> {
        let b = MatrixB { values: Values::F32(&self.b), layout: self.layout, leading: self.leading };
        let mut c = Vec::new();
        for i in 0..self.m {
            for j in 0..self.n {
                let term = |k| self.a[i * self.lda + k] as f64 * self.b[b.index(k, j)] as f64;
                c.push((0..self.k).map(term).sum());
            }
        }
        c
    }

    /// The product with NaN between the rows of C, which must stay.
    fn run(&self, threads: usize, values: Values) -> Vec<f32> {
        let (cx, ldc) = (Context::new(&Device::cpu(threads).unwrap()), self.n + 3);
        let mut out = vec![f32::NAN; self.m * ldc];
        gemm(&cx, &self.product(values), &mut out, ldc, |_, _, _| ()).unwrap();
        out.chunks(ldc).for_each(|row| assert!(row[self.n..].iter().all(|v| v.is_nan())));
        out.chunks(ldc).flat_map(|row| &row[..self.n]).copied().collect()
    }
}

const SIZES: &[(usize, usize, usize)] = &[
    (1, 1, 1),
    (1, 1, 0),
    (3, 5, 0),
    (0, 3, 4),
    (3, 0, 4),
    (1, 40, 17),
    (2, 1, 300),
    (7, 33, 1),
    (11, 31, 15),
    (12, 32, 16),
    (13, 65, 257),
    (37, 97, 600),
    (100, 20, 513),
    (130, 300, 70),
    (300, 7, 33),
    (700, 50, 260),
];

fn cases() -> impl Iterator<Item = Case> {
    let layouts = [Layout::RowsAreOutputs, Layout::RowsAreInputs];
    SIZES.iter().flat_map(move |&(m, n, k)| {
        layouts.into_iter().flat_map(move |l| [0, 5].into_iter().map(move |gap| Case::new(m, n, k, l, gap)))
    })
}

#[test]
fn every_shape_type_and_level_matches_the_definition() {
    for case in cases() {
        let half: Vec<f16> = case.b.iter().map(|&v| f16::from_f32(v)).collect();
        let brain: Vec<bf16> = case.b.iter().map(|&v| bf16::from_f32(v)).collect();
        let want = case.reference();
        for level in Level::available() {
            at_level(level, || {
                let got = case.run(2, Values::F32(&case.b));
                for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                    let Case { m, n, k, layout, .. } = case;
                    let error = (*got as f64 - want).abs();
                    assert!(
                        error <= 1e-6 * (1.0 + k as f64),
                        "{level:?} {m}x{n}x{k} {layout:?} {i}: {got} {want}"
                    );
                }
                assert_eq!(got.len(), want.len());
                assert_eq!(case.run(3, Values::F16(&half)), got);
                assert_eq!(case.run(3, Values::BF16(&brain)), got);
            });
        }
    }
}

#[test]
fn bits_depend_on_neither_threads_nor_neighbours() {
    for level in Level::available() {
        at_level(level, || {
            for case in cases().filter(|c| c.m > 0) {
                let whole = case.run(1, Values::F32(&case.b));
                for threads in [2, 5] {
                    assert_eq!(case.run(threads, Values::F32(&case.b)), whole);
                }
                let cx = Context::new(&Device::cpu(1).unwrap());
                for row in [0, case.m / 2, case.m - 1] {
                    let a = if case.k == 0 { &[][..] } else { &case.a[row * case.lda..] };
                    let alone = Gemm { m: 1, a, ..case.product(Values::F32(&case.b)) };
                    let mut out = vec![0.0; case.n];
                    gemm(&cx, &alone, &mut out, case.n, |_, _, _| ()).unwrap();
                    assert_eq!(out, whole[row * case.n..][..case.n]);
                }
            }
        });
    }
}

#[test]
fn serial_products_have_the_same_bits() {
    for level in Level::available() {
        at_level(level, || {
            for case in cases() {
                let serial = Serial::new();
                let Case { m, n, k, ref a, lda, .. } = case;
                let product = case.product(Values::F32(&case.b));
                let mut b = vec![0.0; serial.packed_len(n, k)];
                serial.pack(&product.b, n, k, &mut b).unwrap();
                let (mut scratch, mut out) = (vec![0.0; serial.scratch_len(m)], vec![f32::NAN; m * n]);
                let mut packed = Packed { m, n, k, a, lda, b: &b, accumulate: false };
                serial.multiply(&packed, &mut scratch, &mut out, n).unwrap();
                assert_eq!(out, case.run(2, Values::F32(&case.b)));
                packed.accumulate = true;
                let twice: Vec<f64> = out.iter().map(|&v| 2.0 * v as f64).collect();
                serial.multiply(&packed, &mut scratch, &mut out, n).unwrap();
                for (got, want) in out.iter().zip(twice) {
                    assert!((*got as f64 - want).abs() < 1e-6 * (1.0 + k as f64));
                }
            }
        });
    }
}

#[test]
fn the_epilogue_sees_every_element_once() {
    for (m, n, k) in [(5, 70, 20), (700, 50, 260), (130, 300, 0)] {
        let case = Case::new(m, n, k, Layout::RowsAreOutputs, 0);
        let plain = case.run(1, Values::F32(&case.b));
        for threads in [1, 4] {
            let cx = Context::new(&Device::cpu(threads).unwrap());
            let mut out = vec![0.0; m * n];
            gemm(&cx, &case.product(Values::F32(&case.b)), &mut out, n, |row, column, values| {
                for (j, v) in values.iter_mut().enumerate() {
                    *v += (row * n + column + j) as f32;
                }
            })
            .unwrap();
            for (i, (got, plain)) in out.iter().zip(&plain).enumerate() {
                assert_eq!(*got, plain + i as f32);
            }
        }
    }
}

#[test]
fn bad_requests_are_errors() {
    let case = Case::new(4, 5, 6, Layout::RowsAreOutputs, 0);
    let product = case.product(Values::F32(&case.b));
    let token = CancelToken::new();
    let cx = Context::new(&Device::cpu(2).unwrap()).cancelled_by(&token);
    let mut out = [0.0; 20];
    let mut run = |product: &Gemm, ldc| gemm(&cx, product, &mut out, ldc, |_, _, _| ());
    run(&product, 5).unwrap();
    assert!(run(&product, 6).is_err());
    assert!(run(&product, 4).is_err());
    assert!(run(&Gemm { k: 7, ..product }, 5).is_err());
    assert!(run(&Gemm { n: 6, ..product }, 5).is_err());
    assert!(run(&Gemm { lda: usize::MAX, ..product }, 5).is_err());
    assert!(run(&Gemm { a: &case.a[1..], ..product }, 5).is_err());
    token.cancel();
    assert!(matches!(run(&product, 5), Err(Error::Cancelled)));
}
