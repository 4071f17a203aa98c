//! The MLP against a plain loop in f64, and bit for bit against the ops that it is made of.

use super::*;
use crate::device::cuda::Precision;
use crate::ops::check::{activation, cast, close, cx, on_batch, on_device, on_threads, random, wide};

/// The weights of an MLP from `channels` to `hidden` channels and back.
struct Weights {
    expand: Tensor,
    expand_bias: Tensor,
    project: Tensor,
    project_bias: Tensor,
    /// Scale - 1, shift and gain.
    scalars: [Tensor; 3],
}

impl Weights {
    fn new(channels: usize, hidden: usize, dtype: DType) -> Self {
        Weights {
            expand: cast(&random(&[hidden, channels], 1), dtype),
            expand_bias: cast(&random(&[hidden], 2), dtype),
            project: cast(&random(&[channels, hidden], 3), dtype),
            project_bias: cast(&random(&[channels], 4), dtype),
            scalars: [-0.2f32, -0.1, 0.3].map(|v| Tensor::from_slice(&[1], &[v]).unwrap()),
        }
    }

    fn mlp(&self, biased: bool) -> ResidualMlp<'_> {
        let [scale, shift, gain] = &self.scalars;
        ResidualMlp {
            norm: LayerNorm { scale: Some(scale), shift: Some(shift), ..LayerNorm::default() },
            expand: Dense { weight: &self.expand, bias: biased.then_some(&self.expand_bias) },
            activation: Activation::Gelu,
            project: Dense { weight: &self.project, bias: biased.then_some(&self.project_bias) },
            gain,
        }
    }
}

/// act(x Wᵀ + b) for one row.
fn naive_dense(x: &[f64], p: &Dense, act: Activation) -> Vec<f64> {
    let bias = p.bias.map_or(vec![0.0; p.weight.dims()[0]], wide);
    let sum = |w: &[f64]| -> f64 { w.iter().zip(x).map(|(w, x)| w * x).sum() };
    wide(p.weight).chunks(x.len()).zip(bias).map(|(w, b)| activation(act, sum(w) + b)).collect()
}

fn naive(x: &Tensor, p: &ResidualMlp) -> Vec<f64> {
    let (channels, eps) = (x.shape().channels(), f64::from(p.norm.eps));
    let scalar = |t: Option<&Tensor>| t.map_or(0.0, |t| wide(t)[0]);
    let (scale, shift, gain) = (1.0 + scalar(p.norm.scale), scalar(p.norm.shift), scalar(Some(p.gain)));
    let row = |row: &[f64]| {
        let mean = row.iter().sum::<f64>() / channels as f64;
        let var = row.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / channels as f64;
        let normed: Vec<f64> = row.iter().map(|v| (v - mean) / (var + eps).sqrt() * scale + shift).collect();
        let hidden = naive_dense(&normed, &p.expand, p.activation);
        let y = naive_dense(&hidden, &p.project, Activation::None);
        row.iter().zip(y).map(|(x, y)| x + gain * y).collect::<Vec<_>>()
    };
    wide(x).chunks(channels).flat_map(row).collect()
}

/// The same of whole ops with epilogues.
fn fused(cx: &Context, x: &Tensor, p: &ResidualMlp) -> Result<Tensor> {
    let first = Epilogue { bias: p.expand.bias, activation: p.activation, ..Epilogue::default() };
    let hidden = linear(cx, &layer_norm(cx, x, &p.norm)?, p.expand.weight, &first)?;
    let then = Epilogue {
        bias: p.project.bias,
        gain: wide(p.gain)[0] as f32,
        residual: Some(x),
        ..Epilogue::default()
    };
    linear(cx, &hidden, p.project.weight, &then)
}

#[test]
fn agrees_with_a_plain_loop_and_the_composed_ops() {
    for (dims, hidden, dtype) in [
        ([1, 1, 1, 1], 1, DType::F32),
        ([2, 3, 5, 7], 9, DType::F16),
        ([3, 2, 2, 33], 130, DType::BF16),
        ([1, 7, 11, 17], 300, DType::F32),
    ] {
        let (x, weights) = (random(&dims, 5), Weights::new(dims[3], hidden, dtype));
        for biased in [false, true] {
            let p = weights.mlp(biased);
            let y = on_batch(&x, |cx, x, _, _| residual_mlp(cx, x, &p));
            close(&y, &dims, &naive(&x, &p), 2e-6);
            assert!(y.bytes().unwrap() == fused(&cx(), &x, &p).unwrap().bytes().unwrap());
            assert!(y.bytes().unwrap() == composed(&cx(), &x, &p).unwrap().bytes().unwrap());
        }
    }
}

