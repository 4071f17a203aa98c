//! What v2's pictures are made of: published defaults, guidance, sizes, previews, schedules, and where walks start.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "common/errors.rs"]
mod errors;
#[path = "common/folder.rs"]
mod folder;

mod common;

use errors::{Kind, assert_error};
use folder::{
    Folder, V2_PARTS, bare, distance, open, picture, read_tensors, reports, rounded, short, tiny, v2,
    weights_of,
};
use safetensors::Dtype;
use wuerstchen::diffusion::latents::{ddim_step, ddpm_step, diffuse};
use wuerstchen::diffusion::noise::{Draw, NoiseSource};
use wuerstchen::diffusion::schedule::{CosineSchedule, DEFAULT_OFFSET, linspace};
use wuerstchen::{Choice, GenerateOptions, Image, Model, ModelOptions, Result, Sampler, Stage, Tensor};

fn model() -> Model {
    open(&v2("model")).unwrap()
}

/// Changed options, and the picture that they make.
fn made(model: &Model, change: impl FnOnce(&mut GenerateOptions)) -> Image {
    let mut options = short(model, "a cat");
    change(&mut options);
    picture(model, &options)
}

/// Numbers between -2 and 2 that follow no rule.
fn numbers(count: usize, salt: usize) -> Vec<f32> {
    (0..count).map(|i| ((i * 29 + salt * 13 + i * i % 7) % 81) as f32 / 20.0 - 2.0).collect()
}

/// Latents of a 128 x 128 picture: `[n, 3, 3, 8]`.
fn some_latents(n: usize) -> Tensor {
    Tensor::from_slice(&[n, 3, 3, 8], &numbers(n * 72, 5)).unwrap()
}

/// Noise that a test knows.
struct Known;

impl Known {
    fn values(draw: Draw, step: usize, count: usize) -> Vec<f32> {
        numbers(count, step + if matches!(draw, Draw::LatentStart | Draw::DecoderStart) { 40 } else { 1 })
    }
}

impl NoiseSource for Known {
    fn normal(&mut self, draw: Draw, step: usize, out: &mut Tensor) -> Result<()> {
        let values = Known::values(draw, step, out.elements());
        out.slice_mut::<f32>()?.copy_from_slice(&values);
        Ok(())
    }

    fn uniform(&mut self, draw: Draw, _: usize, _: &mut Tensor) -> Result<()> {
        panic!("v2 draws no {draw:?}");
    }

    fn below(&mut self, draw: Draw, _: usize, _: u32, _: &mut Tensor) -> Result<()> {
        panic!("v2 draws no {draw:?}");
    }
}

/// diffusers' DEFAULT_STAGE_C_TIMESTEPS: linspace(1, 2/3, 20), then linspace(2/3, 0, 11) without its first.
fn published_times() -> Vec<f32> {
    let early = (0..20).map(|i| f64::from(57 - i) / 57.0);
    let late = (1..11).map(|i| f64::from(2 * (10 - i)) / 30.0);
    early.chain(late).map(|t| t as f32).collect()
}

/// How many steps a stage reports.
fn steps(model: &Model, options: &GenerateOptions, stage: Stage) -> Vec<(u32, u32)> {
    let heard = reports(model, options.clone());
    heard.iter().filter(|p| p.stage == stage).map(|p| (p.step, p.steps)).collect()
}

fn all_of(count: u32) -> Vec<(u32, u32)> {
    (1..=count).map(|step| (step, count)).collect()
}

#[test]
fn the_defaults_are_the_published_ones() {
    let model = model();
    let mut options = GenerateOptions::new(&model).unwrap();
    options.add_prompt("a cat", None).unwrap();
    options.set_size(128, 128).unwrap();
    options.set_seed(11).unwrap();
    for (stage, count) in [(Stage::C, 29), (Stage::B, 12), (Stage::A, 1)] {
        assert_eq!(steps(&model, &options, stage), all_of(count), "{stage:?}");
    }
    let found = picture(&model, &options);
    let spelled = |times: Option<&[f32]>, c: f32, b: f32| {
        made(&model, |options| {
            options.set_stage_c(29, c).unwrap();
            options.set_stage_c_timesteps(times.unwrap_or_default()).unwrap();
            options.set_stage_b(12, b).unwrap();
        })
    };
    let times = published_times();
    assert_eq!(times.len(), 30);
    assert_eq!(found.data(), spelled(Some(&times), 4.0, 0.0).data());
    assert_ne!(found.data(), spelled(None, 4.0, 0.0).data(), "the published times are not evenly spaced");
    assert_ne!(found.data(), spelled(Some(&times), 3.9, 0.0).data());
    assert_ne!(found.data(), spelled(Some(&times), 4.0, 1.1).data());
    // Another guidance keeps the times; a number of steps replaces them.
    options.set("stage_c_guidance", "3.9").unwrap();
    assert_eq!(picture(&model, &options).data(), spelled(Some(&times), 3.9, 0.0).data());
    options.set("stage_c_steps", "29").unwrap();
    assert_eq!(picture(&model, &options).data(), spelled(None, 3.9, 0.0).data());
    // The recommended size, with steps as few as can be.
    let mut options = GenerateOptions::new(&model).unwrap();
    options.add_prompt("a cat", None).unwrap();
    options.set_stage_c(1, 1.0).unwrap();
    options.set_stage_b(1, 1.0).unwrap();
    let image = picture(&model, &options);
    assert_eq!((image.width(), image.height()), (1024, 1024));
}

