//! v2 folders with one thing wrong in them: an error that names the thing, what was expected and what was found.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "common/damage.rs"]
mod damage;
#[path = "common/errors.rs"]
mod errors;
#[path = "common/folder.rs"]
mod folder;

use std::path::Path;

use damage::{check_refused, complaint};
use errors::{Kind, assert_error};
use folder::{Folder, V2_PARTS, bare, file_of, open, picture, read_tensors, short, tiny, v2, weights_of};
use serde_json::{Value, json};
use wuerstchen::{Error, Image, Model, Result, Stage};

/// Opens the model with both halves after one change.
fn opened(change: impl FnOnce(&Folder)) -> (Folder, Result<Model>) {
    let folder = Folder::of(&v2("model"));
    change(&folder);
    let model = open(folder.path());
    (folder, model)
}

/// The parts that have no weights.
const SCHEDULERS: [&str; 2] = ["prior_scheduler", "scheduler"];
const TOKENIZERS: [&str; 2] = ["prior_tokenizer", "tokenizer"];

fn configs() -> impl Iterator<Item = String> {
    let networks = V2_PARTS.map(|part| format!("{part}/config.json"));
    networks.into_iter().chain(SCHEDULERS.map(|part| format!("{part}/scheduler_config.json")))
}

#[test]
fn missing_folders_and_files() {
    let result = opened(|folder| folder.remove("model_index.json")).1;
    assert_error("index", result, Kind::Io, &["model_index.json", "No such file"]);
    for name in configs() {
        let part = name.split('/').next().unwrap();
        let result = opened(|folder| folder.remove(part)).1;
        assert_error(part, result, Kind::Io, &[&name, "No such file"]);
        let result = opened(|folder| folder.remove(&name)).1;
        assert_error(&name, result, Kind::Io, &[&name, "No such file"]);
        let result = opened(|folder| {
            folder.remove(part);
            folder.write(part, "not a folder");
        });
        assert_error(part, result.1, Kind::Io, &[part, "Not a directory"]);
    }
    for part in V2_PARTS {
        let name = weights_of(&v2("model"), part);
        let result = opened(|folder| folder.remove(&name)).1;
        let variants = ["diffusion_pytorch_model.safetensors", "fp16.safetensors", "index.json"];
        assert_error(part, result, Kind::Io, &[&[part][..], &variants].concat());
    }
    for part in TOKENIZERS {
        for name in [part.to_owned(), format!("{part}/tokenizer.json")] {
            let result = opened(|folder| folder.remove(&name)).1;
            assert_error(&name, result, Kind::Io, &[part, "tokenizer.json", "merges.txt", "neither"]);
        }
        // Its settings are not needed: what they say is the usual.
        let (_folder, model) = opened(|folder| folder.remove(&format!("{part}/tokenizer_config.json")));
        let (model, whole) = (model.unwrap(), open(&v2("model")).unwrap());
        let [found, expected] = [&model, &whole].map(|model| picture(model, &short(model, "a cat")));
        assert_eq!(found.data(), expected.data(), "{part}");
    }
    // The halves by themselves, where the prior's parts have no prefix.
    for (half, name) in [
        ("prior", "prior/config.json"),
        ("prior", "text_encoder/config.json"),
        ("prior", "scheduler/scheduler_config.json"),
        ("decoder", "decoder/config.json"),
        ("decoder", "text_encoder/config.json"),
        ("decoder", "scheduler/scheduler_config.json"),
        ("decoder", "vqgan/config.json"),
    ] {
        let folder = Folder::of(&v2(half));
        folder.remove(name);
        assert_error(half, open(folder.path()), Kind::Io, &[name, "No such file"]);
    }
}

#[test]
fn files_that_are_no_json() {
    let indices = TOKENIZERS.map(|part| format!("{part}/tokenizer_config.json"));
    for name in configs().chain(["model_index.json".into()]) {
        for (content, found) in [
            (&b""[..], "expected JSON"),
            (b"{", "expected JSON"),
            (b"[]", "expected a JSON object, found []"),
            (b"\xff\xfe{\0}\0", "expected UTF-8"),
        ] {
            let result = opened(|folder| folder.write(&name, content)).1;
            assert_error(&name, result, Kind::Format, &[&name, found]);
        }
    }
    for name in indices {
        let result = opened(|folder| folder.write(&name, "[]")).1;
        assert_error(&name, result, Kind::Format, &[&name, "a JSON object"]);
    }
}

