use half::{bf16, f16};

use super::*;
use crate::device::simd::tests::at_level;
use crate::device::{CancelToken, Device};

/// What products are computed with.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Way {
    level: Level,
    rounded: bool,
}

impl Way {
    /// All that this processor has.
    fn available() -> impl Iterator<Item = Way> {
        let exact = Level::available().map(|level| Way { level, rounded: false });
        let level = simd::level();
        exact.chain(multiplies_bf16().then_some(Way { level, rounded: true }))
    }

    fn device(self, threads: usize) -> Device {
        let device = if self.rounded { Device::cpu_in_bf16(threads) } else { Device::cpu(threads) };
        device.unwrap()
    }
}

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

/// One product, or a term of a sum.
struct Case {
    m: usize,
    n: usize,
    k: usize,
    a: Vec<f32>,
    order: Order,
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
        // Thirds: sums of their products are rounded, so that bits show the order of summation.
        let a = numbers(size(m, k), 1 + k as u32).iter().map(|v| v / 3.0).collect();
        let b = numbers(size(rows, columns), 2 + k as u32);
        Case { m, n, k, a, order: Order::Rows, lda: k + gap, b, leading: columns + gap, layout }
    }

    /// The same with A column after column, NaN between them.
    fn by_columns(self) -> Self {
        let lda = self.m + 3;
        let mut a = vec![f32::NAN; if self.m * self.k == 0 { 0 } else { (self.k - 1) * lda + self.m }];
        for (i, j) in (0..self.m).flat_map(|i| (0..self.k).map(move |j| (i, j))) {
            a[j * lda + i] = self.a[self.a().index(i, j)];
        }
        Case { a, order: Order::Columns, lda, ..self }
    }

    fn a(&self) -> MatrixA<'_> {
        MatrixA { values: &self.a, order: self.order, leading: self.lda }
    }

    /// A from row `row` on.
    fn a_from(&self, row: usize) -> MatrixA<'_> {
        let values = if self.k == 0 { &[][..] } else { &self.a[self.a().index(row, 0)..] };
        MatrixA { values, ..self.a() }
    }

    fn factors<'a>(&'a self, values: Values<'a>) -> Factors<'a> {
        let b = MatrixB { values, layout: self.layout, leading: self.leading };
        Factors { k: self.k, a: self.a(), b }
    }

    /// With factors as `way` has them.
    fn reference(&self, way: Way) -> Vec<f64> {
        let factor = |v: f32| f64::from(if way.rounded { bf16::from_f32(v).to_f32() } else { v });
        let b = MatrixB { values: Values::F32(&self.b), layout: self.layout, leading: self.leading };
        let mut c = Vec::new();
        for i in 0..self.m {
            for j in 0..self.n {
                let term = |k| factor(self.a[self.a().index(i, k)]) * factor(self.b[b.index(k, j)]);
                c.push((0..self.k).map(term).sum());
            }
        }
        c
    }

    fn run(&self, way: Way, threads: usize, values: Values) -> Vec<f32> {
        sum(way, threads, self.m, self.n, &[self.factors(values)])
    }
}

/// The sum of products, with NaN between the rows of C, which must stay.
fn sum(way: Way, threads: usize, m: usize, n: usize, terms: &[Factors]) -> Vec<f32> {
    let (cx, ldc) = (Context::new(&way.device(threads)), n + 3);
    let mut out = vec![f32::NAN; m * ldc];
    let product = Gemm { m, n, terms, accumulate: false };
    at_level(way.level, || gemm(&cx, &product, &mut out, ldc, |_, _, _| ())).unwrap();
    out.chunks(ldc).for_each(|row| assert!(row[n..].iter().all(|v| v.is_nan())));
    out.chunks(ldc).flat_map(|row| &row[..n]).copied().collect()
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
        layouts.into_iter().flat_map(move |l| {
            [Case::new(m, n, k, l, 0), Case::new(m, n, k, l, 5), Case::new(m, n, k, l, 1).by_columns()]
        })
    })
}

#[test]
fn every_shape_type_and_level_matches_the_definition() {
    for case in cases() {
        let half: Vec<f16> = case.b.iter().map(|&v| f16::from_f32(v)).collect();
        let brain: Vec<bf16> = case.b.iter().map(|&v| bf16::from_f32(v)).collect();
        for way in Way::available() {
            let want = case.reference(way);
            let got = case.run(way, 2, Values::F32(&case.b));
            for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                let Case { m, n, k, layout, .. } = case;
                let error = (*got as f64 - want).abs();
                assert!(error <= 1e-6 * (1.0 + k as f64), "{way:?} {m}x{n}x{k} {layout:?} {i}: {got} {want}");
            }
            assert_eq!(got.len(), want.len());
            assert_eq!(case.run(way, 3, Values::F16(&half)), got);
            assert_eq!(case.run(way, 3, Values::BF16(&brain)), got);
        }
    }
}

