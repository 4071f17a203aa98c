//! Training of Stage A: gradients against the authors' own code, LPIPS against PyTorch, and what steps do.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::sync::Arc;

use common::ranks::{Links, ThreadRank};
use common::training::{Trained, assert_gradients, assert_input_gradient, assert_scalar, channels_first};
use common::{Case, NETWORK_TOLERANCE, context, fixtures, relative_error};
use wuerstchen::nn::{Mode, Params, TrainingPass};
use wuerstchen::ops::binary_cross_entropy::binary_cross_entropy;
use wuerstchen::ops::regression::weighted_sum;
use wuerstchen::pipeline::load::{self, Part};
use wuerstchen::stages::discriminator::Discriminator;
use wuerstchen::stages::stage_a::StageA;
use wuerstchen::tensor::autograd::{Gradients, Tape, leaf};
use wuerstchen::training::objectives::stage_a::{
    adaptive_weight, deception_loss, judgement_loss, last_layer_gradient, picture_loss, reconstruct,
};
use wuerstchen::training::parameters::{Parameters, Role};
use wuerstchen::training::{Goal, TrainOptions, Trainer};
use wuerstchen::{Context, Image, Model, Tensor};

/// A leaf that is no parameter.
const INPUT: usize = 1 << 20;

fn stage_a_in_training(part: &Part<StageA>) -> Parameters {
    let (cx, config) = (context(), *part.network.config());
    let mut parameters = Parameters::default();
    let source = part.keys.source(&part.weights);
    parameters.add(&cx, "stage_a", &source, Role::Trained, |p| StageA::load(p, config)).unwrap();
    parameters
}

fn check_stage_a(name: &str, tape: Arc<Tape>) {
    let (cx, case) = (context(), Case::read(name));
    let part = load::stage_a(&fixtures().join("model/stage_a")).unwrap();
    let mut parameters = stage_a_in_training(&part);
    let network = StageA::load(&Params::new(&parameters).sub("stage_a"), *part.network.config()).unwrap();
    let pass = TrainingPass::new(None, None);
    let training = case.settings["mode"] == "train";
    let mode = if training { Mode::Training(&pass) } else { Mode::Inference };
    let (recording, pixels) = (tape.attach(&cx), case.image("image"));
    let made = reconstruct(&recording, &network, &leaf(&pixels, INPUT), mode).unwrap();
    case.assert_tokens("indices", &made.tokens);
    case.assert_image("recon", &made.pixels, NETWORK_TOLERANCE);
    let picture = picture_loss(&recording, &made.pixels, &pixels, None).unwrap();
    let loss = weighted_sum(&recording, &[(&picture, 1.0), (&made.quantization, 1.0)]).unwrap();
    let scalar = |t: &Tensor| f64::from(t.slice::<f32>().unwrap()[0]);
    assert_scalar("vq", scalar(&made.quantization), case.floats("vq")[0], 1e-5);
    assert_scalar("l1 + mse", scalar(&picture), case.floats("l1")[0] + case.floats("mse")[0], 1e-5);
    assert_scalar("loss", scalar(&loss), case.floats("loss")[0], 1e-5);
    let mut found = Gradients::default();
    tape.backward_from(&cx, &loss, 1.0, &mut found).unwrap();
    let trained = Trained { prefix: "stage_a", keys: &part.keys, recorded: "" };
    assert_gradients(&case, "grad.", &parameters, &found, &[trained]);
    let of_pixels = found.get(INPUT).unwrap().reshape(pixels.dims()).unwrap();
    assert_input_gradient(&case, "grad_input.image", &channels_first(&of_pixels));

    drop((network, made));
    parameters.follow(&cx, &pass.into_seen()).unwrap();
    if training {
        for leaf in ["running_mean", "running_var"] {
            let place = parameters.place(&format!("stage_a.encoder.out.norm.{leaf}")).unwrap();
            case.assert_tensor(
                &format!("after.down_blocks.3.1.{leaf}"),
                parameters.list()[place].master(),
                1e-5,
            );
        }
    }
}

#[test]
fn stage_a_gradients() {
    check_stage_a("stage_a_grad", Tape::new());
}

#[test]
fn stage_a_gradients_by_the_statistics_of_the_batch() {
    check_stage_a("stage_a_grad_train", Tape::new());
}