/// A model's own recommendations come first: each half's from its own folder.
#[test]
fn recommendations_of_the_folders() {
    let (prior, decoder) = (Folder::of(&v2("prior")), Folder::of(&v2("decoder")));
    let recommend = |folder: &Folder, c: u32, b: u32| {
        folder.edit_json("model_index.json", |json| {
            json["defaults"] =
                serde_json::json!({"stage_c_steps": c, "stage_b_steps": b, "stage_b_guidance": 3.0});
        });
    };
    recommend(&prior, 2, 9);
    recommend(&decoder, 9, 4);
    for (path, key, other) in [(&prior, "decoder_path", &decoder), (&decoder, "prior_path", &prior)] {
        let model = joined(path, key, other.path());
        let mut options = GenerateOptions::new(&model).unwrap();
        options.add_prompt("a cat", None).unwrap();
        options.set_size(128, 128).unwrap();
        assert_eq!(steps(&model, &options, Stage::C), all_of(2), "{key}");
        assert_eq!(steps(&model, &options, Stage::B), all_of(4), "{key}");
        let found = picture(&model, &options);
        options.set_stage_b(4, 3.0).unwrap();
        assert_eq!(found.data(), picture(&model, &options).data(), "{key}: the guidance is the decoder's");
        options.set_stage_b(4, 0.0).unwrap();
        assert_ne!(found.data(), picture(&model, &options).data(), "{key}");
    }
}

fn joined(path: &Folder, key: &str, other: &std::path::Path) -> Model {
    let mut options = ModelOptions::default();
    options.set(key, other.to_str().unwrap()).unwrap();
    Model::open(path.path(), &options).unwrap()
}

#[test]
fn guidance_above_one_is_guidance() {
    let model = model();
    let with = |c: f32, b: f32, negative: Option<&str>| {
        let mut options = bare(&model);
        options.set_stage_c(3, c).unwrap();
        options.set_stage_b(3, b).unwrap();
        options.add_prompt("a cat", negative).unwrap();
        picture(&model, &options)
    };
    let free = with(1.0, 1.0, None);
    for off in [1.0, 0.5, 0.0, -4.0] {
        assert_eq!(with(off, 1.0, Some("a dog")).data(), free.data(), "Stage C, guidance {off}");
        assert_eq!(with(1.0, off, Some("a dog")).data(), free.data(), "Stage B, guidance {off}");
    }
    for (c, b) in [(1.01, 0.0), (4.0, 0.0), (0.0, 1.01), (0.0, 4.0)] {
        assert_ne!(with(c, b, None).data(), free.data(), "guidance {c} and {b}");
    }
    for (c, b) in [(4.0, 0.0), (0.0, 4.0), (4.0, 4.0)] {
        assert_ne!(with(c, b, Some("a dog")).data(), with(c, b, None).data(), "guidance {c} and {b}");
        assert_eq!(with(c, b, Some("")).data(), with(c, b, None).data(), "guidance {c} and {b}");
    }
    // Guided away from itself is not guided: in Stage C, whose twins differ in the text alone.
    assert_eq!(with(4.0, 0.0, Some("a cat")).data(), free.data());
}

#[test]
fn every_picture_of_a_prompt_has_latents_of_its_own() {
    let model = model();
    let texts = ["a cat", "a cat", "a dog", "a dog"];
    let text = model.encode_text(Stage::C, &texts).unwrap();
    let latents = model.stage_c_sample(&text, None, None, &bare(&model)).unwrap();
    let samples: Vec<_> = (0..4).map(|i| latents.narrow(i, 1).unwrap()).collect();
    for (i, k) in [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)] {
        assert_ne!(samples[i].bytes(), samples[k].bytes(), "samples {i} and {k}");
    }
}

/// Without guidance a stage is its prediction and the sampler's steps over the schedule of its own folder.
#[test]
fn schedules_are_those_of_the_folders() {
    let published = model();
    for (file, of_c, of_b) in [
        ("none", (1.0, DEFAULT_OFFSET), (1.0, DEFAULT_OFFSET)),
        ("prior_scheduler", (2.0, 0.02), (1.0, DEFAULT_OFFSET)),
        ("scheduler", (1.0, DEFAULT_OFFSET), (0.5, 0.05)),
    ] {
        let folder = Folder::of(&v2("model"));
        if file != "none" {
            let (scaler, s) = if file == "scheduler" { of_b } else { of_c };
            folder.edit_json(&format!("{file}/scheduler_config.json"), |json| {
                json["scaler"] = scaler.into();
                json["s"] = s.into();
            });
        }
        let model = open(folder.path()).unwrap();
        let (c, b) = (CosineSchedule::new(of_c.1, of_c.0), CosineSchedule::new(of_b.1, of_b.0));
        let latents = walked_by_hand(&model, c, Stage::C, Sampler::Ddpm, &some_latents(1));
        walked_by_hand(&model, c, Stage::C, Sampler::Ddim, &some_latents(1));
        walked_by_hand(&model, b, Stage::B, Sampler::Ddpm, &latents);
        let same = made(&model, |_| {}).data() == made(&published, |_| {}).data();
        assert_eq!(same, file == "none", "{file} changes the picture");
    }
}

