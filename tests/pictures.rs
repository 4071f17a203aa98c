//! What pictures are made of: initial pictures, masks, sizes, prompts, options, reports, and weights of every type.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "common/folder.rs"]
mod folder;

mod common;

use common::Case;
use folder::{PARTS, bare, distance, emoji, open, picture, reports, rounded, short, tiny};
use safetensors::Dtype;
use wuerstchen::diffusion::latents::{ddim_step, ddpm_step};
use wuerstchen::diffusion::schedule::{CosineSchedule, linspace};
use wuerstchen::image::from_pixels;
use wuerstchen::nn::Mode;
use wuerstchen::pipeline::load;
use wuerstchen::stages::blocks::Conditioning;
use wuerstchen::{Choice, Error, GenerateOptions, Image, Model, Sampler, Stage, Tensor};

const WHITE: [u8; 3] = [255, 255, 255];
const RED: [u8; 3] = [220, 30, 30];

/// A disc in the middle, with a radius of a third of the shorter side.
fn disc(width: u32, height: u32, colour: [u8; 3], ground: [u8; 3]) -> Image {
    Image::build(width, height, |rgb| {
        let radius = f64::from(width.min(height)) / 3.0;
        for (i, pixel) in rgb.chunks_exact_mut(3).enumerate() {
            let x = (i as u32 % width) as f64 + 0.5 - f64::from(width) / 2.0;
            let y = (i as u32 / width) as f64 + 0.5 - f64::from(height) / 2.0;
            pixel.copy_from_slice(if x.hypot(y) < radius { &colour } else { &ground });
        }
    })
    .unwrap()
}

/// White to the right of `edge`, black to the left.
fn right_half(width: u32, height: u32, edge: u32) -> Image {
    Image::build(width, height, |rgb| {
        for (i, pixel) in rgb.chunks_exact_mut(3).enumerate() {
            pixel.fill(if i as u32 % width < edge { 0 } else { 255 });
        }
    })
    .unwrap()
}

fn means(image: &Image) -> [f64; 3] {
    let mut sums = [0.0; 3];
    for pixel in image.data().chunks_exact(3) {
        sums.iter_mut().zip(pixel).for_each(|(sum, v)| *sum += f64::from(*v));
    }
    sums.map(|sum| sum / f64::from(image.width() * image.height()))
}

fn argument(error: Error, parts: &[&str]) {
    assert!(matches!(error, Error::InvalidArgument { .. }), "{error:?}");
    let text = error.to_string();
    for part in parts {
        assert!(text.contains(part), "no {part:?} in: {text}");
    }
}

/// The trained model brings a picture through its latents and back.
#[test]
fn a_variation_resembles_its_picture() {
    let model = open(&emoji()).unwrap();
    for (width, height) in [(128, 128), (160, 96)] {
        let original = disc(width, height, RED, WHITE);
        let latents = model.encode_image(&[&original]).unwrap();
        let mut options = GenerateOptions::new(&model).unwrap();
        options.set_size(width, height).unwrap();
        let text = model.encode_text(Stage::B, &["a red circle"]).unwrap();
        let tokens = model.stage_b_sample(&latents, &text, None, &options).unwrap();
        let pixels = model.stage_a_decode(&tokens).unwrap();
        let varied = from_pixels(&pixels).unwrap();
        let (found, expected) = (means(&varied), means(&original));
        for (found, expected) in found.iter().zip(expected) {
            assert!((found - expected).abs() < 25.0, "{width} x {height}: {found:.0} for {expected:.0}");
        }
        let blue = disc(width, height, [30, 30, 220], WHITE);
        assert!(distance(&varied, &original) < distance(&varied, &blue), "{width} x {height}");

        // The same through a generation that keeps everything.
        options.add_prompt("a red circle", None).unwrap();
        options.set_init_image(&original, 0.0).unwrap();
        assert_eq!(picture(&model, &options).data(), varied.data(), "strength 0 only decodes");
    }
}

/// Stage A alone, whose tokens were learned on such pictures, keeps more.
#[test]
fn stage_a_brings_a_picture_back() {
    let model = open(&emoji()).unwrap();
    let originals = [disc(64, 96, RED, WHITE), disc(64, 96, [40, 60, 200], WHITE)];
    let tokens = model.stage_a_encode(&[&originals[0], &originals[1]]).unwrap();
    assert_eq!(tokens.dims(), [2, 24, 16]);
    let pixels = model.stage_a_decode(&tokens).unwrap();
    for (i, original) in originals.iter().enumerate() {
        let found = from_pixels(&pixels.narrow(i, 1).unwrap()).unwrap();
        assert!(distance(&found, original) < 12.0, "{}", distance(&found, original));
    }
    argument(model.stage_a_encode(&[&disc(66, 64, RED, WHITE)]).unwrap_err(), &["66"]);
    argument(model.stage_a_encode(&[]).unwrap_err(), &["images", "at least one"]);
    let sizes = [&originals[0], &disc(64, 64, RED, WHITE)];
    argument(model.stage_a_encode(&sizes).unwrap_err(), &["64 x 96", "64 x 64"]);
    argument(model.encode_image(&sizes).unwrap_err(), &["64 x 96", "64 x 64"]);
}

