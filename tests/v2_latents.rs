//! v2 from latents and pictures at hand: variation, the middle of the walk, masks.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "common/errors.rs"]
mod errors;
#[path = "common/folder.rs"]
mod folder;
#[path = "common/v2.rs"]
mod shared;

mod common;

use errors::{Kind, assert_error};
use folder::{Folder, bare, open, short, tiny, v2};
use shared::{Known, all_of, joined, made, model, numbers, published_times, some_latents, steps};
use wuerstchen::diffusion::latents::{ddpm_step, diffuse};
use wuerstchen::diffusion::noise::Draw;
use wuerstchen::diffusion::schedule::CosineSchedule;
use wuerstchen::{GenerateOptions, Image, Stage, Tensor};

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
    assert_eq!(
        model.stage_c_sample(&text, None, None, &options).unwrap().bytes().unwrap(),
        given.bytes().unwrap()
    );

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
    assert_eq!(both.encode_image(&[&original]).unwrap().bytes().unwrap(), latents.bytes().unwrap());
}