/// Checks a stage's walk of four steps against one step after the other; returns what it ends with.
fn walked_by_hand(
    model: &Model,
    schedule: CosineSchedule,
    stage: Stage,
    sampler: Sampler,
    latents: &Tensor,
) -> Tensor {
    let text = model.encode_text(stage, &["a cat"]).unwrap();
    let mut options = bare(model);
    options.set_stage_c(4, 1.0).unwrap();
    options.set_stage_b(4, 1.0).unwrap();
    options.set_stage_c_sampler(sampler).unwrap();
    let (found, dims, start, fresh) = match stage {
        Stage::C => {
            let found = model.stage_c_sample_with(&text, None, None, &options, &mut Known).unwrap();
            (found, [1, 3, 3, 8], Draw::LatentStart, Draw::LatentStep)
        }
        _ => {
            let found = model.stage_b_sample_with(latents, &text, None, &options, &mut Known).unwrap();
            (found, [1, 32, 32, 4], Draw::DecoderStart, Draw::DecoderStep)
        }
    };
    let count = dims.iter().product();
    let mut x = Known::values(start, 0, count);
    for (step, pair) in linspace(1.0, 0.0, 4).windows(2).enumerate() {
        let t = Tensor::from_slice(&[1], &[pair[0]]).unwrap();
        let sample = Tensor::from_slice(&dims, &x).unwrap();
        let predicted = match stage {
            Stage::C => model.stage_c_predict(&sample, &t, &text).unwrap(),
            _ => model.stage_b_predict(&sample, &t, latents, &text).unwrap(),
        };
        let (predicted, now, next) =
            (predicted.slice().unwrap(), schedule.alpha_bar(pair[0]), schedule.alpha_bar(pair[1]));
        let noise = Known::values(fresh, step, count);
        match sampler {
            Sampler::Ddim => ddim_step(&mut x, predicted, now, next),
            Sampler::Ddpm => ddpm_step(&mut x, predicted, (pair[1] != 0.0).then_some(&noise), now, next),
        }
    }
    if stage == Stage::C {
        // As Stage B takes them.
        x.iter_mut().for_each(|x| *x = *x * 42.0 - 1.0);
    }
    assert_eq!(found.dims(), dims);
    assert_eq!(found.slice::<f32>().unwrap(), x, "{stage:?}, {sampler:?}");
    found
}

/// The scaling between the stages is what the prior's index says.
#[test]
fn latents_are_scaled_as_the_index_says() {
    let folder = Folder::of(&v2("prior"));
    folder.edit_json("model_index.json", |json| {
        json["latent_mean"] = 2.0.into();
        json["latent_std"] = 0.5.into();
    });
    let [own, published] = [folder.path(), &v2("prior")].map(|path| {
        let model = open(path).unwrap();
        let text = model.encode_text(Stage::C, &["a cat"]).unwrap();
        model.stage_c_sample(&text, None, None, &bare(&model)).unwrap()
    });
    let expected: Vec<f32> =
        published.slice::<f32>().unwrap().iter().map(|x| (x + 1.0) / 42.0 * 2.0 - 0.5).collect();
    let error = common::relative_error(own.slice().unwrap(), &expected);
    assert!(error < 1e-5, "{error:e}");
}

#[test]
fn sizes_are_multiples_of_128() {
    let model = model();
    let mut options = bare(&model);
    for side in (0..=1100).chain([4096, 4097, 4224, u32::MAX - 127, u32::MAX]) {
        let fits = side > 0 && side % 128 == 0 && side <= 16_384;
        for (name, width, height) in [("width", side, 128), ("height", 128, side)] {
            match options.set_size(width, height) {
                Ok(()) => assert!(fits, "{name} {side} is accepted"),
                refused => {
                    assert!(!fits, "{name} {side} is refused");
                    let side = side.to_string();
                    assert_error(&side, refused, Kind::Argument, &[name, "multiple of 128", &side]);
                }
            }
        }
    }
    assert_error("large", options.set_size(4096, 4224), Kind::Argument, &["16777216", "4096 x 4224"]);
    options.set_size(4096, 4096).unwrap();
    for (width, height) in [(128, 128), (256, 128), (128, 384), (640, 512)] {
        let image = made(&model, |options| options.set_size(width, height).unwrap());
        assert_eq!((image.width(), image.height()), (width, height));
    }
    // A refused size changes nothing.
    let expected = made(&model, |options| options.set_size(256, 128).unwrap());
    let found = made(&model, |options| {
        options.set_size(256, 128).unwrap();
        options.set_size(200, 128).unwrap_err();
    });
    assert_eq!((found.width(), found.data()), (256, expected.data()));
}

/// Each half's index says how it is sized. With ratios of 32 and 8 every multiple of 32 fits.
#[test]
fn sizes_of_other_ratios() {
    let (prior, decoder) = (Folder::of(&v2("prior")), Folder::of(&v2("decoder")));
    prior.edit_json("model_index.json", |json| json["resolution_multiple"] = 32.into());
    decoder.edit_json("model_index.json", |json| json["latent_dim_scale"] = 8.into());
    for model in
        [joined(&prior, "decoder_path", decoder.path()), joined(&decoder, "prior_path", prior.path())]
    {
        let image = made(&model, |options| options.set_size(96, 160).unwrap());
        assert_eq!((image.width(), image.height()), (96, 160));
        let refused = bare(&model).set_size(144, 96);
        assert_error("144", refused, Kind::Argument, &["width", "multiple of 32", "144"]);
        assert_eq!((model.info().latent_width, model.info().default_width), (32, 1024));
    }
}

