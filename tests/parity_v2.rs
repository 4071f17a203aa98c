//! v2 against diffusers: the scheduler, both halves step by step with the noise that it drew, and whole pictures.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::path::PathBuf;

use common::{Case, NETWORK_TOLERANCE, RecordedNoise, fixtures, relative_error};
use serde_json::Value;
use wuerstchen::diffusion::latents::{ddpm_step, diffuse};
use wuerstchen::diffusion::noise::Draw;
use wuerstchen::diffusion::schedule::{CosineSchedule, DEFAULT_OFFSET, linspace};
use wuerstchen::pipeline::load;
use wuerstchen::{GenerateOptions, Model, Stage, Tensor};

/// Noise predictions of a whole step: guidance multiplies the difference of two by 4.
const STEP_TOLERANCE: f64 = NETWORK_TOLERANCE;

fn v2(folder: &str) -> PathBuf {
    fixtures().join("v2").join(folder)
}

fn open(folder: &str) -> Model {
    Model::open(&v2(folder), &common::options()).unwrap()
}

#[test]
fn scheduler() {
    let case = Case::read("v2_scheduler");
    let times = case.floats("t");
    let check = |name: &str, schedule: CosineSchedule| {
        for (t, expected) in times.iter().zip(case.floats(name)) {
            let found = schedule.alpha_bar(*t);
            assert!((found - expected).abs() <= 1e-6, "{name} at {t}: {found} instead of {expected}");
        }
    };
    let published = load::scheduler(&v2("model/scheduler")).unwrap();
    check("alpha_cumprod", published);
    check("alpha_cumprod_scaler2", CosineSchedule::new(DEFAULT_OFFSET, 2.0));
    check("alpha_cumprod_scaler05", CosineSchedule::new(DEFAULT_OFFSET, 0.5));
    check("alpha_cumprod_s02", CosineSchedule::new(0.02, 1.0));

    let even = linspace(1.0, 0.0, 7);
    assert_eq!(even, case.floats("timesteps"));
    for (times, prefix) in [(even.as_slice(), ""), (case.floats("custom.timesteps"), "custom.")] {
        let mut x = case.floats("sample").to_vec();
        for (step, pair) in times.windows(2).enumerate() {
            let fresh = case.floats(&format!("noise.{step}"));
            let output = case.floats(&format!("model_output.{step}"));
            let [t, next] = [0, 1].map(|i| published.alpha_bar(pair[i]));
            ddpm_step(&mut x, output, (pair[1] != 0.0).then_some(fresh), t, next);
            let error = relative_error(&x, case.floats(&format!("{prefix}step.{step}")));
            assert!(error < 5e-6, "{prefix}step.{step}: {error:e}");
        }
    }
    let mut noised = case.floats("sample").to_vec();
    let half = noised.len() / 2;
    for (i, sample) in noised.chunks_exact_mut(half).enumerate() {
        diffuse(sample, &case.floats("noise.0")[i * half..][..half], published.alpha_bar(times[10 + i]));
    }
    assert!(relative_error(&noised, case.floats("add_noise")) < 1e-6);
}

/// Embeddings of some texts, repeated.
fn texts(model: &Model, stage: Stage, texts: &[&str]) -> Tensor {
    model.encode_text(stage, texts).unwrap()
}

fn strings(value: &Value) -> Vec<&str> {
    value.as_array().unwrap().iter().map(|text| text.as_str().unwrap()).collect()
}

