//! Products with factors in bf16 and in eight bits on the CPU, seen from outside: how far results move, what stays the
//! same, what is refused.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "common/folder.rs"]
mod folder;

use std::path::Path;

use folder::{bare, distance, emoji, picture, short, tiny, v2};
use wuerstchen::device::gemm::multiplies_bf16;
use wuerstchen::training::{Goal, TrainOptions};
use wuerstchen::{DType, Error, GenerateOptions, Model, ModelOptions, Residency, Stage, Tensor};

fn open(path: &Path, dtype: DType, threads: u32) -> Model {
    let mut options = ModelOptions::default();
    options.set_device("cpu").unwrap();
    options.set_threads(threads).unwrap();
    options.set_compute_dtype(dtype).unwrap();
    Model::open(path, &options).unwrap()
}

/// The bundled model, exact, and in every coarser type that this processor has instructions for.
fn all() -> (Model, Vec<(DType, Model)>) {
    let coarse =
        [DType::BF16, DType::I8].into_iter().filter(|&dtype| dtype == DType::I8 || multiplies_bf16());
    (open(&emoji(), DType::F32, 2), coarse.map(|dtype| (dtype, open(&emoji(), dtype, 2))).collect())
}

/// The norm of the difference, relative to what is right.
fn error(found: &Tensor, right: &Tensor) -> f64 {
    let (found, right) = (found.slice::<f32>().unwrap(), right.slice::<f32>().unwrap());
    let square = |(a, b): (&f32, &f32)| f64::from(a - b).powi(2);
    let difference: f64 = found.iter().zip(right).map(square).sum();
    (difference / right.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>()).sqrt()
}

const PROMPTS: [&str; 4] = ["a red apple", "a yellow face", "a blue heart", "a green leaf"];

#[test]
fn texts_and_one_step_of_stage_c_move_little() {
    let (exact, coarse) = all();
    let text = exact.encode_text(Stage::C, &PROMPTS).unwrap();
    for (dtype, model) in &coarse {
        let moved = error(&model.encode_text(Stage::C, &PROMPTS).unwrap(), &text);
        println!("text in {dtype}: {moved:.5}");
        assert_eq!(moved > 0.0, multiplies_bf16(), "{dtype}: {moved}");
        assert!(moved < 0.02, "{dtype}: {moved}");
    }
    let numbers: Vec<f32> = (0..4 * 9 * 16).map(|i| ((i * 7919 % 1000) as f32 / 500.0 - 1.0) * 1.7).collect();
    let noised = Tensor::from_slice(&[4, 3, 3, 16], &numbers).unwrap();
    for time in [0.9f32, 0.5, 0.1] {
        let t = Tensor::from_slice(&[4], &[time; 4]).unwrap();
        let right = exact.stage_c_predict(&noised, &t, &text).unwrap();
        for (dtype, model) in &coarse {
            let moved = error(&model.stage_c_predict(&noised, &t, &text).unwrap(), &right);
            println!("Stage C in {dtype} at t = {time}: {moved:.5}");
            assert!((1e-5..0.02).contains(&moved), "{dtype} at {time}: {moved}");
        }
    }
}

#[test]
fn a_walk_of_stage_c_and_the_tokens_of_stage_b_move_little() {
    let (exact, coarse) = all();
    let texts = [Stage::C, Stage::B].map(|stage| exact.encode_text(stage, &PROMPTS).unwrap());
    let options = |model: &Model| {
        let mut options = GenerateOptions::new(model).unwrap();
        options.set_seed(3).unwrap();
        options
    };
    let walk = |m: &Model| m.stage_c_sample(&texts[0], None, None, &options(m)).unwrap();
    let right = walk(&exact);
    let choose = |m: &Model| m.stage_b_sample(&right, &texts[1], None, &options(m)).unwrap();
    let tokens = choose(&exact);
    for (dtype, model) in &coarse {
        let moved = error(&walk(model), &right);
        println!("Stage C in {dtype}, the whole walk: {moved:.5}");
        assert!((1e-5..0.05).contains(&moved), "{dtype}: {moved}");

        let others = choose(model);
        let pairs = tokens.slice::<i64>().unwrap().iter().zip(others.slice::<i64>().unwrap());
        let differing = pairs.filter(|(a, b)| a != b).count() as f64 / tokens.elements() as f64;
        println!("Stage B in {dtype}, tokens that differ: {differing:.4}");
        let [others, tokens] = [&others, &tokens].map(|tokens| exact.stage_a_decode(tokens).unwrap());
        println!("and their pixels: {:.5}", error(&others, &tokens));
        assert!(differing < 0.25, "{dtype}: {differing}");
        assert!(error(&others, &tokens) < 0.1, "{dtype}");
    }
}

