//! Gradients and optimiser steps against the authors' own code, in f32.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use common::training::{Trained, assert_gradients, assert_scalar, is_noise};
use common::{Case, NETWORK_TOLERANCE, context, fixtures};
use wuerstchen::diffusion::schedule::CosineSchedule;
use wuerstchen::nn::{Mode, Params, TrainingPass};
use wuerstchen::ops::mix::mix;
use wuerstchen::ops::regression::squared_error;
use wuerstchen::pipeline::load::{self, Part};
use wuerstchen::stages::image_encoder::ImageEncoder;
use wuerstchen::stages::stage_b::StageB;
use wuerstchen::stages::stage_c::StageC;
use wuerstchen::tensor::autograd::{Gradients, Tape};
use wuerstchen::training::objectives::{stage_b, stage_c};
use wuerstchen::training::optimizer::{self, AdamW, Moments, clip_factor, gradient_norm};
use wuerstchen::training::parameters::{Parameters, Role};
use wuerstchen::training::{Average, Ema};
use wuerstchen::{Context, Tensor};

/// Largest error of a weight after five steps, in multiples of the learning rate.
const STEP_TOLERANCE: f64 = 2e-2;

fn stage_c_in_training(part: &Part<StageC>) -> Parameters {
    let (cx, config) = (context(), *part.network.config());
    let mut parameters = Parameters::default();
    let source = part.keys.source(&part.weights);
    parameters.add(&cx, "stage_c", &source, Role::Trained, |p| StageC::load(p, config)).unwrap();
    parameters
}

fn stage_b_in_training(part: &Part<StageB>) -> Parameters {
    let (cx, config) = (context(), part.network.config().clone());
    let mut parameters = Parameters::default();
    let source = part.keys.source(&part.weights);
    parameters.add(&cx, "stage_b", &source, Role::Trained, |p| StageB::load(p, config)).unwrap();
    parameters
}

fn add_encoder(parameters: &mut Parameters, part: &Part<ImageEncoder>) {
    let (cx, config) = (context(), part.network.config().clone());
    let source = part.keys.source(&part.weights);
    parameters.add(&cx, "image_encoder", &source, Role::Trained, |p| ImageEncoder::load(p, config)).unwrap();
}

/// The loss of Stage C over recorded tensors whose names begin with `prefix`, and its gradients.
fn learn_stage_c(
    cx: &Context,
    case: &Case,
    prefix: &str,
    parameters: &Parameters,
    part: &Part<StageC>,
) -> (f64, Gradients) {
    let network = StageC::load(&Params::new(parameters).sub("stage_c"), *part.network.config()).unwrap();
    let named = |name: &str| format!("{prefix}{name}");
    let batch = stage_c::Batch {
        latents: &case.image(&named("x0")),
        noise: &case.image(&named("noise")),
        times: case.floats(&named("t")),
        text: &case.tensor(&named("c")),
    };
    let tape = Tape::new();
    let schedule = CosineSchedule::default();
    let weighting = stage_c::TimeWeighting::Snr;
    let loss = stage_c::loss(&tape.attach(cx), &network, &schedule, weighting, &batch).unwrap();
    let mut found = Gradients::default();
    tape.backward_from(cx, &loss, 1.0, &mut found).unwrap();
    (f64::from(loss.slice::<f32>().unwrap()[0]), found)
}

#[test]
fn stage_c_gradients() {
    let (cx, case) = (context(), Case::read("stage_c_grad"));
    let part = load::stage_c(&fixtures().join("model/stage_c")).unwrap();
    let parameters = stage_c_in_training(&part);
    let (loss, found) = learn_stage_c(&cx, &case, "", &parameters, &part);
    assert_scalar("loss", loss, case.floats("loss")[0], 1e-5);
    let part = Trained { prefix: "stage_c", keys: &part.keys, recorded: "" };
    assert_gradients(&case, "grad.", &parameters, &found, &[part]);
}

#[test]
fn weights_of_times() {
    let case = Case::read("stage_c_grad");
    let schedule = CosineSchedule::default();
    for (&t, &expected) in case.floats("t").iter().zip(case.floats("p2")) {
        let found = stage_c::TimeWeighting::Snr.weight(schedule.alpha_bar(t));
        assert_scalar("p2", found.into(), expected, 1e-5);
    }
    // The paper's own form, equation by equation.
    let alpha_bar = 0.25;
    assert_scalar("paper", stage_c::TimeWeighting::Paper.weight(alpha_bar).into(), 0.75 / 1.25, 1e-6);
}

