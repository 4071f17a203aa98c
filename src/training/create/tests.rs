use super::draw::{Rule, Spread, fill, stream};
use super::rules::Rules;
use super::*;
use crate::stages::unet::LevelConfig;

fn context() -> Context {
    Context::new(&Device::cpu(2).unwrap())
}

fn drawn(elements: usize, seed: u64, spread: Spread) -> Vec<f64> {
    let mut out = vec![0f32; elements];
    fill(&context(), &mut out, stream(seed, "a tensor"), spread).unwrap();
    out.into_iter().map(f64::from).collect()
}

/// Mean, standard deviation, kurtosis (3 for normal numbers, 1.8 for uniform ones) and the largest absolute value.
fn moments(values: &[f64]) -> [f64; 4] {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let central = |p: i32| values.iter().map(|x| (x - mean).powi(p)).sum::<f64>() / n;
    let largest = values.iter().fold(0f64, |m, x| m.max(x.abs()));
    [mean, central(2).sqrt(), central(4) / central(2).powi(2), largest]
}

#[test]
fn spreads_have_their_moments() {
    let n = 300_001;
    let [mean, deviation, kurtosis, _] = moments(&drawn(n, 1, Spread::Normal(0.02)));
    assert!(mean.abs() < 0.02 * 0.01 && (deviation / 0.02 - 1.0).abs() < 0.01, "{mean} {deviation}");
    assert!((kurtosis - 3.0).abs() < 0.06, "{kurtosis}");
    let [mean, deviation, kurtosis, largest] = moments(&drawn(n, 2, Spread::Uniform(0.3)));
    assert!(mean.abs() < 0.003 && (deviation * 3f64.sqrt() / 0.3 - 1.0).abs() < 0.01, "{mean} {deviation}");
    assert!((kurtosis - 1.8).abs() < 0.03 && largest <= 0.3 && largest > 0.2999, "{kurtosis} {largest}");
    assert!(drawn(n, 3, Spread::Constant(1.0)).iter().all(|&x| x == 1.0));
}

#[test]
fn an_element_depends_on_seed_name_and_place_alone() {
    for spread in [Spread::Normal(1.0), Spread::Uniform(1.0)] {
        let long = drawn(200_000, 5, spread);
        assert_eq!(drawn(70_001, 5, spread), long[..70_001]);
        assert_ne!(drawn(100, 6, spread), long[..100]);
    }
    assert_ne!(stream(5, "a").normal(0), stream(5, "b").normal(0));
}

/// The formulas of torch.nn.init, with PyTorch's counting of fans.
#[test]
fn rules_are_pytorchs() {
    let spread = |rule: Rule, dims: &[usize]| rule.spread(dims, || Some(&[8, 5, 3, 3])).unwrap();
    let uniform = |variance: f64| Spread::Uniform((3.0 * variance).sqrt());
    let close = |a: Spread, b: Spread| match (a, b) {
        (Spread::Uniform(a), Spread::Uniform(b)) | (Spread::Normal(a), Spread::Normal(b)) => {
            assert!((a / b - 1.0).abs() < 1e-12, "{a} {b}");
        }
        (a, b) => panic!("{a:?} {b:?}"),
    };
    // A depthwise convolution: fan in 9, fan out 32 * 9.
    close(spread(Rule::Xavier(1.0), &[32, 1, 3, 3]), uniform(2.0 / (9.0 + 288.0)));
    close(spread(Rule::Xavier(0.5), &[6, 4]), uniform(0.25 * 2.0 / 10.0));
    close(spread(Rule::XavierPacked(3), &[6, 6]), uniform(2.0 / 24.0));
    close(spread(Rule::KaimingOut, &[10, 4, 3, 3]), Spread::Normal((2.0 / 90.0f64).sqrt()));
    // A Linear, a Conv2d, and a bias beside [8, 5, 3, 3].
    close(spread(Rule::Layer, &[7, 16]), Spread::Uniform(0.25));
    close(spread(Rule::Layer, &[7, 4, 2, 2]), Spread::Uniform(0.25));
    close(spread(Rule::Layer, &[8]), Spread::Uniform(1.0 / 45f64.sqrt()));
    assert!(Rule::Xavier(1.0).spread(&[4], || None).is_err());
}

fn rule(rules: &Rules, name: &str) -> Rule {
    rules.of(name).unwrap().0
}

#[test]
fn exceptions_come_before_the_rule() {
    let level = |repeats| LevelConfig { letters: "CTA".into(), repeats, channels: 8, heads: 2 };
    let b = crate::stages::stage_b::StageBConfig {
        embedding_width: 4,
        codebook_size: 64,
        time_width: 16,
        patch_size: 2,
        condition_width: 8,
        latent_channels: 4,
        text_width: 8,
        kernel: 3,
        self_attention: true,
        levels: vec![level(1), level(3)],
    };
    let rules = rules::stage_b(&b);
    assert_eq!(rule(&rules, "tokens.weight"), Rule::Normal(0.125));
    assert_eq!(rules.of("logits.weight"), Some((Rule::Normal(0.125), "tokens.weight")));
    assert_eq!(rule(&rules, "down.1.2.project.weight"), Rule::Xavier(0.5));
    assert_eq!(rule(&rules, "down.1.2.output.weight"), Rule::Xavier(1.0));
    assert_eq!(rule(&rules, "down.1.2.condition_mapper.weight"), Rule::Xavier(1.0));
    assert_eq!(rule(&rules, "down.1.1.mapper.weight"), Rule::Constant(0.0));
    assert_eq!(rule(&rules, "down.1.resample.weight"), Rule::Xavier(1.0));
    assert_eq!(rule(&rules, "down.1.resample.bias"), Rule::Constant(0.0));
    assert_eq!(rule(&rules, "up.0.resample.bias"), Rule::Layer);
    let c = crate::stages::stage_c::StageCConfig {
        latent_channels: 4,
        channels: 8,
        text_width: 8,
        time_width: 16,
        depth: 4,
        heads: 2,
    };
    let rules = rules::stage_c(&c);
    assert_eq!(rule(&rules, "output.weight"), Rule::Constant(0.0));
    assert_eq!(rule(&rules, "blocks.2.output.weight"), Rule::Xavier(1.0));
    assert_eq!(rule(&rules, "blocks.0.project.weight"), Rule::Xavier(0.5));
    assert_eq!(rule(&rules, "blocks.2.key.weight"), Rule::XavierPacked(3));
}