#[test]
fn numbers_out_of_range() {
    let counts = [
        ("vqgan", vec!["levels", "bottleneck_blocks", "embed_dim", "latent_channels", "num_vq_embeddings"]),
        ("decoder", vec!["c_in", "c_out", "c_r", "patch_size", "c_cond", "effnet_embd", "clip_embd"]),
        ("decoder", vec!["kernel_size"]),
        ("prior_prior", vec!["c_in", "c", "c_cond", "c_r", "depth", "nhead"]),
        ("prior_text_encoder", vec!["vocab_size", "hidden_size", "num_hidden_layers"]),
        ("text_encoder", vec!["num_attention_heads", "max_position_embeddings", "intermediate_size"]),
    ];
    let absurd = [json!(0), json!(-1), json!(1e18), json!(10u64.pow(18)), json!(2.5), json!("8"), json!([8])];
    for (part, fields) in counts {
        let file = format!("{part}/config.json");
        for field in fields {
            for value in &absurd {
                let (_folder, result) =
                    opened(|folder| folder.edit_json(&file, |json| json[field] = value.clone()));
                let found = format!("found {value}");
                assert_error(&found, result, Kind::Format, &[&file, field, "expected a number from", &found]);
            }
        }
    }
    for (file, field) in [
        ("model_index.json", "resolution_multiple"),
        ("model_index.json", "latent_dim_scale"),
        ("model_index.json", "latent_mean"),
        ("model_index.json", "latent_std"),
        ("model_index.json", "image_size"),
        ("prior_scheduler/scheduler_config.json", "scaler"),
        ("prior_scheduler/scheduler_config.json", "s"),
        ("scheduler/scheduler_config.json", "scaler"),
        ("scheduler/scheduler_config.json", "s"),
    ] {
        for value in [json!("8"), json!([8]), json!(1e18), json!(-1e18), json!(true)] {
            let (_folder, result) = opened(|f| f.edit_json(file, |json| json[field] = value.clone()));
            let found = format!("found {value}");
            assert_error(field, result, Kind::Format, &[file, field, "expected a number from", &found]);
        }
    }
    for (file, field) in [
        ("model_index.json", "resolution_multiple"),
        ("model_index.json", "latent_mean"),
        ("scheduler/scheduler_config.json", "scaler"),
        ("prior_scheduler/scheduler_config.json", "s"),
    ] {
        let (_folder, result) = opened(|f| f.edit_json(file, |json| json[field] = json!(0)));
        assert_error(field, result, Kind::Format, &[file, field, "found 0"]);
    }
}

