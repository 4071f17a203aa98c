//! A GPU does what the definitions say, bit for bit, whatever it is given and however it gets its noise.

use super::*;
use crate::device::cuda::Precision;
use crate::ops::check;

const SHAPES: [&[usize]; 4] = [&[1], &[3, 1], &[2, 3, 5, 7], &[2, 9, 8, 16]];
const ALPHA_BARS: [f32; 2] = [0.3, 0.45];

fn generators(samples: usize) -> Generators {
    Generators { seeds: (0..samples as u64).map(|n| n * 77).collect(), stream: 1 << 32 | 5, stride: 0 }
}

fn drawn(dims: &[usize]) -> Tensor {
    let mut noise = Tensor::new(&check::cx(), "noise", dims, DType::F32).unwrap();
    generators(dims[0]).fill_normal(&mut noise).unwrap();
    noise
}

fn predictions(dims: &[usize]) -> [Prediction; 3] {
    let (conditional, other) = (check::random(dims, 2), check::random(dims, 3));
    let guided = |weight| Prediction {
        conditional: conditional.clone(),
        unconditional: Some((other.clone(), weight)),
    };
    [conditional.clone().into(), guided(0.25), guided(4.0)]
}

fn on(cx: &Context, predicted: &Prediction) -> Prediction {
    Prediction {
        conditional: check::moved(cx, &predicted.conditional),
        unconditional: predicted.unconditional.as_ref().map(|(u, w)| (check::moved(cx, u), *w)),
    }
}

/// Panics unless a GPU gives the bits of the CPU, without being asked for anything.
fn same_bits(
    x: &Tensor,
    predicted: &Prediction,
    op: impl Fn(&Context, Tensor, &Prediction) -> Result<Tensor>,
) {
    let expected = op(&check::cx(), x.clone(), predicted).unwrap();
    let Some(cx) = check::cuda(Precision::F32) else { return };
    let stream = cx.cuda().unwrap().unwrap().clone();
    for shared in [false, true] {
        let (there, predicted) = (check::moved(&cx, x), on(&cx, predicted));
        let kept = shared.then(|| there.clone());
        let before = stream.downloads();
        let found = op(&cx, there, &predicted).unwrap();
        assert_eq!(stream.downloads(), before, "the host read from the device");
        assert!(found.bytes().unwrap() == expected.bytes().unwrap());
        assert!(kept.is_none_or(|kept| kept.bytes().unwrap() == x.bytes().unwrap()));
    }
}

#[test]
fn steps_are_those_of_the_definition() {
    for dims in SHAPES {
        let (x, noise) = (check::random(dims, 1), drawn(dims));
        let both = [Random::Given(noise.clone()), Random::Drawn(generators(dims[0]))];
        for predicted in predictions(dims) {
            let cx = check::cx();
            let guided = predicted.guided(&cx).unwrap();
            let (guided, mut expected) = (guided.slice().unwrap(), x.slice::<f32>().unwrap().to_vec());
            cpu::ddpm_step(&mut expected, guided, Some(noise.slice().unwrap()), ALPHA_BARS[0], ALPHA_BARS[1]);
            for fresh in &both {
                let found = ddpm_step(&cx, x.clone(), &predicted, Some(fresh), ALPHA_BARS).unwrap();
                assert_eq!(found.slice::<f32>().unwrap(), expected);
                same_bits(&x, &predicted, |cx, x, p| ddpm_step(cx, x, p, Some(fresh), ALPHA_BARS));
            }
            let mut expected = x.slice::<f32>().unwrap().to_vec();
            cpu::ddim_step(&mut expected, guided, ALPHA_BARS[0], ALPHA_BARS[1]);
            let found = ddim_step(&cx, x.clone(), &predicted, ALPHA_BARS).unwrap();
            assert_eq!(found.slice::<f32>().unwrap(), expected);
            same_bits(&x, &predicted, |cx, x, p| ddpm_step(cx, x, p, None, ALPHA_BARS));
            same_bits(&x, &predicted, |cx, x, p| ddim_step(cx, x, p, ALPHA_BARS));
            same_bits(&x, &predicted, |cx, x, p| implied_clean(cx, &x, p, ALPHA_BARS[0]));
        }
    }
}

