use super::*;
use crate::device::Device;
use crate::device::simd::{Level, tests::at_level};

fn tensor(dims: &[usize], seed: usize) -> Tensor {
    let count = dims.iter().product();
    let values: Vec<f32> =
        (0..count).map(|i| ((i * 7919 + seed * 104_729) % 1009) as f32 / 300.0 - 1.6).collect();
    Tensor::from_slice(dims, &values).unwrap()
}

/// The definition in f64: all segments, any mask, `seen(n, t, j)`.
fn reference(
    q: Columns,
    width: usize,
    heads: usize,
    segments: &[KeyValues],
    seen: impl Fn(usize, usize, usize) -> bool,
) -> Vec<f64> {
    let [samples, queries, _] = q.tensor.dims_of("q").unwrap();
    let d = width / heads;
    let at = |c: &Columns, n: usize, t: usize, i: usize| {
        let [_, tokens, stride] = c.tensor.dims_of("c").unwrap();
        c.tensor.slice::<f32>().unwrap()[(n * tokens + t) * stride + c.start + i] as f64
    };
    let mut y = vec![0.0; samples * queries * width];
    for (row, y) in y.chunks_mut(d).enumerate() {
        let (n, t, h) = (row / heads / queries, row / heads % queries, row % heads);
        let (mut sum, mut position) = (0.0, 0);
        for segment in segments {
            let e = segment.index.map_or(n, |i| i[n]);
            for j in 0..segment.keys.tensor.dims()[1] {
                if seen(n, t, position) {
                    let score: f64 =
                        (0..d).map(|i| at(&q, n, t, h * d + i) * at(&segment.keys, e, j, h * d + i)).sum();
                    let p = (score / (d as f64).sqrt()).exp();
                    sum += p;
                    y.iter_mut()
                        .enumerate()
                        .for_each(|(i, y)| *y += p * at(&segment.values, e, j, h * d + i));
                }
                position += 1;
            }
        }
        y.iter_mut().for_each(|y| *y /= sum);
    }
    y
}

fn close(got: &Tensor, want: &[f64], what: &str) {
    for (i, (got, want)) in got.slice::<f32>().unwrap().iter().zip(want).enumerate() {
        assert!((*got as f64 - want).abs() < 1e-5, "{what} {i}: {got} for {want}");
    }
    assert_eq!(got.elements(), want.len());
}

/// (samples, queries, text keys, heads, head size)
const CASES: &[(usize, usize, usize, usize, usize)] = &[
    (1, 1, 1, 1, 1),
    (2, 5, 3, 2, 7),
    (1, 33, 0, 3, 16),
    (2, 150, 77, 2, 64),
    (1, 13, 300, 1, 80),
    (1, 3, 2, 1, 256),
];

#[test]
fn every_case_and_level_matches_the_definition() {
    let cx = Context::new(&Device::cpu(1).unwrap());
    for &(n, t, text, heads, d) in CASES {
        let width = heads * d;
        let fused = tensor(&[n, t, 3 * width + 2], 1);
        let cached = tensor(&[n + 1, text, 2 * width], 2);
        let index: Vec<usize> = (0..n).map(|i| n - i).collect();
        let at = |tensor, start| Columns { tensor, start };
        let own = KeyValues { keys: at(&fused, width + 1), values: at(&fused, 2 * width + 2), index: None };
        let other = KeyValues { keys: at(&cached, 0), values: at(&cached, width), index: Some(&index) };
        let (q, lengths) = (at(&fused, 1), vec![t.div_ceil(2); n]);
        for level in Level::available() {
            at_level(level, || {
                let what = format!("{level:?} {n} {t} {text} {heads} {d}");
                let y = attention(&cx, q, width, heads, &[own, other], Mask::None).unwrap();
                close(&y, &reference(q, width, heads, &[own, other], |_, _, _| true), &what);
                let y = attention(&cx, q, width, heads, &[own], Mask::Causal).unwrap();
                close(&y, &reference(q, width, heads, &[own], |_, t, j| j <= t), &what);
                let y = attention(&cx, q, width, heads, &[own], Mask::CausalWithLengths(&lengths)).unwrap();
                let seen = |n: usize, t, j| j <= t && j < lengths[n];
                close(&y, &reference(q, width, heads, &[own], seen), &what);
            });
        }
    }
}

#[test]
fn bits_depend_on_neither_threads_nor_batch() {
    let (n, t, heads, width) = (3, 700, 2, 48);
    let (fused, text) = (tensor(&[n, t, 3 * width], 1), tensor(&[2, 20, 2 * width], 2));
    let run = |threads, first: usize, count: usize| {
        let cx = Context::new(&Device::cpu(threads).unwrap());
        let part = fused.narrow(first, count).unwrap();
        let at = |tensor, start| Columns { tensor, start };
        let index = &[1, 0, 1][first..first + count];
        let own = KeyValues { keys: at(&part, width), values: at(&part, 2 * width), index: None };
        let other = KeyValues { keys: at(&text, 0), values: at(&text, width), index: Some(index) };
        let y = attention(&cx, at(&part, 0), width, heads, &[own, other], Mask::None).unwrap();
        y.slice::<f32>().unwrap().to_vec()
    };
    let whole = run(1, 0, n);
    assert_eq!(run(2, 0, n), whole);
    assert_eq!(run(5, 0, n), whole);
    for i in 0..n {
        assert_eq!(run(5, i, 1), whole[i * t * width..][..t * width]);
    }
}

#[test]
fn large_scores_stay_finite() {
    let cx = Context::new(&Device::cpu(1).unwrap());
    let x = Tensor::from_slice(&[1, 2, 2], &[1e4f32, -1e4, -3e4, 2e4]).unwrap();
    let c = Columns { tensor: &x, start: 0 };
    let own = KeyValues { keys: c, values: c, index: None };
    let y = attention(&cx, c, 2, 1, &[own], Mask::None).unwrap();
    assert_eq!(y.slice::<f32>().unwrap(), [1e4, -1e4, -3e4, 2e4]);
}

#[test]
fn misfits_are_named() {
    let cx = Context::new(&Device::cpu(1).unwrap());
    let (x, y) = (tensor(&[2, 3, 4], 1), tensor(&[1, 5, 4], 2));
    let c = |tensor| Columns { tensor, start: 0 };
    let own = KeyValues { keys: c(&x), values: c(&x), index: None };
    let named = |width, heads, segment: KeyValues, mask, name: &str| {
        let error = attention(&cx, c(&x), width, heads, &[segment], mask).unwrap_err().to_string();
        assert!(error.starts_with(name), "{error}");
    };
    named(4, 3, own, Mask::None, "attention: heads");
    named(4, 0, own, Mask::None, "attention: heads");
    named(5, 1, own, Mask::None, "attention: q");
    named(4, 1, KeyValues { keys: c(&y), ..own }, Mask::None, "attention: values");
    named(4, 1, KeyValues { keys: c(&y), values: c(&y), index: None }, Mask::None, "attention: keys");
    let indexed = |index| KeyValues { keys: c(&y), values: c(&y), index: Some(index) };
    named(4, 1, indexed(&[0, 1]), Mask::None, "attention: index");
    named(4, 1, indexed(&[0, 0]), Mask::Causal, "attention: keys");
    named(4, 1, own, Mask::CausalWithLengths(&[1, 4]), "attention: lengths");
    assert!(attention(&cx, c(&x), 4, 1, &[], Mask::None).is_err());
}
