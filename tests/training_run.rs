//! Trainers as a caller uses them: steps, errors, checkpoints, export.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::path::PathBuf;

use common::fixtures;
use wuerstchen::training::{Ema, Goal, Sample, TrainMetrics, TrainOptions, Trainer};
use wuerstchen::{DType, GenerateOptions, Image, Model};

fn model() -> Model {
    Model::open(&fixtures().join("model"), &common::options()).unwrap()
}

/// The fixture model's own size.
fn image(number: u32) -> Image {
    let info = model().info();
    let (width, height) = (info.default_width, info.default_height);
    Image::build(width, height, |bytes| {
        for (i, byte) in bytes.iter_mut().enumerate() {
            *byte = ((i as u32).wrapping_mul(7 + 2 * number) ^ (i as u32 >> 5)) as u8;
        }
    })
    .unwrap()
}

fn options(goal: Goal) -> TrainOptions {
    let mut options = TrainOptions::new(goal);
    options.set_warmup_steps(2);
    options.set_learning_rate(1e-3).unwrap();
    options.set_ema(Ema { decay: 0.5, start: 0, every: 1 }).unwrap();
    options
}

const CAPTIONS: [&str; 4] = ["a cat", "a dog", "two birds", "the sea"];

fn samples(trainer: &Trainer) -> Vec<Sample> {
    let images: Vec<Image> = (0..4).map(image).collect();
    trainer.prepare(&images.iter().collect::<Vec<_>>(), &CAPTIONS).unwrap()
}

fn steps(trainer: &mut Trainer, samples: &[Sample], count: usize) -> Vec<TrainMetrics> {
    let samples: Vec<&Sample> = samples.iter().collect();
    (0..count).map(|_| trainer.step_over(&samples).unwrap()).collect()
}

fn folder(name: &str) -> PathBuf {
    let path = std::env::temp_dir().join(format!("wuerstchen-training-{}-{name}", std::process::id()));
    drop(std::fs::remove_dir_all(&path));
    path
}

/// Those whose losses hang on the text; Stage A's and the pair's tests are in files of their own.
const GOALS: [Goal; 2] = [Goal::StageB, Goal::StageC];

#[test]
fn losses_fall() {
    for goal in GOALS {
        let mut options = options(goal);
        options.set_text_dropout(0.0).unwrap();
        let mut trainer = Trainer::new(&model(), &options).unwrap();
        let samples = samples(&trainer);
        let metrics = steps(&mut trainer, &samples, 60);
        let mean = |part: &[TrainMetrics]| part.iter().map(|m| m.loss).sum::<f32>() / part.len() as f32;
        let (first, last) = (mean(&metrics[..15]), mean(&metrics[45..]));
        assert!(last < 0.95 * first, "{goal:?}: {first} -> {last}");
        assert_eq!(metrics[0].learning_rate, 0.0, "the first step of a warm-up only fills the moments");
        assert_eq!(metrics.last().unwrap().step, 60);
    }
}

#[test]
fn a_resumed_run_is_the_uninterrupted_one() {
    for goal in GOALS {
        let path = folder(&format!("resume-{goal:?}"));
        let mut whole = Trainer::new(&model(), &options(goal)).unwrap();
        let samples = samples(&whole);
        steps(&mut whole, &samples, 3);
        whole.set_data_position(Some(serde_json::json!({"epoch": 3})));
        whole.save(&path).unwrap();
        let expected = steps(&mut whole, &samples, 3);

        let mut resumed = Trainer::new(&model(), &options(goal)).unwrap();
        resumed.load(&path).unwrap();
        assert_eq!(resumed.progress().step, 3);
        assert_eq!(resumed.data_position().unwrap()["epoch"], 3);
        assert_eq!(steps(&mut resumed, &samples, 3), expected, "{goal:?}");
        for (a, b) in whole.parameters().list().iter().zip(resumed.parameters().list()) {
            assert_eq!(a.master().bytes().unwrap(), b.master().bytes().unwrap(), "{}", a.name);
        }
        std::fs::remove_dir_all(path).unwrap();
    }
}

