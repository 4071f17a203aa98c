//! The product and its epilogue against a plain loop in f64.

use super::*;
use crate::device::cuda::Precision;
use crate::ops::activation::tests::naive;
use crate::ops::check::{cast, close, cx, on_batch, on_device, on_threads, random, wide};

/// What a term adds to each element of the result.
fn products(term: &Term) -> Vec<f64> {
    let [inputs, outputs] = sides("weight", term.weight, term.layout).unwrap();
    let (x, w) = (wide(term.x), wide(term.weight));
    let at = |k: usize, o: usize| match term.layout {
        Layout::RowsAreOutputs => w[o * inputs + k],
        Layout::RowsAreInputs => w[k * outputs + o],
    };
    let channels = term.x.shape().channels();
    let element = |row: &[f64], o| -> f64 {
        row.iter().enumerate().map(|(k, x)| x * at(term.first_input + k, o)).sum()
    };
    x.chunks(channels).flat_map(|row| (0..outputs).map(|o| element(row, o)).collect::<Vec<_>>()).collect()
}

/// The sum of terms and its epilogue.
fn reference(terms: &[Term], e: &Epilogue) -> Vec<f64> {
    let x = terms[0].x;
    let [_, outputs] = sides("weight", terms[0].weight, terms[0].layout).unwrap();
    let per_sample = x.shape().rows() / x.dims()[0];
    let vector = |v: Option<&Tensor>| v.map(wide);
    let (scale, bias) = (vector(e.channel_scale), vector(e.bias));
    let (residual, modulation) = (vector(e.residual), vector(e.modulation));
    let mut out = vec![0.0; x.shape().rows() * outputs];
    for term in terms {
        out.iter_mut().zip(products(term)).for_each(|(sum, v)| *sum += v);
    }
    for (i, acc) in out.iter_mut().enumerate() {
        let (r, o) = (i / outputs, i % outputs);
        let v = *acc * scale.as_ref().map_or(1.0, |s| s[o]) + bias.as_ref().map_or(0.0, |b| b[o]);
        let v = naive(e.activation, v) * f64::from(e.gain);
        let v = v + residual.as_ref().map_or(0.0, |v| v[i]);
        *acc = modulation.as_ref().map_or(v, |m| {
            let n = if m.len() > 2 * outputs { r / per_sample } else { 0 };
            let m = &m[n * 2 * outputs..];
            v * (1.0 + m[o]) + m[outputs + o]
        });
    }
    out
}

/// A term over a whole weight.
fn whole<'a>(x: &'a Tensor, weight: &'a Tensor, layout: Layout) -> Term<'a> {
    Term { x, weight, layout, first_input: 0 }
}

#[test]
fn agrees_with_a_plain_loop() {
    for (dims, outputs) in [([2, 3, 5], 7), ([1, 1, 1], 1), ([3, 17, 33], 65), ([2, 1, 300], 129)] {
        let inputs = dims[2];
        let x = random(&dims, 1);
        let [scale, bias] = [2, 3].map(|seed| random(&[outputs], seed));
        let residual = random(&[dims[0], dims[1], outputs], 4);
        for samples in [1, dims[0]] {
            let modulation = random(&[samples, 2 * outputs], 5);
            for dtype in [DType::F32, DType::F16, DType::BF16] {
                let weight = cast(&random(&[outputs, inputs], 6), dtype);
                let full = Epilogue {
                    channel_scale: Some(&scale),
                    bias: Some(&bias),
                    activation: Activation::Gelu,
                    gain: 0.7,
                    residual: Some(&residual),
                    modulation: Some(&modulation),
                    result: ResultType::Activations,
                };
                for e in [Epilogue::default(), Epilogue { bias: Some(&bias), ..Default::default() }, full] {
                    let y = on_threads(|cx| linear(cx, &x, &weight, &e));
                    close(
                        &y,
                        &[dims[0], dims[1], outputs],
                        &reference(&[whole(&x, &weight, Layout::RowsAreOutputs)], &e),
                        2e-5,
                    );
                }
                let weight = cast(&random(&[inputs, outputs], 6), dtype);
                let y = on_threads(|cx| linear_transposed(cx, &x, &weight, &full));
                close(
                    &y,
                    &[dims[0], dims[1], outputs],
                    &reference(&[whole(&x, &weight, Layout::RowsAreInputs)], &full),
                    2e-5,
                );
            }
        }
    }
}

/// Of the largest number of a result, by the type of activations.
const ON_A_GPU: [(Precision, f64); 3] =
    [(Precision::F32, 1e-5), (Precision::F16, 4e-3), (Precision::BF16, 2e-2)];

