//! Loss, accuracy and gradients against the definition in f64.

use super::*;
use crate::device::cuda::Precision;
use crate::ops::check::{
    self, cast, close, cuda, cx, gradients, gradients_on_device, moved, on_device, on_threads, random, wide,
};
use crate::tensor::autograd::{Gradients, Tape, leaf};

/// The losses of tokens, and for each whether the largest logit is the target's.
fn naive(x: &[f64], w: &[f64], targets: &[i64], smoothing: f64) -> Vec<(f64, bool)> {
    let channels = x.len() / targets.len();
    let token = |(x, &target): (&[f64], &i64)| {
        let logits: Vec<f64> =
            w.chunks(channels).map(|w| w.iter().zip(x).map(|(a, b)| a * b).sum()).collect();
        let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let total = logits.iter().map(|l| (l - largest).exp()).sum::<f64>().ln() + largest;
        let uniform = smoothing / logits.len() as f64;
        let loss = (0..logits.len()).map(|v| {
            let label = uniform + if v as i64 == target { 1.0 - smoothing } else { 0.0 };
            label * (total - logits[v])
        });
        (loss.sum(), logits.iter().position(|&l| l == largest) == Some(target as usize))
    };
    x.chunks(channels).zip(targets).map(token).collect()
}

fn targets(rows: usize, classes: usize) -> Vec<i64> {
    (0..rows).map(|r| (r * r * 7 % classes) as i64).collect()
}

fn coefficients(rows: usize) -> Vec<f32> {
    (0..rows).map(|r| (r % 5) as f32 * 0.25).collect()
}

#[test]
fn agrees_with_the_definition() {
    for (dims, classes, dtype) in [
        (&[1usize, 1][..], 1usize, DType::F32),
        (&[2, 3, 5, 7], 33, DType::F16),
        (&[40, 65], 300, DType::BF16),
        // More rows than are held at a time.
        (&[600, 3], 9000, DType::F32),
    ] {
        let (x, w) = (random(dims, 1), cast(&random(&[classes, *dims.last().unwrap()], 2), dtype));
        let rows = x.shape().rows();
        let (targets, coefficients) = (targets(rows, classes), coefficients(rows));
        let truth = Tensor::from_slice(&dims[..dims.len() - 1], &targets).unwrap();
        for smoothing in [0.0, 0.1, 1.0] {
            let p = CrossEntropy { targets: &truth, coefficients: &coefficients, smoothing };
            let expected = naive(&wide(&x), &wide(&w), &targets, f64::from(smoothing));
            let losses: Vec<f64> = expected.iter().map(|(loss, _)| *loss).collect();
            let of_tokens = on_threads(|cx| Ok(cross_entropy(cx, &x, &w, &p)?.of_tokens));
            close(&of_tokens, &[rows], &losses, 1e-6);
            let found = cross_entropy(&cx(), &x, &w, &p).unwrap();
            let sum = losses.iter().zip(&coefficients).map(|(l, &c)| l * f64::from(c)).sum();
            close(&found.loss, &[1], &[sum], 1e-6);
            assert_eq!(found.correct().unwrap(), expected.iter().filter(|(_, right)| *right).count());
            assert!(found.loss.tracked().is_none());
        }
    }
}

#[test]
fn features_and_weight_have_gradients() {
    for (dims, classes, dtype) in
        [(&[1usize, 1][..], 1usize, DType::F32), (&[2, 2, 3], 5, DType::F16), (&[5, 4], 17, DType::F32)]
    {
        let rows: usize = dims[..dims.len() - 1].iter().product();
        let inputs = [random(dims, 1), cast(&random(&[classes, *dims.last().unwrap()], 2), dtype)];
        let (targets, coefficients) = (targets(rows, classes), coefficients(rows));
        let truth = Tensor::from_slice(&[rows], &targets).unwrap();
        for smoothing in [0.0, 0.1] {
            let p = CrossEntropy { targets: &truth, coefficients: &coefficients, smoothing };
            let op = |cx: &Context, t: &[Tensor]| Ok(cross_entropy(cx, &t[0], &t[1], &p)?.loss);
            gradients(&inputs, op, |v| {
                let losses = naive(&v[0], &v[1], &targets, f64::from(smoothing));
                vec![losses.iter().zip(&coefficients).map(|((l, _), &c)| l * f64::from(c)).sum()]
            });
        }
    }
}

/// The gradients of some of features and weight in one tensor.
fn gradients_of(cx: &Context, x: &Tensor, w: &Tensor, tracked: &[usize]) -> Result<Tensor> {
    let rows = x.shape().rows();
    let (targets, coefficients) = (targets(rows, w.dims()[0]), coefficients(rows));
    let truth = Tensor::from_slice(&[rows], &targets)?;
    let p = CrossEntropy { targets: &truth, coefficients: &coefficients, smoothing: 0.1 };
    let tape = Tape::new();
    let of = |i, t: &Tensor| if tracked.contains(&i) { leaf(t, i) } else { t.clone() };
    let found = cross_entropy(&tape.attach(cx), &of(0, x), &of(1, w), &p)?;
    let mut gradients = Gradients::default();
    tape.backward_from(cx, &found.loss, 3.0, &mut gradients)?;
    assert_eq!([0, 1].map(|i| gradients.get(i).is_some()), [0, 1].map(|i| tracked.contains(&i)));
    let parts: Vec<&Tensor> = tracked.iter().filter_map(|&i| gradients.get(i)).collect();
    Tensor::from_parts(cx, "gradients", &[parts.iter().map(|p| p.elements()).sum()], &parts)
}