#[test]
fn bits_depend_on_neither_threads_nor_neighbours() {
    for way in Way::available() {
        for case in cases().filter(|c| c.m > 0) {
            let whole = case.run(way, 1, Values::F32(&case.b));
            for threads in [2, 5] {
                assert_eq!(case.run(way, threads, Values::F32(&case.b)), whole);
            }
            for row in [0, case.m / 2, case.m - 1] {
                let alone = Factors { a: case.a_from(row), ..case.factors(Values::F32(&case.b)) };
                assert_eq!(sum(way, 1, 1, case.n, &[alone]), whole[row * case.n..][..case.n]);
            }
        }
    }
}

/// M, N and the depths of terms.
const SUMS: &[(usize, usize, &[usize])] = &[
    (4, 5, &[]),
    (1, 1, &[1, 1]),
    (5, 33, &[0, 16, 0]),
    (40, 70, &[16, 255, 1]),
    (100, 20, &[256, 257]),
    (300, 300, &[257, 16, 256, 1]),
    (700, 50, &[640, 16]),
    (700, 600, &[1, 255]),
];

/// Terms whose layouts take turns, with gaps between rows.
fn terms(m: usize, n: usize, depths: &[usize]) -> Vec<Case> {
    let layouts = [Layout::RowsAreOutputs, Layout::RowsAreInputs].into_iter().cycle();
    let term = |(gap, (&k, l))| {
        let case = Case::new(m, n, k, l, gap);
        if gap % 3 == 2 { case.by_columns() } else { case }
    };
    depths.iter().zip(layouts).enumerate().map(term).collect()
}

#[test]
fn sums_match_the_definition_and_have_fixed_bits() {
    for &(m, n, depths) in SUMS {
        let cases = terms(m, n, depths);
        let half = |case: &Case| case.b.iter().map(|&v| f16::from_f32(v)).collect::<Vec<_>>();
        let halves: Vec<_> = cases.iter().map(half).collect();
        let factors: Vec<_> = cases.iter().map(|c| c.factors(Values::F32(&c.b))).collect();
        let of_halves = cases.iter().zip(&halves).map(|(c, b)| c.factors(Values::F16(b)));
        let of_halves: Vec<_> = of_halves.collect();
        for way in Way::available() {
            let mut want = vec![0.0; m * n];
            for case in &cases {
                want.iter_mut().zip(case.reference(way)).for_each(|(sum, v)| *sum += v);
            }
            let got = sum(way, 1, m, n, &factors);
            for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                assert!((*got as f64 - want).abs() <= 1e-4, "{way:?} {m}x{n} {depths:?} {i}: {got} {want}");
            }
            for threads in [2, 4] {
                assert_eq!(sum(way, threads, m, n, &factors), got);
            }
            assert_eq!(sum(way, 2, m, n, &of_halves), got);
            let last = cases.iter().zip(&factors).map(|(c, f)| Factors { a: c.a_from(m - 1), ..*f });
            let rows: Vec<_> = last.collect();
            assert_eq!(sum(way, 1, 1, n, &rows), got[(m - 1) * n..]);
        }
    }
}

#[test]
fn whole_blocks_of_one_product_are_terms() {
    let layouts = [Layout::RowsAreOutputs, Layout::RowsAreInputs];
    for (way, layout) in Way::available().flat_map(|way| layouts.map(|layout| (way, layout))) {
        let depth = if way.rounded { 2 * WORDS } else { WORDS };
        for (m, n) in [(3, 70), (130, 300), (700, 50)] {
            let whole = Case::new(m, n, 3 * depth + 7, layout, 2);
            let term = |first: usize, end: usize| {
                let all = whole.factors(Values::F32(&whole.b));
                let b = MatrixB { values: all.b.values.skip(all.b.index(first, 0)), ..all.b };
                Factors { k: end - first, a: MatrixA { values: &all.a.values[first..], ..all.a }, b }
            };
            let parts = [term(0, depth), term(depth, 3 * depth), term(3 * depth, whole.k)];
            assert_eq!(sum(way, 2, m, n, &parts), whole.run(way, 1, Values::F32(&whole.b)));
        }
    }
}

