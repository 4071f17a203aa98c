//! What v2's pictures are made of: published defaults, guidance, sizes, schedules, previews.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "common/errors.rs"]
mod errors;
#[path = "common/folder.rs"]
mod folder;
#[path = "common/v2.rs"]
mod shared;

mod common;

use errors::{Kind, assert_error};
use folder::{Folder, bare, distance, open, picture, reports, short, v2};
use shared::{Known, all_of, joined, made, model, published_times, some_latents, steps};
use wuerstchen::diffusion::latents::{ddim_step, ddpm_step};
use wuerstchen::diffusion::noise::Draw;
use wuerstchen::diffusion::schedule::{CosineSchedule, DEFAULT_OFFSET};
use wuerstchen::{Choice, GenerateOptions, Model, Sampler, Stage, Tensor};

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
        assert_ne!(samples[i].bytes().unwrap(), samples[k].bytes().unwrap(), "samples {i} and {k}");
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
        let given = some_latents(1);
        let latents = walked_by_hand(&model, c, (Stage::C, Sampler::Ddpm), &EVENLY, &given);
        walked_by_hand(&model, c, (Stage::C, Sampler::Ddim), &EVENLY, &given);
        walked_by_hand(&model, c, (Stage::C, Sampler::Ddpm), &UNEVENLY, &given);
        walked_by_hand(&model, b, (Stage::B, Sampler::Ddpm), &EVENLY, &latents);
        walked_by_hand(&model, b, (Stage::B, Sampler::Ddpm), &UNEVENLY, &latents);
        let same = made(&model, |_| {}).data() == made(&published, |_| {}).data();
        assert_eq!(same, file == "none", "{file} changes the picture");
    }
}

/// The times of four steps as a number of steps gives them, and three that no number gives.
const EVENLY: [f32; 5] = [1.0, 0.75, 0.5, 0.25, 0.0];
const UNEVENLY: [f32; 4] = [0.9, 0.6, 0.1, 0.0];

/// Checks a stage's walk against one step after the other; returns what it ends with.
fn walked_by_hand(
    model: &Model,
    schedule: CosineSchedule,
    (stage, sampler): (Stage, Sampler),
    times: &[f32],
    latents: &Tensor,
) -> Tensor {
    let text = model.encode_text(stage, &["a cat"]).unwrap();
    let mut options = bare(model);
    options.set_stage_c(4, 1.0).unwrap();
    options.set_stage_b(4, 1.0).unwrap();
    options.set_stage_c_sampler(sampler).unwrap();
    if times != EVENLY {
        options.set_stage_c_timesteps(times).unwrap();
        options.set_stage_b_timesteps(times).unwrap();
    }
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
    for (step, pair) in times.windows(2).enumerate() {
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
fn times_of_stage_b_are_for_v2_and_go_back_to_steps() {
    let of_v1 = open(&common::fixtures().join("model")).unwrap();
    let result = GenerateOptions::new(&of_v1).unwrap().set_stage_b_timesteps(&UNEVENLY);
    assert_error("v1", result, Kind::Unsupported, &["times of Stage B", "generation 1"]);
    let of_prior = open(&v2("prior")).unwrap();
    let result = bare(&of_prior).set_stage_b_timesteps(&UNEVENLY);
    assert_error("the prior alone", result, Kind::Unsupported, &["decoder_path"]);

    let model = model();
    let mut options = bare(&model);
    for times in [&[1.0][..], &[0.5, 0.5], &[0.2, 0.8], &[1.1, 0.0], &[f32::NAN, 0.0]] {
        assert_error("times", options.set_stage_b_timesteps(times), Kind::Argument, &["timesteps"]);
    }
    let uneven = made(&model, |o| o.set_stage_b_timesteps(&UNEVENLY).unwrap());
    let even = made(&model, |o| o.set_stage_b(3, 0.0).unwrap());
    assert_ne!(uneven.data(), even.data());
    for back in [
        made(&model, |o| {
            o.set_stage_b_timesteps(&UNEVENLY).unwrap();
            o.set_stage_b(3, 0.0).unwrap();
        }),
        made(&model, |o| {
            o.set_stage_b(3, 0.0).unwrap();
            o.set_stage_b_timesteps(&UNEVENLY).unwrap();
            o.set_stage_b_timesteps(&[]).unwrap();
        }),
    ] {
        assert_eq!(back.data(), even.data());
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