#[test]
fn gradients_of_many_rows_are_summed_in_parts() {
    let (x, w) = (random(&[700, 6], 1), random(&[9000, 6], 2));
    let both = on_threads(|cx| gradients_of(cx, &x, &w, &[0, 1]));
    let one = |i| gradients_of(&cx(), &x, &w, &[i]).unwrap();
    assert!(both.bytes().unwrap() == [one(0).bytes().unwrap(), one(1).bytes().unwrap()].concat());
    // The sum over the features' gradient by features is that of the weight by the weight: both are
    // sum of gradient by logits times logits.
    let dot = |a: &[f64], b: &Tensor| a.iter().zip(wide(b)).map(|(a, b)| a * b).sum::<f64>();
    let all = wide(&both);
    let (dx, dw) = all.split_at(x.elements());
    let (by_features, by_weight) = (dot(dx, &x), dot(dw, &w));
    assert!((by_features - by_weight).abs() <= 1e-4 * by_features.abs(), "{by_features} {by_weight}");
}

#[test]
fn large_logits_do_not_overflow() {
    let x = Tensor::from_slice(&[2, 1], &[1000f32, -1000.]).unwrap();
    let w = Tensor::from_slice(&[3, 1], &[1f32, 0., -1.]).unwrap();
    let truth = Tensor::from_slice(&[2], &[0i64, 0]).unwrap();
    let p = CrossEntropy { targets: &truth, coefficients: &[1.0; 2], smoothing: 0.0 };
    let found = cross_entropy(&cx(), &x, &w, &p).unwrap();
    close(&found.of_tokens, &[2], &[0.0, 2000.0], 1e-7);
    assert_eq!(found.correct().unwrap(), 1);
}

#[test]
fn no_tokens_have_no_loss() {
    let (x, w) = (leaf(&random(&[0, 3], 1), 0), leaf(&random(&[4, 3], 2), 1));
    let truth = Tensor::from_slice::<i64>(&[0], &[]).unwrap();
    let (cx, tape) = (cx(), Tape::new());
    let p = CrossEntropy { targets: &truth, coefficients: &[], smoothing: 0.1 };
    let found = cross_entropy(&tape.attach(&cx), &x, &w, &p).unwrap();
    let mut gradients = Gradients::default();
    tape.backward_from(&cx, &found.loss, 1.0, &mut gradients).unwrap();
    assert_eq!(wide(gradients.get(1).unwrap()), [0.0; 12]);
    assert_eq!((wide(&found.loss), found.correct().unwrap()), (vec![0.0], 0));
}

#[test]
fn what_does_not_fit_is_refused() {
    let (x, w) = (random(&[2, 3], 1), random(&[4, 3], 2));
    let fails = |w: &Tensor, targets: &[i64], coefficients: &[f32], smoothing, parts: &[&str]| {
        let truth = Tensor::from_slice(&[targets.len()], targets).unwrap();
        let p = CrossEntropy { targets: &truth, coefficients, smoothing };
        let error = cross_entropy(&cx(), &x, w, &p).unwrap_err().to_string();
        assert!(parts.iter().all(|part| error.contains(part)), "{error}");
    };
    let ones = &[1.0; 2];
    fails(&w, &[0, 4], ones, 0.0, &["targets", "classes below 4", "4 as token 1"]);
    fails(&w, &[-1, 0], ones, 0.0, &["targets", "-1 as token 0"]);
    fails(&w, &[0], ones, 0.0, &["targets", "2 tokens"]);
    fails(&w, &[0, 0], &[1.0], 0.0, &["coefficients", "2 tokens", "1"]);
    fails(&w, &[0, 0], ones, 1.5, &["smoothing", "1.5"]);
    fails(&w, &[0, 0], ones, f32::NAN, &["smoothing", "NaN"]);
    fails(&random(&[4, 2], 3), &[0, 0], ones, 0.0, &["weight", "[V, 3]"]);
    fails(&random(&[0, 3], 3), &[0, 0], ones, 0.0, &["weight", "[V, 3]"]);
}

#[test]
fn a_gpu_answers_without_asking_the_host() {
    for ([rows, channels, classes], precision, tolerance) in [
        ([1usize, 1, 1], Precision::F32, 1e-6),
        ([40, 65, 300], Precision::F32, 1e-6),
        ([40, 65, 300], Precision::BF16, 2e-2),
        ([3, 4, 12_000], Precision::F32, 1e-6),
    ] {
        let inputs = [random(&[rows, channels], 1), random(&[classes, channels], 2)];
        let (targets, coefficients) = (targets(rows, classes), coefficients(rows));
        let truth = Tensor::from_slice(&[rows], &targets).unwrap();
        let op = |cx: &Context, t: &[Tensor], of_tokens: bool| {
            let p = CrossEntropy { targets: &t[2], coefficients: &coefficients, smoothing: 0.1 };
            let found = cross_entropy(cx, &t[0], &t[1], &p)?;
            Ok(if of_tokens { found.of_tokens } else { found.loss })
        };
        for of_tokens in [false, true] {
            let all = [&inputs[0], &inputs[1], &truth];
            on_device(&all, &[(precision, tolerance)], |cx, t| op(cx, t, of_tokens));
        }
        gradients_on_device(&inputs, |cx, t| op(cx, &[t[0].clone(), t[1].clone(), moved(cx, &truth)], false));
        // Which tokens are right.
        let Some(cx) = cuda(Precision::F32) else { continue };
        let p = CrossEntropy { targets: &truth, coefficients: &coefficients, smoothing: 0.0 };
        let right = |cx: &Context| cross_entropy(cx, &inputs[0], &inputs[1], &p).unwrap().correct().unwrap();
        assert!(right(&cx).abs_diff(right(&check::cx())) <= rows / 100);
    }
}