#[test]
fn strength_says_how_much_is_kept() {
    let model = open(&emoji()).unwrap();
    let original = disc(128, 128, RED, WHITE);
    let with = |strength: f32, seed: u64| {
        let mut options = short(&model, "a green tree");
        options.set_stage_c(10, 3.0).unwrap();
        options.set_seed(seed).unwrap();
        options.set_init_image(&original, strength).unwrap();
        options
    };
    let mean_distance = |strength: f32| -> f64 {
        (0..4).map(|seed| distance(&picture(&model, &with(strength, seed)), &original)).sum::<f64>() / 4.0
    };
    let (none, half, all) = (mean_distance(0.0), mean_distance(0.5), mean_distance(1.0));
    assert!(none < half && half < all, "{none:.1} {half:.1} {all:.1}");
    // A share of the steps, at least one.
    for (strength, expected) in [(0.01, 1), (0.5, 5), (1.0, 10)] {
        let steps = reports(&model, with(strength, 0)).iter().filter(|p| p.stage == Stage::C).count();
        assert_eq!(steps, expected, "strength {strength}");
    }
    // Sizes that are not the picture's: it is stretched.
    let mut options = with(0.5, 0);
    options.set_size(64, 96).unwrap();
    let image = picture(&model, &options);
    assert_eq!((image.width(), image.height()), (64, 96));
    for strength in [-0.1, 1.1, f32::NAN, f32::INFINITY] {
        argument(options.set_init_image(&original, strength).unwrap_err(), &["strength", "from 0 to 1"]);
    }
}

#[test]
fn a_mask_keeps_what_is_black() {
    let model = open(&emoji()).unwrap();
    let original = disc(128, 128, RED, WHITE);
    let mask = right_half(128, 128, 50);
    let mut options = short(&model, "a green tree");
    options.set_stage_c(6, 3.0).unwrap();
    options.set_mask(&mask).unwrap();
    argument(model.generate(&options).unwrap_err(), &["mask", "initial"]);
    options.set_init_image(&original, 1.0).unwrap();
    options.set_images_per_prompt(2).unwrap();
    for image in model.generate(&options).unwrap() {
        let pixels = image.data().chunks_exact(3).zip(original.data().chunks_exact(3));
        let mut changed = 0;
        for (i, (found, original)) in pixels.enumerate() {
            if i % 128 < 50 {
                assert_eq!(found, original, "pixel {i} was to be kept");
            } else {
                changed += u32::from(found != original);
            }
        }
        assert!(changed > 128 * 78 / 4, "{changed} pixels changed");
    }
    // All black gives the picture itself; a mask of another size is brought to this one.
    for (width, height) in [(128, 128), (20, 40)] {
        options.set_mask(&right_half(width, height, width)).unwrap();
        for image in model.generate(&options).unwrap() {
            assert_eq!(image.data(), original.data());
        }
    }
    // All white keeps nothing: the walk is that of no picture.
    options.set_mask(&right_half(128, 128, 0)).unwrap();
    let found = model.generate(&options).unwrap();
    let mut free = short(&model, "a green tree");
    free.set_stage_c(6, 3.0).unwrap();
    free.set_images_per_prompt(2).unwrap();
    for (found, expected) in found.iter().zip(model.generate(&free).unwrap()) {
        assert_eq!(found.data(), expected.data());
    }
}

/// Stage calls take their grid from the tensors: it must be that of the initial picture, if there is one.
#[test]
fn noise_of_another_grid_than_the_picture_is_an_error() {
    let model = open(&tiny()).unwrap();
    let text = model.encode_text(Stage::C, &["a cat"]).unwrap();
    let mut options = short(&model, "a cat");
    let noise = Tensor::from_slice(&[1, 5, 2, 8], &[0.5f32; 80]).unwrap();
    let free = model.stage_c_sample(&text, None, Some(&noise), &options).unwrap();
    assert_eq!(free.dims(), [1, 5, 2, 8]);
    options.set_init_image(&disc(64, 64, RED, WHITE), 0.5).unwrap();
    argument(model.stage_c_sample(&text, None, Some(&noise), &options).unwrap_err(), &["5", "2", "3"]);
    options.set_mask(&right_half(64, 64, 32)).unwrap();
    argument(model.stage_c_sample(&text, None, Some(&noise), &options).unwrap_err(), &["5", "2", "3"]);
}