#[test]
fn previews_and_progress() {
    let model = model();
    let mut options = short(&model, "a cat");
    options.set_images_per_prompt(2).unwrap();
    options.set_size(256, 128).unwrap();
    let expected = model.generate(&options).unwrap();
    let (a, b, c) = (Stage::A, Stage::B, Stage::C);
    let heard = reports(&model, options.clone());
    let found: Vec<_> = heard.iter().map(|p| (p.stage, p.step, p.steps)).collect();
    assert_eq!(
        found,
        [(c, 1, 3), (c, 2, 3), (c, 3, 3), (b, 1, 3), (b, 2, 3), (b, 3, 3), (a, 1, 2), (a, 2, 2)]
    );
    assert!(heard.windows(2).all(|pair| pair[0].seconds <= pair[1].seconds));
    for every in [0, 1, 2, 3, 100] {
        options.set_preview(every).unwrap();
        for p in reports(&model, options.clone()) {
            let due = p.stage != a && every != 0 && p.step % every == 0;
            assert_eq!(p.preview.is_some(), due, "every {every}: {:?} {}", p.stage, p.step);
            if let Some(preview) = p.preview {
                assert_eq!((preview.width(), preview.height()), (256, 128));
            }
        }
        for (found, expected) in model.generate(&options).unwrap().iter().zip(&expected) {
            assert_eq!(found.data(), expected.data(), "a preview every {every} steps changes the picture");
        }
    }
    // Stage B's previews come to the picture: the last is off by what is left of the noise, 1e-4 of its variance.
    options.set_preview(1).unwrap();
    options.set_stage_b(8, 2.0).unwrap();
    let image = &model.generate(&options).unwrap()[0];
    let previews: Vec<_> = reports(&model, options).into_iter().filter(|p| p.stage == b).collect();
    let far: Vec<f64> = previews.iter().map(|p| distance(p.preview.as_ref().unwrap(), image)).collect();
    assert!(far[7] < 4.0 && far[7] < far[0], "distances of the previews: {far:.1?}");
    // Several batches of Stage B: each stage counts on.
    let mut options = short(&model, "a cat");
    options.set_size(384, 256).unwrap();
    options.set_images_per_prompt(6).unwrap();
    assert_eq!(steps(&model, &options, c), all_of(3));
    assert_eq!(steps(&model, &options, a), all_of(6));
    let of_b = steps(&model, &options, b);
    assert!(of_b.len() > 3, "one batch only");
    assert_eq!(of_b, all_of(of_b.len() as u32));
}

#[test]
fn a_model_of_the_prior_alone() {
    let (alone, whole) = (open(&v2("prior")).unwrap(), model());
    let (own, both) = (alone.info(), whole.info());
    assert_eq!((own.generation, own.default_width, own.default_height), (2, 1024, 1024));
    assert_eq!((own.latent_channels, own.latent_height, own.latent_width), (8, 24, 24));
    assert_eq!((own.stage_a_parameters, own.stage_b_parameters, own.image_encoder_parameters), (0, 0, 0));
    assert!(own.stage_c_parameters == both.stage_c_parameters && own.stage_c_parameters > 0);
    assert!(own.text_encoder_parameters > 0 && own.text_encoder_parameters < both.text_encoder_parameters);

    let [latents, expected] = [&alone, &whole].map(|model| {
        let ids = model.tokenize(Stage::C, "a cat").unwrap();
        assert_eq!(ids.dims(), [77]);
        let text = model.encode_text(Stage::C, &["a cat"]).unwrap();
        let t = Tensor::from_slice(&[1], &[0.5f32]).unwrap();
        let noise = model.stage_c_predict(&some_latents(1), &t, &text).unwrap();
        let latents = model.stage_c_sample(&text, None, None, &bare(model)).unwrap();
        [noise.bytes().to_vec(), latents.bytes().to_vec()]
    });
    assert_eq!(latents, expected);

    let mut options = short(&alone, "a cat");
    // Without the half that makes pictures their size is only that of the latents.
    options.set_size(150, 120).unwrap();
    let text = alone.encode_text(Stage::C, &["a cat"]).unwrap();
    assert_eq!(alone.stage_c_sample(&text, None, None, &options).unwrap().dims(), [1, 3, 4, 8]);
    assert_error("0", options.set_size(0, 128), Kind::Argument, &["width"]);
    options.set_size(128, 128).unwrap();
    let (latents, x) = (some_latents(1), Tensor::from_slice(&[1, 32, 32, 4], &numbers(4096, 1)).unwrap());
    let t = Tensor::from_slice(&[1], &[0.5f32]).unwrap();
    let gray = Image::build(128, 128, |rgb| rgb.fill(90)).unwrap();
    let missing: [(&str, Result<()>); 9] = [
        ("generate", alone.generate(&options).map(drop)),
        ("a job", wuerstchen::Job::start(&alone, &options).map(drop)),
        ("tokenize", alone.tokenize(Stage::B, "a cat").map(drop)),
        ("encode_text", alone.encode_text(Stage::B, &["a cat"]).map(drop)),
        ("stage_b_predict", alone.stage_b_predict(&x, &t, &latents, &text).map(drop)),
        ("stage_b_sample", alone.stage_b_sample(&latents, &text, None, &options).map(drop)),
        ("stage_a_encode", alone.stage_a_encode(&[&gray]).map(drop)),
        ("stage_a_decode", alone.stage_a_decode(&x).map(drop)),
        ("temperature", options.set_stage_b_temperature(1.0, 1.0)),
    ];
    for (what, result) in missing {
        assert_error(what, result, Kind::Unsupported, &["Stage B and A", "decoder_path"]);
    }
}

