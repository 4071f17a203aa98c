use super::*;
use crate::device::cuda::Precision;
use crate::ops::check;
use crate::tensor::rng::{Generators, Philox};

struct Case {
    cond: Tensor,
    uncond: Option<Tensor>,
    weight: Tensor,
    guidance: f32,
}

impl Case {
    /// Sizes: rows, channels, classes.
    fn new([rows, channels, classes]: [usize; 3], guided: bool, dtype: DType) -> Self {
        Case {
            cond: check::random(&[rows, channels], 1),
            uncond: guided.then(|| check::random(&[rows, channels], 2)),
            weight: check::cast(&check::random(&[classes, channels], 3), dtype),
            guidance: 2.5,
        }
    }

    /// The guided logits of each row.
    fn logits(&self) -> Vec<Vec<f64>> {
        let [_, channels] = self.cond.dims_of::<2>("x").unwrap();
        let weight = check::wide(&self.weight);
        let of = |x: &[f64]| -> Vec<f64> {
            weight.chunks(channels).map(|w| w.iter().zip(x).map(|(w, x)| w * x).sum()).collect()
        };
        let cond = check::wide(&self.cond);
        let Some(uncond) = self.uncond.as_ref().map(check::wide) else {
            return cond.chunks(channels).map(of).collect();
        };
        let g = f64::from(self.guidance);
        cond.chunks(channels)
            .zip(uncond.chunks(channels))
            .map(|(c, u)| of(c).iter().zip(of(u)).map(|(c, u)| c * g + u * (1.0 - g)).collect())
            .collect()
    }

    fn run(
        &self,
        temperature: f32,
        choice: impl for<'a> Fn(usize, usize, &'a [Tensor]) -> TokenChoice<'a>,
        held: &[Tensor],
    ) -> Vec<usize> {
        let run = |cx: &Context, cond: &Tensor, first: usize, count: usize| {
            let uncond = self.uncond.as_ref().map(|u| u.narrow(first, count)).transpose()?;
            let held = match held {
                [uniforms] if uniforms.dims().len() == 1 => vec![uniforms.narrow(first, count)?],
                other => other.to_vec(),
            };
            let choice = choice(first, count, &held);
            choose_tokens(cx, cond, uncond.as_ref(), &self.weight, self.guidance, temperature, choice)
        };
        let whole = check::on_threads(|cx| run(cx, &self.cond, 0, self.cond.dims()[0]));
        let alone = run(&check::cx(), &self.cond.narrow(0, 1).unwrap(), 0, 1).unwrap();
        assert!(alone.bytes().unwrap() == whole.narrow(0, 1).unwrap().bytes().unwrap());
        whole.slice::<i64>().unwrap().iter().map(|&v| v as usize).collect()
    }
}

fn cases() -> Vec<Case> {
    vec![
        Case::new([1, 1, 1], false, DType::F32),
        Case::new([37, 5, 67], true, DType::F32),
        Case::new([20, 33, 130], false, DType::F16),
        Case::new([300, 16, 8192], true, DType::BF16),
    ]
}

fn softmax(logits: &[f64], temperature: f64) -> Vec<f64> {
    let largest = logits.iter().copied().fold(f64::MIN, f64::max);
    let weights: Vec<f64> = logits.iter().map(|l| ((l - largest) / temperature).exp()).collect();
    let total: f64 = weights.iter().sum();
    weights.iter().map(|w| w / total).collect()
}

#[test]
fn argmax_agrees_with_the_definition() {
    for case in cases() {
        let tokens = case.run(0.0, |_, _, _| TokenChoice::Argmax, &[]);
        for (logits, token) in case.logits().iter().zip(tokens) {
            let largest = logits.iter().copied().fold(f64::MIN, f64::max);
            assert!(logits[token] >= largest - 1e-4);
        }
    }
}