#[test]
fn stage_a_gradients_of_blocks_that_run_again() {
    check_stage_a("stage_a_grad_train", Tape::recomputing());
}

fn check_discriminator(name: &str) {
    let (cx, case) = (context(), Case::read(name));
    let part = load::discriminator(&fixtures().join("extra").join(name)).unwrap();
    let config = *part.network.config();
    let mut parameters = Parameters::default();
    let source = part.keys.source(&part.weights);
    parameters.add(&cx, "d", &source, Role::Trained, |p| Discriminator::load(p, config)).unwrap();
    let mut network = Discriminator::load(&Params::new(&parameters).sub("d"), config).unwrap();
    let pictures = case.image("image");
    let condition = case.has("cond").then(|| case.tensor("cond"));
    let evaluated = network.forward(&cx, &pictures, condition.as_ref()).unwrap();
    case.assert_image("eval.out", &evaluated, NETWORK_TOLERANCE);

    network.iterate(&cx).unwrap();
    let tape = Tape::new();
    let recording = tape.attach(&cx);
    let tracked = condition.as_ref().map(|condition| leaf(condition, INPUT + 1));
    let logits = network.logits(&recording, &leaf(&pictures, INPUT), tracked.as_ref()).unwrap();
    let out = network.forward(&cx, &pictures, condition.as_ref()).unwrap();
    case.assert_image("train.out", &out, NETWORK_TOLERANCE);
    let loss = binary_cross_entropy(&recording, &logits, &vec![1.0; pictures.dims()[0]]).unwrap();
    assert_scalar("loss", loss.slice::<f32>().unwrap()[0].into(), case.floats("loss")[0], 1e-5);
    let mut found = Gradients::default();
    tape.backward_from(&cx, &loss, 1.0, &mut found).unwrap();
    let trained = Trained { prefix: "d", keys: &part.keys, recorded: "" };
    assert_gradients(&case, "grad.", &parameters, &found, &[trained]);
    let of_pictures = found.get(INPUT).unwrap().reshape(pictures.dims()).unwrap();
    assert_input_gradient(&case, "grad_input.image", &channels_first(&of_pictures));
    if condition.is_some() {
        let of_condition = found.get(INPUT + 1).unwrap();
        assert_input_gradient(&case, "grad_input.cond", of_condition.slice().unwrap());
    }

    let assert_directions = |network: &Discriminator, after: &str| {
        for (name, vector) in network.directions() {
            let key = part.keys.key(name.strip_prefix("d.").unwrap()).name;
            case.assert_tensor(&format!("{after}.{key}"), vector, 1e-5);
        }
    };
    assert_directions(&network, "after");
    network.iterate(&cx).unwrap();
    let again = network.forward(&cx, &pictures, condition.as_ref()).unwrap();
    case.assert_image("train2.out", &again, NETWORK_TOLERANCE);
    case.assert_image("eval2.out", &again, NETWORK_TOLERANCE);
    assert_directions(&network, "after2");
}

#[test]
fn discriminator_gradients() {
    check_discriminator("discriminator");
}

#[test]
fn discriminator_gradients_with_a_condition() {
    check_discriminator("discriminator_cond");
}

#[test]
fn a_discriminator_says_what_it_takes() {
    let cx = context();
    let part = load::discriminator(&fixtures().join("extra/discriminator_cond")).unwrap();
    let judge = |side: usize, condition: Option<&Tensor>| {
        let pictures = Tensor::zeros(&cx, "pictures", &[1, side, side, 3], wuerstchen::DType::F32).unwrap();
        part.network.forward(&cx, &pictures, condition)
    };
    let condition = Tensor::from_slice(&[1, 6], &[0.5f32; 6]).unwrap();
    assert!(judge(17, Some(&condition)).is_ok());
    let error = judge(16, Some(&condition)).unwrap_err().to_string();
    assert!(error.contains("more than 16 pixels"), "{error}");
    let error = judge(32, None).unwrap_err().to_string();
    assert!(error.contains("condition") && error.contains("[1, 6]"), "{error}");
}

