use super::*;
use crate::device::Device;
use crate::device::cuda::Precision;
use crate::device::simd::{Level, tests::at_level};
use crate::ops::check;
use crate::tensor::autograd::{Gradients, Tape, leaf};

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

/// A segment for [`gradients`]: which tensor holds its keys, which its values, from which column on, and the index.
type Place<'a> = ([(usize, usize); 2], Option<&'a [usize]>);

/// Attention of the columns of `t` at these places, and its definition over their numbers.
struct Case<'a> {
    dims: Vec<[usize; 3]>,
    q: (usize, usize),
    segments: Vec<Place<'a>>,
    width: usize,
    heads: usize,
    mask: Mask<'a>,
}

impl Case<'_> {
    fn inputs(&self) -> Vec<Tensor> {
        self.dims.iter().zip(1..).map(|(dims, seed)| check::random(dims, seed)).collect()
    }

    fn run(&self, cx: &Context, t: &[Tensor]) -> Result<Tensor> {
        let at = |(i, start): (usize, usize)| Columns { tensor: &t[i], start };
        let segments: Vec<KeyValues> = self
            .segments
            .iter()
            .map(|&([keys, values], index)| KeyValues { keys: at(keys), values: at(values), index })
            .collect();
        attention(cx, at(self.q), self.width, self.heads, &segments, self.mask)
    }

    fn definition(&self, t: &[Vec<f64>]) -> Vec<f64> {
        let d = self.width / self.heads;
        let [samples, queries, _] = self.dims[self.q.0];
        let at = |(i, start): (usize, usize), n: usize, token: usize, h: usize| {
            let [_, tokens, stride] = self.dims[i];
            &t[i][(n * tokens + token) * stride + start + h * d..][..d]
        };
        let mut y = vec![0.0; samples * queries * self.width];
        for (row, y) in y.chunks_mut(d).enumerate() {
            let (n, token, h) = (row / self.heads / queries, row / self.heads % queries, row % self.heads);
            let (mut sum, mut position) = (0.0, 0);
            for &([keys, values], index) in &self.segments {
                let entry = index.map_or(n, |index| index[n]);
                for j in 0..self.dims[keys.0][1] {
                    let seen = match self.mask {
                        Mask::None => true,
                        Mask::Causal => position <= token,
                        Mask::CausalWithLengths(lengths) => position <= token && position < lengths[n],
                    };
                    position += 1;
                    if !seen {
                        continue;
                    }
                    let pairs = at(self.q, n, token, h).iter().zip(at(keys, entry, j, h));
                    let p = (pairs.map(|(q, k)| q * k).sum::<f64>() / (d as f64).sqrt()).exp();
                    sum += p;
                    y.iter_mut().zip(at(values, entry, j, h)).for_each(|(y, v)| *y += p * v);
                }
            }
            y.iter_mut().for_each(|y| *y /= sum);
        }
        y
    }
}

#[test]
fn gradients() {
    let (plain, causal) = (Mask::None, Mask::Causal);
    let own = |tensor, width| ([(tensor, width), (tensor, 2 * width)], None);
    for case in [
        // q, keys and values in tensors of their own; one key.
        Case {
            dims: vec![[1, 1, 1]; 3],
            q: (0, 0),
            segments: vec![([(1, 0), (2, 0)], None)],
            width: 1,
            heads: 1,
            mask: plain,
        },
        // One fused projection with columns that nobody reads, and text that two of three samples share.
        Case {
            dims: vec![[3, 4, 13], [3, 5, 4], [3, 5, 5]],
            q: (0, 1),
            segments: vec![own(0, 4), ([(1, 0), (2, 1)], Some(&[2, 0, 2]))],
            width: 4,
            heads: 2,
            mask: plain,
        },
        // More queries than a block, and as many entries as samples in another order.
        Case {
            dims: vec![[2, 150, 3], [2, 2, 3], [2, 2, 3]],
            q: (0, 0),
            segments: vec![([(1, 0), (2, 0)], Some(&[1, 0]))],
            width: 3,
            heads: 1,
            mask: plain,
        },
        // One tensor for everything.
        Case {
            dims: vec![[1, 7, 6]],
            q: (0, 0),
            segments: vec![([(0, 0), (0, 0)], None)],
            width: 6,
            heads: 3,
            mask: plain,
        },
        Case {
            dims: vec![[2, 5, 12]],
            q: (0, 0),
            segments: vec![own(0, 4)],
            width: 4,
            heads: 1,
            mask: causal,
        },
        Case {
            dims: vec![[2, 6, 12]],
            q: (0, 0),
            segments: vec![own(0, 4)],
            width: 4,
            heads: 2,
            mask: Mask::CausalWithLengths(&[2, 6]),
        },
    ] {
        for level in Level::available() {
            at_level(level, || {
                check::gradients(&case.inputs(), |cx, t| case.run(cx, t), |t| case.definition(t))
            });
        }
    }
}

#[test]
fn the_bits_of_gradients_do_not_depend_on_threads() {
    let case = Case {
        dims: vec![[2, 300, 120], [1, 77, 80]],
        q: (0, 0),
        segments: vec![([(0, 40), (0, 80)], None), ([(1, 0), (1, 40)], Some(&[0, 0]))],
        width: 40,
        heads: 5,
        mask: Mask::None,
    };
    check::gradients_on_threads(&case.inputs(), |cx, t| case.run(cx, t));
}