#[test]
fn another_caption_needs_no_other_preparation() {
    for goal in [Goal::Pair, Goal::StageA, Goal::StageB, Goal::StageC] {
        let run = |recaptioned: bool| {
            let mut trainer = Trainer::new(&model(), &options(goal)).unwrap();
            let images: Vec<Image> = (0..4).map(image).collect();
            let images: Vec<&Image> = images.iter().collect();
            let captions = if recaptioned { [""; 4] } else { CAPTIONS };
            let mut samples = trainer.prepare(&images, &captions).unwrap();
            if recaptioned {
                for (sample, caption) in samples.iter_mut().zip(CAPTIONS) {
                    *sample = trainer.recaption(sample, caption).unwrap();
                }
            }
            steps(&mut trainer, &samples, 2)
        };
        assert_eq!(run(true), run(false), "{goal:?}");
    }
}

#[test]
fn an_exported_model_draws() {
    for goal in GOALS {
        let path = folder(&format!("export-{goal:?}"));
        let mut trainer = Trainer::new(&model(), &options(goal)).unwrap();
        let samples = samples(&trainer);
        trainer.export(&path).unwrap();
        assert_same_pictures(&path, true, "nothing was trained yet");
        steps(&mut trainer, &samples, 4);
        // Again into the same folder: it is replaced as a whole.
        trainer.export(&path).unwrap();
        assert_same_pictures(&path, false, "the weights have changed");
        std::fs::remove_dir_all(path).unwrap();
    }
}

#[test]
fn a_few_steps_are_exported_before_the_average_has_followed_any() {
    let path = folder("export-early");
    let mut options = options(Goal::StageC);
    options.set_ema(Ema { decay: 0.9, start: 5_000, every: 100 }).unwrap();
    let mut trainer = Trainer::new(&model(), &options).unwrap();
    let samples = samples(&trainer);
    steps(&mut trainer, &samples, 4);
    trainer.export(&path).unwrap();
    assert_same_pictures(&path, false, "four steps were taken");
    std::fs::remove_dir_all(path).unwrap();
}

fn assert_same_pictures(folder: &std::path::Path, same: bool, why: &str) {
    let draw = |model: &Model| {
        let mut options = GenerateOptions::new(model).unwrap();
        options.add_prompt("a cat", None).unwrap();
        model.generate(&options).unwrap()[0].data().to_vec()
    };
    let exported = Model::open(folder, &common::options()).unwrap();
    assert_eq!(draw(&exported) == draw(&model()), same, "{why}");
}

#[test]
fn a_batch_in_parts_is_the_batch() {
    // The encoder's BatchNorm sees parts apart: Stage B without it.
    for goal in GOALS {
        let run = |parts: u32| {
            let mut options = options(goal);
            options.set_grad_accumulation(parts).unwrap();
            options.set("train_encoder", "false").unwrap();
            let mut trainer = Trainer::new(&model(), &options).unwrap();
            let samples = samples(&trainer);
            steps(&mut trainer, &samples, 3)
        };
        for (whole, parts) in run(1).iter().zip(run(4)) {
            assert!((whole.loss / parts.loss - 1.0).abs() < 1e-4, "{goal:?}: {whole:?} {parts:?}");
            assert!((whole.grad_norm / parts.grad_norm - 1.0).abs() < 1e-3, "{goal:?}: {whole:?} {parts:?}");
        }
    }
}

#[test]
fn recomputing_changes_no_loss() {
    for goal in GOALS {
        let run = |recompute: &str| {
            let mut options = options(goal);
            options.set("recompute", recompute).unwrap();
            let mut trainer = Trainer::new(&model(), &options).unwrap();
            let samples = samples(&trainer);
            steps(&mut trainer, &samples, 3)
        };
        assert_eq!(run("false"), run("true"), "{goal:?}");
    }
}