#[test]
fn lpips_agrees_with_pytorch() {
    let cx = context();
    let folder = fixtures().join("lpips");
    let case = Case::read_at("lpips", &folder.join("case"));
    let network = load::perceptual(&folder.join("weights.safetensors")).unwrap().network;
    let (x, y) = (case.image("x"), case.image("y"));
    let tape = Tape::new();
    let loss = network.distance(&tape.attach(&cx), &leaf(&x, INPUT), &y).unwrap();
    assert_scalar("loss", loss.slice::<f32>().unwrap()[0].into(), case.floats("loss")[0], 1e-5);
    let mut found = Gradients::default();
    tape.backward_from(&cx, &loss, 1.0, &mut found).unwrap();
    let of_x = found.get(INPUT).unwrap().reshape(x.dims()).unwrap();
    assert_input_gradient(&case, "grad.x", &channels_first(&of_x));
    for n in 0..2 {
        let alone = network.distance(&cx, &x.narrow(n, 1).unwrap(), &y.narrow(n, 1).unwrap()).unwrap();
        assert_scalar("each", alone.slice::<f32>().unwrap()[0].into(), case.floats("each")[n], 1e-5);
    }
    let small = Tensor::zeros(&cx, "pictures", &[1, 15, 40, 3], wuerstchen::DType::F32).unwrap();
    assert!(network.distance(&cx, &small, &small).is_err());
}

#[test]
fn lpips_weights_are_found_under_other_names() {
    let bytes = std::fs::read(fixtures().join("lpips/weights.safetensors")).unwrap();
    let stored = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let path = std::env::temp_dir().join(format!("wst-lpips-{}.safetensors", std::process::id()));
    let block = |number: usize| [4, 9, 16, 23].iter().filter(|&&first| number >= first).count() + 1;
    let number = |name: &str| name.split('.').nth(1).unwrap().parse().unwrap();
    for whole in [false, true] {
        let renamed = |name: &str| match name.strip_prefix("features.") {
            Some(rest) if whole => format!("net.slice{}.{rest}", block(number(name))),
            Some(_) => format!("net.{name}"),
            None => name.to_owned(),
        };
        let tensors: Vec<_> = stored.iter().map(|(name, view)| (renamed(name), view)).collect();
        safetensors::serialize_to_file(tensors, None, &path).unwrap();
        load::perceptual(&path).unwrap();
    }
    let few: Vec<_> = stored.iter().filter(|(name, _)| *name != "features.17.bias").collect();
    safetensors::serialize_to_file(few, None, &path).unwrap();
    let error = load::perceptual(&path).unwrap_err().to_string();
    assert!(error.contains("features.17.bias"), "{error}");
    std::fs::remove_file(&path).unwrap();
}

/// The weight by its definition: gradients of both losses at the last layer's weight, each through the whole network.
#[test]
fn the_adaptive_weight_is_that_of_its_definition() {
    let (cx, case) = (context(), Case::read("stage_a_grad"));
    let part = load::stage_a(&fixtures().join("model/stage_a")).unwrap();
    let parameters = stage_a_in_training(&part);
    let network = StageA::load(&Params::new(&parameters).sub("stage_a"), *part.network.config()).unwrap();
    let judge = load::discriminator(&fixtures().join("extra/discriminator")).unwrap().network;
    let pixels = case.image("image");
    let last = parameters.place("stage_a.decoder.out.weight").unwrap();
    let through_all = |loss: &dyn Fn(&Context, &Tensor) -> Tensor| {
        let tape = Tape::new();
        let recording = tape.attach(&cx);
        let made = reconstruct(&recording, &network, &pixels, Mode::Inference).unwrap();
        let mut found = Gradients::default();
        tape.backward_from(&cx, &loss(&recording, &made.pixels), 1.0, &mut found).unwrap();
        found.take(last).unwrap()
    };
    let made = reconstruct(&cx, &network, &pixels, Mode::Inference).unwrap();
    let by_pixels = |loss: &dyn Fn(&Context, &Tensor) -> Tensor| {
        let tape = Tape::new();
        let mut found = Gradients::default();
        let loss = loss(&tape.attach(&cx), &leaf(&made.pixels, INPUT));
        tape.backward_from(&cx, &loss, 1.0, &mut found).unwrap();
        let of_pixels = found.take(INPUT).unwrap().reshape(pixels.dims()).unwrap();
        last_layer_gradient(&cx, &network, &made.features, &of_pixels).unwrap()
    };
    let norm =
        |g: &Tensor| g.slice::<f32>().unwrap().iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
    let picture = |cx: &Context, x: &Tensor| picture_loss(cx, x, &pixels, None).unwrap();
    let adversarial = |cx: &Context, x: &Tensor| deception_loss(cx, &judge, x).unwrap();
    let expected = [through_all(&picture), through_all(&adversarial)];
    let found = [by_pixels(&picture), by_pixels(&adversarial)];
    for (found, expected) in found.iter().zip(&expected) {
        assert!(relative_error(found.slice().unwrap(), expected.slice().unwrap()) < 1e-6);
    }
    let [p, a] = [&found[0], &found[1]].map(norm);
    let weight = adaptive_weight(p, a);
    assert_scalar("weight", weight, (norm(&expected[0]) / (norm(&expected[1]) + 1e-4)) as f32, 1e-5);
    assert!(weight > 0.0 && weight < 1e4);
}