#[test]
fn stage_calls_refuse_what_does_not_fit() {
    let model = open(&tiny()).unwrap();
    let options = short(&model, "a cat");
    let floats = |dims: &[usize]| Tensor::from_slice(dims, &vec![0.5f32; dims.iter().product()]).unwrap();
    let tokens =
        |dims: &[usize], token: i64| Tensor::from_slice(dims, &vec![token; dims.iter().product()]).unwrap();
    let text = model.encode_text(Stage::C, &["a cat", "a dog"]).unwrap();
    let one = model.encode_text(Stage::C, &["a cat"]).unwrap();
    let (latents, t) = (floats(&[2, 3, 3, 8]), floats(&[2]));
    assert!(model.stage_c_predict(&latents, &t, &text).is_ok());
    let refused = |what: &str, result: wuerstchen::Result<Tensor>| match result {
        Err(Error::InvalidArgument { .. }) => {}
        other => panic!("{what}: {other:?}"),
    };
    let c = |what, x: &Tensor, t: &Tensor, text: &Tensor| refused(what, model.stage_c_predict(x, t, text));
    c("channels", &floats(&[2, 3, 3, 7]), &t, &text);
    c("rank", &floats(&[2, 3, 8]), &t, &text);
    c("no rows", &floats(&[2, 0, 3, 8]), &t, &text);
    c("no samples", &floats(&[0, 3, 3, 8]), &floats(&[0]), &floats(&[0, 77, 24]));
    c("type", &tokens(&[2, 3, 3, 8], 0), &t, &text);
    c("texts", &latents, &t, &one);
    c("text width", &latents, &t, &floats(&[2, 77, 23]));
    c("times", &latents, &floats(&[1]), &text);
    c("type of times", &latents, &tokens(&[2], 0), &text);
    for time in [-0.1, 1.1, f32::NAN] {
        c("time", &latents, &Tensor::from_slice(&[2], &[0.5, time]).unwrap(), &text);
    }
    let x = tokens(&[2, 8, 8], 63);
    assert!(model.stage_b_predict(&x, &t, &latents, &text).is_ok());
    let b = |what, x: &Tensor, latents: &Tensor| refused(what, model.stage_b_predict(x, &t, latents, &text));
    b("grid", &tokens(&[2, 8, 6], 0), &latents);
    b("no grid", &tokens(&[2, 0, 8], 0), &latents);
    b("a token", &tokens(&[2, 8, 8], 64), &latents);
    b("a negative token", &tokens(&[2, 8, 8], -1), &latents);
    b("floats", &floats(&[2, 8, 8]), &latents);
    b("latents", &x, &floats(&[1, 3, 3, 8]));
    b("latent channels", &x, &floats(&[2, 3, 3, 9]));
    let sample = |text: &Tensor, negative: Option<&Tensor>, noise: Option<&Tensor>| {
        model.stage_c_sample(text, negative, noise, &options)
    };
    assert!(sample(&text, Some(&one), None).is_ok());
    refused("negatives", sample(&text, Some(&floats(&[3, 77, 24])), None));
    refused("no texts", sample(&floats(&[0, 77, 24]), None, None));
    refused("no texts", sample(&floats(&[0, 77, 24]), Some(&one), None));
    refused("noise", sample(&text, None, Some(&floats(&[1, 3, 3, 8]))));
    refused("noise", sample(&text, None, Some(&floats(&[2, 3, 3, 4]))));
    refused("no noise", sample(&text, None, Some(&floats(&[2, 0, 3, 8]))));
    refused("no latents", model.stage_b_sample(&floats(&[0, 3, 3, 8]), &text, None, &options));
    refused("texts", model.stage_b_sample(&latents, &one, None, &options));
    refused("a token", model.stage_a_decode(&tokens(&[1, 4, 4], 64)));
    refused("no tokens", model.stage_a_decode(&tokens(&[1, 0, 4], 0)));
    refused("channels", model.stage_a_decode(&floats(&[1, 4, 4, 5])));
    refused("a type", model.stage_a_decode(&Tensor::from_slice(&[1, 4, 4, 4], &[0u8; 64]).unwrap()));
    refused("stage", model.encode_text(Stage::A, &["a cat"]));
    refused("texts", model.encode_text(Stage::C, &[]));
    // Texts of other lengths than the model's own are as good.
    let short = floats(&[2, 5, 24]);
    assert!(sample(&short, Some(&one), None).is_ok() && sample(&short, None, None).is_ok());
    assert!(model.stage_b_sample(&latents, &short, Some(&one), &options).is_ok());
}

