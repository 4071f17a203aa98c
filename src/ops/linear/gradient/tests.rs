//! Gradients of products against central differences of the definitions in f64, and their helpers against plain
//! loops.

use super::*;
use crate::device::cuda::Precision;
use crate::ops::check::{cast, close, cuda, cx, gradients, moved, on_threads, random, wide};
use crate::ops::linear::{ResultType, linear, linear_sum, linear_transposed};
use crate::tensor::autograd::{Gradients, Tape, leaf};

const OUT: Layout = Layout::RowsAreOutputs;
const IN: Layout = Layout::RowsAreInputs;

/// A term: depth, inputs of its weight before and behind them, layout and type.
type Sizes = (usize, [usize; 2], Layout, DType);

fn weight(outputs: usize, sizes: &Sizes, seed: u64) -> Tensor {
    let &(depth, [before, behind], layout, dtype) = sizes;
    let inputs = before + depth + behind;
    let dims = if layout == OUT { [outputs, inputs] } else { [inputs, outputs] };
    cast(&random(&dims, seed), dtype)
}

/// x times the term's inputs of w.
fn product(outputs: usize, sizes: &Sizes, x: &[f64], w: &[f64]) -> Vec<f64> {
    let &(depth, [before, behind], layout, _) = sizes;
    let inputs = before + depth + behind;
    let at =
        |o: usize, k: usize| if layout == OUT { o * inputs + before + k } else { (before + k) * outputs + o };
    let element = |row: &[f64], o: usize| row.iter().enumerate().map(|(k, x)| x * w[at(o, k)]).sum::<f64>();
    x.chunks(depth).flat_map(|row| (0..outputs).map(|o| element(row, o)).collect::<Vec<_>>()).collect()
}

#[test]
fn sums_of_products() {
    let cases: [(&[usize], usize, &[Sizes]); 6] = [
        (&[1], 1, &[(1, [0, 0], OUT, DType::F32)]),
        (&[], 5, &[(3, [0, 0], OUT, DType::F32)]),
        (&[2, 3], 7, &[(5, [0, 0], IN, DType::F16)]),
        (&[2, 2], 3, &[(4, [1, 2], OUT, DType::BF16), (2, [3, 0], IN, DType::F32)]),
        (
            &[9],
            17,
            &[(1, [0, 1], IN, DType::F16), (6, [2, 0], OUT, DType::F32), (3, [0, 0], OUT, DType::F16)],
        ),
        (&[2, 1, 3], 4, &[(3, [0, 0], IN, DType::F32), (3, [0, 4], OUT, DType::F32)]),
    ];
    for (outer, outputs, sizes) in cases {
        let mut inputs = Vec::new();
        for (i, size) in sizes.iter().enumerate() {
            inputs.push(random(&[outer, &[size.0]].concat(), 10 + i as u64));
            inputs.push(weight(outputs, size, 20 + i as u64));
        }
        let terms = |t: &[Tensor], op: &dyn Fn(&[Term]) -> Result<Tensor>| {
            let term = |(i, size): (usize, &Sizes)| (i, size.2, size.1[0]);
            let parts = sizes.iter().enumerate().map(term);
            let terms = parts.map(|(i, layout, first_input)| Term {
                x: &t[2 * i],
                weight: &t[2 * i + 1],
                layout,
                first_input,
            });
            op(&terms.collect::<Vec<_>>())
        };
        let sum = |v: &[Vec<f64>]| {
            let products =
                sizes.iter().enumerate().map(|(i, size)| product(outputs, size, &v[2 * i], &v[2 * i + 1]));
            products.reduce(|sum, term| sum.iter().zip(&term).map(|(a, b)| a + b).collect()).unwrap()
        };
        gradients(&inputs, |cx, t| terms(t, &|terms| linear_sum(cx, terms, &Epilogue::default())), sum);
        let n = inputs.len();
        inputs.push(cast(&random(&[outputs], 1), DType::F16));
        inputs.push(random(&[outer, &[outputs]].concat(), 2));
        let op = |cx: &Context, t: &[Tensor]| {
            let e =
                Epilogue { bias: Some(&t[n]), gain: 0.7, residual: Some(&t[n + 1]), ..Epilogue::default() };
            terms(t, &|terms| linear_sum(cx, terms, &e))
        };
        gradients(&inputs, op, |v| {
            let element = |(i, y): (usize, &f64)| (y + v[n][i % outputs]) * f64::from(0.7f32) + v[n + 1][i];
            sum(v).iter().enumerate().map(element).collect()
        });
    }
}