#[test]
fn fields_that_cannot_be() {
    let cases: &[(&str, &str, Value, &str)] = &[
        ("decoder/config.json", "_class_name", json!("Paella"), "WuerstchenDiffNeXt"),
        ("decoder/config.json", "_class_name", json!(7), "a text"),
        ("prior_prior/config.json", "_class_name", json!("Prior"), "WuerstchenPrior"),
        ("vqgan/config.json", "_class_name", json!("VQModel"), "PaellaVQModel"),
        ("scheduler/scheduler_config.json", "_class_name", json!("DDPMScheduler"), "DDPMWuerstchenScheduler"),
        ("prior_scheduler/scheduler_config.json", "_class_name", json!("DDIM"), "DDPMWuerstchenScheduler"),
        ("decoder/config.json", "c_hidden", json!([]), "at least one level"),
        ("decoder/config.json", "c_hidden", json!([8, 12]), "2 elements"),
        ("decoder/config.json", "c_hidden", json!(vec![8; 9]), "at most 8"),
        ("decoder/config.json", "blocks", json!([1, 1]), "3 elements"),
        ("decoder/config.json", "blocks", json!([1, 1, 0]), "from 1 to"),
        ("decoder/config.json", "level_config", json!(["CT", "CTA"]), "3 elements"),
        ("decoder/config.json", "level_config", json!(["CT", "CTA", "CTF"]), "the letters C, T and A"),
        ("decoder/config.json", "level_config", json!(["CT", "CTA", ""]), "the letters C, T and A"),
        ("decoder/config.json", "nhead", json!([-1, 3]), "3 elements"),
        ("decoder/config.json", "nhead", json!([-1, 5, 4]), "a divisor of 12"),
        ("decoder/config.json", "nhead", json!([-1, 3, -1]), "a divisor of 16"),
        ("decoder/config.json", "nhead", json!([-1, 0, 4]), "a number of heads"),
        ("decoder/config.json", "inject_effnet", json!([false, true]), "3 elements"),
        ("decoder/config.json", "inject_effnet", json!([0, 1, 1]), "true or false"),
        ("decoder/config.json", "inject_effnet", json!("yes"), "true or false"),
        ("decoder/config.json", "kernel_size", json!(4), "odd"),
        ("decoder/config.json", "c_out", json!(8), "4, as c_in"),
        ("decoder/config.json", "dropout", json!([0.1]), "3 elements"),
        ("prior_prior/config.json", "nhead", json!(5), "a divisor of c, 28"),
        ("prior_prior/config.json", "depth", json!(1025), "from 1 to 1024"),
        ("vqgan/config.json", "embed_dim", json!(15), "a multiple of 2"),
        ("vqgan/config.json", "levels", json!(9), "from 1 to 8"),
        ("vqgan/config.json", "in_channels", json!(4), "expected 3"),
        ("vqgan/config.json", "out_channels", json!(1), "expected 3"),
        ("vqgan/config.json", "up_down_scale_factor", json!(4), "expected 2"),
        ("vqgan/config.json", "scale_factor", json!(0), "expected a number from"),
        ("text_encoder/config.json", "num_attention_heads", json!(4), "a divisor of hidden_size, 15"),
        ("prior_text_encoder/config.json", "num_attention_heads", json!(3), "a divisor of hidden_size, 20"),
        ("model_index.json", "_class_name", json!("WuerstchenPipeline"), "WuerstchenCombinedPipeline"),
        ("model_index.json", "defaults", json!({"stage_b_steps": 0}), "stage_b_steps"),
    ];
    for (file, field, value, expected) in cases {
        let (_folder, result) = opened(|f| f.edit_json(file, |json| json[*field] = value.clone()));
        assert_error(&format!("{file}: {field} = {value}"), result, Kind::Format, &[file, field, expected]);
    }
    let (_folder, result) =
        opened(|f| f.edit_json("text_encoder/config.json", |json| json["hidden_act"] = json!("relu")));
    assert_error("relu", result, Kind::Unsupported, &["text_encoder/config.json", "hidden_act", "relu"]);
}

