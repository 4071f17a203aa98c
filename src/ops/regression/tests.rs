use super::*;
use crate::device::cuda::Precision;
use crate::ops::check;

fn squared(x: &[f64], target: &[f64], weights: &[f32]) -> f64 {
    let sample = x.len() / weights.len();
    let terms = x.iter().zip(target).enumerate();
    terms.map(|(i, (x, t))| f64::from(weights[i / sample]) * (x - t).powi(2)).sum::<f64>() / x.len() as f64
}

fn absolute(x: &[f64], target: &[f64]) -> f64 {
    x.iter().zip(target).map(|(x, t)| (x - t).abs()).sum::<f64>() / x.len() as f64
}

#[test]
fn agrees_with_the_definition() {
    for dims in [&[1usize][..], &[3, 5, 7], &[70_000, 1], &[2, 3, 20_000]] {
        let (x, t) = (check::random(dims, 1), check::random(dims, 2));
        let weights: Vec<f32> = (0..dims[0]).map(|n| n as f32 % 3.0).collect();
        let (wide_x, wide_t) = (check::wide(&x), check::wide(&t));
        let loss = check::on_threads(|cx| squared_error(cx, &x, &t, Some(&weights)));
        check::close(&loss, &[1], &[squared(&wide_x, &wide_t, &weights)], 1e-7);
        let loss = check::on_threads(|cx| squared_error(cx, &x, &t, None));
        check::close(&loss, &[1], &[squared(&wide_x, &wide_t, &[1.0])], 1e-7);
        let loss = check::on_threads(|cx| absolute_error(cx, &x, &t));
        check::close(&loss, &[1], &[absolute(&wide_x, &wide_t)], 1e-7);
    }
    let (cx, x) = (check::cx(), check::random(&[2, 3], 1));
    assert!(squared_error(&cx, &x, &check::random(&[3, 2], 1), None).is_err());
    assert!(squared_error(&cx, &x, &x, Some(&[1.0])).is_err());
    let empty = check::random(&[2, 0], 1);
    assert!(absolute_error(&cx, &empty, &empty).is_err());
}

#[test]
fn gradients_are_those_of_the_definition() {
    for dims in [&[1usize][..], &[3, 5, 7]] {
        let inputs = [check::random(dims, 1), check::random(dims, 2)];
        let weights: Vec<f32> = (0..dims[0]).map(|n| 0.5 + n as f32).collect();
        check::gradients(
            &inputs,
            |cx, x| squared_error(cx, &x[0], &x[1], Some(&weights)),
            |x| vec![squared(&x[0], &x[1], &weights)],
        );
        check::gradients(&inputs, |cx, x| absolute_error(cx, &x[0], &x[1]), |x| vec![absolute(&x[0], &x[1])]);
        check::gradients(
            &inputs,
            |cx, x| {
                let squared = squared_error(cx, &x[0], &x[1], None)?;
                let absolute = absolute_error(cx, &x[0], &x[1])?;
                weighted_sum(cx, &[(&squared, 0.5), (&absolute, -2.0), (&squared, 1.0)])
            },
            |x| vec![1.5 * squared(&x[0], &x[1], &[1.0]) - 2.0 * absolute(&x[0], &x[1])],
        );
    }
    let cx = check::cx();
    assert!(weighted_sum(&cx, &[(&check::random(&[2], 1), 1.0)]).is_err());
}

#[test]
fn equal_numbers_have_no_gradient() {
    use crate::tensor::autograd::{Gradients, Tape, leaf};
    let (cx, tape) = (check::cx(), Tape::new());
    let x = leaf(&check::random(&[2, 3], 1), 0);
    let loss = absolute_error(&tape.attach(&cx), &x, &x.constant()).unwrap();
    let mut found = Gradients::default();
    tape.backward_from(&cx, &loss, 1.0, &mut found).unwrap();
    assert_eq!(found.get(0).unwrap().slice::<f32>().unwrap(), [0.0; 6]);
}

#[test]
fn a_gpu_answers_without_asking_the_host() {
    let tolerances = [(Precision::F32, 1e-7), (Precision::BF16, 2e-2), (Precision::F16, 4e-3)];
    for dims in [&[1usize][..], &[3, 5, 7], &[2, 3, 20_000]] {
        let (x, t) = (check::random(dims, 1), check::random(dims, 2));
        let weights: Vec<f32> = (0..dims[0]).map(|n| 0.5 + n as f32).collect();
        let loss = |cx: &Context, x: &[Tensor]| {
            let squared = squared_error(cx, &x[0], &x[1], Some(&weights))?;
            let terms = [(&squared, 0.5), (&absolute_error(cx, &x[0], &x[1])?, -2.0)];
            weighted_sum(cx, &terms)
        };
        check::on_device(&[&x, &t], &tolerances, loss);
        check::gradients_on_device(&[x, t], loss);
    }
    // More terms than one launch takes.
    let one = Tensor::from_slice(&[1], &[1f32]).unwrap();
    let terms = |x: &Tensor| (0..37).map(|i| (x.clone(), i as f32)).collect::<Vec<_>>();
    check::on_device(&[&one], &tolerances[..1], |cx, x| {
        let terms = terms(&x[0]);
        weighted_sum(cx, &terms.iter().map(|(x, factor)| (x, *factor)).collect::<Vec<_>>())
    });
}