#[test]
fn the_judge_learns_from_both_kinds_alike() {
    let cx = context();
    let judge = load::discriminator(&fixtures().join("extra/discriminator")).unwrap().network;
    let case = Case::read("discriminator");
    let pictures = case.image("image");
    let (real, made) = (pictures.narrow(0, 1).unwrap(), pictures.narrow(1, 1).unwrap());
    let loss = judgement_loss(&cx, &judge, &real, &made).unwrap().slice::<f32>().unwrap()[0];
    let mean = |x: &Tensor, term: fn(f64) -> f64| {
        let out = judge.forward(&cx, x, None).unwrap();
        let values = out.slice::<f32>().unwrap();
        values.iter().map(|&p| term(p.into())).sum::<f64>() / values.len() as f64
    };
    let expected = 0.5 * (mean(&real, |p| -p.ln()) + mean(&made, |p| -(1.0 - p).ln()));
    assert_scalar("judgement", loss.into(), expected as f32, 1e-5);
    assert!(judgement_loss(&cx, &judge, &pictures, &made).is_err());
}

fn model() -> Model {
    let mut options = common::options();
    options.set_threads(2).unwrap();
    Model::open(&fixtures().join("model"), &options).unwrap()
}

fn options(set: &[(&str, &str)]) -> TrainOptions {
    let mut options = TrainOptions::new(Goal::StageA);
    let own =
        [("warmup_steps", "0"), ("learning_rate", "0.001"), ("adversary_channels", "32"), ("ema_every", "1")];
    for (key, value) in own.iter().chain(set) {
        options.set(key, value).unwrap();
    }
    options
}

/// Pictures with edges and slopes, none like the other.
fn pictures(count: u32) -> Vec<Image> {
    let picture = |n: u32| {
        let rgb: Vec<u8> = (0..32 * 32u32)
            .flat_map(|i| {
                let (x, y) = (i % 32, i / 32);
                let stripe = if (x + n * 5) / 8 % 2 == y / (4 + n) % 2 { 200 } else { 40 };
                [stripe, (x * 8) as u8, (y * (2 + n)) as u8]
            })
            .collect();
        Image::from_rgb(32, 32, &rgb, 96).unwrap()
    };
    (0..count).map(picture).collect()
}

fn step(trainer: &mut Trainer, images: &[Image]) -> f32 {
    let images: Vec<&Image> = images.iter().collect();
    let metrics = trainer.step(&images, &vec![""; images.len()]).unwrap();
    assert!(!metrics.skipped);
    metrics.loss
}

/// The losses of some steps over the same pictures.
fn steps(trainer: &mut Trainer, images: &[Image], count: usize) -> Vec<f32> {
    (0..count).map(|_| step(trainer, images)).collect()
}

fn parameters(trainer: &Trainer) -> Vec<Vec<u8>> {
    trainer.parameters().list().iter().map(|p| p.master().bytes().unwrap().to_vec()).collect()
}

#[test]
fn steps_reduce_the_loss() {
    let lpips = fixtures().join("lpips/weights.safetensors");
    for set in [
        &[][..],
        &[("perceptual", lpips.to_str().unwrap())],
        &[("recompute", "true"), ("compute_dtype", "bf16")],
    ] {
        let mut trainer = Trainer::new(&model(), &options(set)).unwrap();
        let images = pictures(4);
        let losses = steps(&mut trainer, &images, 20);
        assert!(losses[19] < 0.85 * losses[0], "{set:?}: {losses:?}");
    }
}