#[test]
fn recomputing_gives_stage_c_the_same_gradients() {
    let (cx, case) = (context(), Case::read("stage_c_grad"));
    let part = load::stage_c(&fixtures().join("model/stage_c")).unwrap();
    let parameters = stage_c_in_training(&part);
    let (_, kept) = learn_stage_c(&cx, &case, "", &parameters, &part);
    let network = StageC::load(&Params::new(&parameters).sub("stage_c"), *part.network.config()).unwrap();
    let batch = stage_c::Batch {
        latents: &case.image("x0"),
        noise: &case.image("noise"),
        times: case.floats("t"),
        text: &case.tensor("c"),
    };
    let tape = Tape::recomputing();
    let (schedule, weighting) = (CosineSchedule::default(), stage_c::TimeWeighting::Snr);
    let loss = stage_c::loss(&tape.attach(&cx), &network, &schedule, weighting, &batch).unwrap();
    let mut again = Gradients::default();
    tape.backward_from(&cx, &loss, 1.0, &mut again).unwrap();
    for place in parameters.trained() {
        let values = |found: &Gradients| found.get(place).unwrap().slice::<f32>().unwrap().to_vec();
        assert_eq!(values(&kept), values(&again), "{}", parameters.list()[place].name);
    }
}

#[test]
fn stage_b_gradients() {
    let (cx, case) = (context(), Case::read("stage_b_grad"));
    let part = load::stage_b(&fixtures().join("model/stage_b")).unwrap();
    let parameters = stage_b_in_training(&part);
    let network =
        StageB::load(&Params::new(&parameters).sub("stage_b"), part.network.config().clone()).unwrap();
    let replaced: Vec<bool> = case.integers("mask").iter().map(|&m| m != 0).collect();
    let batch = stage_b::Batch {
        tokens: &case.tokens("latents"),
        noised: &case.tokens("noised"),
        replaced: &replaced,
        times: case.floats("t"),
        latents: &case.image("effnet"),
        text: &case.tensor("byt5"),
    };
    let tape = Tape::new();
    let found_loss = stage_b::loss(&tape.attach(&cx), &network, &batch).unwrap();
    assert_scalar("loss", found_loss.loss.slice::<f32>().unwrap()[0].into(), case.floats("loss")[0], 1e-5);
    let accuracy = found_loss.correct().unwrap() as f64 / replaced.len() as f64;
    assert!((accuracy - f64::from(case.floats("acc")[0])).abs() < 1e-6);
    let mut found = Gradients::default();
    tape.backward_from(&cx, &found_loss.loss, 1.0, &mut found).unwrap();
    let part = Trained { prefix: "stage_b", keys: &part.keys, recorded: "" };
    assert_gradients(&case, "grad.", &parameters, &found, &[part]);
}

/// The image encoder in training mode, with the recorded draws of stochastic depth if the case has them.
fn check_encoder(case: &str) {
    let (cx, case) = (context(), Case::read(case));
    let part = load::image_encoder(&fixtures().join("model/image_encoder")).unwrap().encoder;
    let mut parameters = Parameters::default();
    add_encoder(&mut parameters, &part);
    let mut config = part.network.config().clone();
    // The recorded output is the head's own, and the loss is taken there.
    (config.output_add, config.output_div) = (0.0, 1.0);
    config.stochastic_depth = case.settings["stochastic_depth_prob"].as_f64().unwrap_or(0.0) as f32;
    let network = ImageEncoder::load(&Params::new(&parameters).sub("image_encoder"), config).unwrap();
    // By number: backbone.1.0, 2.0, 2.1, 3.0, 3.1, …
    let recorded: Vec<Option<Vec<f32>>> = ["1.0", "2.0", "2.1", "3.0", "3.1", "4.0", "4.1"]
        .iter()
        .map(|block| format!("sd_noise.backbone.{block}"))
        .map(|name| case.has(&name).then(|| case.floats(&name).to_vec()))
        .collect();
    let depth = move |draw: wuerstchen::nn::DepthDraw| {
        recorded[draw.block].clone().unwrap_or_else(|| panic!("block {} was never left out", draw.block))
    };
    let pass = TrainingPass::new(None, Some(Box::new(depth)));
    let tape = Tape::new();
    let recording = tape.attach(&cx);
    let out = network.forward(&recording, &case.image("x"), Mode::Training(&pass)).unwrap();
    case.assert_image("mapper_out", &out, 5.0 * NETWORK_TOLERANCE);
    let loss = squared_error(&recording, &out, &case.image("target"), None).unwrap();
    assert_scalar("loss", loss.slice::<f32>().unwrap()[0].into(), case.floats("loss")[0], 1e-5);
    let mut found = Gradients::default();
    tape.backward_from(&cx, &loss, 1.0, &mut found).unwrap();
    drop(network);
    let trained = Trained { prefix: "image_encoder", keys: &part.keys, recorded: "" };
    assert_gradients(&case, "grad.", &parameters, &found, &[trained]);

    parameters.follow(&cx, &pass.into_seen()).unwrap();
    let mut followed = 0;
    for parameter in parameters.list().iter().filter(|p| p.role == Role::Statistic) {
        let name = parameter.name.strip_prefix("image_encoder.").unwrap();
        case.assert_tensor(&format!("after.{}", part.keys.key(name).name), parameter.master(), 1e-5);
        followed += 1;
    }
    assert!(followed > 10);
}