#[test]
fn on_a_gpu_in_every_type() {
    let (x, weights) = (random(&[2, 3, 16], 5), Weights::new(16, 40, DType::F32));
    let [scale, shift, gain] = &weights.scalars;
    let dense = [&weights.expand, &weights.expand_bias, &weights.project, &weights.project_bias];
    let tensors = [[&x, scale, shift, gain].as_slice(), &dense].concat();
    on_device(
        &tensors,
        &[(Precision::F32, 1e-5), (Precision::F16, 4e-3), (Precision::BF16, 2e-2)],
        |cx, t| {
            let p = ResidualMlp {
                norm: LayerNorm { scale: Some(&t[1]), shift: Some(&t[2]), ..LayerNorm::default() },
                expand: Dense { weight: &t[4], bias: Some(&t[5]) },
                activation: Activation::Gelu,
                project: Dense { weight: &t[6], bias: Some(&t[7]) },
                gain: &t[3],
            };
            residual_mlp(cx, &t[0], &p)
        },
    );
}

#[test]
fn groups_of_rows_do_not_show() {
    // Few channels and a wide hidden layer: three groups, the last of them smaller.
    let (hidden, rows) = (SCRATCH_ELEMENTS / 100, 251);
    assert_eq!(rows_at_once(rows, hidden), 84);
    let (x, weights) = (random(&[1, rows, 3], 5), Weights::new(3, hidden, DType::F32));
    let p = weights.mlp(true);
    let y = on_threads(|cx| residual_mlp(cx, &x, &p));
    assert!(y.bytes().unwrap() == fused(&cx(), &x, &p).unwrap().bytes().unwrap());
}

#[test]
fn groups_are_even() {
    assert_eq!(rows_at_once(0, 5), 0);
    assert_eq!(rows_at_once(7, 0), 7);
    assert_eq!(rows_at_once(7, usize::MAX), 1);
    assert_eq!(rows_at_once(100, SCRATCH_ELEMENTS / 100), 100);
    assert_eq!(rows_at_once(101, SCRATCH_ELEMENTS / 100), 51);
}

#[test]
fn sizes_of_zero_are_allowed() {
    let weights = Weights::new(4, 6, DType::F32);
    let y = residual_mlp(&cx(), &random(&[2, 0, 4], 1), &weights.mlp(true)).unwrap();
    assert_eq!(y.dims(), [2, 0, 4]);
    let (x, weights) = (random(&[2, 0], 1), Weights::new(0, 6, DType::F32));
    assert_eq!(residual_mlp(&cx(), &x, &weights.mlp(true)).unwrap().dims(), [2, 0]);
    // Without a hidden layer the second bias is left.
    let (x, weights) = (random(&[5, 4], 1), Weights::new(4, 0, DType::F32));
    let p = weights.mlp(true);
    let bias = wide(&weights.project_bias);
    let want: Vec<f64> =
        wide(&x).iter().enumerate().map(|(i, x)| x + wide(p.gain)[0] * bias[i % 4]).collect();
    close(&residual_mlp(&cx(), &x, &p).unwrap(), &[5, 4], &want, 1e-6);
}

#[test]
fn what_does_not_fit_is_refused() {
    let (x, weights) = (random(&[2, 4], 1), Weights::new(4, 6, DType::F32));
    let good = weights.mlp(true);
    residual_mlp(&cx(), &x, &good).unwrap();
    let fails = |x: &Tensor, p: &ResidualMlp, parts: &[&str]| {
        let error = residual_mlp(&cx(), x, p).unwrap_err().to_string();
        assert!(parts.iter().all(|part| error.contains(part)), "{error}");
    };
    fails(&random(&[2, 5], 1), &good, &["mlp expand weight", "[6, 5]", "[6, 4]"]);
    fails(&x, &ResidualMlp { project: good.expand, ..good }, &["mlp project weight", "[4, 6]", "[6, 4]"]);
    let bias = Some(&weights.project_bias);
    fails(&x, &ResidualMlp { expand: Dense { bias, ..good.expand }, ..good }, &["bias", "6 elements", "[4]"]);
}