#[test]
fn a_constant_query_and_constant_keys_cost_and_get_nothing() {
    let (cx, tape) = (check::cx(), Tape::new());
    let [q, k] = [1, 2].map(|seed| check::random(&[1, 3, 4], seed));
    let v = leaf(&check::random(&[1, 3, 4], 3), 0);
    let at = |tensor| Columns { tensor, start: 0 };
    let segment = KeyValues { keys: at(&k), values: at(&v), index: None };
    let y = attention(&tape.attach(&cx), at(&q), 4, 2, &[segment], Mask::None).unwrap();
    let ones = Tensor::from_slice(&[1, 3, 4], &[1f32; 12]).unwrap();
    let mut found = Gradients::default();
    tape.backward(&cx, &[(&y, ones)], &mut found).unwrap();
    // The probabilities of a query sum to 1.
    let sums: Vec<f64> =
        (0..4).map(|c| check::wide(found.get(0).unwrap()).iter().skip(c).step_by(4).sum()).collect();
    assert!(sums.iter().all(|sum| (sum - 3.0).abs() < 1e-5), "{sums:?}");
}

/// Cases of many tiles for a GPU: heads of several sizes, where 16 bytes at a time can be read and where not.
fn device_cases() -> Vec<Case<'static>> {
    let plain = |dims: Vec<[usize; 3]>, q, segments, width, heads| Case {
        dims,
        q,
        segments,
        width,
        heads,
        mask: Mask::None,
    };
    let own = |width| ([(0, width), (0, 2 * width)], None);
    let text = |width, index: &'static [usize]| ([(1, 0), (1, width)], Some(index));
    vec![
        plain(vec![[2, 5, 44], [3, 3, 28]], (0, 1), vec![own(14), text(14, &[2, 0])], 14, 2),
        // Two segments that do not end with a tile, one that is empty.
        plain(
            vec![[2, 150, 384], [1, 77, 256], [2, 0, 128]],
            (0, 0),
            vec![own(128), ([(2, 0), (2, 0)], None), text(128, &[0, 0])],
            128,
            2,
        ),
        // Many queries for few keys.
        plain(vec![[3, 260, 16], [2, 2, 32]], (0, 0), vec![text(16, &[1, 0, 1])], 16, 1),
        plain(vec![[1, 70, 240]], (0, 0), vec![own(80)], 80, 1),
        plain(vec![[1, 70, 384]], (0, 0), vec![own(128)], 128, 1),
        plain(vec![[1, 40, 600]], (0, 0), vec![own(200)], 200, 1),
        Case { mask: Mask::Causal, ..plain(vec![[1, 130, 120]], (0, 0), vec![own(40)], 40, 1) },
        Case {
            mask: Mask::CausalWithLengths(&[77, 3]),
            ..plain(vec![[2, 77, 384]], (0, 0), vec![own(128)], 128, 2)
        },
    ]
}

#[test]
fn agrees_on_a_device() {
    for case in device_cases() {
        let inputs = case.inputs();
        let inputs: Vec<&Tensor> = inputs.iter().collect();
        let tolerances = [(Precision::F32, 1e-5), (Precision::BF16, 2e-2), (Precision::F16, 4e-3)];
        check::on_device(&inputs, &tolerances, |cx, t| case.run(cx, t));
    }
}

/// The gradients of a case under a random gradient of its result, and how often the host read them or what led to them.
fn gradients_on(cx: &Context, case: &Case) -> (Vec<Tensor>, u64) {
    let inputs = case.inputs();
    let tape = Tape::new();
    let leaves: Vec<Tensor> = inputs.iter().enumerate().map(|(i, x)| leaf(&check::moved(cx, x), i)).collect();
    let [samples, queries, _] = case.dims[case.q.0];
    let seed = check::moved(cx, &check::random(&[samples, queries, case.width], 5));
    let downloads = || cx.cuda().unwrap().map_or(0, |stream| stream.downloads());
    let before = downloads();
    let y = case.run(&tape.attach(cx), &leaves).unwrap();
    let mut found = Gradients::default();
    tape.backward(cx, &[(&y, seed)], &mut found).unwrap();
    let after = downloads();
    ((0..inputs.len()).map(|i| found.take(i).unwrap()).collect(), after - before)
}

#[test]
fn gradients_agree_on_a_device() {
    let Some(cx) = check::cuda(Precision::F32) else { return };
    let shared_bytes = cx.cuda().unwrap().unwrap().gpu().info().shared_bytes;
    // GPUs before sm_80 have no room for the gradient of the largest heads.
    for case in
        device_cases().into_iter().filter(|case| shared_bytes > 64 << 10 || case.width / case.heads <= 128)
    {
        let (here, _) = gradients_on(&check::cx(), &case);
        let (there, _) = gradients_on(&cx, &case);
        for (here, there) in here.iter().zip(&there) {
            check::close(there, here.dims(), &check::wide(here), 1e-5);
        }
    }
    // With tensors of their own nothing is added up beside the op itself.
    let apart = Case {
        dims: vec![[2, 40, 24], [1, 9, 24], [1, 9, 24]],
        q: (0, 0),
        segments: vec![([(1, 0), (2, 0)], Some(&[0, 0]))],
        width: 24,
        heads: 3,
        mask: Mask::None,
    };
    assert_eq!(gradients_on(&cx, &apart).1, 0, "the host read from the device");
}

#[test]
fn a_device_names_what_it_cannot() {
    let Some(cx) = check::cuda(Precision::F32) else { return };
    let x = tensor(&[1, 2, 257], 1);
    let c = Columns { tensor: &x, start: 0 };
    let own = KeyValues { keys: c, values: c, index: None };
    let named = |width, segments: &[KeyValues], name: &str| {
        let error = attention(&cx, c, width, 1, segments, Mask::None).unwrap_err().to_string();
        assert!(error.contains(name), "{error}");
    };
    named(257, &[own], "heads of 257 channels");
    named(2, &[own; 9], "at most 8");
}
