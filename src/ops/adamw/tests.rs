use super::*;
use crate::device::cuda::Precision;
use crate::ops::check::{self, random};

/// A context of each device.
fn contexts() -> impl Iterator<Item = Context> {
    std::iter::once(check::cx()).chain(check::cuda(Precision::F32))
}

#[test]
fn two_steps_are_those_of_the_definition() {
    let n = CHUNK + 3;
    let (start, gradients) = (random(&[n], 1), [random(&[n], 2), random(&[n], 3)]);
    let (rate, decay, [b1, b2], eps) = (0.01f64, 0.1f64, [0.9f64, 0.95f64], 1e-8f64);
    for cx in contexts() {
        let mut weights = start.copied(&cx).unwrap();
        let zeros = || Tensor::zeros(&cx, "x", &[n], DType::F32).unwrap();
        let (mut first, mut second) = (zeros(), zeros());
        let wide = check::wide(&start);
        let mut expected: Vec<[f64; 3]> = wide.into_iter().map(|w| [w, 0.0, 0.0]).collect();
        for (t, gradient) in (1..).zip(&gradients) {
            let corrections = [1.0 - b1.powi(t), 1.0 - b2.powi(t)];
            let step = AdamWStep {
                scale: 0.5,
                betas: [b1 as f32, b2 as f32],
                decay: (1.0 - rate * decay) as f32,
                size: (rate / corrections[0]) as f32,
                root: corrections[1].sqrt() as f32,
                eps: eps as f32,
            };
            adamw(&cx, &step, &mut weights, [&mut first, &mut second], gradient).unwrap();
            for ([w, m, v], g) in expected.iter_mut().zip(check::wide(gradient)) {
                let g = 0.5 * g;
                *w -= rate * decay * *w;
                *m = b1 * *m + (1.0 - b1) * g;
                *v = b2 * *v + (1.0 - b2) * g * g;
                *w -= rate * (*m / corrections[0]) / ((*v / corrections[1]).sqrt() + eps);
            }
        }
        assert_eq!(cx.cuda().unwrap().map_or(0, |stream| stream.downloads()), 0);
        for (got, [want, ..]) in check::wide(&weights).iter().zip(&expected) {
            assert!((got - want).abs() < 1e-6, "{got} instead of {want}");
        }
        let mut short = random(&[3], 1).copied(&cx).unwrap();
        let step = AdamWStep { scale: 1.0, betas: [0.9; 2], decay: 1.0, size: 0.1, root: 1.0, eps: 1e-8 };
        assert!(adamw(&cx, &step, &mut short, [&mut first, &mut second], &start).is_err());
    }
}

#[test]
fn squares_are_summed() {
    let tensors = [random(&[3, CHUNK], 5), random(&[1], 6), random(&[0], 7), random(&[70, 999], 8)];
    let expected: f64 = tensors.iter().flat_map(check::wide).map(|x| x.powi(2)).sum();
    for cx in contexts() {
        let moved: Vec<Tensor> = tensors.iter().map(|x| x.copied(&cx).unwrap()).collect();
        let found = sum_of_squares(&cx, &moved.iter().collect::<Vec<_>>()).unwrap();
        assert!((found / expected - 1.0).abs() < 1e-6);
        assert_eq!(sum_of_squares(&cx, &[]).unwrap(), 0.0);
    }
}

#[test]
fn an_average_follows() {
    let (start, x) = (random(&[CHUNK / 7], 1), random(&[CHUNK / 7], 2));
    let expected: Vec<f64> =
        check::wide(&start).iter().zip(check::wide(&x)).map(|(a, x)| 0.75 * a + 0.25 * x).collect();
    for cx in contexts() {
        let mut average = start.copied(&cx).unwrap();
        moving_average(&cx, &mut average, &x, 0.75).unwrap();
        check::close(&average, x.dims(), &expected, 1e-6);
        assert!(moving_average(&cx, &mut average, &random(&[3], 1), 0.75).is_err());
        let mut running = start.copied(&cx).unwrap();
        approach(&cx, &mut running, &x, [1.0, 0.25]).unwrap();
        check::close(&running, x.dims(), &expected, 1e-6);
    }
}