#[test]
fn image_encoder_gradients() {
    check_encoder("image_encoder_train");
}

#[test]
fn image_encoder_gradients_with_stochastic_depth() {
    check_encoder("image_encoder_train_sd");
}

/// The recorded settings of the optimiser.
fn settings(case: &Case, warmup: &str) -> AdamW {
    let number = |name: &str| case.settings[name].as_f64().unwrap() as f32;
    let beta = |i: usize| case.settings["betas"][i].as_f64().unwrap() as f32;
    AdamW {
        learning_rate: number("lr"),
        betas: [beta(0), beta(1)],
        eps: number("eps"),
        weight_decay: number("weight_decay"),
        warmup_steps: case.settings[warmup]
            .as_u64()
            .unwrap_or_else(|| case.settings["warmup_updates"].as_u64().unwrap()),
        clip: number("clip"),
    }
}

/// What five steps must leave.
fn assert_final(case: &Case, parameters: &Parameters, average: &Average, of: &[Trained], rate: f64) {
    let noise = &case.record["noise_dominated"]["zero_gradient"];
    let mut compared = 0;
    for (place, parameter) in parameters.list().iter().enumerate() {
        let elements = parameter.master().elements();
        let (name, first) = of.iter().find_map(|part| part.place(&parameter.name, elements)).unwrap();
        let both = [("final.", Some(parameter.master())), ("ema.", average.of.get(&place))];
        for (kind, values) in both.into_iter().filter_map(|(kind, values)| Some((kind, values?))) {
            let expected = &case.floats(&format!("{kind}{name}"))[first..][..elements];
            let statistic = parameter.role == Role::Statistic;
            for (i, (got, want)) in values.slice::<f32>().unwrap().iter().zip(expected).enumerate() {
                if is_noise(noise, &name, first + i) {
                    continue;
                }
                // A running statistic is no step: it inherits what the noise elements do to the activations.
                let allowed =
                    if statistic { 5e-4 * f64::from(want.abs()).max(0.1) } else { STEP_TOLERANCE * rate };
                let error = (f64::from(*got) - f64::from(*want)).abs();
                assert!(error <= allowed, "{kind}{name}[{}]: {got} instead of {want}", first + i);
            }
            compared += 1;
        }
    }
    assert!(compared > 50);
}

#[test]
fn five_steps_of_stage_c() {
    let (cx, case) = (context(), Case::read("train_stage_c"));
    let part = load::stage_c(&fixtures().join("model/stage_c")).unwrap();
    let mut parameters = stage_c_in_training(&part);
    let mut average = Average::new(&cx, &parameters).unwrap();
    let (settings, mut moments) = (settings(&case, "warmup_updates"), Moments::default());
    let ema = Ema { decay: case.settings["ema_beta"].as_f64().unwrap() as f32, start: 0, every: 1 };
    let trained = [Trained { prefix: "stage_c", keys: &part.keys, recorded: "" }];
    for step in 0..5 {
        assert_scalar(
            "rate",
            settings.rate(step as u64).into(),
            case.floats("lr")[step].max(1e-30),
            1e-6 + f64::from(step == 0) * 2.0,
        );
        let (loss, found) = learn_stage_c(&cx, &case, &format!("step.{step}."), &parameters, &part);
        assert_scalar("loss", loss, case.floats("loss")[step], 2e-5);
        if step == 0 {
            assert_gradients(&case, "step1.grad.", &parameters, &found, &trained);
        }
        let norm = gradient_norm(&cx, &parameters, &found).unwrap();
        assert_scalar("norm", norm, case.floats("grad_norm")[step], 5e-5);
        let scale = clip_factor(norm, settings.clip);
        optimizer::step(&cx, &settings, &mut parameters, &mut moments, &found, scale).unwrap();
        average.follow(&cx, &parameters, &ema, step as u64 + 1).unwrap();
    }
    assert_final(&case, &parameters, &average, &trained, f64::from(settings.learning_rate));
}

