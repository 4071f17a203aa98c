use super::*;
use crate::device::cuda::Precision;
use crate::ops::activation::Activation;
use crate::ops::check;
use crate::ops::elementwise::activate;
use crate::tensor::autograd::{Gradients, Tape, leaf};

fn naive(x: &Tensor, gamma: &Tensor, beta: &Tensor) -> Vec<f64> {
    let (n, c) = (x.dims()[0], x.shape().channels());
    let (x, gamma, beta) = (check::wide(x), check::wide(gamma), check::wide(beta));
    let mut out = Vec::new();
    for sample in x.chunks(x.len() / n) {
        let gx: Vec<f64> =
            (0..c).map(|i| sample.iter().skip(i).step_by(c).map(|v| v * v).sum::<f64>().sqrt()).collect();
        let mean = gx.iter().sum::<f64>() / c as f64;
        out.extend(sample.iter().enumerate().map(|(i, v)| {
            let i = i % c;
            gamma[i] * (v * gx[i] / (mean + 1e-6)) + beta[i] + v
        }));
    }
    out
}

#[test]
fn agrees_with_the_definition_in_place_and_not() {
    for (dims, dtype) in [
        (&[1usize, 1, 1, 1][..], DType::F32),
        (&[3, 9, 11, 37], DType::BF16),
        (&[2, 65, 130], DType::F16),
        (&[2, 33, 1, 600], DType::F32),
    ] {
        let c = dims[dims.len() - 1];
        let x = check::random(dims, 1);
        let gamma = check::cast(&check::random(&[1, 1, 1, c], 2), dtype);
        let beta = check::cast(&check::random(&[c], 3), dtype);
        let expected = naive(&x, &gamma, &beta);
        let shared = check::on_batch(&x, |cx, x, _, _| response_norm(cx, x.clone(), &gamma, &beta));
        check::close(&shared, dims, &expected, 2e-6);
        let own = check::on_threads(|cx| response_norm(cx, check::random(dims, 1), &gamma, &beta));
        assert!(own.bytes().unwrap() == shared.bytes().unwrap());
    }
}

#[test]
fn on_a_gpu() {
    let tolerances = [(Precision::F32, 1e-5), (Precision::BF16, 1e-2), (Precision::F16, 2e-3)];
    for dims in [&[1usize, 1, 1, 1][..], &[3, 9, 11, 37], &[2, 300, 24], &[1, 33, 1, 600]] {
        let c = dims[dims.len() - 1];
        let inputs = [check::random(dims, 1), check::random(&[1, 1, 1, c], 2), check::random(&[c], 3)];
        check::on_device(&inputs.each_ref(), &tolerances, of_all);
        check::gradients_on_device(&inputs, of_all);
        // With the GELU in its two passes.
        let activated = |cx: &Context, t: &[Tensor]| match cx.cuda()? {
            Some(stream) => cuda::normalize(cx, stream, t[0].clone(), (&t[1], &t[2]), true),
            None => response_norm(cx, activate(cx, t[0].clone(), Activation::Gelu)?, &t[1], &t[2]),
        };
        check::on_device(&inputs.each_ref(), &tolerances, activated);
    }
    let Some(cx) = check::cuda(Precision::F16) else { return };
    let stream = cx.cuda().unwrap().unwrap().clone();
    let x = check::moved(&cx, &check::cast(&check::random(&[2, 5, 8], 1), DType::F16));
    let (address, gamma) = (x.on(&cx, &stream).unwrap().address(), check::random(&[8], 2));
    let y = response_norm(&cx, x, &gamma, &gamma).unwrap();
    assert_eq!(y.on(&cx, &stream).unwrap().address(), address);
    let error = response_norm(&cx, y, &check::random(&[7], 1), &gamma).unwrap_err();
    assert!(error.to_string().contains("gamma"), "{error}");
}

#[test]
fn works_in_place_when_it_can() {
    let (gamma, x) = (check::random(&[8], 1), check::random(&[2, 5, 8], 2));
    let address = x.bytes().unwrap().as_ptr();
    let y = response_norm(&check::cx(), x, &gamma, &gamma).unwrap();
    assert_eq!(y.bytes().unwrap().as_ptr(), address);
    let error = response_norm(&check::cx(), y, &check::random(&[7], 1), &gamma).unwrap_err();
    assert!(error.to_string().contains("gamma"), "{error}");
}

/// The definition on the values of x, gamma and beta.
fn definition(t: &[Vec<f64>], samples: usize) -> Vec<f64> {
    let c = t[1].len();
    let sample = t[0].len() / samples;
    let mut out = Vec::new();
    for x in t[0].chunks(sample) {
        let norms: Vec<f64> =
            (0..c).map(|i| x.iter().skip(i).step_by(c).map(|v| v * v).sum::<f64>().sqrt()).collect();
        let mean = norms.iter().sum::<f64>() / c as f64 + 1e-6;
        out.extend(
            x.iter().enumerate().map(|(i, v)| t[1][i % c] * v * norms[i % c] / mean + t[2][i % c] + v),
        );
    }
    out
}

fn of_all(cx: &Context, t: &[Tensor]) -> Result<Tensor> {
    response_norm(cx, t[0].clone(), &t[1], &t[2])
}

#[test]
fn gradients() {
    for (dims, dtype) in [
        (&[1usize, 1, 1][..], DType::F32),
        (&[2, 3, 5, 7], DType::BF16),
        (&[3, 37, 2], DType::F16),
        (&[1, 2, 35], DType::F32),
    ] {
        let c = dims[dims.len() - 1];
        let x = check::random(dims, 1);
        let [gamma, beta] = [2, 3].map(|seed| check::cast(&check::random(&[c], seed), dtype));
        check::gradients(&[x, gamma, beta], of_all, |t| definition(t, dims[0]));
    }
    let x = check::random(&[2, 3, 4], 1);
    let both = |cx: &Context, t: &[Tensor]| response_norm(cx, t[0].clone(), &t[1], &t[1]);
    check::gradients(&[x, check::random(&[4], 2)], both, |t| {
        definition(&[t[0].clone(), t[1].clone(), t[1].clone()], 2)
    });
    let large = [&[2usize, 150, 130][..], &[130], &[130]].map(|dims| check::random(dims, 1));
    check::gradients_on_threads(&large, of_all);
}

#[test]
fn a_channel_of_zeros_has_the_gradient_of_the_rest() {
    // Where the norm is 0 its own gradient is 0 too: what is left is 1 + gamma * 0.
    let x = Tensor::from_slice(&[1, 2, 2], &[0f32, 3.0, 0.0, 4.0]).unwrap();
    let (cx, tape) = (check::cx(), Tape::new());
    let gamma = check::random(&[2], 2);
    let y = of_all(&tape.attach(&cx), &[leaf(&x, 0), gamma.clone(), gamma]).unwrap();
    let mut found = Gradients::default();
    tape.backward(&cx, &[(&y, check::random(&[1, 2, 2], 3))], &mut found).unwrap();
    let (g, dx) = (check::wide(&check::random(&[1, 2, 2], 3)), check::wide(found.get(0).unwrap()));
    assert_eq!([dx[0], dx[2]], [g[0], g[2]]);
    assert!(dx.iter().all(|v| v.is_finite()));
}