#[test]
fn a_model_of_the_decoder_alone() {
    let (alone, whole) = (open(&v2("decoder")).unwrap(), model());
    let (own, both) = (alone.info(), whole.info());
    assert_eq!((own.generation, own.default_width, own.default_height), (2, 1024, 1024));
    assert_eq!((own.latent_channels, own.latent_height, own.latent_width), (8, 24, 24));
    assert_eq!((own.stage_c_parameters, own.image_encoder_parameters), (0, 0));
    assert_eq!(own.stage_a_parameters, both.stage_a_parameters);
    assert_eq!(own.stage_b_parameters, both.stage_b_parameters);
    assert!(own.stage_a_parameters > 0 && own.stage_b_parameters > 0);
    assert!(own.text_encoder_parameters > 0 && own.text_encoder_parameters < both.text_encoder_parameters);

    // Latents of another run, or of a picture, become pictures: one for all, or one for each.
    for count in [1, 2] {
        let latents = some_latents(count);
        let [found, expected] = [&alone, &whole].map(|model| {
            let mut options = short(model, "a cat");
            options.set_images_per_prompt(2).unwrap();
            options.set_init_latents(&latents, 0.0).unwrap();
            assert!(steps(model, &options, Stage::C).is_empty(), "Stage C does not run");
            assert_eq!(steps(model, &options, Stage::B), all_of(3));
            model.generate(&options).unwrap()
        });
        for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
            assert_eq!(found.data(), expected.data(), "picture {i} of {count} latents");
            // And the stages one after the other make the same.
            let own = latents.narrow(i % count, 1).unwrap();
            let text = alone.encode_text(Stage::B, &["a cat"]).unwrap();
            let mut options = bare(&alone);
            options.set_seed(11 + i as u64).unwrap();
            let decoded = alone.stage_b_sample(&own, &text, None, &options).unwrap();
            let pixels = alone.stage_a_decode(&decoded).unwrap();
            assert_eq!(found.data(), wuerstchen::image::from_pixels(&pixels).unwrap().data(), "picture {i}");
        }
    }

    let text = whole.encode_text(Stage::C, &["a cat"]).unwrap();
    let latents = some_latents(1);
    let t = Tensor::from_slice(&[1], &[0.5f32]).unwrap();
    let with = |change: &dyn Fn(&mut GenerateOptions)| {
        let mut options = short(&alone, "a cat");
        change(&mut options);
        alone.generate(&options).map(drop)
    };
    let missing: [(&str, Result<()>); 7] = [
        ("generate", with(&|_| {})),
        ("a part of the walk", with(&|options| options.set_init_latents(&latents, 0.5).unwrap())),
        (
            "a mask",
            with(&|options| {
                options.set_init_latents(&latents, 0.0).unwrap();
                options.set_mask(&Image::build(8, 8, |rgb| rgb.fill(255)).unwrap()).unwrap();
            }),
        ),
        ("tokenize", alone.tokenize(Stage::C, "a cat").map(drop)),
        ("encode_text", alone.encode_text(Stage::C, &["a cat"]).map(drop)),
        ("stage_c_predict", alone.stage_c_predict(&latents, &t, &text).map(drop)),
        ("stage_c_sample", alone.stage_c_sample(&text, None, None, &bare(&alone)).map(drop)),
    ];
    for (what, result) in missing {
        assert_error(what, result, Kind::Unsupported, &["Stage C", "prior_path"]);
    }
}

#[test]
fn info_of_both_halves() {
    let info = model().info();
    assert_eq!((info.generation, info.default_width, info.default_height), (2, 1024, 1024));
    assert_eq!((info.latent_channels, info.latent_height, info.latent_width), (8, 24, 24));
    let count = |parts: &[&str]| -> u64 {
        let tensors =
            parts.iter().flat_map(|part| read_tensors(&v2("model").join(weights_of(&v2("model"), part))));
        tensors.filter(|t| t.is_float()).map(|t| t.shape.iter().product::<usize>() as u64).sum()
    };
    assert_eq!(info.stage_a_parameters, count(&["vqgan"]));
    assert_eq!(info.stage_b_parameters, count(&["decoder"]));
    assert_eq!(info.stage_c_parameters, count(&["prior_prior"]));
    assert_eq!(info.text_encoder_parameters, count(&["prior_text_encoder", "text_encoder"]));
    assert_eq!(info.image_encoder_parameters, 0);
    let bytes =
        V2_PARTS.map(|part| v2("model").join(weights_of(&v2("model"), part)).metadata().unwrap().len());
    assert_eq!(info.bytes_mapped, bytes.iter().sum::<u64>());
}

#[test]
fn initial_latents_in_the_middle_of_the_walk() {
    let model = model();
    let given = some_latents(1);
    let text = model.encode_text(Stage::C, &["a cat"]).unwrap();
    // One step from the middle: noised, predicted, stepped, scaled.
    let mut options = bare(&model);
    options.set_stage_c(2, 1.0).unwrap();
    options.set_init_latents(&given, 0.5).unwrap();
    let found = model.stage_c_sample_with(&text, None, None, &options, &mut Known).unwrap();
    let schedule = CosineSchedule::default();
    let mut x: Vec<f32> = given.slice::<f32>().unwrap().iter().map(|x| (x + 1.0) / 42.0).collect();
    diffuse(&mut x, &Known::values(Draw::LatentStart, 0, 72), schedule.alpha_bar(0.5));
    let (sample, t) =
        (Tensor::from_slice(&[1, 3, 3, 8], &x).unwrap(), Tensor::from_slice(&[1], &[0.5f32]).unwrap());
    let predicted = model.stage_c_predict(&sample, &t, &text).unwrap();
    let (now, next) = (schedule.alpha_bar(0.5), schedule.alpha_bar(0.0));
    ddpm_step(&mut x, predicted.slice().unwrap(), None, now, next);
    let expected: Vec<f32> = x.iter().map(|x| x * 42.0 - 1.0).collect();
    let error = common::relative_error(found.slice().unwrap(), &expected);
    assert!(error < 1e-5, "{error:e}");

    // Strength 0 gives the latents back, bit by bit.
    options.set_init_latents(&given, 0.0).unwrap();
    assert_eq!(model.stage_c_sample(&text, None, None, &options).unwrap().bytes(), given.bytes());

    // A share of the steps: of even ones, and of the published times those that are later.
    for (strength, even, published) in [(0.01, 1, 1), (0.5, 5, 8), (0.9, 9, 24), (1.0, 10, 29)] {
        let mut options = short(&model, "a cat");
        options.set_stage_c(10, 2.0).unwrap();
        options.set_init_latents(&given, strength).unwrap();
        assert_eq!(steps(&model, &options, Stage::C), all_of(even), "{strength} of 10 steps");
        let mut options = GenerateOptions::new(&model).unwrap();
        options.add_prompt("a cat", None).unwrap();
        options.set_size(128, 128).unwrap();
        options.set_init_latents(&given, strength).unwrap();
        let expected = match strength < 1.0 {
            true => published_times().iter().filter(|t| **t < strength).count() as u32,
            false => 29,
        };
        assert_eq!(expected, published, "the test's own count");
        assert_eq!(steps(&model, &options, Stage::C), all_of(expected), "{strength} of the published times");
    }

    // Each picture from latents of its own, as if it were alone.
    let two = some_latents(2);
    let mut options = short(&model, "a cat");
    options.set_images_per_prompt(2).unwrap();
    options.set_init_latents(&two, 0.6).unwrap();
    let images = model.generate(&options).unwrap();
    for (i, image) in images.iter().enumerate() {
        let alone = made(&model, |options| {
            options.set_seed(11 + i as u64).unwrap();
            options.set_init_latents(&two.narrow(i, 1).unwrap(), 0.6).unwrap();
        });
        assert_eq!(image.data(), alone.data(), "picture {i}");
    }
}