#[test]
fn prior_of_two_prompts_with_two_pictures_each() {
    let case = Case::read("v2_prior_batch");
    let model = open("prior");
    let twice = |key: &str| -> Vec<&str> {
        strings(&case.settings[key]).into_iter().flat_map(|text| [text, text]).collect()
    };
    let (prompts, negatives) = (twice("prompts"), twice("negative_prompts"));
    let all = texts(&model, Stage::C, &[prompts.clone(), negatives.clone()].concat());
    case.assert_tensor("text", &all, NETWORK_TOLERANCE);
    let (text, negative) = (all.narrow(0, 4).unwrap(), all.narrow(4, 4).unwrap());

    let mut options = GenerateOptions::new(&model).unwrap();
    options.set_stage_c(1, case.settings["guidance_scale"].as_f64().unwrap() as f32).unwrap();
    let times: Vec<f32> =
        case.settings["timesteps"].as_array().unwrap().iter().map(|t| t.as_f64().unwrap() as f32).collect();
    options.set_stage_c_timesteps(&times).unwrap();
    let names = [(Draw::LatentStep, "noise.{}")];
    let mut noise = RecordedNoise { case: &case, names: &names };
    let start = case.image("latents");
    let embeddings =
        model.stage_c_sample_with(&text, Some(&negative), Some(&start), &options, &mut noise).unwrap();
    case.assert_image("image_embeddings", &embeddings, STEP_TOLERANCE);
    for (step, t) in times[..times.len() - 1].iter().enumerate() {
        let x = if step == 0 { start.clone() } else { case.image(&format!("latents.{step}")) };
        assert_prediction(&case, &format!("pred.{step}"), &x, *t, 2, |x, t| {
            model.stage_c_predict(x, t, &all).unwrap()
        });
    }
    // The pictures' size gives the grid where no noise is given: 120 x 150 pixels are 3 x 4 positions.
    options.set_size(150, 120).unwrap();
    let own = model.stage_c_sample(&text, Some(&negative), None, &options).unwrap();
    assert_eq!(own.dims(), start.dims());
}

/// A raw prediction of the recorded walk: `copies` of the sample in one batch, as guidance makes them.
fn assert_prediction(
    case: &Case,
    name: &str,
    x: &Tensor,
    t: f32,
    copies: usize,
    predict: impl Fn(&Tensor, &Tensor) -> Tensor,
) {
    let cx = common::context();
    let batch = wuerstchen::ops::batch::concat(&cx, &vec![x; copies]).unwrap();
    let n = batch.dims()[0];
    let times = Tensor::from_slice(&[n], &vec![t; n]).unwrap();
    case.assert_image(name, &predict(&batch, &times), NETWORK_TOLERANCE);
}

#[test]
fn decoder_of_two_embeddings() {
    let case = Case::read("v2_decoder_batch");
    let model = open("decoder");
    let prompt = case.settings["prompt"].as_str().unwrap();
    let all = texts(&model, Stage::B, &[prompt, prompt, "", ""]);
    case.assert_tensor("text", &all, NETWORK_TOLERANCE);
    let text = all.narrow(0, 2).unwrap();
    let mut options = GenerateOptions::new(&model).unwrap();
    let guidance = case.settings["guidance_scale"].as_f64().unwrap() as f32;
    options.set_stage_b(case.settings["num_inference_steps"].as_u64().unwrap() as u32, guidance).unwrap();
    let names = [(Draw::DecoderStart, "latents"), (Draw::DecoderStep, "noise.{}")];
    let mut noise = RecordedNoise { case: &case, names: &names };
    let embeddings = case.image("image_embeddings");
    // Without a negative text the walk is guided away from the empty prompt, as in the reference.
    let latents = model.stage_b_sample_with(&embeddings, &text, None, &options, &mut noise).unwrap();
    case.assert_image("final_latents", &latents, STEP_TOLERANCE);
}