#[test]
fn multinomial_agrees_with_the_definition() {
    for case in cases() {
        let rows = case.cond.dims()[0];
        let rng = Philox::new(5, 5);
        let uniforms: Vec<f32> = (0..rows).map(|r| rng.uniform(r as u64)).collect();
        let held = [Tensor::from_slice(&[rows], &uniforms).unwrap()];
        let tokens = case.run(0.7, |_, _, held| TokenChoice::Multinomial { uniforms: &held[0] }, &held);
        for ((logits, token), u) in case.logits().iter().zip(tokens).zip(&uniforms) {
            let probabilities = softmax(logits, f64::from(0.7f32));
            let below: f64 = probabilities[..token].iter().sum();
            let u = f64::from(*u);
            assert!(below <= u + 2e-5 && u <= below + probabilities[token] + 2e-5, "{below} {u}");
        }
    }
}

#[test]
fn quant_agrees_with_the_definition() {
    for case in cases() {
        let classes = case.weight.dims()[0];
        let held = [check::random(&[classes, 4], 8)];
        let tokens = case.run(0.5, |_, _, held| TokenChoice::Quant { codebook: &held[0] }, &held);
        let codes = check::wide(&held[0]);
        for (logits, token) in case.logits().iter().zip(tokens) {
            let probabilities = softmax(logits, 0.5);
            let mean: Vec<f64> = (0..4)
                .map(|d| probabilities.iter().enumerate().map(|(v, p)| p * codes[v * 4 + d]).sum())
                .collect();
            let distance = |v: usize| -> f64 { (0..4).map(|d| (mean[d] - codes[v * 4 + d]).powi(2)).sum() };
            let best = (0..classes).map(distance).fold(f64::MAX, f64::min);
            assert!(distance(token) <= best + 1e-4);
        }
    }
}

#[test]
fn borders_and_ties() {
    for cx in std::iter::once(check::cx()).chain(check::cuda(Precision::F32)) {
        borders_and_ties_on(&cx);
    }
}

fn borders_and_ties_on(cx: &Context) {
    let cond = Tensor::from_slice(&[6, 1], &[1f32; 6]).unwrap();
    let weight = Tensor::from_slice(&[4, 1], &[0f32; 4]).unwrap();
    let uniforms = Tensor::from_slice(&[6], &[0f32, 0.2, 0.25, 0.75, 0.999_999_9, 1.0]).unwrap();
    let run = |weight: &Tensor, choice| choose_tokens(cx, &cond, None, weight, 1.0, 1.0, choice).unwrap();
    let choice = TokenChoice::Multinomial { uniforms: &uniforms };
    assert_eq!(run(&weight, choice).slice::<i64>().unwrap(), [0, 0, 1, 3, 3, 3]);
    assert_eq!(run(&weight, TokenChoice::Argmax).slice::<i64>().unwrap(), [0; 6]);
    // Classes without any probability are never chosen, not even at the borders.
    let spiked = Tensor::from_slice(&[4, 1], &[-500f32, 0.0, 0.0, -500.0]).unwrap();
    assert_eq!(run(&spiked, choice).slice::<i64>().unwrap(), [1, 1, 1, 2, 2, 2]);
}

#[test]
fn what_does_not_fit_is_refused() {
    let (cx, x, w) = (check::cx(), check::random(&[3, 2], 1), check::random(&[4, 2], 2));
    let run = |x: &Tensor, u: Option<&Tensor>, t: f32, choice: TokenChoice| {
        choose_tokens(&cx, x, u, &w, 1.0, t, choice).is_ok()
    };
    let (three, two) = (check::random(&[3], 3), check::random(&[2], 3));
    assert!(run(&x, None, 1.0, TokenChoice::Multinomial { uniforms: &three }));
    assert!(!run(&x, None, 1.0, TokenChoice::Multinomial { uniforms: &two }));
    assert!(!run(&x, None, 0.0, TokenChoice::Multinomial { uniforms: &three }));
    assert!(!run(&x, None, f32::NAN, TokenChoice::Multinomial { uniforms: &three }));
    assert!(!run(&x, Some(&w), 1.0, TokenChoice::Argmax));
    assert!(!run(&check::random(&[3, 3], 1), None, 1.0, TokenChoice::Argmax));
    assert!(!run(&x, None, 1.0, TokenChoice::Quant { codebook: &x }));
}