/// Configurations that are fine by themselves but are not those of the weights.
#[test]
fn configurations_of_other_weights() {
    let cases: &[(&str, &str, Value, &[&str])] = &[
        ("vqgan", "embed_dim", json!(32), &["expected shape", "found ["]),
        ("vqgan", "latent_channels", json!(8), &["expected shape", "found ["]),
        ("vqgan", "num_vq_embeddings", json!(65), &["vquantizer.embedding.weight", "[65, 4]", "[64, 4]"]),
        ("vqgan", "levels", json!(3), &["expected"]),
        ("vqgan", "bottleneck_blocks", json!(1), &["up_blocks"]),
        ("vqgan", "bottleneck_blocks", json!(3), &["up_blocks"]),
        ("decoder", "c_cond", json!(16), &["expected shape", "16", "14"]),
        ("decoder", "c_r", json!(18), &["mapper.weight", "expected shape"]),
        ("decoder", "patch_size", json!(1), &["expected shape"]),
        ("decoder", "c_hidden", json!([8, 12, 20]), &["expected shape", "20"]),
        ("decoder", "blocks", json!([1, 1, 3]), &["down_blocks.2", "none of this name"]),
        ("decoder", "blocks", json!([1, 1, 1]), &["expected"]),
        ("decoder", "level_config", json!(["CT", "CTA", "CT"]), &["expected"]),
        ("decoder", "kernel_size", json!(5), &["depthwise.weight", "5, 5]", "3, 3]"]),
        // The image embedding goes to other levels than the weights have mappers for, or to none.
        ("decoder", "inject_effnet", json!([true, true, true]), &["expected", "found"]),
        ("decoder", "inject_effnet", json!([false, false, true]), &["expected", "found"]),
        ("decoder", "inject_effnet", json!([true, true, false]), &["expected", "found"]),
        ("decoder", "inject_effnet", json!([false, false, false]), &["down_blocks.1.1.channelwise.0"]),
        ("decoder", "effnet_embd", json!(9), &["effnet_mappers", "expected shape", "9", "8"]),
        ("decoder", "clip_embd", json!(16), &["clip_mapper.weight", "[14, 16]", "[14, 15]"]),
        ("prior_prior", "c", json!(32), &["expected shape", "32", "28"]),
        ("prior_prior", "c_in", json!(9), &["projection.weight", "expected shape", "9", "8"]),
        ("prior_prior", "c_cond", json!(21), &["cond_mapper.0.weight", "21", "20"]),
        ("prior_prior", "depth", json!(3), &["blocks.6.depthwise.weight", "none of this name"]),
        ("prior_prior", "depth", json!(1), &["blocks.3."]),
        ("prior_text_encoder", "hidden_size", json!(24), &["expected shape", "24", "20"]),
        ("text_encoder", "num_hidden_layers", json!(3), &["layers.2", "none of this name"]),
        ("text_encoder", "vocab_size", json!(800), &["token_embedding.weight", "[800, 15]", "[794, 15]"]),
    ];
    for (part, field, value, parts) in cases {
        let file = format!("{part}/config.json");
        let (_folder, result) = opened(|f| f.edit_json(&file, |json| json[*field] = value.clone()));
        let weights = weights_of(&v2("model"), part);
        let parts = [*parts, &[weights.as_str()][..]].concat();
        assert_error(&format!("{part}: {field} = {value}"), result, Kind::Format, &parts);
    }
}

/// Gives a part another size throughout: its configuration and every tensor that has the old one.
fn resize(folder: &Folder, part: &str, field: &str, from: usize, to: usize, is_one: fn(&str) -> bool) {
    folder.edit_json(&format!("{part}/config.json"), |json| json[field] = json!(to));
    folder.edit_weights(part, |tensors| {
        for tensor in tensors.iter_mut().filter(|t| is_one(&t.name)) {
            for axis in 0..tensor.shape.len() {
                if tensor.shape[axis] == from {
                    tensor.resize(axis, to);
                }
            }
        }
    });
}