#[test]
fn an_input_may_be_the_residual_and_a_weight_serve_twice() {
    let (x, w) = (random(&[2, 3, 5], 1), random(&[5, 5], 2));
    let op = |cx: &Context, t: &[Tensor]| {
        linear(cx, &t[0], &t[1], &Epilogue { residual: Some(&t[0]), ..Epilogue::default() })
    };
    let sizes = (5, [0, 0], OUT, DType::F32);
    gradients(&[x.clone(), w], op, |v| {
        product(5, &sizes, &v[0], &v[1]).iter().zip(&v[0]).map(|(y, x)| y + x).collect()
    });
    // Parts of one weight that are apart, meet and overlap.
    for (layout, first) in [(OUT, [0, 5]), (OUT, [1, 7]), (IN, [2, 4]), (IN, [3, 3])] {
        let weight = random(&if layout == OUT { [3, 12] } else { [12, 3] }, 3);
        let op = |cx: &Context, t: &[Tensor]| {
            let term = |x, first_input| Term { x, weight: &t[2], layout, first_input };
            linear_sum(cx, &[term(&t[0], first[0]), term(&t[1], first[1])], &Epilogue::default())
        };
        gradients(&[x.clone(), random(&[2, 3, 5], 4), weight], op, |v| {
            let term =
                |i: usize| product(3, &(5, [first[i], 7 - first[i]], layout, DType::F32), &v[i], &v[2]);
            term(0).iter().zip(term(1)).map(|(a, b)| a + b).collect()
        });
    }
}

#[test]
fn on_a_tape_the_numbers_are_the_same() {
    let (x, residual, modulation) = (random(&[2, 40, 30], 1), random(&[2, 40, 20], 2), random(&[2, 40], 3));
    let [scale, bias] = [4, 5].map(|seed| random(&[20], seed));
    let weight = cast(&random(&[20, 30], 6), DType::BF16);
    let plain = Epilogue::default();
    let full = Epilogue {
        channel_scale: Some(&scale),
        bias: Some(&bias),
        activation: Activation::Gelu,
        gain: 0.7,
        residual: Some(&residual),
        modulation: Some(&modulation),
        result: ResultType::Activations,
    };
    let recording = Tape::new().attach(&cx());
    for e in [
        full,
        Epilogue { channel_scale: None, ..full },
        Epilogue { activation: Activation::None, ..full },
        Epilogue { bias: None, residual: None, ..full },
        Epilogue { channel_scale: None, residual: None, modulation: None, ..full },
        Epilogue { modulation: None, channel_scale: None, activation: Activation::None, ..full },
        Epilogue { gain: 0.7, ..plain },
        Epilogue { modulation: Some(&modulation), ..plain },
    ] {
        let y = linear(&recording, &leaf(&x, 0), &weight, &e).unwrap();
        close(&y, &[2, 40, 20], &wide(&linear(&cx(), &x, &weight, &e).unwrap()), 1e-6);
    }
    let (vector, modulation) = (leaf(&random(&[30], 7), 0), random(&[1, 40], 8));
    let e = Epilogue { residual: None, modulation: Some(&modulation), ..full };
    let y = linear(&recording, &vector, &weight, &e).unwrap();
    close(&y, &[20], &wide(&linear(&cx(), &vector, &weight, &e).unwrap()), 1e-6);
}