#[test]
fn any_size_that_the_stages_divide() {
    for (path, sizes) in [
        (tiny(), vec![(16, 16), (16, 128), (272, 16), (48, 80), (112, 96)]),
        (emoji(), vec![(16, 16), (16, 64), (80, 48), (144, 112)]),
    ] {
        let model = open(&path).unwrap();
        for (width, height) in sizes {
            let mut options = short(&model, "a cat");
            options.set_size(width, height).unwrap();
            options.set_preview(1).unwrap();
            let image = picture(&model, &options);
            assert_eq!((image.width(), image.height()), (width, height));
            options.set_init_image(&disc(31, 57, RED, WHITE), 0.5).unwrap();
            options.set_mask(&right_half(5, 3, 2)).unwrap();
            picture(&model, &options);
        }
        let mut options = short(&model, "a cat");
        let before = picture(&model, &options);
        for side in [0, 1, 8, 15, 17, 100, 4097, u32::MAX] {
            argument(
                options.set_size(side, 64).unwrap_err(),
                &["width", "multiple of 16", &side.to_string()],
            );
            argument(
                options.set_size(64, side).unwrap_err(),
                &["height", "multiple of 16", &side.to_string()],
            );
        }
        for (width, height) in [(4096, 4112), (16, 1 << 24), (1 << 31, 1 << 31), (u32::MAX - 15, 16)] {
            argument(options.set_size(width, height).unwrap_err(), &["16777216"]);
        }
        assert_eq!(picture(&model, &options).data(), before.data(), "a refused size changes nothing");
        options.set_size(4096, 4096).unwrap();
    }
}

/// Without guidance Stage C is its conditional prediction and the sampler's step, nothing else.
#[test]
fn guidance_of_one_is_no_guidance() {
    let model = open(&tiny()).unwrap();
    let text = model.encode_text(Stage::C, &["a cat"]).unwrap();
    let dims = [1, 3, 3, 8];
    let noise: Vec<f32> = (0..72).map(|i| ((i * 29 % 71) as f32 - 35.0) / 20.0).collect();
    let start = Tensor::from_slice(&dims, &noise).unwrap();
    let schedule = CosineSchedule::default();
    for (sampler, steps) in [(Sampler::Ddim, 4), (Sampler::Ddpm, 1)] {
        let mut options = short(&model, "a cat");
        options.set_stage_c(steps, 1.0).unwrap();
        options.set_stage_c_sampler(sampler).unwrap();
        let found = model.stage_c_sample(&text, None, Some(&start), &options).unwrap();
        let mut x = noise.clone();
        for pair in linspace(1.0, 0.0, steps as usize).windows(2) {
            let t = Tensor::from_slice(&[1], &[pair[0]]).unwrap();
            let sample = Tensor::from_slice(&dims, &x).unwrap();
            let predicted = model.stage_c_predict(&sample, &t, &text).unwrap();
            let (now, next) = (schedule.alpha_bar(pair[0]), schedule.alpha_bar(pair[1]));
            match sampler {
                Sampler::Ddim => ddim_step(&mut x, predicted.slice().unwrap(), now, next),
                Sampler::Ddpm => ddpm_step(&mut x, predicted.slice().unwrap(), None, now, next),
            }
        }
        assert_eq!(found.slice::<f32>().unwrap(), x, "{sampler:?}");
    }
    // And what one would be guided away from has no say, while with guidance it has.
    let with = |guidance: f32, negative: Option<&str>| {
        let mut options = bare(&model);
        options.set_stage_c(3, guidance).unwrap();
        options.set_stage_b(3, guidance).unwrap();
        options.add_prompt("a cat", negative).unwrap();
        picture(&model, &options)
    };
    assert_eq!(with(1.0, Some("a dog")).data(), with(1.0, None).data());
    assert_ne!(with(3.0, Some("a dog")).data(), with(3.0, None).data());
    assert_eq!(with(3.0, Some("")).data(), with(3.0, None).data());
    assert_ne!(with(3.0, None).data(), with(1.0, None).data());
    // Guided away from itself is not guided.
    let text = model.encode_text(Stage::C, &["a cat"]).unwrap();
    let latents = |guidance: f32, negative: Option<&Tensor>| {
        let mut options = bare(&model);
        options.set_stage_c(2, guidance).unwrap();
        model.stage_c_sample(&text, negative, Some(&start), &options).unwrap()
    };
    assert_eq!(latents(5.0, Some(&text)).bytes().unwrap(), latents(1.0, None).bytes().unwrap());
}