/// Parts that are whole by themselves but were not made for each other.
#[test]
fn parts_of_different_models() {
    let effnet = |folder: &Folder| {
        resize(folder, "decoder", "effnet_embd", 8, 10, |name| name.starts_with("effnet_mappers."));
        // The bias of a level with as many channels has kept its size.
        folder.edit_weights("decoder", |tensors| {
            for bias in
                tensors.iter_mut().filter(|t| t.name.starts_with("effnet_mappers.") && t.shape == [10])
            {
                bias.resize(0, 8);
            }
        });
    };
    let parts = ["decoder/config.json: effnet_embd", "expected 8, as prior_prior: c_in says", "found 10"];
    assert_error("effnet", opened(effnet).1, Kind::Format, &parts);

    let clip = |folder: &Folder| {
        resize(folder, "decoder", "clip_embd", 15, 18, |name| name == "clip_mapper.weight");
    };
    let parts =
        ["decoder/config.json: clip_embd", "expected 15, as text_encoder: hidden_size says", "found 18"];
    assert_error("clip", opened(clip).1, Kind::Format, &parts);

    let text = |folder: &Folder| {
        resize(folder, "prior_prior", "c_cond", 20, 24, |name| name == "cond_mapper.0.weight");
    };
    let parts = [
        "prior_prior/config.json: c_cond",
        "expected 20, as prior_text_encoder: hidden_size says",
        "found 24",
    ];
    assert_error("text", opened(text).1, Kind::Format, &parts);

    let latents = |folder: &Folder| {
        folder.edit_json("vqgan/config.json", |json| json["latent_channels"] = json!(6));
        folder.edit_weights("vqgan", |tensors| {
            for (name, axis) in
                [("vquantizer.embedding.weight", 1), ("up_blocks.0.0.weight", 1), ("down_blocks", 0)]
            {
                for tensor in tensors.iter_mut().filter(|t| t.name.starts_with(name)) {
                    if tensor.shape.get(axis) == Some(&4) {
                        tensor.resize(axis, 6);
                    }
                }
            }
        });
    };
    let parts = ["decoder/config.json: c_in", "expected 6, as vqgan: latent_channels says", "found 4"];
    assert_error("latents", opened(latents).1, Kind::Format, &parts);

    // The towers the wrong way round, and one that the tokenizer has too many ids for.
    for (part, other, named) in [
        ("text_encoder", "prior_text_encoder", "decoder/config.json: clip_embd"),
        ("prior_text_encoder", "text_encoder", "prior_prior/config.json: c_cond"),
    ] {
        let result = opened(|folder| folder.link(part, &v2("model").join(other))).1;
        assert_error(part, result, Kind::Format, &[named, "hidden_size says"]);
    }
    for (part, tokenizer) in [("text_encoder", "tokenizer"), ("prior_text_encoder", "prior_tokenizer")] {
        let result = opened(|folder| {
            resize(folder, part, "vocab_size", 794, 700, |name| name.ends_with("token_embedding.weight"));
        });
        let file = format!("{tokenizer}/tokenizer.json");
        let expected = format!("ids below 700, as {part}: vocab_size says");
        assert_error(part, result.1, Kind::Format, &[&file, &expected, "793"]);
    }
    // An image encoder of other latents.
    let result = opened(|folder| {
        let encoder = Folder::of(&tiny());
        resize(&encoder, "image_encoder", "c_latent", 8, 12, |name| name.starts_with("mapper."));
        for name in ["config.json", folder::WEIGHTS] {
            std::fs::create_dir_all(folder.path().join("image_encoder")).unwrap();
            folder.write(&format!("image_encoder/{name}"), encoder.read(&format!("image_encoder/{name}")));
        }
    });
    let parts = ["prior_prior/config.json: c_in", "expected 12, as image_encoder: c_latent says", "found 8"];
    assert_error("image encoder", result.1, Kind::Format, &parts);
}

/// Halves that lie apart: the error names both folders.
#[test]
fn halves_of_different_models() {
    let other = Folder::of(&v2("decoder"));
    resize(&other, "decoder", "effnet_embd", 8, 10, |name| name.starts_with("effnet_mappers."));
    other.edit_weights("decoder", |tensors| {
        for bias in tensors.iter_mut().filter(|t| t.name.starts_with("effnet_mappers.") && t.shape == [10]) {
            bias.resize(0, 8);
        }
    });
    open(other.path()).unwrap();
    let prior = v2("prior").join("prior").display().to_string();
    let decoder = other.path().join("decoder/config.json").display().to_string();
    for (path, key, named) in
        [(v2("prior"), "decoder_path", other.path()), (other.path().into(), "prior_path", &v2("prior"))]
    {
        let parts = [&decoder, "effnet_embd", &format!("expected 8, as {prior}: c_in says"), "found 10"];
        assert_error(key, join(&path, &[(key, named)]), Kind::Format, &parts);
    }
}

fn join(path: &Path, others: &[(&str, &Path)]) -> Result<Model> {
    let mut options = folder::options();
    for (key, path) in others {
        options.set(key, path.to_str().unwrap())?;
    }
    Model::open(path, &options)
}