#[test]
fn serial_products_have_the_same_bits() {
    for way in Way::available() {
        at_level(way.level, || {
            for case in cases().filter(|c| c.order == Order::Rows) {
                let serial = Serial::new(&way.device(1));
                let Case { m, n, k, ref a, lda, .. } = case;
                let product = case.factors(Values::F32(&case.b));
                let mut b = vec![0.0; serial.packed_len(n, k)];
                serial.pack(&product.b, n, k, &mut b).unwrap();
                let (mut scratch, mut out) = (vec![0.0; serial.scratch_len(m)], vec![f32::NAN; m * n]);
                let mut packed = Packed { m, n, k, a, lda, b: &b, accumulate: false };
                serial.multiply(&packed, &mut scratch, &mut out, n).unwrap();
                assert_eq!(out, case.run(way, 2, Values::F32(&case.b)));
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
fn the_order_of_a_changes_no_bit() {
    for way in Way::available() {
        for &(m, n, k) in SIZES {
            let new = || Case::new(m, n, k, Layout::RowsAreInputs, 2);
            let (rows, columns) = (new(), new().by_columns());
            assert_eq!(columns.run(way, 2, Values::F32(&columns.b)), rows.run(way, 1, Values::F32(&rows.b)));
        }
    }
}

#[test]
fn a_deep_sum_is_that_of_its_parts() {
    // Deeper than what is packed at once, so that the parts are products of their own.
    let sums = [(130, 70, &[9000][..]), (200, 33, &[2000, 255, 2001, 300, 16])];
    for (way, (m, n, depths)) in Way::available().flat_map(|way| sums.map(|sum| (way, sum))) {
        let case = |k: usize| Case::new(m, n, k, Layout::RowsAreInputs, 1);
        let cases: Vec<_> = depths.iter().map(|&k| case(k).by_columns()).collect();
        let factors: Vec<_> = cases.iter().map(|c| c.factors(Values::F32(&c.b))).collect();
        let got = sum(way, 2, m, n, &factors);
        // Few rows that are not transposed take another way, without packing beforehand.
        let rows: Vec<_> = depths.iter().map(|&k| case(k)).collect();
        let row = rows.iter().map(|c| Factors { a: c.a_from(m / 2), ..c.factors(Values::F32(&c.b)) });
        assert_eq!(sum(way, 1, 1, n, &row.collect::<Vec<_>>()), got[m / 2 * n..][..n]);
        assert_eq!(sum(way, 3, m, n, &factors), got);
    }
}

#[test]
fn products_add_to_what_is_there() {
    for (way, case) in Way::available().flat_map(|way| cases().map(move |case| (way, case))) {
        let cx = Context::new(&way.device(2));
        let Case { m, n, .. } = case;
        let terms = [case.factors(Values::F32(&case.b))];
        let want: Vec<f64> = case.reference(way).iter().map(|v| v + 2.0).collect();
        let mut out = vec![1.0; m * n];
        let product = Gemm { m, n, terms: &terms, accumulate: true };
        let add_one = |_, _, row: &mut [f32]| row.iter_mut().for_each(|v| *v += 1.0);
        at_level(way.level, || gemm(&cx, &product, &mut out, n, add_one)).unwrap();
        for (got, want) in out.iter().zip(&want) {
            assert!((f64::from(*got) - want).abs() <= 1e-6 * (1.0 + case.k as f64));
        }
    }
}

#[test]
fn the_epilogue_sees_every_element_once() {
    for (m, n, k) in [(5, 70, 20), (700, 50, 260), (130, 300, 0)] {
        let case = Case::new(m, n, k, Layout::RowsAreOutputs, 0);
        let way = Way { level: simd::level(), rounded: false };
        let plain = case.run(way, 1, Values::F32(&case.b));
        for threads in [1, 4] {
            let cx = Context::new(&Device::cpu(threads).unwrap());
            let mut out = vec![0.0; m * n];
            let terms = [case.factors(Values::F32(&case.b))];
            gemm(
                &cx,
                &Gemm { m, n, terms: &terms, accumulate: false },
                &mut out,
                n,
                |row, column, values| {
                    for (j, v) in values.iter_mut().enumerate() {
                        *v += (row * n + column + j) as f32;
                    }
                },
            )
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
    let factors = case.factors(Values::F32(&case.b));
    let token = CancelToken::new();
    let cx = Context::new(&Device::cpu(2).unwrap()).cancelled_by(&token);
    let mut out = [0.0; 20];
    let mut run = |n, term: Factors, ldc| {
        // A bad term is found in any place.
        let terms = [factors, term];
        gemm(&cx, &Gemm { m: 4, n, terms: &terms, accumulate: false }, &mut out, ldc, |_, _, _| ())
    };
    run(5, factors, 5).unwrap();
    assert!(run(5, factors, 6).is_err());
    assert!(run(5, factors, 4).is_err());
    assert!(run(6, factors, 5).is_err());
    assert!(run(5, Factors { k: 7, ..factors }, 5).is_err());
    assert!(run(5, Factors { a: MatrixA::rows(&case.a, usize::MAX), ..factors }, 5).is_err());
    assert!(run(5, Factors { a: MatrixA::rows(&case.a[1..], 6), ..factors }, 5).is_err());
    assert!(run(5, Factors { a: MatrixA::columns(&case.a, 4), ..factors }, 5).is_ok());
    assert!(run(5, Factors { a: MatrixA::columns(&case.a, 3), ..factors }, 5).is_err());
    assert!(run(5, Factors { a: MatrixA::columns(&case.a[1..], 4), ..factors }, 5).is_err());
    let b = MatrixB { values: factors.b.values.skip(1), ..factors.b };
    assert!(run(5, Factors { b, ..factors }, 5).is_err());
    token.cancel();
    assert!(matches!(run(5, factors, 5), Err(Error::Cancelled)));
}