#[test]
fn timesteps_replace_steps() {
    let model = open(&tiny()).unwrap();
    let mut options = short(&model, "a cat");
    options.set_stage_c(5, 3.0).unwrap();
    let expected = picture(&model, &options);
    options.set_stage_c_timesteps(&linspace(1.0, 0.0, 5)).unwrap();
    assert_eq!(picture(&model, &options).data(), expected.data());
    options.set_stage_c_timesteps(&[1.0, 0.0]).unwrap();
    let two = picture(&model, &options);
    assert_ne!(two.data(), expected.data());
    options.set_stage_c(1, 3.0).unwrap();
    assert_eq!(picture(&model, &options).data(), two.data(), "one step");
    options.set_stage_c_timesteps(&[0.8, 0.3]).unwrap();
    assert_ne!(picture(&model, &options).data(), two.data());
    options.set_stage_c_timesteps(&[]).unwrap();
    assert_eq!(picture(&model, &options).data(), two.data(), "an empty list goes back");
    for times in [
        &[1.0][..],
        &[0.0, 1.0],
        &[0.5, 0.5],
        &[1.1, 0.0],
        &[1.0, -0.1],
        &[1.0, f32::NAN, 0.0],
        &[f32::NAN, f32::NAN],
        &[f32::INFINITY, 0.0],
    ] {
        argument(options.set_stage_c_timesteps(times).unwrap_err(), &["timesteps"]);
    }
    let many: Vec<f32> = linspace(1.0, 0.0, 10_001);
    argument(options.set_stage_c_timesteps(&many).unwrap_err(), &["10000", "10001"]);
}

#[test]
fn progress_counts_every_step() {
    let model = open(&emoji()).unwrap();
    // One batch: all of Stage C, all of Stage B, all of Stage A.
    let mut options = short(&model, "a cat");
    options.set_images_per_prompt(2).unwrap();
    let heard = reports(&model, options.clone());
    let found: Vec<_> = heard.iter().map(|p| (p.stage, p.step, p.steps)).collect();
    let (a, b, c) = (Stage::A, Stage::B, Stage::C);
    let expected = [(c, 1, 3), (c, 2, 3), (c, 3, 3), (b, 1, 3), (b, 2, 3), (b, 3, 3), (a, 1, 2), (a, 2, 2)];
    assert_eq!(found, expected);
    assert!(heard.windows(2).all(|pair| pair[0].seconds <= pair[1].seconds));
    assert!(heard.iter().all(|p| p.preview.is_none()), "nobody asked for previews");

    // Previews when they are due, as large as the picture.
    for every in [1, 2, 3, 100] {
        options.set_preview(every).unwrap();
        options.set_size(96, 64).unwrap();
        for p in reports(&model, options.clone()) {
            let due = p.stage != a && p.step % every == 0;
            assert_eq!(p.preview.is_some(), due, "every {every}: {:?} {}", p.stage, p.step);
            if let Some(preview) = p.preview {
                assert_eq!((preview.width(), preview.height()), (96, 64));
            }
        }
    }

    // Several batches of Stage B: each stage counts on, and ends with its last step.
    options.set_preview(0).unwrap();
    options.set_size(256, 256).unwrap();
    options.set_stage_b(2, 2.0).unwrap();
    options.set_images_per_prompt(6).unwrap();
    let heard = reports(&model, options);
    for stage in [a, b, c] {
        let steps: Vec<_> = heard.iter().filter(|p| p.stage == stage).map(|p| (p.step, p.steps)).collect();
        let last = steps.len() as u32;
        let expected: Vec<_> = (1..=last).map(|step| (step, last)).collect();
        assert_eq!(steps, expected, "{stage:?}");
    }
    assert_eq!(heard.iter().filter(|p| p.stage == a).count(), 6);
}

#[test]
fn the_last_preview_shows_the_picture() {
    let model = open(&emoji()).unwrap();
    let mut options = short(&model, "a red apple");
    options.set_stage_c(8, 3.0).unwrap();
    options.set_preview(1).unwrap();
    let image = picture(&model, &options);
    let heard = reports(&model, options);
    let preview = |stage: Stage| heard.iter().rev().find(|p| p.stage == stage).unwrap().preview.clone();
    assert_eq!(preview(Stage::B).unwrap().data(), image.data(), "Stage B's last tokens are the picture's");
    assert!(distance(&preview(Stage::C).unwrap(), &image) < 40.0);
}