#[test]
fn training_goes_on_bit_for_bit() {
    let folder = std::env::temp_dir().join(format!("wst-stage-a-{}", std::process::id()));
    let set = [("adversary_start", "1"), ("init_codebook", "true"), ("grad_accumulation", "2")];
    let model = model();
    let mut trainer = Trainer::new(&model, &options(&set)).unwrap();
    let images = pictures(6);
    for i in 0..3 {
        step(&mut trainer, &images[i..i + 2]);
    }
    trainer.save(&folder).unwrap();
    let mut resumed = Trainer::new(&model, &options(&set)).unwrap();
    resumed.load(&folder).unwrap();
    assert!(parameters(&trainer) == parameters(&resumed));
    for i in 0..3 {
        let losses = [&mut trainer, &mut resumed].map(|trainer| step(trainer, &images[i + 1..i + 4]));
        assert_eq!(losses[0].to_bits(), losses[1].to_bits(), "step {i}");
    }
    assert!(parameters(&trainer) == parameters(&resumed));
    // What lies beside the parameters is as much the same: the discriminator, its moments, the counts.
    let [first, second] = [&trainer, &resumed].map(|trainer| {
        trainer.save(&folder).unwrap();
        std::fs::read(folder.join("task.safetensors")).unwrap()
    });
    let parsed = safetensors::SafeTensors::deserialize(&first).unwrap();
    assert!(parsed.tensor("second.discriminator.layers.3.weight_orig").is_ok());
    assert!(first == second);
    // A checkpoint from before the discriminator was asked for goes on with a fresh one.
    let mut without = Trainer::new(&model, &options(&[])).unwrap();
    step(&mut without, &images[..2]);
    without.save(&folder).unwrap();
    resumed.load(&folder).unwrap();
    step(&mut resumed, &images[..2]);
    std::fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn the_adversary_joins_at_its_step() {
    let images = pictures(2);
    let mut alone = Trainer::new(&model(), &options(&[])).unwrap();
    let mut joined = Trainer::new(&model(), &options(&[("adversary_start", "2")])).unwrap();
    for _ in 0..2 {
        assert_eq!(step(&mut alone, &images).to_bits(), step(&mut joined, &images).to_bits());
    }
    assert!(parameters(&alone) == parameters(&joined));
    assert_ne!(step(&mut alone, &images).to_bits(), step(&mut joined, &images).to_bits());
    assert!(parameters(&alone) != parameters(&joined));
}

#[test]
fn steps_do_not_depend_on_threads() {
    let folder = fixtures().join("model");
    let lpips = fixtures().join("lpips/weights.safetensors");
    let set = [("adversary_start", "0"), ("perceptual", lpips.to_str().unwrap())];
    let [one, three] = [1, 3].map(|threads| {
        let mut of_model = common::options();
        of_model.set_threads(threads).unwrap();
        let mut trainer = Trainer::new(&Model::open(&folder, &of_model).unwrap(), &options(&set)).unwrap();
        steps(&mut trainer, &pictures(3), 2);
        parameters(&trainer)
    });
    assert!(one == three);
}

#[test]
fn two_ranks_learn_what_one_does() {
    let set = [("adversary_start", "1"), ("init_codebook", "true"), ("learning_rate", "0.0001")];
    let images = pictures(4);
    let mut alone = Trainer::new(&model(), &options(&set)).unwrap();
    let expected = steps(&mut alone, &images, 4);
    let ranks = ThreadRank::all(2, Links::Two);
    let learn = &|number: usize| {
        let mut trainer = Trainer::new(&model(), &options(&set)).unwrap();
        trainer.set_reduce(ranks[number].clone());
        let losses = steps(&mut trainer, &images[2 * number..][..2], 4);
        let folder = std::env::temp_dir().join(format!("wst-stage-a-rank{number}-{}", std::process::id()));
        trainer.save(&folder).unwrap();
        let task = std::fs::read(folder.join("task.safetensors")).unwrap();
        std::fs::remove_dir_all(&folder).unwrap();
        (losses, parameters(&trainer), task)
    };
    let [first, second] = std::thread::scope(|scope| {
        [0, 1].map(|number| scope.spawn(move || learn(number))).map(|rank| rank.join().unwrap())
    });
    assert!(first == second, "both ranks have the same bits");
    for (found, expected) in first.0.iter().zip(&expected) {
        assert_scalar("loss", (*found).into(), *expected, 1e-4);
    }
}

#[test]
fn an_exported_stage_a_draws() {
    let folder = std::env::temp_dir().join(format!("wst-stage-a-export-{}", std::process::id()));
    let mut trainer = Trainer::new(&model(), &options(&[("ema_start", "0"), ("ema_decay", "0")])).unwrap();
    let images = pictures(2);
    steps(&mut trainer, &images, 2);
    trainer.export(&folder).unwrap();
    let exported = load::stage_a(&folder.join("stage_a")).unwrap().network;
    let trained = trainer.parameters();
    let expected = trained.list()[trained.place("stage_a.codebook.weight").unwrap()].master();
    assert!(exported.codebook().bytes().unwrap() == expected.bytes().unwrap());
    std::fs::remove_dir_all(&folder).unwrap();
}

/// Whether each code of the codebook is an encoder output of the model that training begins with.
fn codes(trainer: &Trainer) -> Vec<Vec<f32>> {
    let parameters = trainer.parameters();
    let codes = parameters.list()[parameters.place("stage_a.codebook.weight").unwrap()].master();
    codes.slice::<f32>().unwrap().chunks(codes.dims()[1]).map(<[f32]>::to_vec).collect()
}

#[test]
fn a_fresh_codebook_begins_as_encoder_outputs() {
    // Nothing moves but what is put there.
    let still = [("learning_rate", "0"), ("init_codebook", "true"), ("seed", "7")];
    let mut trainer = Trainer::new(&model(), &options(&still)).unwrap();
    let (before, images) = (codes(&trainer), pictures(2));
    step(&mut trainer, &images);
    let part = load::stage_a(&fixtures().join("model/stage_a")).unwrap();
    let cx = context();
    let pixels = wuerstchen::image::to_pixels(&cx, &images.iter().collect::<Vec<_>>()).unwrap();
    let pass = TrainingPass::new(None, None);
    let encoded = part.network.encode(&cx, &pixels, Mode::Training(&pass)).unwrap();
    let outputs: Vec<&[f32]> = encoded.slice::<f32>().unwrap().chunks(encoded.dims()[3]).collect();
    let near = |code: &[f32]| {
        outputs.iter().any(|output| output.iter().zip(code).all(|(a, b)| (a - b).abs() < 1e-5))
    };
    assert!(codes(&trainer).iter().all(|code| near(code)));
    assert!(!before.iter().all(|code| near(code)));
    let first = codes(&trainer);
    step(&mut trainer, &images);
    assert_eq!(first, codes(&trainer), "only the first step fills the codebook");
}

#[test]
fn dead_codes_are_put_back() {
    let images = pictures(2);
    let still = [("learning_rate", "0")];
    let mut trainer = Trainer::new(&model(), &options(&still)).unwrap();
    let before = codes(&trainer);
    // 128 outputs a step for 64 codes: a code is dead after 100 steps.
    steps(&mut trainer, &images, 99);
    assert_eq!(before, codes(&trainer));
    step(&mut trainer, &images);
    let after = codes(&trainer);
    let changed = before.iter().zip(&after).filter(|(a, b)| a != b).count();
    assert!(changed > 0 && changed < before.len(), "{changed} of {}", before.len());
    let mut left = Trainer::new(&model(), &options(&[still[0], ("revive_codes", "false")])).unwrap();
    steps(&mut left, &images, 101);
    assert_eq!(before, codes(&left));
}

#[test]
fn the_stage_a_of_v2_trains() {
    let model = Model::open(&fixtures().join("v2/model"), &common::options()).unwrap();
    let mut trainer = Trainer::new(&model, &options(&[("adversary_start", "0")])).unwrap();
    let losses = steps(&mut trainer, &pictures(2), 5);
    assert!(losses.iter().all(|loss| loss.is_finite()));
}

#[test]
fn sizes_that_do_not_divide_are_named() {
    let trainer = Trainer::new(&model(), &options(&[])).unwrap();
    let odd = Image::from_rgb(34, 32, &vec![0; 34 * 32 * 3], 34 * 3).unwrap();
    let error = trainer.prepare(&[&odd], &[""]).unwrap_err().to_string();
    assert!(error.contains("multiples of 4") && error.contains("34 x 32"), "{error}");
    assert!(
        Trainer::new(&model(), &options(&[("adversary_start", "0"), ("adversary_channels", "12")])).is_err()
    );
}
