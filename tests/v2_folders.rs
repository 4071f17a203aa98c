//! v2 from one folder or two, whole or in halves, and in every form that its files have.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "common/errors.rs"]
mod errors;
#[path = "common/folder.rs"]
mod folder;
#[path = "common/v2.rs"]
mod shared;

mod common;

use errors::{Kind, assert_error};
use folder::{Folder, V2_PARTS, bare, open, read_tensors, rounded, short, v2, weights_of};
use safetensors::Dtype;
use shared::{all_of, made, model, numbers, some_latents, steps};
use wuerstchen::{GenerateOptions, Image, Model, Result, Stage, Tensor};

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
        [noise.bytes().unwrap().to_vec(), latents.bytes().unwrap().to_vec()]
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
        assert_error(what, result, Kind::Unsupported, &["decoding latents", "decoder_path"]);
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
fn residency_changes_memory_and_not_pictures() {
    let mut options = common::options();
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