#[test]
fn threads_batches_and_calls_before_change_no_bit() {
    for dtype in [DType::BF16, DType::I8] {
        let alone = open(&emoji(), dtype, 1);
        let expected: Vec<_> = PROMPTS.map(|prompt| picture(&alone, &short(&alone, prompt))).into();
        let model = open(&emoji(), dtype, 3);
        for _ in 0..2 {
            let mut options = bare(&model);
            for prompt in PROMPTS {
                options.add_prompt(prompt, None).unwrap();
            }
            let first = &model.generate(&options).unwrap()[0];
            assert_eq!(first.data(), expected[0].data());
            for (prompt, expected) in PROMPTS.iter().zip(&expected) {
                assert_eq!(picture(&model, &short(&model, prompt)).data(), expected.data());
            }
        }
        let exact = open(&emoji(), DType::F32, 2);
        let moved = distance(&picture(&exact, &short(&exact, PROMPTS[0])), &expected[0]);
        assert_eq!(moved > 0.0, dtype == DType::I8 || multiplies_bf16(), "{dtype}: {moved}");
        assert!(moved < 20.0, "{dtype}: {moved}");
    }
}

#[test]
fn models_of_every_generation_draw() {
    for (path, dtype) in [tiny(), v2("model")].iter().flat_map(|p| [DType::BF16, DType::I8].map(|t| (p, t))) {
        let model = open(path, dtype, 2);
        picture(&model, &short(&model, "a cat"));
    }
}

#[test]
fn weights_are_counted_and_leave_with_their_stage() {
    let held = |residency: Residency| {
        let mut options = ModelOptions::default();
        options.set("device", "cpu").unwrap();
        options.set("compute_dtype", "i8").unwrap();
        options.set_residency(residency).unwrap();
        let model = Model::open(&emoji(), &options).unwrap();
        picture(&model, &short(&model, "a cat"));
        let after_one = model.info().bytes_host;
        picture(&model, &short(&model, "a dog"));
        (after_one, model.info().bytes_host)
    };
    let (all, again) = held(Residency::All);
    assert_eq!(all, again);
    let (stage, again) = held(Residency::Stage);
    assert_eq!(stage, again);
    // The blocks of both stages are most of the model's weights.
    assert!(all > stage + 2_000_000, "{all} {stage}");
}

#[test]
fn what_computes_otherwise_refuses() {
    let mut options = ModelOptions::default();
    for dtype in [DType::I64, DType::U8] {
        assert!(matches!(options.set_compute_dtype(dtype), Err(Error::InvalidArgument { .. })));
    }
    for (dtype, device) in [(DType::F16, "cpu"), (DType::I8, "cuda:0")] {
        options.set_compute_dtype(dtype).unwrap();
        options.set_device(device).unwrap();
        let error = Model::open(&emoji(), &options).err().unwrap();
        let text = error.to_string();
        assert!(matches!(error, Error::Unsupported { .. }), "{text}");
        let dtype = dtype.to_string();
        assert!(["compute_dtype", &dtype, "CPU"].iter().all(|word| text.contains(word)), "{text}");
    }
    let mut training = TrainOptions::new(Goal::StageC);
    assert!(matches!(training.set_compute_dtype(DType::I8), Err(Error::InvalidArgument { .. })));
}

#[test]
fn tensors_of_eight_bits_are_no_input() {
    let model = open(&emoji(), DType::I8, 1);
    let text = model.encode_text(Stage::C, &["a cat"]).unwrap();
    let t = Tensor::from_slice(&[1], &[0.5f32]).unwrap();
    let x = Tensor::from_slice(&[1, 3, 3, 16], &[1i8; 144]).unwrap();
    assert_eq!((x.dtype(), x.dtype().size(), x.bytes().unwrap().len()), (DType::I8, 1, 144));
    let refused = |what: &str, result: wuerstchen::Result<Tensor>| {
        assert!(matches!(result, Err(Error::InvalidArgument { .. })), "{what}: {:?}", result.err());
    };
    refused("latents", model.stage_c_predict(&x, &t, &text));
    refused("tokens or latents", model.stage_a_decode(&x.narrow(0, 1).unwrap()));
    let options = GenerateOptions::new(&model).unwrap();
    refused(
        "text",
        model.stage_c_sample(&Tensor::from_slice(&[1, 16, 128], &[1i8; 2048]).unwrap(), None, None, &options),
    );
}
