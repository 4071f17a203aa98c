//! The product and its epilogue against a plain loop in f64.

use super::*;
use crate::ops::activation::tests::naive;
use crate::ops::check::{cast, close, cx, on_batch, on_threads, random, wide};

fn reference(x: &Tensor, weight: &Tensor, transposed: bool, e: &Epilogue) -> Vec<f64> {
    let [rows, columns] = weight.dims_of("weight").unwrap();
    let (outputs, inputs) = if transposed { (columns, rows) } else { (rows, columns) };
    let per_sample = x.shape().rows() / x.dims()[0];
    let (x, w) = (wide(x), wide(weight));
    let vector = |v: Option<&Tensor>| v.map(wide);
    let (scale, bias) = (vector(e.channel_scale), vector(e.bias));
    let (residual, modulation) = (vector(e.residual), vector(e.modulation));
    let mut out = Vec::new();
    for (r, row) in x.chunks(inputs).enumerate() {
        for o in 0..outputs {
            let at = |k: usize| if transposed { w[k * outputs + o] } else { w[o * inputs + k] };
            let acc: f64 = row.iter().enumerate().map(|(k, x)| x * at(k)).sum();
            let v = acc * scale.as_ref().map_or(1.0, |s| s[o]) + bias.as_ref().map_or(0.0, |b| b[o]);
            let v = naive(e.activation, v) * f64::from(e.gain);
            let v = v + residual.as_ref().map_or(0.0, |v| v[r * outputs + o]);
            out.push(modulation.as_ref().map_or(v, |m| {
                let n = if m.len() > 2 * outputs { r / per_sample } else { 0 };
                let m = &m[n * 2 * outputs..];
                v * (1.0 + m[o]) + m[outputs + o]
            }));
        }
    }
    out
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
                };
                for e in [Epilogue::default(), Epilogue { bias: Some(&bias), ..Default::default() }, full] {
                    let y = on_threads(|cx| linear(cx, &x, &weight, &e));
                    close(&y, &[dims[0], dims[1], outputs], &reference(&x, &weight, false, &e), 2e-5);
                }
                let weight = cast(&random(&[inputs, outputs], 6), dtype);
                let y = on_threads(|cx| linear_transposed(cx, &x, &weight, &full));
                close(&y, &[dims[0], dims[1], outputs], &reference(&x, &weight, true, &full), 2e-5);
            }
        }
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