#[test]
fn noising_and_kept_regions_are_those_of_the_definition() {
    for dims in SHAPES {
        let (x, kept, noise) = (check::random(dims, 1), check::random(dims, 2), drawn(dims));
        let mut rows = dims.to_vec();
        *rows.last_mut().unwrap() = 1;
        let mask: Vec<f32> = (0..rows.iter().product()).map(|i: usize| (i % 3) as f32 / 2.0).collect();
        let mask = Tensor::from_slice(&rows, &mask).unwrap();
        let mut expected = kept.slice::<f32>().unwrap().to_vec();
        cpu::diffuse(&mut expected, noise.slice().unwrap(), 0.3);
        let none = Prediction::from(x.clone());
        for fresh in [Random::Given(noise.clone()), Random::Drawn(generators(dims[0]))] {
            let found = diffuse(&check::cx(), kept.clone(), &fresh, 0.3).unwrap();
            assert_eq!(found.slice::<f32>().unwrap(), expected);
            same_bits(&kept, &none, |cx, x, _| diffuse(cx, x, &fresh, 0.3));
            let region = KeptRegion { latents: &kept, mask: &mask };
            same_bits(&x, &none, |cx, x, _| keep_region(cx, x, region, &fresh, 0.3));
        }
    }
}

#[test]
fn half_precision_predictions_are_taken_as_they_are() {
    let (x, p) = (check::random(&[2, 5, 8], 1), check::random(&[2, 5, 8], 2));
    for (precision, dtype) in [(Precision::BF16, DType::BF16), (Precision::F16, DType::F16)] {
        let Some(cx) = check::cuda(precision) else { return };
        let half = check::cast(&p, dtype);
        let wide = crate::ops::kernels::widened(&check::cx(), "p", &half).unwrap();
        let expected = ddim_step(&check::cx(), x.clone(), &wide.into(), ALPHA_BARS).unwrap();
        let found =
            ddim_step(&cx, check::moved(&cx, &x), &check::moved(&cx, &half).into(), ALPHA_BARS).unwrap();
        assert!(found.bytes().unwrap() == expected.bytes().unwrap());
    }
}

#[test]
fn tokens_are_put_back() {
    for dims in [&[1usize, 1][..], &[3, 5, 7], &[2, 64]] {
        let count = dims.iter().product::<usize>();
        let tokens: Vec<i64> = (0..count as i64).map(|i| if i % 5 == 3 { NO_TOKEN } else { i }).collect();
        let random: Vec<i64> = (0..count as i64).map(|i| 1000 + i).collect();
        let [tokens, random] = [tokens, random].map(|t| Tensor::from_slice(dims, &t).unwrap());
        let mut uniforms = Tensor::new(&check::cx(), "u", dims, DType::F32).unwrap();
        generators(dims[0]).fill_uniform(&mut uniforms).unwrap();
        let expected =
            renoise(&check::cx(), &tokens, &random, &Random::Given(uniforms.clone()), 0.4).unwrap();
        let numbers = expected.slice::<i64>().unwrap().iter().zip(tokens.slice::<i64>().unwrap());
        let u = uniforms.slice::<f32>().unwrap();
        for (i, (found, token)) in numbers.enumerate() {
            let want = if *token != NO_TOKEN && u[i] <= 0.4 { 1000 + i as i64 } else { *token };
            assert_eq!(*found, want);
        }
        for uniforms in [Random::Given(uniforms.clone()), Random::Drawn(generators(dims[0]))] {
            check::on_device(&[&tokens, &random], &[(Precision::F32, 0.0)], |cx, t| {
                let found = renoise(cx, &t[0], &t[1], &uniforms, 0.4)?;
                Ok(found)
            });
            let found = renoise(&check::cx(), &tokens, &random, &uniforms, 0.4).unwrap();
            assert!(found.bytes().unwrap() == expected.bytes().unwrap());
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let (cx, x, other) = (check::cx(), check::random(&[2, 3], 1), check::random(&[3, 2], 1));
    let drawn = |samples| Random::Drawn(generators(samples));
    assert!(ddim_step(&cx, x.clone(), &other.clone().into(), ALPHA_BARS).is_err());
    assert!(ddpm_step(&cx, x.clone(), &x.clone().into(), Some(&drawn(3)), ALPHA_BARS).is_err());
    assert!(ddpm_step(&cx, x.clone(), &x.clone().into(), Some(&drawn(2)), ALPHA_BARS).is_ok());
    assert!(diffuse(&cx, x.clone(), &Random::Given(other.clone()), 0.5).is_err());
    let region = KeptRegion { latents: &other, mask: &x };
    assert!(keep_region(&cx, x.clone(), region, &drawn(2), 0.5).is_err());
}