#[test]
fn half_precision_weights_learn_as_full_ones_do() {
    let run = |dtype: DType| {
        let mut options = options(Goal::StageC);
        options.set_compute_dtype(dtype).unwrap();
        let mut trainer = Trainer::new(&model(), &options).unwrap();
        let samples = samples(&trainer);
        steps(&mut trainer, &samples, 20)
    };
    let full = run(DType::F32);
    // The same draws: what differs is the rounding of weights, 2^-11 and 2^-8.
    for (dtype, tolerance) in [(DType::F16, 1e-2), (DType::BF16, 8e-2)] {
        let half = run(dtype);
        assert_ne!(half, full, "{dtype}: the weights were not rounded");
        for (half, full) in half.iter().zip(&full) {
            let error = (half.loss / full.loss - 1.0).abs();
            assert!(error < tolerance && !half.skipped, "{dtype}: {half:?} beside {full:?}");
        }
    }
}

#[test]
fn a_loss_that_is_not_finite_changes_nothing() {
    let mut options = options(Goal::StageC);
    // So large a step that the next loss overflows.
    options.set_learning_rate(10.0).unwrap();
    options.set_grad_clip(0.0).unwrap();
    options.set_warmup_steps(0);
    let mut trainer = Trainer::new(&model(), &options).unwrap();
    let samples = samples(&trainer);
    let all: Vec<&Sample> = samples.iter().collect();
    for _ in 0..60 {
        let before: Vec<Vec<u8>> =
            trainer.parameters().list().iter().map(|p| p.master().bytes().unwrap().to_vec()).collect();
        let metrics = trainer.step_over(&all).unwrap();
        if metrics.skipped {
            let after = trainer.parameters().list().iter().map(|p| p.master().bytes().unwrap().to_vec());
            assert!(before.into_iter().eq(after), "a skipped step changed a weight");
            assert_eq!(trainer.progress().skipped, 1);
            return;
        }
    }
    panic!("the loss never overflowed");
}

#[test]
fn bad_batches_are_named() {
    let mut trainer = Trainer::new(&model(), &options(Goal::StageC)).unwrap();
    let picture = image(0);
    let message = |result: wuerstchen::Result<TrainMetrics>| result.unwrap_err().to_string();
    assert!(message(trainer.step(&[], &[])).contains("images"));
    assert!(message(trainer.step(&[&picture], &[])).contains("captions"));
    let small = Image::build(8, 8, |_| ()).unwrap();
    assert!(message(trainer.step(&[&picture, &small], &["a", "b"])).contains("one size"));
    let mut other = Trainer::new(&model(), &options(Goal::StageB)).unwrap();
    let samples = samples(&trainer);
    assert!(message(other.step_over(&[&samples[0]])).contains("samples"));
    assert!(message(trainer.step_over(&[])).contains("samples"));
    // After all of these the trainer still works.
    steps(&mut trainer, &samples, 1);
}

#[test]
fn a_cancelled_step_leaves_everything() {
    let mut trainer = Trainer::new(&model(), &options(Goal::StageC)).unwrap();
    let samples = samples(&trainer);
    trainer.cancel_token().cancel();
    let all: Vec<&Sample> = samples.iter().collect();
    assert!(matches!(trainer.step_over(&all), Err(wuerstchen::Error::Cancelled)));
    assert_eq!(trainer.progress().step, 0);
}

#[test]
fn a_checkpoint_of_another_stage_is_refused() {
    let path = folder("stages");
    Trainer::new(&model(), &options(Goal::StageC)).unwrap().save(&path).unwrap();
    let mut other = Trainer::new(&model(), &options(Goal::StageB)).unwrap();
    let error = other.load(&path).unwrap_err().to_string();
    assert!(error.contains("stage") && error.contains("StageB"), "{error}");
    assert!(other.load(&folder("nothing")).is_err());
    std::fs::remove_dir_all(path).unwrap();
}