#[test]
fn logits_that_are_not_finite_give_no_token() {
    for cx in std::iter::once(check::cx()).chain(check::cuda(Precision::F32)) {
        not_finite_on(&cx);
    }
}

fn not_finite_on(cx: &Context) {
    let (rows, classes, channels) = (3, 70, 5);
    let cond = check::random(&[rows, channels], 1);
    let mut weight = check::random(&[classes, channels], 2);
    let uniforms = Tensor::from_slice(&[rows], &[0.5f32; 3]).unwrap();
    let mut codebook = check::random(&[classes, 4], 3);
    let run = |weight: &Tensor, codebook: &Tensor| {
        let choices = [
            TokenChoice::Multinomial { uniforms: &uniforms },
            TokenChoice::Argmax,
            TokenChoice::Quant { codebook },
        ];
        choices.map(|choice| {
            let tokens = choose_tokens(cx, &cond, None, weight, 1.0, 1.0, choice).unwrap();
            tokens.slice::<i64>().unwrap().iter().all(|&token| token == NO_TOKEN)
        })
    };
    assert_eq!(run(&weight, &codebook), [false; 3]);
    codebook.slice_mut::<f32>().unwrap()[6] = f32::NAN;
    assert_eq!(run(&weight, &codebook), [false, false, true]);
    // The last row of weights, which is behind the last whole vector.
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        weight.slice_mut::<f32>().unwrap()[69 * channels] = value;
        assert_eq!(run(&weight, &check::random(&[classes, 4], 3)), [true; 3]);
    }
}

#[test]
fn a_gpu_chooses_without_asking_the_host() {
    for [rows, channels, classes] in [[1usize, 1, 1], [37, 5, 67], [9, 16, 8192], [3, 4, 12_000]] {
        let case = Case::new([rows, channels, classes], true, DType::F32);
        let mut uniforms = Tensor::new(&check::cx(), "u", &[rows], DType::F32).unwrap();
        let generators = Generators { seeds: vec![3], stream: 4, stride: 0 };
        generators.fill_uniform(&mut uniforms).unwrap();
        let inputs = [
            &case.cond,
            case.uncond.as_ref().unwrap(),
            &case.weight,
            &uniforms,
            &check::random(&[classes, 4], 8),
        ];
        type Rule = fn(&[Tensor]) -> TokenChoice;
        let rules: [Rule; 3] = [
            |_| TokenChoice::Argmax,
            |x| TokenChoice::Multinomial { uniforms: &x[3] },
            |x| TokenChoice::Quant { codebook: &x[4] },
        ];
        for rule in rules {
            check::on_device(&inputs, &[(Precision::F32, 0.0)], |cx, x| {
                choose_tokens(cx, &x[0], Some(&x[1]), &x[2], case.guidance, 0.7, rule(x))
            });
        }
    }
    // In half precision the logits differ; those of rounded features are still the largest.
    for precision in [Precision::BF16, Precision::F16] {
        let Some(cx) = check::cuda(precision) else { return };
        let dtype = DType::of_activations(&cx);
        let case = Case::new([40, 33, 130], false, dtype);
        let cond = check::cast(&case.cond, dtype);
        let wide = Case { cond: crate::ops::kernels::widened(&check::cx(), "x", &cond).unwrap(), ..case };
        let cond = check::moved(&cx, &cond);
        let tokens = choose_tokens(&cx, &cond, None, &wide.weight, 1.0, 1.0, TokenChoice::Argmax).unwrap();
        for (logits, token) in wide.logits().iter().zip(tokens.slice::<i64>().unwrap()) {
            let largest = logits.iter().copied().fold(f64::MIN, f64::max);
            assert!(logits[*token as usize] >= largest - 1e-4);
        }
    }
}