#[test]
fn masks_over_initial_latents() {
    let model = model();
    let given = some_latents(1);
    let mask = |value: u8| Image::build(64, 64, |rgb| rgb.fill(value)).unwrap();
    let masked = |value: u8| {
        made(&model, |options| {
            options.set_init_latents(&given, 1.0).unwrap();
            options.set_mask(&mask(value)).unwrap();
        })
    };
    assert_eq!(masked(255).data(), made(&model, |_| {}).data(), "all white keeps nothing");
    assert_ne!(masked(0).data(), masked(255).data(), "all black is not all white");
    assert_ne!(masked(128).data(), masked(255).data(), "gray is not white");
}

#[test]
fn initial_latents_that_do_not_fit() {
    let model = model();
    let mut options = short(&model, "a cat");
    options.set_images_per_prompt(3).unwrap();
    let floats = |dims: &[usize]| Tensor::from_slice(dims, &numbers(dims.iter().product(), 3)).unwrap();
    for (what, latents) in [
        ("channels", floats(&[1, 3, 3, 7])),
        ("rank", floats(&[3, 3, 8])),
        ("empty", floats(&[1, 0, 3, 8])),
        ("none", floats(&[0, 3, 3, 8])),
        ("integers", Tensor::from_slice(&[1, 3, 3, 8], &[1i64; 72]).unwrap()),
        ("bytes", Tensor::from_slice(&[1, 3, 3, 8], &[1u8; 72]).unwrap()),
    ] {
        assert_error(what, options.set_init_latents(&latents, 0.5), Kind::Argument, &["init latents"]);
    }
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut values = numbers(72, 3);
        values[71] = value;
        let latents = Tensor::from_slice(&[1, 3, 3, 8], &values).unwrap();
        let found = options.set_init_latents(&latents, 0.5);
        assert_error("not finite", found, Kind::Argument, &["init latents", "finite", &value.to_string()]);
    }
    for strength in [-0.1, 1.1, f32::NAN, f32::INFINITY] {
        let found = options.set_init_latents(&some_latents(1), strength);
        assert_error("strength", found, Kind::Argument, &["strength", "from 0 to 1"]);
    }
    // Nothing of that is kept.
    let expected = model.generate(&options).unwrap();
    assert_eq!(expected[0].data(), made(&model, |_| {}).data());
    // The pictures' number and size may still change, so these are looked at when they are made.
    let text = model.encode_text(Stage::C, &["a cat"]).unwrap();
    for (what, dims) in [("count", [2, 3, 3, 8]), ("grid", [1, 4, 3, 8]), ("grid", [3, 3, 2, 8])] {
        for strength in [0.0, 0.5] {
            options.set_init_latents(&floats(&dims), strength).unwrap();
            let parts = ["init latents", "1 or 3 samples of 3 x 3", "128 x 128", &format!("{dims:?}")];
            assert_error(what, model.generate(&options), Kind::Argument, &parts);
            let parts = ["init latents", "1 or 1 samples of 3 x 3"];
            assert_error(what, model.stage_c_sample(&text, None, None, &options), Kind::Argument, &parts);
        }
    }
    options.set_init_latents(&floats(&[1, 3, 6, 8]), 0.5).unwrap();
    options.set_size(256, 128).unwrap();
    assert_eq!(model.generate(&options).unwrap().len(), 3);
}