/// Text to picture, compared wherever the reference recorded something.
fn check_pipeline(case: &str, model: &Model) {
    let case = Case::read(case);
    let settings = &case.settings;
    let count = |key: &str| settings[key].as_u64().unwrap() as u32;
    let number = |key: &str| settings[key].as_f64().unwrap() as f32;
    let prompt = settings["prompt"].as_str().unwrap();
    let negative = settings["negative_prompt"].as_str().unwrap_or("");
    let mut options = GenerateOptions::new(model).unwrap();
    options.set_size(count("width"), count("height")).unwrap();
    options.set_stage_c(count("prior_num_inference_steps"), number("prior_guidance_scale")).unwrap();
    options.set_stage_b(count("num_inference_steps"), number("decoder_guidance_scale")).unwrap();

    let for_c = texts(model, Stage::C, &[prompt, negative]);
    case.assert_tensor("prior.text", &for_c, NETWORK_TOLERANCE);
    let guided = number("decoder_guidance_scale") > 1.0;
    let for_b = texts(model, Stage::B, &[prompt, negative][..1 + usize::from(guided)]);
    case.assert_tensor("decoder.text", &for_b, NETWORK_TOLERANCE);

    let names = [
        (Draw::LatentStart, "prior_latents"),
        (Draw::LatentStep, "prior_noise.{}"),
        (Draw::DecoderStart, "decoder_latents"),
        (Draw::DecoderStep, "decoder_noise.{}"),
    ];
    let mut noise = RecordedNoise { case: &case, names: &names };
    let one = |all: &Tensor, i: usize| all.narrow(i, 1).unwrap();
    let embeddings = model
        .stage_c_sample_with(&one(&for_c, 0), Some(&one(&for_c, 1)), None, &options, &mut noise)
        .unwrap();
    case.assert_image("image_embeddings", &embeddings, STEP_TOLERANCE);
    let steps = count("prior_num_inference_steps");
    for (step, t) in linspace(1.0, 0.0, steps as usize)[..steps as usize].iter().enumerate() {
        let name = if step == 0 { "prior_latents".into() } else { format!("prior.latents.{step}") };
        assert_prediction(&case, &format!("prior.pred.{step}"), &case.image(&name), *t, 2, |x, t| {
            model.stage_c_predict(x, t, &for_c).unwrap()
        });
    }

    let negative = guided.then(|| one(&for_b, 1));
    let text = one(&for_b, 0);
    let latents =
        model.stage_b_sample_with(&embeddings, &text, negative.as_ref(), &options, &mut noise).unwrap();
    let steps = count("num_inference_steps");
    case.assert_image(&format!("decoder.latents.{steps}"), &latents, STEP_TOLERANCE);
    let effnet = case.image("decoder.effnet");
    for (step, t) in linspace(1.0, 0.0, steps as usize)[..steps as usize].iter().enumerate() {
        let name = if step == 0 { "decoder_latents".into() } else { format!("decoder.latents.{step}") };
        let copies = if guided { 2 } else { 1 };
        assert_prediction(&case, &format!("decoder.pred.{step}"), &case.image(&name), *t, copies, |x, t| {
            model.stage_b_predict(x, t, &effnet, &for_b).unwrap()
        });
    }

    let pixels = model.stage_a_decode(&latents).unwrap();
    let image = wuerstchen::image::from_pixels(&pixels).unwrap();
    let expected = case.integers("image_u8");
    let worst = image.data().iter().zip(expected).map(|(f, e)| (i64::from(*f) - e).abs()).max();
    assert!(worst <= Some(1), "the picture is off by {worst:?}");
}

#[test]
fn pipeline_without_decoder_guidance() {
    check_pipeline("v2_pipeline_cfg0", &open("model"));
}

#[test]
fn pipeline_with_decoder_guidance() {
    check_pipeline("v2_pipeline_cfg2", &open("model"));
}

/// The folders hold the same weights: joined either way they make the same pictures.
#[test]
fn pipeline_of_two_folders() {
    let mut options = common::options();
    options.set("decoder_path", v2("decoder").to_str().unwrap()).unwrap();
    check_pipeline("v2_pipeline_cfg2", &Model::open(&v2("prior"), &options).unwrap());
    let mut options = common::options();
    options.set_prior_path(v2("prior")).unwrap();
    check_pipeline("v2_pipeline_cfg0", &Model::open(&v2("decoder"), &options).unwrap());
}