/// Every key of `set` does what the setter of that name does.
#[test]
fn options_by_name() {
    let model = open(&tiny()).unwrap();
    type Setter = fn(&mut GenerateOptions);
    let cases: [(&str, &str, Setter); 16] = [
        ("prompt", "a second one", |o| o.add_prompt("a second one", None).unwrap()),
        ("images_per_prompt", "2", |o| o.set_images_per_prompt(2).unwrap()),
        ("width", "48", |o| o.set_size(48, 64).unwrap()),
        ("height", " 80 ", |o| o.set_size(64, 80).unwrap()),
        ("seed", "18446744073709551615", |o| o.set_seed(u64::MAX).unwrap()),
        ("stage_c_steps", "2", |o| o.set_stage_c(2, 3.0).unwrap()),
        ("stage_c_guidance", "1.5", |o| o.set_stage_c(3, 1.5).unwrap()),
        ("stage_c_sampler", "ddim", |o| o.set_stage_c_sampler(Sampler::Ddim).unwrap()),
        ("stage_c_sampler", "ddpm", |o| o.set_stage_c_sampler(Sampler::Ddpm).unwrap()),
        ("stage_b_steps", "2", |o| o.set_stage_b(2, 2.0).unwrap()),
        ("stage_b_guidance", "-0.5", |o| o.set_stage_b(3, -0.5).unwrap()),
        ("stage_b_temperature", "2, 0.1", |o| o.set_stage_b_temperature(2.0, 0.1).unwrap()),
        ("stage_b_temperature", "3", |o| o.set_stage_b_temperature(3.0, 3.0).unwrap()),
        ("stage_b_choice", "argmax", |o| o.set_stage_b_choice(Choice::Argmax).unwrap()),
        ("stage_b_choice", "quant", |o| o.set_stage_b_choice(Choice::Quant).unwrap()),
        ("stage_b_choice", "multinomial", |o| o.set_stage_b_choice(Choice::Multinomial).unwrap()),
    ];
    let make = |change: &dyn Fn(&mut GenerateOptions)| {
        let mut options = short(&model, "a cat");
        change(&mut options);
        let images = model.generate(&options).unwrap();
        images.iter().map(|i| (i.width(), i.height(), i.data().to_vec())).collect::<Vec<_>>()
    };
    let unchanged = make(&|_| {});
    for (key, value, setter) in cases {
        let by_name = make(&|options| options.set(key, value).unwrap());
        assert!(by_name == make(&|options| setter(options)), "{key} = {value}");
        let same = matches!(value, "ddpm" | "multinomial");
        assert_eq!(by_name == unchanged, same, "{key} = {value} changes the picture");
    }
    let mut options = short(&model, "a cat");
    options.set("preview", "2").unwrap();
    let previews = reports(&model, options.clone()).iter().filter(|p| p.preview.is_some()).count();
    assert_eq!(previews, 2);
    for (key, value) in [
        ("images_per_prompt", "0"),
        ("images_per_prompt", "5000"),
        ("width", "50"),
        ("height", "-64"),
        ("seed", "-1"),
        ("seed", "18446744073709551616"),
        ("stage_c_steps", "0"),
        ("stage_c_steps", "10001"),
        ("stage_c_guidance", "nan"),
        ("stage_c_guidance", "inf"),
        ("stage_c_guidance", "1e39"),
        ("stage_c_sampler", "DDIM"),
        ("stage_b_steps", "2.5"),
        ("stage_b_guidance", "-inf"),
        ("stage_b_temperature", "0"),
        ("stage_b_temperature", "1,0"),
        ("stage_b_temperature", "1,"),
        ("stage_b_temperature", "-1"),
        ("stage_b_choice", ""),
        ("preview", "often"),
    ] {
        let error = options.set(key, value).unwrap_err();
        assert!(matches!(error, Error::InvalidArgument { .. }), "{key} = {value}: {error}");
        let text = error.to_string();
        let named = text.contains(key) || text.contains(&key.replace("_per_prompt", ""));
        assert!(named || text.contains("temperature"), "{key} = {value}: {text}");
    }
    let text = options.set("stage_c", "1").unwrap_err().to_string();
    for key in cases.map(|case| case.0) {
        assert!(text.contains(key), "{key} is not in: {text}");
    }
    let mut model_options = common::options();
    for (key, value) in [("device", "cpu"), ("threads", "2"), ("compute_dtype", "f32"), ("residency", "all")]
    {
        model_options.set(key, value).unwrap();
        assert!(model_options.set(key, "nonsense").unwrap_err().to_string().contains("nonsense"), "{key}");
    }
    let stage_by_stage = {
        model_options.set("residency", "stage").unwrap();
        let model = Model::open(&tiny(), &model_options).unwrap();
        picture(&model, &short(&model, "a cat"))
    };
    assert_eq!(stage_by_stage.data(), unchanged[0].2, "residency changes memory, not pictures");
}