#[test]
fn on_a_gpu_in_every_type() {
    for (dims, outputs) in [([2, 3, 5], 7), ([1, 1, 1], 1), ([3, 17, 24], 72), ([2, 1, 300], 16)] {
        let inputs = dims[2];
        let (x, weight) = (random(&dims, 1), random(&[outputs, inputs], 6));
        let [scale, bias] = [2, 3].map(|seed| random(&[outputs], seed));
        let residual = random(&[dims[0], dims[1], outputs], 4);
        let modulation = random(&[dims[0], 2 * outputs], 5);
        let transposed = random(&[inputs, outputs], 6);
        let tensors = [&x, &weight, &scale, &bias, &residual, &modulation, &transposed];
        for activation in [Activation::None, Activation::Gelu, Activation::LeakyRelu(0.2)] {
            for gain in [1.0, 0.7] {
                on_device(&tensors, &ON_A_GPU, |cx, t| {
                    let e = Epilogue { activation, gain, residual: Some(&t[4]), ..Epilogue::default() };
                    linear(cx, &t[0], &t[1], &Epilogue { bias: Some(&t[3]), ..e })
                });
                on_device(&tensors, &ON_A_GPU, |cx, t| {
                    let e = Epilogue {
                        channel_scale: Some(&t[2]),
                        bias: Some(&t[3]),
                        activation,
                        gain,
                        residual: Some(&t[4]),
                        modulation: Some(&t[5]),
                        result: ResultType::Activations,
                    };
                    linear_transposed(cx, &t[0], &t[6], &e)
                });
            }
        }
    }
}

#[test]
fn sums_on_a_gpu_in_every_type() {
    for (outputs, sum) in sums() {
        let terms = sum.terms();
        let bias = random(&[outputs], 3);
        let mut tensors: Vec<&Tensor> = terms.iter().flat_map(|term| [term.x, term.weight]).collect();
        tensors.push(&bias);
        on_device(&tensors, &ON_A_GPU, |cx, t| {
            let (bias, factors) = t.split_last().unwrap();
            let moved = terms.iter().zip(factors.chunks(2));
            let moved: Vec<Term> =
                moved.map(|(term, part)| Term { x: &part[0], weight: &part[1], ..*term }).collect();
            let e = Epilogue { bias: Some(bias), activation: Activation::Silu, ..Epilogue::default() };
            linear_sum(cx, &moved, &e)
        });
    }
}

#[test]
fn a_sample_does_not_see_its_neighbours() {
    let (x, weight) = (random(&[5, 11, 70], 1), random(&[90, 70], 2));
    let modulation = random(&[5, 180], 3);
    on_batch(&x, |cx, x, first, count| {
        let modulation = modulation.narrow(first, count)?;
        // One row would mean "for all samples": the same here.
        let e = Epilogue { modulation: Some(&modulation), ..Epilogue::default() };
        linear(cx, x, &weight, &e)
    });
}

#[test]
fn shapes_are_checked() {
    let (x, weight) = (random(&[2, 4], 1), random(&[3, 5], 2));
    let error = linear(&cx(), &x, &weight, &Epilogue::default()).unwrap_err().to_string();
    assert!(error.contains("5 channels") && error.contains("[2, 4]"), "{error}");
    let (weight, bias) = (random(&[3, 4], 2), random(&[2], 3));
    let e = Epilogue { bias: Some(&bias), ..Epilogue::default() };
    assert!(linear(&cx(), &x, &weight, &e).unwrap_err().to_string().contains("linear bias"));
}

/// Inputs and weights of a sum: depth, inputs of the weight before and behind them, layout and type of each term.
struct Sum {
    parts: Vec<(Tensor, Tensor, Layout, usize)>,
}

type Sizes = (usize, [usize; 2], Layout, DType);

impl Sum {
    fn new(outer: [usize; 2], outputs: usize, sizes: &[Sizes]) -> Self {
        let part = |(i, &(depth, [before, behind], layout, dtype)): (usize, &Sizes)| {
            let x = random(&[outer[0], outer[1], depth], 10 + i as u64);
            let inputs = before + depth + behind;
            let dims = match layout {
                Layout::RowsAreOutputs => [outputs, inputs],
                Layout::RowsAreInputs => [inputs, outputs],
            };
            (x, cast(&random(&dims, 20 + i as u64), dtype), layout, before)
        };
        Sum { parts: sizes.iter().enumerate().map(part).collect() }
    }