#[test]
fn paths_of_halves() {
    let (whole, prior, decoder) = (v2("model"), v2("prior"), v2("decoder"));
    let expected = {
        let model = open(&whole).unwrap();
        picture(&model, &short(&model, "a cat"))
    };
    // What may be joined: a half from anywhere in the place of the folder's own, or beside it.
    for (path, others) in [
        (&prior, vec![("decoder_path", decoder.as_path())]),
        (&prior, vec![("decoder_path", &whole)]),
        (&decoder, vec![("prior_path", prior.as_path())]),
        (&decoder, vec![("prior_path", &whole)]),
        (&whole, vec![("prior_path", &prior)]),
        (&whole, vec![("decoder_path", &decoder)]),
        (&whole, vec![("prior_path", &whole), ("decoder_path", &decoder)]),
        (&prior, vec![("prior_path", &prior), ("decoder_path", &decoder)]),
        (&whole, vec![("prior_path", Path::new("")), ("decoder_path", Path::new(""))]),
    ] {
        let model = join(path, &others).unwrap();
        let mut options = bare(&model);
        options.add_prompt("a cat", None).unwrap();
        assert_eq!(picture(&model, &options).data(), expected.data(), "{}, {others:?}", path.display());
    }

    for (key, wrong, class) in [
        ("prior_path", &decoder, "WuerstchenDecoderPipeline"),
        ("decoder_path", &prior, "WuerstchenPriorPipeline"),
        ("prior_path", &tiny(), "WuerstchenV1Pipeline"),
        ("decoder_path", &tiny(), "WuerstchenV1Pipeline"),
    ] {
        for path in [&whole, &prior, &decoder] {
            let wrong_path = wrong.display().to_string();
            assert_error(key, join(path, &[(key, wrong)]), Kind::Argument, &[key, class, &wrong_path]);
        }
    }
    for key in ["prior_path", "decoder_path"] {
        let missing = whole.join("no/such/folder");
        let found = join(&whole, &[(key, &missing)]);
        assert_error(key, found, Kind::Io, &["no/such/folder/model_index.json", "No such file"]);
        let cascade = Folder::of(&whole);
        cascade.edit_json("model_index.json", |json| {
            json["_class_name"] = json!("StableCascadeCombinedPipeline")
        });
        let found = join(&whole, &[(key, cascade.path())]);
        assert_error(key, found, Kind::Argument, &[key, "StableCascadeCombinedPipeline"]);
        // A v1 model is whole.
        for named in [&whole, &tiny()] {
            let v1 = tiny().display().to_string();
            assert_error(key, join(&tiny(), &[(key, named)]), Kind::Argument, &[key, "whole", &v1]);
        }
    }
    // A folder that nothing is taken from is a mistake.
    for (path, others) in [
        (&whole, vec![("prior_path", prior.as_path()), ("decoder_path", &decoder)]),
        (&prior, vec![("prior_path", &whole)]),
        (&decoder, vec![("decoder_path", &whole)]),
        (&prior, vec![("prior_path", &whole), ("decoder_path", &decoder)]),
    ] {
        let parts = ["path", "neither prior_path nor decoder_path", path.to_str().unwrap()];
        assert_error("unused", join(path, &others), Kind::Argument, &parts);
    }
}

#[test]
fn tensors_that_are_not_as_they_should_be() {
    for part in V2_PARTS {
        let file = weights_of(&v2("model"), part);
        let all = read_tensors(&v2("model").join(&file));
        // Some of them from all over the file.
        for tensor in all.iter().filter(|t| t.is_float()).step_by(all.len().div_ceil(12)) {
            check_refused(&v2("model"), part, tensor);
        }
    }
    // A tensor that no layer asks for, but in text towers: theirs come with a projection or without.
    let extra = |folder: &Folder, part: &str| {
        folder.edit_weights(part, |tensors| {
            let mut tensor = tensors[0].clone();
            tensor.name = "blocks.99.unheard_of.weight".into();
            tensors.push(tensor);
        });
    };
    for part in ["prior_prior", "decoder", "vqgan"] {
        let result = opened(|folder| extra(folder, part)).1;
        let parts = [part, "blocks.99.unheard_of.weight", "no layer"];
        assert_error(part, result, Kind::Format, &parts);
    }
}