#[test]
fn prompts_of_every_kind() {
    let strange = [
        String::new(),
        "   \n\t ".into(),
        "word ".repeat(2000),
        "x".repeat(10_000),
        "一只可爱的猫坐在沙发上".into(),
        "🍎🐱👩‍👩‍👧‍👦 emoji".into(),
        "<|endoftext|><|startoftext|> <|endoftext|>".into(),
        "\0\u{1}\u{7f}\u{fffd}\u{202e}".into(),
        "e\u{301}".repeat(50),
        "'s 't 're \"quoted\" $5 @home/_x".into(),
    ];
    let model = open(&emoji()).unwrap();
    let mut options = bare(&model);
    options.set_stage_c(1, 3.0).unwrap();
    options.set_stage_b(1, 2.0).unwrap();
    options.set_size(32, 32).unwrap();
    for text in &strange {
        // As a prompt, and as what to avoid.
        options.add_prompt(text, Some(text)).unwrap();
        let ids = model.tokenize(Stage::C, text).unwrap();
        assert_eq!(ids.dims(), [32], "{text:.20}");
    }
    assert_eq!(model.generate(&options).unwrap().len(), strange.len());
    // A long prompt is its beginning.
    let ids = |text: &str| model.tokenize(Stage::C, text).unwrap().slice::<i64>().unwrap().to_vec();
    assert_eq!(ids(&"word ".repeat(2000)), ids(&"word ".repeat(40)));
    // The reference's tokenizer cannot spell all of them: an error that says what, and no panic.
    let model = open(&tiny()).unwrap();
    for text in &strange {
        match model.generate(&short(&model, text)) {
            Ok(images) => assert_eq!(images.len(), 1),
            Err(error) => argument(error, &["prompt", "vocabulary", "tokenizer.json"]),
        }
    }
    let mut options = short(&model, "a cat");
    let long = "x".repeat((1 << 20) + 1);
    argument(options.add_prompt(&long, None).unwrap_err(), &["prompt", "1048576", "1048577"]);
    argument(options.add_prompt("a", Some(&long)).unwrap_err(), &["negative prompt", "1048577"]);
    options.set_images_per_prompt(4096).unwrap();
    argument(options.add_prompt("a", None).unwrap_err(), &["4096", "8192"]);
    argument(options.set_images_per_prompt(u32::MAX).unwrap_err(), &["4096"]);
}

/// Values at the ends of what is allowed: a picture or an error that names the options, never a panic.
#[test]
fn extreme_options() {
    let model = open(&tiny()).unwrap();
    let extremes: [fn(&mut GenerateOptions); 14] = [
        |o| o.set_stage_c(1, 3.0).unwrap(),
        |o| o.set_stage_c(3, 1e30).unwrap(),
        |o| o.set_stage_c(3, f32::MAX).unwrap(),
        |o| o.set_stage_c(3, -f32::MAX).unwrap(),
        |o| o.set_stage_b(1, 2.0).unwrap(),
        |o| o.set_stage_b(3, 1e30).unwrap(),
        |o| o.set_stage_b(3, f32::MAX).unwrap(),
        |o| o.set_stage_b(3, -f32::MAX).unwrap(),
        |o| o.set_stage_b_temperature(1e-30, 1e-30).unwrap(),
        |o| o.set_stage_b_temperature(1e30, 1e30).unwrap(),
        |o| o.set_stage_b_temperature(f32::MAX, f32::MIN_POSITIVE).unwrap(),
        |o| o.set_stage_b_temperature(f32::MIN_POSITIVE, f32::MAX).unwrap(),
        |o| o.set_stage_c_timesteps(&[f32::MIN_POSITIVE, 0.0]).unwrap(),
        |o| o.set_stage_c_timesteps(&[1.0, 1.0 - f32::EPSILON, 1.0 - 2.0 * f32::EPSILON]).unwrap(),
    ];
    for (number, change) in extremes.into_iter().enumerate() {
        for choice in [Choice::Multinomial, Choice::Argmax, Choice::Quant] {
            let mut options = short(&model, "a cat");
            options.set_stage_b_choice(choice).unwrap();
            change(&mut options);
            match model.generate(&options) {
                Ok(images) => assert_eq!(images.len(), 1),
                Err(error) => {
                    assert!((1..=7).contains(&number), "{number}, {choice:?}: {error}");
                    argument(error, &["options", "guidance"]);
                }
            }
        }
    }
    // The limit of a low temperature is the largest logit.
    let with = |choice: Choice, temperature: f32| {
        let mut options = short(&model, "a cat");
        options.set_stage_b_choice(choice).unwrap();
        options.set_stage_b_temperature(temperature, temperature).unwrap();
        picture(&model, &options).data().to_vec()
    };
    assert_eq!(with(Choice::Multinomial, 1e-30), with(Choice::Argmax, 1.0));
    assert_eq!(with(Choice::Multinomial, f32::MIN_POSITIVE), with(Choice::Argmax, 1.0));
    let mut options = short(&model, "a cat");
    // Its inverse is no number.
    argument(options.set_stage_b_temperature(1e-40, 1.0).unwrap_err(), &["temperature start"]);
    argument(options.set_stage_b_temperature(1.0, 1e-40).unwrap_err(), &["temperature end"]);
    for value in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        argument(options.set_stage_b_temperature(value, 1.0).unwrap_err(), &["temperature start"]);
    }
}