    fn terms(&self) -> Vec<Term<'_>> {
        let term = |(x, weight, layout, first_input)| Term { x, weight, layout, first_input };
        self.parts.iter().map(|(x, w, layout, first)| term((x, w, *layout, *first))).collect()
    }

    /// The definition in other ops: inputs and weights joined, then one product.
    fn composed(&self, cx: &Context, e: &Epilogue) -> Result<Tensor> {
        let dims = self.parts[0].0.dims();
        let [_, outputs] = sides("weight", &self.parts[0].1, self.parts[0].2)?;
        let k: usize = self.parts.iter().map(|(x, ..)| x.shape().channels()).sum();
        let (mut x, mut weight) = (vec![Vec::new(); dims[0] * dims[1]], vec![Vec::new(); outputs]);
        for (input, w, layout, first) in &self.parts {
            let ([inputs, _], w) = (sides("weight", w, *layout)?, wide(w));
            let channels = input.shape().channels();
            let rows = input.slice::<f32>()?.chunks(channels);
            x.iter_mut().zip(rows).for_each(|(joined, row)| joined.extend_from_slice(row));
            for (o, joined) in weight.iter_mut().enumerate() {
                joined.extend((*first..first + channels).map(|i| match layout {
                    Layout::RowsAreOutputs => w[o * inputs + i] as f32,
                    Layout::RowsAreInputs => w[i * outputs + o] as f32,
                }));
            }
        }
        let x = Tensor::from_slice(&[dims[0], dims[1], k], &x.concat())?;
        linear(cx, &x, &Tensor::from_slice(&[outputs, k], &weight.concat())?, e)
    }
}

/// Depths at the borders of a block of K, in both layouts and all types, at the start, the end and in the middle
/// of a weight's inputs.
fn sums() -> Vec<(usize, Sum)> {
    const OUT: Layout = Layout::RowsAreOutputs;
    const IN: Layout = Layout::RowsAreInputs;
    let cases: [([usize; 2], usize, &[Sizes]); 7] = [
        ([1, 1], 1, &[(1, [0, 0], OUT, DType::F32)]),
        ([1, 1], 1, &[(1, [1, 0], IN, DType::F16), (1, [0, 1], OUT, DType::BF16)]),
        ([2, 3], 7, &[(16, [3, 2], OUT, DType::F16), (1, [0, 0], IN, DType::F32)]),
        ([3, 17], 65, &[(255, [0, 0], OUT, DType::F32), (16, [257, 5], OUT, DType::BF16)]),
        ([2, 70], 40, &[(256, [1, 0], IN, DType::BF16), (257, [16, 16], OUT, DType::F16)]),
        ([2, 131], 300, &[(16, [0, 1], IN, DType::F32), (1, [5, 0], IN, DType::BF16)]),
        (
            [2, 301],
            33,
            &[(257, [2, 0], OUT, DType::F32), (16, [0, 9], IN, DType::F16), (255, [0, 0], IN, DType::F32)],
        ),
    ];
    cases.into_iter().map(|(outer, outputs, sizes)| (outputs, Sum::new(outer, outputs, sizes))).collect()
}

#[test]
fn sums_agree_with_a_plain_loop_and_with_joined_inputs() {
    for (outputs, sum) in sums() {
        let terms = sum.terms();
        let [samples, tokens, _] = terms[0].x.dims_of("x").unwrap();
        let dims = [samples, tokens, outputs];
        let bias = cast(&random(&[outputs], 3), DType::F16);
        let residual = random(&dims, 4);
        let modulation = random(&[samples, 2 * outputs], 5);
        let gelu = Epilogue { bias: Some(&bias), activation: Activation::Gelu, ..Epilogue::default() };
        let full = Epilogue { gain: 0.7, residual: Some(&residual), modulation: Some(&modulation), ..gelu };
        for e in [Epilogue::default(), gelu, full] {
            let y = on_threads(|cx| linear_sum(cx, &terms, &e));
            close(&y, &dims, &reference(&terms, &e), 2e-5);
            close(&y, &dims, &wide(&sum.composed(&cx(), &e).unwrap()), 2e-5);
            let four = Context::new(&crate::device::Device::cpu(4).unwrap());
            assert!(linear_sum(&four, &terms, &e).unwrap().bytes().unwrap() == y.bytes().unwrap());
        }
    }
}

#[test]
fn one_term_has_the_bits_of_the_product() {
    let (x, weight) = (random(&[3, 50, 300], 1), cast(&random(&[70, 300], 2), DType::F16));
    let term = whole(&x, &weight, Layout::RowsAreOutputs);
    let y = linear_sum(&cx(), &[term], &Epilogue::default()).unwrap();
    assert!(y.bytes().unwrap() == linear(&cx(), &x, &weight, &Epilogue::default()).unwrap().bytes().unwrap());
}

#[test]
fn a_sample_of_a_sum_does_not_see_its_neighbours() {
    let (x, skip) = (random(&[5, 140, 70], 1), random(&[5, 140, 16], 2));
    let weight = random(&[90, 86], 3);
    on_batch(&x, |cx, x, first, count| {
        let skip = skip.narrow(first, count)?;
        let part = |x, first_input| Term { first_input, ..whole(x, &weight, Layout::RowsAreOutputs) };
        linear_sum(cx, &[part(x, 0), part(&skip, 70)], &Epilogue::default())
    });
}