#[test]
fn what_is_not_tracked_gets_nothing() {
    let (x, w) = (leaf(&random(&[3, 4], 1), 0), random(&[5, 4], 2));
    let (cx, tape) = (cx(), Tape::new());
    let y = linear(&tape.attach(&cx), &x, &w, &Epilogue::default()).unwrap();
    let mut found = Gradients::default();
    tape.backward(&cx, &[(&y, random(&[3, 5], 3))], &mut found).unwrap();
    assert_eq!(found.get(0).unwrap().elements(), 12);
    assert!(linear(&tape.attach(&cx), &x.constant(), &w, &Epilogue::default()).unwrap().tracked().is_none());
    assert!(linear(&cx, &x, &w, &Epilogue::default()).unwrap().tracked().is_none());
}

#[test]
fn without_rows_the_gradient_is_zero() {
    for (layout, dims) in [(OUT, [3, 4]), (IN, [4, 3])] {
        let (x, w) = (leaf(&random(&[2, 0, 4], 1), 0), leaf(&random(&dims, 2), 1));
        let (cx, tape) = (cx(), Tape::new());
        let bias = leaf(&random(&[3], 3), 2);
        let e = Epilogue { bias: Some(&bias), ..Epilogue::default() };
        let op = if layout == OUT { linear } else { linear_transposed };
        let y = op(&tape.attach(&cx), &x, &w, &e).unwrap();
        let mut found = Gradients::default();
        tape.backward(&cx, &[(&y, random(&[2, 0, 3], 3))], &mut found).unwrap();
        assert_eq!(wide(found.get(1).unwrap()), [0.0; 12]);
        assert_eq!(wide(found.get(2).unwrap()), [0.0; 3]);
    }
}

#[test]
fn helpers_agree_with_plain_loops() {
    for (rows, inputs, outputs) in [(1, 1, 1), (70, 33, 65), (700, 17, 9), (3000, 5, 300)] {
        let (x, dy) = (random(&[rows, inputs], 1), random(&[rows, outputs], 2));
        let (wide_x, wide_dy) = (wide(&x), wide(&dy));
        let mut sums = vec![0.0; outputs];
        wide_dy.iter().enumerate().for_each(|(i, v)| sums[i % outputs] += v);
        close(&on_threads(|cx| column_sums(cx, &dy)), &[outputs], &sums, 1e-6);
        let of_weight = |o: usize, k: usize| -> f64 {
            (0..rows).map(|r| wide_dy[r * outputs + o] * wide_x[r * inputs + k]).sum()
        };
        for (layout, dims) in [(OUT, [outputs, inputs]), (IN, [inputs, outputs])] {
            let dw: Vec<f64> = (0..inputs * outputs)
                .map(|i| {
                    let (row, column) = (i / dims[1], i % dims[1]);
                    if layout == OUT { of_weight(row, column) } else { of_weight(column, row) }
                })
                .collect();
            close(&on_threads(|cx| weight_gradient(cx, &x, &dy, layout)), &dims, &dw, 1e-5);
            let w = cast(&random(&dims, 3), DType::F16);
            let back = if layout == OUT { [dims[1], dims[0]] } else { dims };
            // dy W is the product with the transpose.
            let mut transposed = vec![0.0; inputs * outputs];
            for (i, v) in wide(&w).into_iter().enumerate() {
                let (row, column) = (i / dims[1], i % dims[1]);
                transposed[if layout == OUT { column * back[1] + row } else { row * back[1] + column }] = v;
            }
            let dx: Vec<f64> = (0..rows * inputs)
                .map(|i| {
                    let row = &wide_dy[i / inputs * outputs..][..outputs];
                    row.iter().zip(&transposed[i % inputs * outputs..]).map(|(a, b)| a * b).sum()
                })
                .collect();
            close(&on_threads(|cx| input_gradient(cx, &dy, &w, layout)), &[rows, inputs], &dx, 1e-5);
        }
    }
}

