use super::*;
use crate::ops::check::{cx, random};

#[test]
fn two_steps_are_those_of_the_definition() {
    let n = CHUNK + 3;
    let (start, gradients) = (random(&[n], 1), [random(&[n], 2), random(&[n], 3)]);
    let (rate, decay, [b1, b2], eps) = (0.01f64, 0.1f64, [0.9f64, 0.95f64], 1e-8f64);
    let mut weights = start.slice::<f32>().unwrap().to_vec();
    let (mut first, mut second) = (vec![0f32; n], vec![0f32; n]);
    let mut expected: Vec<[f64; 3]> = weights.iter().map(|&w| [f64::from(w), 0.0, 0.0]).collect();
    for (t, gradient) in (1..).zip(&gradients) {
        let gradient = gradient.slice::<f32>().unwrap();
        let corrections = [1.0 - b1.powi(t), 1.0 - b2.powi(t)];
        let step = AdamWStep {
            scale: 0.5,
            betas: [b1 as f32, b2 as f32],
            decay: (1.0 - rate * decay) as f32,
            size: (rate / corrections[0]) as f32,
            root: corrections[1].sqrt() as f32,
            eps: eps as f32,
        };
        adamw(&cx(), &step, &mut weights, [&mut first, &mut second], gradient).unwrap();
        for ([w, m, v], g) in expected.iter_mut().zip(gradient) {
            let g = 0.5 * f64::from(*g);
            *w -= rate * decay * *w;
            *m = b1 * *m + (1.0 - b1) * g;
            *v = b2 * *v + (1.0 - b2) * g * g;
            *w -= rate * (*m / corrections[0]) / ((*v / corrections[1]).sqrt() + eps);
        }
    }
    for (got, [want, ..]) in weights.iter().zip(&expected) {
        assert!((f64::from(*got) - want).abs() < 1e-6, "{got} instead of {want}");
    }
}

#[test]
fn squares_are_summed() {
    let x = random(&[3, CHUNK], 5);
    let expected: f64 = x.slice::<f32>().unwrap().iter().map(|&x| f64::from(x).powi(2)).sum();
    assert!((sum_of_squares(&cx(), &x).unwrap() / expected - 1.0).abs() < 1e-6);
}