/// What every network makes of the reference's inputs: name, output and what the reference made of them.
fn outputs(folder: &std::path::Path) -> Vec<(&'static str, Tensor, Vec<f32>)> {
    let cx = common::context();
    let mut outputs = Vec::new();
    let mut push = |name: &'static str, found: Tensor, case: &Case, recorded: &str, turned: bool| {
        let (shape, values) = (case.shape(recorded), case.floats(recorded));
        let expected = if turned { common::channels_last(shape, values).1 } else { values.to_vec() };
        outputs.push((name, found, expected));
    };
    let case = Case::read("text_encoder");
    let text = load::text_encoder(&folder.join("text_encoder")).unwrap().network;
    let hidden = text.forward(&cx, &case.tokens("ids"), None).unwrap();
    push("text encoder", hidden, &case, "nomask.last_hidden_state", false);

    let case = Case::read("image_encoder");
    let encoder = load::image_encoder(&folder.join("image_encoder")).unwrap().encoder.network;
    push(
        "image encoder",
        encoder.forward(&cx, &case.image("x"), Mode::Inference).unwrap(),
        &case,
        "out",
        true,
    );

    let case = Case::read("stage_a");
    let stage_a = load::stage_a(&folder.join("stage_a")).unwrap().network;
    let encoded = stage_a.encode(&cx, &case.image("image"), Mode::Inference).unwrap();
    push("stage A, encoder", encoded, &case, "pre_scale_latents", true);
    let decoded = stage_a.decode_tokens(&cx, &case.tokens("rand_indices")).unwrap();
    push("stage A, decoder", decoded, &case, "decoded_indices", true);

    let case = Case::read("stage_b_forward");
    let stage_b = load::stage_b(&folder.join("stage_b")).unwrap().network;
    let attended = [
        stage_b.attend_to_latents(&cx, &case.image("0.effnet")).unwrap(),
        stage_b.attend_to_text(&cx, &case.tensor("0.byt5")).unwrap(),
    ];
    let modulations = stage_b.modulations(&cx, case.floats("0.r")).unwrap();
    let conditioning = Conditioning { modulations: &modulations, attended: &attended };
    let features = stage_b.features(&cx, &case.tokens("0.tokens"), conditioning).unwrap();
    push("stage B", stage_b.logits(&cx, &features).unwrap(), &case, "0.logits", true);

    let case = Case::read("stage_c_forward");
    let stage_c = load::stage_c(&folder.join("stage_c")).unwrap().network;
    let attended = [stage_c.attend_to_text(&cx, &case.tensor("0.c")).unwrap()];
    let modulations = stage_c.modulations(&cx, case.floats("0.r")).unwrap();
    let conditioning = Conditioning { modulations: &modulations, attended: &attended };
    let noise = stage_c.forward(&cx, &case.image("0.x"), conditioning).unwrap();
    push("stage C", noise, &case, "0.noise", true);
    outputs
}

/// Weights stay in the type of their file, and give exactly what the same numbers give in F32.
#[test]
fn weights_of_every_type() {
    // What rounding the weights alone may change: a few times half the last place of their mantissas.
    for (dtype, tolerance) in [(Dtype::F32, 2e-5), (Dtype::F16, 2e-3), (Dtype::BF16, 2e-2)] {
        let (stored, widened) = rounded(&tiny(), &PARTS, dtype);
        let reference = outputs(widened.path());
        for ((name, found, expected), (_, wide, _)) in outputs(stored.path()).iter().zip(&reference) {
            assert_eq!(
                found.bytes().unwrap(),
                wide.bytes().unwrap(),
                "{name} in {dtype:?}: not what the numbers give in F32"
            );
            let error = common::relative_error(found.slice().unwrap(), expected);
            println!("{name} in {dtype:?}: {error:.1e}");
            // A chain of convolutions without a residual path around most of them passes on more.
            let tolerance = if *name == "image encoder" { 3.0 * tolerance } else { tolerance };
            assert!(error < tolerance, "{name} in {dtype:?}: {error:.1e} > {tolerance:.0e}");
        }
        let [half, wide] = [&stored, &widened].map(|folder| open(folder.path()).unwrap());
        let found = picture(&half, &short(&half, "a cat"));
        assert_eq!(found.data(), picture(&wide, &short(&wide, "a cat")).data(), "{dtype:?}");
        if dtype != Dtype::F32 {
            assert!(half.info().bytes_mapped < wide.info().bytes_mapped * 6 / 10);
        }
    }
}