#[test]
fn files_that_are_not_whole() {
    for part in V2_PARTS {
        let name = weights_of(&v2("model"), part);
        let whole = std::fs::read(v2("model").join(&name)).unwrap();
        let with = |content: &[u8]| opened(|folder| folder.write(&name, content)).1;
        for length in [0, 7, 8, 100, whole.len() / 2, whole.len() - 1] {
            assert_error(part, with(&whole[..length]), Kind::Format, &[&name, "a whole safetensors file"]);
        }
        for length in [0, 1 << 20, 100_000_001, u64::MAX] {
            let mut content = whole.clone();
            content[..8].copy_from_slice(&length.to_le_bytes());
            assert_error(part, with(&content), Kind::Format, &[&name, "a whole safetensors file"]);
        }
    }
    // A shard that is not there, and one that lacks a tensor.
    for part in V2_PARTS {
        let result = opened(|folder| {
            let [_, second] = folder.shard(part);
            folder.remove(&second);
        });
        assert_error(part, result.1, Kind::Io, &[part, "00002-of-00002.safetensors", "No such file"]);
        let result = opened(|folder| {
            let [first, _] = folder.shard(part);
            let mut tensors = read_tensors(&folder.path().join(&first));
            tensors.pop();
            folder.write(&first, file_of(&tensors));
        });
        let parts = [part, "00001-of-00002.safetensors", "index.json", "none of this name"];
        assert_error(part, result.1, Kind::Format, &parts);
    }
}

/// Goes through every tensor: all stages, Stage A both ways, and a preview every so many of 1 + 2 steps.
fn use_all(model: &Model, preview: u32) -> Result<Vec<Image>> {
    let mut options = bare(model);
    options.set_stage_c(1, 2.0)?;
    options.set_stage_b(2, 2.0)?;
    options.set_preview(preview)?;
    options.add_prompt("a cat", Some("a dog"))?;
    let image = Image::build(128, 128, |rgb| rgb.fill(100))?;
    model.stage_a_encode(&[&image])?;
    model.generate(&options)
}

/// What may be infinite and still give finite numbers: a variance, which only ever divides.
fn may_be_infinite(name: &str) -> bool {
    name.ends_with("running_var")
}