#[test]
fn five_steps_of_stage_b_with_its_encoder() {
    let (cx, case) = (context(), Case::read("train_stage_b"));
    let part = load::stage_b(&fixtures().join("model/stage_b")).unwrap();
    let encoder = load::image_encoder(&fixtures().join("model/image_encoder")).unwrap().encoder;
    let mut parameters = stage_b_in_training(&part);
    add_encoder(&mut parameters, &encoder);
    let mut average = Average::new(&cx, &parameters).unwrap();
    let (settings, mut moments) = (settings(&case, "warmup_updates"), Moments::default());
    let ema = Ema { decay: case.settings["ema_beta"].as_f64().unwrap() as f32, start: 0, every: 1 };
    let trained = [
        Trained { prefix: "stage_b", keys: &part.keys, recorded: "generator." },
        Trained { prefix: "image_encoder", keys: &encoder.keys, recorded: "effnet." },
    ];
    let schedule = CosineSchedule::default();
    for step in 0..5 {
        let named = |name: &str| format!("step.{step}.{name}");
        let all = Params::new(&parameters);
        let network = StageB::load(&all.sub("stage_b"), part.network.config().clone()).unwrap();
        let encode = ImageEncoder::load(&all.sub("image_encoder"), encoder.network.config().clone()).unwrap();
        let tape = Tape::new();
        let recording = tape.attach(&cx);
        let pass = TrainingPass::new(None, None);
        let latents =
            encode.forward(&recording, &case.image(&named("images")), Mode::Training(&pass)).unwrap();
        let count = latents.dims()[0];
        let noise_name = named("effnet_noise");
        let noise = if case.has(&noise_name) { case.image(&noise_name) } else { latents.constant() };
        let shares: Vec<f32> = case
            .floats(&named("effnet_noise_rand"))
            .iter()
            .map(|rand| schedule.alpha_bar(0.5 * rand))
            .collect();
        let (signal, strength) = match case.integers(&named("effnet_mode"))[0] {
            0 => (vec![1.0; count], vec![0.0; count]),
            1 => (vec![0.0; count], vec![0.0; count]),
            _ => (
                shares.iter().map(|share| share.sqrt()).collect(),
                shares.iter().map(|share| (1.0 - share).sqrt()).collect(),
            ),
        };
        let latents = mix(&recording, &latents, &noise, &signal, &strength).unwrap();
        let (tokens, random) = (case.integers(&named("latents")), case.integers(&named("random_tokens")));
        let replaced: Vec<bool> = case.integers(&named("mask")).iter().map(|&m| m != 0).collect();
        let noised: Vec<i64> =
            (0..tokens.len()).map(|i| if replaced[i] { random[i] } else { tokens[i] }).collect();
        let batch = stage_b::Batch {
            tokens: &case.tokens(&named("latents")),
            noised: &Tensor::from_slice(case.shape(&named("latents")), &noised).unwrap(),
            replaced: &replaced,
            times: case.floats(&named("t")),
            latents: &latents,
            text: &case.tensor(&named("byt5")),
        };
        let loss = stage_b::loss(&recording, &network, &batch).unwrap().loss;
        assert_scalar("loss", loss.slice::<f32>().unwrap()[0].into(), case.floats("loss")[step], 2e-5);
        let mut found = Gradients::default();
        tape.backward_from(&cx, &loss, 1.0, &mut found).unwrap();
        drop((network, encode, loss));
        if step == 0 {
            assert_gradients(&case, "step1.grad.", &parameters, &found, &trained);
        }
        let norm = gradient_norm(&cx, &parameters, &found).unwrap();
        assert_scalar("norm", norm, case.floats("grad_norm")[step], 5e-5);
        let scale = clip_factor(norm, settings.clip);
        optimizer::step(&cx, &settings, &mut parameters, &mut moments, &found, scale).unwrap();
        parameters.follow(&cx, &pass.into_seen()).unwrap();
        average.follow(&cx, &parameters, &ema, step as u64 + 1).unwrap();
    }
    assert_final(&case, &parameters, &average, &trained, f64::from(settings.learning_rate));
}