#[test]
fn sums_without_numbers_are_sums() {
    let bias = random(&[3], 1);
    let e = Epilogue { bias: Some(&bias), ..Epilogue::default() };
    let (rows_are_outputs, rows_are_inputs) = (Layout::RowsAreOutputs, Layout::RowsAreInputs);
    // No depth: the epilogue of zero, also for a weight with inputs that nothing meets.
    for (dims, layout, first_input) in [
        ([3, 0], rows_are_outputs, 0),
        ([0, 3], rows_are_inputs, 0),
        ([3, 4], rows_are_outputs, 4),
        ([4, 3], rows_are_inputs, 4),
    ] {
        let (x, weight) = (random(&[2, 0], 2), random(&dims, 3));
        let term = Term { first_input, ..whole(&x, &weight, layout) };
        let y = linear_sum(&cx(), &[term, term], &e).unwrap();
        close(&y, &[2, 3], &[wide(&bias), wide(&bias)].concat(), 0.0);
    }
    let y = linear(&cx(), &random(&[2, 0], 2), &random(&[3, 0], 3), &e).unwrap();
    close(&y, &[2, 3], &[wide(&bias), wide(&bias)].concat(), 0.0);
    // No rows, no outputs.
    for (x, outputs) in [([0, 2, 5], 3), ([2, 0, 5], 3), ([2, 2, 5], 0)] {
        let (x, rows) = (random(&x, 2), [x[0], x[1], outputs]);
        for (dims, layout) in [([outputs, 9], rows_are_outputs), ([9, outputs], rows_are_inputs)] {
            let weight = random(&dims, 3);
            let term = Term { first_input: 4, ..whole(&x, &weight, layout) };
            let y = linear_sum(&cx(), &[term, term], &Epilogue::default()).unwrap();
            assert_eq!(y.dims(), rows);
        }
    }
}

#[test]
fn sums_that_do_not_fit_are_refused() {
    let (x, weight) = (random(&[2, 4], 1), random(&[3, 6], 2));
    let good = Term { first_input: 2, ..whole(&x, &weight, Layout::RowsAreOutputs) };
    let fails = |terms: &[Term], e: &Epilogue, parts: &[&str]| {
        let error = linear_sum(&cx(), terms, e).unwrap_err().to_string();
        assert!(parts.iter().all(|part| error.contains(part)), "{error}");
    };
    let plain = Epilogue::default();
    linear_sum(&cx(), &[good; MAX_TERMS], &plain).unwrap();
    fails(&[], &plain, &["linear sum", "1 to 8 terms", "0"]);
    fails(&[good; MAX_TERMS + 1], &plain, &["linear sum", "1 to 8 terms", "9"]);
    for first_input in [3, usize::MAX] {
        let from = format!("4 inputs from input {first_input} on");
        fails(&[good, Term { first_input, ..good }], &plain, &["linear weight", &from, "[3, 6]"]);
    }
    let transposed = Term { layout: Layout::RowsAreInputs, ..good };
    fails(&[good, transposed], &plain, &["linear weight", "3 outputs", "[3, 6]"]);
    fails(&[transposed], &plain, &["linear weight", "4 inputs from input 2 on", "[3, 6]"]);
    let others = [random(&[3, 4], 3), random(&[2, 1, 4], 3), random(&[], 3)];
    for other in &others {
        let found = other.shape().to_string();
        fails(&[good, Term { x: other, ..good }], &plain, &["linear input", "dimensions [2]", &found]);
    }
    fails(&[Term { x: &others[2], ..good }], &plain, &["linear input", "at least one dimension", "[]"]);
    let flat = random(&[18], 4);
    fails(&[Term { weight: &flat, ..good }], &plain, &["linear weight", "2 dimensions", "[18]"]);
    let integers = Tensor::from_slice(&[3, 6], &[0i64; 18]).unwrap();
    fails(&[Term { weight: &integers, ..good }], &plain, &["linear weight", "a float type"]);
    let residual = random(&[2, 4], 5);
    let e = Epilogue { residual: Some(&residual), ..plain };
    fails(&[good], &e, &["linear residual", "[2, 3]", "[2, 4]"]);
    // A modulation must have all samples, or one row for all.
    let (x, modulation) = (random(&[3, 1, 4], 6), random(&[2, 6], 7));
    let e = Epilogue { modulation: Some(&modulation), ..plain };
    fails(&[Term { x: &x, ..good }], &e, &["linear modulation", "[3 or 1, 6]", "[2, 6]"]);
}