#[test]
fn whole_epilogues() {
    let (rows, inputs, outputs) = ([2, 3], 4, 5);
    let tensors = [
        random(&[rows[0], rows[1], inputs], 1),
        random(&[outputs, inputs], 2),
        random(&[outputs], 3),
        random(&[outputs], 4),
        random(&[rows[0], rows[1], outputs], 5),
        random(&[rows[0], 2 * outputs], 6),
    ];
    for activation in [Activation::None, Activation::Silu] {
        for scaled in [true, false] {
            // Without a scale, its place is taken by a second use of the bias.
            let op = |cx: &Context, t: &[Tensor]| {
                let e = Epilogue {
                    channel_scale: scaled.then_some(&t[2]),
                    bias: Some(if scaled { &t[3] } else { &t[2] }),
                    activation,
                    gain: 0.7,
                    residual: Some(&t[4]),
                    modulation: Some(&t[5]),
                    result: ResultType::Activations,
                };
                let y = linear(cx, &t[0], &t[1], &e)?;
                elementwise::affine_channels(cx, y, &Tensor::from_slice(&[5], &[1f32; 5])?, &t[3])
            };
            gradients(&tensors, op, |v| {
                let y = product(outputs, &(inputs, [0, 0], OUT, DType::F32), &v[0], &v[1]);
                let element = |(i, y): (usize, &f64)| {
                    let (o, n) = (i % outputs, i / outputs / rows[1]);
                    let y = if scaled { y * v[2][o] + v[3][o] } else { y + v[2][o] };
                    let y = crate::ops::check::activation(activation, y) * f64::from(0.7f32) + v[4][i];
                    let modulation = &v[5][n * 2 * outputs..];
                    y * (1.0 + modulation[o]) + modulation[outputs + o] + v[3][o]
                };
                y.iter().enumerate().map(element).collect()
            });
        }
    }
    // A vector is one sample.
    let vector = [random(&[inputs], 1), random(&[outputs, inputs], 2), random(&[1, 2 * outputs], 3)];
    let op = |cx: &Context, t: &[Tensor]| {
        linear(cx, &t[0], &t[1], &Epilogue { modulation: Some(&t[2]), ..Epilogue::default() })
    };
    gradients(&vector, op, |v| {
        let y = product(outputs, &(inputs, [0, 0], OUT, DType::F32), &v[0], &v[1]);
        y.iter().enumerate().map(|(o, y)| y * (1.0 + v[2][o]) + v[2][outputs + o]).collect()
    });
}

#[test]
fn on_a_gpu_the_host_reads_nothing() {
    let Some(cx) = cuda(Precision::F32) else { return };
    let stream = cx.cuda().unwrap().unwrap().clone();
    let tensors = [
        random(&[2, 3, 5], 1),
        random(&[7, 9], 2),
        random(&[6, 7], 3),
        random(&[7], 4),
        random(&[2, 3, 7], 5),
    ];
    let leaves: Vec<Tensor> = tensors.iter().enumerate().map(|(i, x)| leaf(&moved(&cx, x), i)).collect();
    let dy = moved(&cx, &random(&[2, 3, 7], 6));
    let before = stream.downloads();
    let tape = Tape::new();
    let term = |layout, weight: usize, first_input| Term {
        x: &leaves[0],
        weight: &leaves[weight],
        layout,
        first_input,
    };
    let e = Epilogue { bias: Some(&leaves[3]), gain: 0.7, residual: Some(&leaves[4]), ..Epilogue::default() };
    let y = linear_sum(&tape.attach(&cx), &[term(OUT, 1, 2), term(IN, 2, 1)], &e).unwrap();
    let mut found = Gradients::default();
    tape.backward(&cx, &[(&y, dy)], &mut found).unwrap();
    assert!((0..5).all(|i| found.get(i).is_some()));
    assert_eq!(stream.downloads(), before);
}