/// The published folders have no image encoder; one that fits beside the prior does.
#[test]
fn initial_pictures_need_an_image_encoder() {
    let whole = model();
    let gray = |side: u32| Image::build(side, side, |rgb| rgb.fill(90)).unwrap();
    let missing = ["picture as input", "image_encoder"];
    assert_error("set", short(&whole, "a cat").set_init_image(&gray(128), 0.5), Kind::Unsupported, &missing);
    assert_error("encode", whole.encode_image(&[&gray(128)]), Kind::Unsupported, &missing);

    let folder = Folder::of(&v2("model"));
    folder.link("image_encoder", &tiny().join("image_encoder"));
    let model = open(folder.path()).unwrap();
    assert!(model.info().image_encoder_parameters > 0);
    assert_eq!(made(&model, |_| {}).data(), made(&whole, |_| {}).data(), "text to picture does not see it");
    // The encoder sees as many pixels as give the latents of the picture's size: here 48 x 48 of one colour in both.
    let latents = model.encode_image(&[&gray(128)]).unwrap();
    let v1 = open(&tiny()).unwrap().encode_image(&[&gray(64)]).unwrap();
    assert_eq!((latents.dims(), v1.dims()), (&[1, 3, 3, 8][..], &[1, 3, 3, 8][..]));
    let expected: Vec<f32> = v1.slice::<f32>().unwrap().iter().map(|x| x * 42.0 - 1.0).collect();
    let error = common::relative_error(latents.slice().unwrap(), &expected);
    assert!(error < 1e-5, "{error:e}");
    for (width, height) in [(128, 128), (256, 128), (640, 384)] {
        let image = Image::build(width, height, |rgb| {
            rgb.iter_mut().enumerate().for_each(|(i, byte)| *byte = (i * 37 % 251) as u8);
        });
        let image = image.unwrap();
        let latents = model.encode_image(&[&image]).unwrap();
        for strength in [0.0, 0.4] {
            let sized = |options: &mut GenerateOptions| options.set_size(width, height).unwrap();
            let by_picture = made(&model, |options| {
                sized(options);
                options.set_init_image(&image, strength).unwrap();
            });
            let by_latents = made(&model, |options| {
                sized(options);
                options.set_init_latents(&latents, strength).unwrap();
            });
            assert_eq!(by_picture.data(), by_latents.data(), "{width} x {height}, strength {strength}");
        }
    }
    // What a mask keeps is the picture's own.
    let original = gray(128);
    let kept = made(&model, |options| {
        options.set_init_image(&original, 1.0).unwrap();
        options.set_mask(&Image::build(16, 16, |rgb| rgb.fill(0)).unwrap()).unwrap();
    });
    assert_eq!(kept.data(), original.data());
    // It goes with the prior, wherever that is; a decoder alone has no use for it.
    let prior = Folder::of(&v2("prior"));
    prior.link("image_encoder", &tiny().join("image_encoder"));
    let decoder = Folder::of(&v2("decoder"));
    let both = joined(&decoder, "prior_path", prior.path());
    assert_eq!(both.encode_image(&[&original]).unwrap().bytes(), latents.bytes());
}

#[test]
fn choices_of_tokens_are_not_for_v2() {
    for folder in ["model", "decoder"] {
        let model = open(&v2(folder)).unwrap();
        let mut options = bare(&model);
        for (what, result) in [
            ("temperature", options.set_stage_b_temperature(0.7, 0.3)),
            ("choice", options.set_stage_b_choice(Choice::Argmax)),
            ("by name", options.set("stage_b_temperature", "0.7,0.3")),
            ("by name", options.set("stage_b_choice", "argmax")),
        ] {
            assert_error(what, result, Kind::Unsupported, &["tokens", "generation 2"]);
        }
    }
}

#[test]
fn options_by_name() {
    let model = model();
    type Setter = fn(&mut GenerateOptions);
    let cases: [(&str, &str, Setter); 8] = [
        ("width", "256", |o| o.set_size(256, 128).unwrap()),
        ("height", "256", |o| o.set_size(128, 256).unwrap()),
        ("seed", "12", |o| o.set_seed(12).unwrap()),
        ("stage_c_steps", "2", |o| o.set_stage_c(2, 3.0).unwrap()),
        ("stage_c_guidance", "1.5", |o| o.set_stage_c(3, 1.5).unwrap()),
        ("stage_c_sampler", "ddim", |o| o.set_stage_c_sampler(Sampler::Ddim).unwrap()),
        ("stage_b_steps", "2", |o| o.set_stage_b(2, 2.0).unwrap()),
        ("stage_b_guidance", "1.5", |o| o.set_stage_b(3, 1.5).unwrap()),
    ];
    let plain = made(&model, |_| {});
    for (key, value, setter) in cases {
        let by_name = made(&model, |options| options.set(key, value).unwrap());
        assert_eq!(by_name.data(), made(&model, setter).data(), "{key} = {value}");
        assert_ne!(by_name.data(), plain.data(), "{key} = {value} changes nothing");
    }
}

#[test]
fn residency_changes_memory_and_not_pictures() {
    let mut options = ModelOptions::default();
    options.set("residency", "stage").unwrap();
    let stage_by_stage = Model::open(&v2("model"), &options).unwrap();
    let whole = model();
    for _ in 0..2 {
        assert_eq!(made(&stage_by_stage, |_| {}).data(), made(&whole, |_| {}).data());
    }
}

/// Half precision under its own file names, whole and in shards, gives what the same numbers give in F32.
#[test]
fn half_precision_and_shards() {
    for dtype in [Dtype::F16, Dtype::BF16] {
        let (stored, widened) = rounded(&v2("model"), &V2_PARTS, dtype);
        let wide = open(widened.path()).unwrap();
        let expected = made(&wide, |_| {});
        let check = |what: &str| {
            let model = open(stored.path()).unwrap();
            assert_eq!(made(&model, |_| {}).data(), expected.data(), "{dtype:?}, {what}");
            assert_eq!(model.info().stage_b_parameters, wide.info().stage_b_parameters);
            assert!(model.info().bytes_mapped < wide.info().bytes_mapped * 7 / 10, "{dtype:?}, {what}");
        };
        check("whole files");
        let names = V2_PARTS.map(|part| weights_of(stored.path(), part));
        let variant = |name: &str| name.replace(".safetensors", ".fp16.safetensors");
        for name in &names {
            stored.write(&variant(name), stored.read(name));
            stored.remove(name);
        }
        check("fp16 variants");
        for name in &names {
            stored.write(name, stored.read(&variant(name)));
            stored.remove(&variant(name));
        }
        V2_PARTS.iter().for_each(|part| drop(stored.shard(part)));
        check("shards");
        for name in &names {
            // As diffusers names the index of a variant's shards.
            let index = format!("{name}.index.json");
            stored.write(&name.replace(".safetensors", ".safetensors.index.fp16.json"), stored.read(&index));
            stored.remove(&index);
        }
        check("shards of fp16 variants");
        // A whole file comes before a variant: this one has other numbers.
        let other = Folder::of(stored.path());
        other.write("vqgan/diffusion_pytorch_model.safetensors", {
            let mut tensors = read_tensors(&v2("model").join("vqgan/diffusion_pytorch_model.safetensors"));
            tensors
                .iter_mut()
                .filter(|t| t.is_float() && t.name.contains("out_block"))
                .for_each(|t| t.fill(0.3));
            folder::file_of(&tensors)
        });
        assert_ne!(made(&open(other.path()).unwrap(), |_| {}).data(), expected.data());
    }
}