/// Every tensor in turn is no number: never a picture, always the name of the tensor.
#[test]
fn weights_that_are_not_numbers() {
    assert_eq!(use_all(&open(&v2("model")).unwrap(), 1).unwrap().len(), 1);
    let mut wrong = Vec::new();
    for part in V2_PARTS {
        let file = weights_of(&v2("model"), part);
        let tensors = read_tensors(&v2("model").join(&file));
        for (i, tensor) in tensors.iter().enumerate().filter(|(_, t)| t.is_float()) {
            let name = tensor.name.as_str();
            // NaN everywhere; the infinities by turns, and no previews, some of both stages, some of Stage B alone.
            let infinity = if i % 2 == 0 { f32::INFINITY } else { f32::NEG_INFINITY };
            let values = if may_be_infinite(name) { &[f32::NAN][..] } else { &[f32::NAN, infinity] };
            for (preview, &value) in (i as u32..).zip(values) {
                let used = |model: &Model| use_all(model, preview % 3);
                wrong.extend(complaint(&v2("model"), part, (i, tensor), value, used));
            }
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

/// A half that is damaged does not stop calls that go without it.
#[test]
fn a_damaged_half_leaves_the_other() {
    let folder = Folder::of(&v2("model"));
    folder.edit_weights("vqgan", |tensors| {
        tensors.iter_mut().filter(|t| t.is_float()).for_each(|t| t.fill(f32::NAN))
    });
    let model = open(folder.path()).unwrap();
    for _ in 0..2 {
        let found = model.generate(&short(&model, "a cat"));
        assert_error("vqgan", found, Kind::Format, &["vqgan", "finite weights"]);
    }
    let text = model.encode_text(Stage::C, &["a cat"]).unwrap();
    let whole = open(&v2("model")).unwrap();
    let [found, expected] =
        [&model, &whole].map(|model| model.stage_c_sample(&text, None, None, &bare(model)).unwrap());
    assert_eq!(found.bytes().unwrap(), expected.bytes().unwrap());
}

#[test]
fn stage_calls_refuse_what_does_not_fit() {
    use wuerstchen::Tensor;
    let model = open(&v2("model")).unwrap();
    let options = short(&model, "a cat");
    let floats = |dims: &[usize]| Tensor::from_slice(dims, &vec![0.5f32; dims.iter().product()]).unwrap();
    let integers = |dims: &[usize]| Tensor::from_slice(dims, &vec![0i64; dims.iter().product()]).unwrap();
    let for_c = model.encode_text(Stage::C, &["a cat", "a dog"]).unwrap();
    let for_b = model.encode_text(Stage::B, &["a cat", "a dog"]).unwrap();
    let (latents, x, t) = (floats(&[2, 3, 3, 8]), floats(&[2, 32, 32, 4]), floats(&[2]));
    let refused = |what: &str, result: Result<Tensor>| match result {
        Err(Error::InvalidArgument { .. }) => {}
        other => panic!("{what}: {other:?}"),
    };
    // The stages' texts have different widths.
    assert_eq!((for_c.dims(), for_b.dims()), (&[2, 77, 20][..], &[2, 77, 15][..]));
    assert!(model.stage_c_predict(&latents, &t, &for_c).is_ok());
    refused("the other text", model.stage_c_predict(&latents, &t, &for_b));
    refused("channels", model.stage_c_predict(&floats(&[2, 3, 3, 4]), &t, &for_c));

    let b = |x: &Tensor, latents: &Tensor, text: &Tensor| model.stage_b_predict(x, &t, latents, text);
    assert_eq!(b(&x, &latents, &for_b).unwrap().dims(), [2, 32, 32, 4]);
    refused("the other text", b(&x, &latents, &for_c));
    refused("tokens", b(&integers(&[2, 32, 32]), &latents, &for_b));
    refused("integers", b(&integers(&[2, 32, 32, 4]), &latents, &for_b));
    refused("channels", b(&floats(&[2, 32, 32, 3]), &latents, &for_b));
    refused("grid", b(&floats(&[2, 32, 36, 4]), &latents, &for_b));
    refused("no grid", b(&floats(&[2, 0, 32, 4]), &latents, &for_b));
    refused("latents", b(&x, &floats(&[1, 3, 3, 8]), &for_b));
    refused("latent channels", b(&x, &floats(&[2, 3, 3, 9]), &for_b));
    refused("no latents", b(&x, &floats(&[2, 0, 3, 8]), &for_b));
    // Any grid of latents is brought to that of x.
    assert!(b(&x, &floats(&[2, 5, 2, 8]), &for_b).is_ok());

    let sample = |latents: &Tensor, text: &Tensor| model.stage_b_sample(latents, text, None, &options);
    assert_eq!(sample(&latents, &for_b).unwrap().dims(), [2, 32, 32, 4]);
    assert_eq!(
        sample(&floats(&[2, 6, 3, 8]), &for_b).unwrap().dims(),
        [2, 64, 32, 4],
        "latents give the size"
    );
    refused("the other text", sample(&latents, &for_c));
    refused("no latents", sample(&floats(&[0, 3, 3, 8]), &for_b));
    let result = sample(&floats(&[2, 4, 3, 8]), &for_b);
    assert_error("4 rows", result, Kind::Argument, &["latents", "multiple of 8", "4, which gives 42"]);

    assert_eq!(model.stage_a_decode(&x).unwrap().dims(), [2, 128, 128, 3]);
    assert_eq!(
        model.stage_a_decode(&integers(&[1, 5, 3])).unwrap().dims(),
        [1, 20, 12, 3],
        "tokens work too"
    );
    refused("a token", model.stage_a_decode(&Tensor::from_slice(&[1, 1, 1], &[64i64]).unwrap()));
    refused("channels", model.stage_a_decode(&floats(&[1, 4, 4, 8])));
}