fn ids(model: &Model, stage: Stage, text: &str) -> Vec<i64> {
    model.tokenize(stage, text).unwrap().slice::<i64>().unwrap().to_vec()
}

const TEXTS: [&str; 6] = [
    "",
    "a photo of a cat",
    "An astronaut's HORSE, riding 42 times!",
    "  spaces \t and\nlines  ",
    "<|endoftext|> in the middle <|startoftext|>",
    "the same word again and again and again and again and again and again and again and again and again \
     and again and again and again and again and again and again and again and again and again and again",
];

/// Older folders have vocab.json and merges.txt in the place of tokenizer.json.
#[test]
fn legacy_tokenizers_give_the_same_ids() {
    let legacy = fixtures_extra("tokenizer_legacy");
    let folder = Folder::of(&v2("model"));
    for part in ["prior_tokenizer", "tokenizer"] {
        folder.link(part, &legacy);
    }
    assert!(!legacy.join("tokenizer.json").exists());
    let (old, new) = (open(folder.path()).unwrap(), model());
    for text in TEXTS {
        for stage in [Stage::C, Stage::B] {
            assert_eq!(ids(&old, stage, text), ids(&new, stage, text), "{stage:?}: {text:?}");
        }
    }
    assert_eq!(made(&old, |_| {}).data(), made(&new, |_| {}).data());
}

fn fixtures_extra(name: &str) -> std::path::PathBuf {
    common::fixtures().join("extra").join(name)
}

#[test]
fn tokenizers_say_how_long_prompts_are() {
    let limited = |part: &str, limit: serde_json::Value| {
        let folder = Folder::of(&v2("model"));
        folder.edit_json(&format!("{part}/tokenizer_config.json"), |json| json["model_max_length"] = limit);
        let model = open(folder.path());
        (folder, model)
    };
    let whole = model();
    for (part, short_one, other) in
        [("prior_tokenizer", Stage::C, Stage::B), ("tokenizer", Stage::B, Stage::C)]
    {
        let (_folder, model) = limited(part, 16.into());
        let model = model.unwrap();
        for text in TEXTS {
            let (found, long) = (ids(&model, short_one, text), ids(&whole, short_one, text));
            let eos = long[76];
            assert_eq!(found.len(), 16, "{text:?}");
            assert_eq!(found[..15], long[..15], "{text:?}");
            assert_eq!(found[15], eos, "{text:?}");
            assert_eq!(ids(&model, other, text), ids(&whole, other, text));
        }
        assert_eq!(model.encode_text(short_one, &["a cat"]).unwrap().dims()[..2], [1, 16]);
        assert_eq!(model.encode_text(other, &["a cat"]).unwrap().dims()[..2], [1, 77]);
        made(&model, |_| {});
        // No more than the tower has positions; files without a limit say 1e30.
        for limit in [78.into(), 1_000_000.into(), 1e30.into(), serde_json::Value::Null] {
            let what = format!("{part}: {limit}");
            let model = limited(part, limit).1.unwrap();
            assert_eq!(ids(&model, short_one, "a cat"), ids(&whole, short_one, "a cat"), "{what}");
        }
        for limit in [0, 1] {
            let parts = [part, "model_max_length", "at least 2", &limit.to_string()];
            assert_error(part, limited(part, limit.into()).1, Kind::Format, &parts);
        }
    }
}

/// Values at the ends of what is allowed: a picture or an error that names the options, never a panic.
#[test]
fn extreme_options() {
    let model = model();
    let extremes: [fn(&mut GenerateOptions); 12] = [
        |o| o.set_stage_c(1, 3.0).unwrap(),
        |o| o.set_stage_c(3, 1e30).unwrap(),
        |o| o.set_stage_c(3, f32::MAX).unwrap(),
        |o| o.set_stage_c(3, -f32::MAX).unwrap(),
        |o| o.set_stage_b(1, 2.0).unwrap(),
        |o| o.set_stage_b(3, 1e30).unwrap(),
        |o| o.set_stage_b(3, f32::MAX).unwrap(),
        |o| o.set_stage_b(3, -f32::MAX).unwrap(),
        |o| o.set_stage_c_timesteps(&[f32::MIN_POSITIVE, 0.0]).unwrap(),
        |o| o.set_stage_c_timesteps(&[1.0, 1.0 - f32::EPSILON, 1.0 - 2.0 * f32::EPSILON]).unwrap(),
        |o| o.set_init_latents(&Tensor::from_slice(&[1, 3, 3, 8], &[f32::MAX; 72]).unwrap(), 0.0).unwrap(),
        |o| o.set_init_latents(&Tensor::from_slice(&[1, 3, 3, 8], &[-f32::MAX; 72]).unwrap(), 0.5).unwrap(),
    ];
    for (number, change) in extremes.into_iter().enumerate() {
        for preview in [0, 1] {
            let mut options = short(&model, "a cat");
            options.set_preview(preview).unwrap();
            change(&mut options);
            match model.generate(&options) {
                Ok(images) => assert_eq!(images.len(), 1),
                Err(error) => {
                    assert!(matches!(number, 1 | 2 | 5 | 6 | 10 | 11), "{number}: {error}");
                    assert_error("extreme", Err::<(), _>(error), Kind::Argument, &["options", "guidance"]);
                }
            }
        }
    }
}
