//! A model folder with one thing wrong in it: an error that names the thing, what was expected and what was found.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "common/damage.rs"]
mod damage;
#[path = "common/errors.rs"]
mod errors;
#[path = "common/folder.rs"]
mod folder;

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use damage::{check_refused, complaint};
use errors::{Kind, assert_error};
use folder::{Folder, PARTS, WEIGHTS, emoji, file_of, open, picture, read_tensors, short, tiny};
use safetensors::Dtype;
use serde_json::{Value, json};
use wuerstchen::{GenerateOptions, Image, Model, Result, Stage};

/// Opens the tiny model after one change.
fn opened(change: impl FnOnce(&Folder)) -> (Folder, Result<Model>) {
    let folder = Folder::of(&tiny());
    change(&folder);
    let model = open(folder.path());
    (folder, model)
}

#[test]
fn missing_folders_and_files() {
    for part in ["stage_a", "stage_b", "stage_c", "text_encoder"] {
        let result = opened(|folder| folder.remove(part)).1;
        assert_error(part, result, Kind::Io, &[part, "config.json", "No such file"]);
    }
    let result = opened(|folder| folder.remove("tokenizer")).1;
    assert_error("tokenizer", result, Kind::Io, &["tokenizer", "tokenizer.json", "merges.txt", "neither"]);
    let result = opened(|folder| folder.remove("model_index.json")).1;
    assert_error("index", result, Kind::Io, &["model_index.json", "No such file"]);
    for part in PARTS {
        let name = format!("{part}/config.json");
        let result = opened(|folder| folder.remove(&name)).1;
        assert_error(part, result, Kind::Io, &[&name, "No such file"]);
        let result = opened(|folder| folder.remove(&format!("{part}/{WEIGHTS}"))).1;
        assert_error(part, result, Kind::Io, &[part, WEIGHTS, "index.json"]);
        let result = opened(|folder| {
            folder.remove(part);
            folder.write(part, "not a folder");
        });
        assert_error(part, result.1, Kind::Io, &[part, "Not a directory"]);
    }
}

/// Text to image needs no image encoder; pictures as input do.
#[test]
fn a_model_without_an_image_encoder() {
    let (_folder, model) = opened(|folder| folder.remove("image_encoder"));
    let model = model.unwrap();
    assert_eq!(model.info().image_encoder_parameters, 0);
    let mut options = short(&model, "a cat");
    let image = picture(&model, &options);
    for result in [options.set_init_image(&image, 0.5), model.encode_image(&[&image]).map(drop)] {
        assert_error("no encoder", result, Kind::Unsupported, &["picture as input", "image_encoder"]);
    }
    // A link to nowhere is no such choice.
    let result = opened(|folder| {
        folder.link("image_encoder", Path::new("/none/such"));
    });
    assert_error("a dangling link", result.1, Kind::Io, &["image_encoder/config.json", "No such file"]);
    options.set_mask(&image).unwrap();
    assert_error("a mask alone", model.generate(&options), Kind::Argument, &["mask"]);
}

#[test]
fn paths_that_are_no_model() {
    let empty = Folder::empty();
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml");
    let odd = empty.path().join(OsStr::from_bytes(b"mod\xffel"));
    for path in [&file, Path::new("/none/such"), empty.path(), &odd, Path::new("/dev/null"), Path::new("/")] {
        assert_error("no model", open(path), Kind::Io, &["model_index.json"]);
    }
    assert_error("no path", open(Path::new("")), Kind::Argument, &["path", "a model folder"]);
    assert_error("a null byte", open(Path::new("a\0b")), Kind::Io, &["model_index.json"]);
    let long = "x".repeat(5000);
    assert_error("a long path", open(Path::new(&long)), Kind::Io, &["too long"]);
    // A path that is not UTF-8 is as good as any.
    std::os::unix::fs::symlink(tiny(), &odd).unwrap();
    let model = open(&odd).unwrap();
    picture(&model, &short(&model, "a cat"));
}

#[test]
fn configurations_that_are_no_json() {
    let names = PARTS.map(|part| format!("{part}/config.json"));
    for name in names.iter().map(String::as_str).chain(["model_index.json"]) {
        for (content, found) in [
            (&b""[..], "expected JSON"),
            (b"{", "expected JSON"),
            (b"<xml/>", "expected JSON"),
            (b"[]", "expected a JSON object, found []"),
            (b"\"text\"", "expected a JSON object"),
            (b"\xff\xfe{\0}\0", "expected UTF-8"),
        ] {
            let result = opened(|folder| folder.write(name, content)).1;
            assert_error(name, result, Kind::Format, &[name, found]);
        }
    }
}

#[test]
fn numbers_out_of_range() {
    let counts = [
        ("stage_a", vec!["levels", "bottleneck_blocks", "c_hidden", "c_latent", "codebook_size"]),
        ("stage_b", vec!["c_in", "c_out", "num_labels", "c_r", "patch_size", "c_cond", "effnet_embd"]),
        ("stage_b", vec!["byt5_embd", "kernel_size"]),
        ("stage_c", vec!["c_in", "c", "c_cond", "c_r", "depth", "nhead"]),
        ("text_encoder", vec!["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"]),
        ("text_encoder", vec!["num_attention_heads", "max_position_embeddings"]),
        ("image_encoder", vec!["stem_channels", "last_channel", "c_latent"]),
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
    for field in ["image_size", "image_encoder_size", "text_length", "format_version"] {
        for value in &absurd {
            // A large version is not wrong, only unknown.
            if field == "format_version" && value.as_u64().is_some_and(|n| n > 1) {
                continue;
            }
            let (_folder, result) =
                opened(|folder| folder.edit_json("model_index.json", |json| json[field] = value.clone()));
            assert_error(
                field,
                result,
                Kind::Format,
                &["model_index.json", field, &format!("found {value}")],
            );
        }
    }
}

#[test]
fn fields_that_cannot_be() {
    let cases: &[(&str, &str, Value, &str)] = &[
        ("stage_a", "/scale_factor", json!(0), "expected a number from"),
        ("stage_a", "/scale_factor", json!("NaN"), "expected a number from"),
        ("stage_a", "/levels", json!(9), "from 1 to 8"),
        ("stage_a", "/c_hidden", json!(15), "a multiple of 2"),
        ("stage_a", "/_class_name", json!("Paella"), "VQModel"),
        ("stage_b", "/c_hidden", json!([]), "at least one level"),
        ("stage_b", "/c_hidden", json!([10]), "1 elements"),
        ("stage_b", "/c_hidden", json!([10, 16, 16]), "3 elements"),
        ("stage_b", "/c_hidden", json!([10, 0]), "from 1 to"),
        ("stage_b", "/c_hidden", json!([10, -16]), "from 1 to"),
        ("stage_b", "/c_hidden", json!(vec![1; 9]), "at most 8"),
        ("stage_b", "/nhead", json!([-1, 5]), "a divisor of 16"),
        ("stage_b", "/nhead", json!([-1, -1]), "a divisor of 16"),
        ("stage_b", "/nhead", json!([-1, 0]), "a number of heads"),
        ("stage_b", "/blocks", json!([1, 0]), "from 1 to"),
        ("stage_b", "/blocks", json!([1, 100_000]), "from 1 to"),
        ("stage_b", "/level_config", json!(["CT", "CTX"]), "C, T, A and F"),
        ("stage_b", "/level_config", json!(["CT", ""]), "C, T, A and F"),
        ("stage_b", "/kernel_size", json!(4), "odd"),
        ("stage_b", "/c_out", json!(12), "as c_in"),
        ("stage_b", "/self_attn", json!(1), "true or false"),
        ("stage_b", "/dropout", json!([0.5]), "2 elements"),
        ("stage_c", "/nhead", json!(5), "a divisor of c, 24"),
        ("stage_c", "/latent_size", json!([12]), "two numbers"),
        ("stage_c", "/depth", json!(1025), "from 1 to 1024"),
        ("text_encoder", "/num_attention_heads", json!(5), "a divisor of hidden_size, 24"),
        ("text_encoder", "/layer_norm_eps", json!(-1), "expected a number from"),
        ("image_encoder", "/blocks", json!([]), "at least one"),
        ("image_encoder", "/blocks/0/kernel", json!(2), "odd"),
        ("image_encoder", "/blocks/0/stride", json!(0), "from 1 to 4"),
        ("image_encoder", "/blocks/0/type", json!("Conv"), "FusedMBConv"),
        ("image_encoder", "/blocks/2/in_channels", json!(9), "what the layer before gives"),
        ("image_encoder", "/output_div", json!(0), "expected a number from"),
        ("image_encoder", "/std", json!([0.2, 0.2]), "3 numbers"),
        ("image_encoder", "/std", json!([0.2, 0.2, 0.0]), "a number from"),
    ];
    for (part, pointer, value, expected) in cases {
        let file = format!("{part}/config.json");
        let (_folder, result) = opened(|folder| {
            folder.edit_json(&file, |json| match json.pointer_mut(pointer) {
                Some(field) => *field = value.clone(),
                None => json[&pointer[1..]] = value.clone(),
            });
        });
        let field = pointer.rsplit('/').next().unwrap();
        assert_error(&format!("{part}{pointer} {value}"), result, Kind::Format, &[&file, field, expected]);
    }
    let (_folder, result) =
        opened(|f| f.edit_json("text_encoder/config.json", |j| j["hidden_act"] = json!("relu")));
    assert_error("relu", result, Kind::Unsupported, &["text_encoder/config.json", "hidden_act", "relu"]);
    for (field, value, expected) in [
        ("image_size", json!(8192), "from 1 to 4096"),
        ("text_length", json!(1), "from 2 to"),
        ("text_length", json!(78), "at most 77"),
        ("text_attention_mask", json!("yes"), "true or false"),
        ("defaults", json!([]), "an object"),
        ("defaults", json!({"stage_c_steps": 0}), "stage_c_steps"),
        ("defaults", json!({"stage_c_sampler": "euler"}), "stage_c_sampler"),
        ("defaults", json!({"stage_b_temperature": [1.0, 0.0]}), "stage_b_temperature"),
        ("defaults", json!({"stage_b_temperature": [1.0]}), "stage_b_temperature"),
        ("defaults", json!({"stage_b_choice": "best"}), "stage_b_choice"),
    ] {
        let (_folder, result) = opened(|f| f.edit_json("model_index.json", |json| json[field] = value));
        assert_error(field, result, Kind::Format, &["model_index.json", field, expected]);
    }
}

/// Configurations that are fine by themselves but are not those of the weights.
#[test]
fn configurations_of_other_weights() {
    let cases: &[(&str, &str, Value, &[&str])] = &[
        ("stage_a", "/c_hidden", json!(32), &["expected shape", "found ["]),
        ("stage_a", "/c_latent", json!(8), &["expected shape", "found ["]),
        ("stage_a", "/codebook_size", json!(65), &["vquantizer.codebook.weight", "[65, 4]", "[64, 4]"]),
        ("stage_a", "/levels", json!(3), &["expected"]),
        ("stage_a", "/levels", json!(1), &["expected"]),
        ("stage_a", "/bottleneck_blocks", json!(1), &["up_blocks", "expected"]),
        ("stage_a", "/bottleneck_blocks", json!(1000), &["up_blocks", "none of this name"]),
        ("stage_b", "/c_cond", json!(16), &["expected shape", "16"]),
        ("stage_b", "/c_r", json!(18), &["mapper.weight", "expected shape"]),
        ("stage_b", "/patch_size", json!(1), &["expected shape"]),
        ("stage_b", "/c_hidden", json!([12, 16]), &["expected shape", "12"]),
        ("stage_b", "/blocks", json!([2, 2]), &["expected"]),
        ("stage_b", "/blocks", json!([1, 3]), &["expected", "none of this name"]),
        ("stage_b", "/blocks", json!([1, 1]), &["expected"]),
        ("stage_b", "/level_config", json!(["CT", "CTF"]), &["expected", "none of this name"]),
        ("stage_b", "/level_config", json!(["C", "CTA"]), &["down_blocks"]),
        ("stage_b", "/kernel_size", json!(5), &["depthwise.weight", "5, 5]", "3, 3]"]),
        ("stage_c", "/c", json!(48), &["expected shape", "48", "24"]),
        ("stage_c", "/depth", json!(3), &["blocks.6.depthwise.weight", "none of this name"]),
        ("stage_c", "/depth", json!(1024), &["blocks.6.depthwise.weight", "none of this name"]),
        ("stage_c", "/depth", json!(1), &["blocks.3."]),
        ("stage_c", "/c_r", json!(32), &["mapper.weight", "expected shape"]),
        ("text_encoder", "/hidden_size", json!(28), &["expected shape", "28", "24"]),
        ("text_encoder", "/num_hidden_layers", json!(3), &["encoder.layers.2", "none of this name"]),
        ("text_encoder", "/vocab_size", json!(2051), &["token_embedding.weight", "[2051, 24]", "[2050, 24]"]),
        (
            "text_encoder",
            "/max_position_embeddings",
            json!(64),
            &["position_embedding", "[64, 24]", "[77, 24]"],
        ),
        ("image_encoder", "/last_channel", json!(40), &["backbone.5", "expected shape"]),
        ("image_encoder", "/blocks/1/layers", json!(3), &["backbone.2.2", "none of this name"]),
        ("image_encoder", "/blocks/1/layers", json!(1), &["backbone.2.1"]),
        ("image_encoder", "/blocks/0/kernel", json!(5), &["backbone.1.0", "expected shape"]),
        ("image_encoder", "/blocks/0/type", json!("MBConv"), &["backbone.1.0", "expected"]),
    ];
    for (part, pointer, value, parts) in cases {
        let file = format!("{part}/config.json");
        let (_folder, result) = opened(|folder| {
            folder.edit_json(&file, |json| *json.pointer_mut(pointer).unwrap() = value.clone());
        });
        let what = format!("{part}{pointer} = {value}");
        let weights = format!("{part}/{WEIGHTS}");
        assert_error(&what, result, Kind::Format, &[*parts, &[weights.as_str()][..]].concat());
    }
}

#[test]
fn parts_of_different_models() {
    let text_width = |folder: &Folder| {
        // A text encoder of another width: all of its tensors change alike.
        folder.edit_json("text_encoder/config.json", |json| json["hidden_size"] = json!(28));
        folder.edit_weights("text_encoder", |tensors| {
            for tensor in tensors {
                for axis in 0..tensor.shape.len() {
                    if tensor.shape[axis] == 24 {
                        tensor.resize(axis, 28);
                    }
                }
            }
        });
    };
    let result = opened(text_width).1;
    assert_error("text width", result, Kind::Format, &["byt5_embd", "28", "text_encoder: hidden_size", "24"]);

    let codebook = |folder: &Folder| {
        folder.edit_json("stage_a/config.json", |json| json["codebook_size"] = json!(60));
        folder.edit_weights("stage_a", |tensors| {
            tensors.iter_mut().find(|t| t.name.contains("codebook")).unwrap().resize(0, 60);
        });
    };
    let result = opened(codebook).1;
    assert_error("codebook", result, Kind::Format, &["num_labels", "60, as stage_a: codebook_size", "64"]);

    let latents = |folder: &Folder| {
        folder.edit_json("stage_b/config.json", |json| json["effnet_embd"] = json!(16));
        folder.edit_weights("stage_b", |tensors| {
            tensors.iter_mut().find(|t| t.name == "effnet_mapper.weight").unwrap().resize(1, 16);
        });
    };
    let result = opened(latents).1;
    assert_error("latents", result, Kind::Format, &["effnet_embd", "8, as stage_c: c_in", "16"]);

    let encoder = |folder: &Folder| {
        folder.edit_json("image_encoder/config.json", |json| json["c_latent"] = json!(12));
        folder.edit_weights("image_encoder", |tensors| {
            tensors
                .iter_mut()
                .filter(|t| t.name.starts_with("mapper.") && t.is_float() && !t.shape.is_empty())
                .for_each(|t| t.resize(0, 12));
        });
    };
    let result = opened(encoder).1;
    assert_error("image encoder", result, Kind::Format, &["c_in", "12, as image_encoder: c_latent", "8"]);

    // A part of the other model that is here.
    for part in ["stage_a", "stage_b", "stage_c", "text_encoder", "image_encoder"] {
        let result = opened(|folder| {
            folder.link(part, &emoji().join(part));
        });
        assert_error(part, result.1, Kind::Format, &[part]);
    }
}

#[test]
fn tensors_that_are_not_as_they_should_be() {
    for part in PARTS {
        let all = read_tensors(&tiny().join(part).join(WEIGHTS));
        // Some of them from all over the file.
        for tensor in all.iter().filter(|t| t.is_float()).step_by(all.len().div_ceil(8)) {
            check_refused(&tiny(), part, tensor);
        }
    }
}

#[test]
fn files_that_are_not_whole() {
    for part in PARTS {
        let name = format!("{part}/{WEIGHTS}");
        let whole = std::fs::read(tiny().join(&name)).unwrap();
        let with = |content: &[u8]| opened(|folder| folder.write(&name, content)).1;
        for length in [0, 1, 7, 8, 9, 100, whole.len() / 2, whole.len() - 1] {
            assert_error(part, with(&whole[..length]), Kind::Format, &[&name, "a whole safetensors file"]);
        }
        for length in [0, 1, 1 << 20, 100_000_001, 1 << 40, u64::MAX] {
            let mut content = whole.clone();
            content[..8].copy_from_slice(&length.to_le_bytes());
            assert_error(part, with(&content), Kind::Format, &[&name, "a whole safetensors file"]);
        }
        assert_error(part, with(b"PK\x03\x04 a pickle of PyTorch, say"), Kind::Format, &[&name]);
        let longer = [&whole[..], &[0]].concat();
        assert_error(part, with(&longer), Kind::Format, &[&name, "a whole safetensors file"]);
    }
}

/// Makes one picture with every part: an initial picture, all stages, previews.
fn use_all(model: &Model) -> Result<Vec<Image>> {
    let mut options = GenerateOptions::new(model)?;
    options.set_stage_c(1, 2.0)?;
    options.set_stage_b(2, 2.0)?;
    options.set_size(64, 64)?;
    options.add_prompt("a cat", Some("a dog"))?;
    options.set_preview(1)?;
    let image = Image::build(64, 64, |rgb| rgb.fill(100))?;
    options.set_init_image(&image, 0.8)?;
    model.stage_a_encode(&[&image])?;
    model.generate(&options)
}

/// What may be infinite and still give finite numbers: a variance, which only ever divides, and what drives a gate.
fn may_be_infinite(name: &str) -> bool {
    name.ends_with("running_var") || name.contains(".fc2.") || name.contains(".fc1.")
}

/// Every tensor in turn is no number: never a picture, always the name of the tensor.
#[test]
fn weights_that_are_not_numbers() {
    assert_eq!(use_all(&open(&tiny()).unwrap()).unwrap().len(), 1);
    let mut wrong = Vec::new();
    for part in PARTS {
        let file = format!("{part}/{WEIGHTS}");
        let tensors = read_tensors(&tiny().join(&file));
        for (i, tensor) in tensors.iter().enumerate().filter(|(_, t)| t.is_float()) {
            let name = tensor.name.as_str();
            // NaN everywhere; the infinities by turns.
            let infinity = if i % 2 == 0 { f32::INFINITY } else { f32::NEG_INFINITY };
            let values = if may_be_infinite(name) { &[f32::NAN][..] } else { &[f32::NAN, infinity] };
            for &value in values {
                wrong.extend(complaint(&tiny(), part, (i, tensor), value, use_all));
            }
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

/// One number of a tensor that every picture goes through, in the trained model, whose weights are halves.
#[test]
fn one_weight_that_is_not_a_number() {
    for (part, name) in [
        ("text_encoder", "encoder.layers.1.mlp.fc1.weight"),
        ("stage_c", "blocks.3.depthwise.weight"),
        ("stage_b", "up_blocks.0.0.channelwise.0.weight"),
        ("stage_b", "out_mapper.1.weight"),
        ("stage_a", "up_blocks.0.0.weight"),
    ] {
        for value in [half::f16::NAN, half::f16::INFINITY] {
            let folder = Folder::of(&emoji());
            folder.edit_weights(part, |tensors| {
                let tensor = tensors.iter_mut().find(|t| t.name.ends_with(name)).unwrap();
                assert_eq!(tensor.dtype, Dtype::F16);
                tensor.data[4..6].copy_from_slice(&value.to_le_bytes());
            });
            let model = open(folder.path()).unwrap();
            let found = model.generate(&short(&model, "a red apple"));
            assert_error(name, found, Kind::Format, &[part, name, "finite weights", "1 that are not"]);
        }
    }
}

#[test]
fn tokenizers_of_other_text_towers() {
    // Ids that the tower has no embedding for.
    let result = opened(|folder| {
        folder.edit_json("tokenizer/tokenizer.json", |json| {
            let vocabulary = json["model"]["vocab"].as_object_mut().unwrap();
            vocabulary.insert("beyond</w>".into(), json!(2050));
        });
    });
    let parts = ["tokenizer.json", "vocab_size", "2050", "ids below 2050"];
    assert_error("a large id", result.1, Kind::Format, &parts);
    // The same tokenizer over a smaller tower.
    let result = opened(|folder| {
        folder.edit_json("text_encoder/config.json", |json| json["vocab_size"] = json!(2000));
        folder.edit_weights("text_encoder", |tensors| {
            let tokens = tensors.iter_mut().find(|t| t.name.ends_with("token_embedding.weight")).unwrap();
            tokens.resize(0, 2000);
        });
    });
    let parts = ["tokenizer.json", "ids below 2000", "2049"];
    assert_error("a small tower", result.1, Kind::Format, &parts);
    // A larger tower has room for the ids.
    let (_folder, model) = opened(|folder| {
        folder.edit_json("text_encoder/config.json", |json| json["vocab_size"] = json!(2060));
        folder.edit_weights("text_encoder", |tensors| {
            let tokens = tensors.iter_mut().find(|t| t.name.ends_with("token_embedding.weight")).unwrap();
            tokens.resize(0, 2060);
        });
    });
    assert_eq!(model.unwrap().tokenize(Stage::C, "a cat").unwrap().dims(), [77]);
}

#[test]
fn other_generations() {
    // diffusers' own files have other fields: lists of library and class.
    let of_class = |class: &str| {
        let index = json!({"_class_name": class, "prior": ["diffusers", "AClass"], "tokenizer": null});
        opened(|folder| folder.write("model_index.json", index.to_string())).1
    };
    for class in
        ["StableCascadeCombinedPipeline", "StableCascadePriorPipeline", "StableCascadeDecoderPipeline"]
    {
        let parts = ["model_index.json", class, "generation 3", "generations 1, the paper's, and 2"];
        assert_error(class, of_class(class), Kind::Unsupported, &parts);
    }
    // v2 is read, but its parts are not those of a v1 folder.
    for (class, missing) in [
        ("WuerstchenCombinedPipeline", "prior_text_encoder/config.json"),
        ("WuerstchenPriorPipeline", "prior/config.json"),
        ("WuerstchenDecoderPipeline", "scheduler/scheduler_config.json"),
    ] {
        assert_error(class, of_class(class), Kind::Io, &[missing, "No such file"]);
    }
    for class in [json!("StableDiffusionPipeline"), json!(""), json!(1), Value::Null] {
        let result =
            opened(|f| f.edit_json("model_index.json", |json| json["_class_name"] = class.clone())).1;
        let parts = ["model_index.json", "_class_name", "expected"];
        assert_error(&class.to_string(), result, Kind::Format, &parts);
    }
    let result = opened(|f| f.edit_json("model_index.json", |json| json["format_version"] = json!(2))).1;
    assert_error("version 2", result, Kind::Unsupported, &["format_version 2", "version 1"]);
}

#[test]
fn weights_in_shards() {
    let whole = open(&tiny()).unwrap();
    let expected = picture(&whole, &short(&whole, "a cat"));
    for part in PARTS {
        let (_folder, model) = opened(|folder| drop(folder.shard(part)));
        let model = model.unwrap();
        assert_eq!(picture(&model, &short(&model, "a cat")).data(), expected.data(), "{part}");
        let count = |info: wuerstchen::ModelInfo| {
            [
                info.stage_a_parameters,
                info.stage_b_parameters,
                info.stage_c_parameters,
                info.text_encoder_parameters,
                info.image_encoder_parameters,
            ]
        };
        assert_eq!(count(model.info()), count(whole.info()), "{part}");
        let latents = [&model, &whole].map(|model| model.encode_image(&[&expected]).unwrap());
        assert_eq!(latents[0].bytes().unwrap(), latents[1].bytes().unwrap(), "{part}");
    }
    // A shard that is not there, and one that lacks a tensor.
    let second = "model-00002-of-00002.safetensors";
    let file = format!("stage_c/{second}");
    let result = opened(|folder| {
        folder.shard("stage_c");
        folder.remove(&file);
    });
    assert_error("no shard", result.1, Kind::Io, &[&file, "No such file"]);
    let result = opened(|folder| {
        folder.shard("stage_c");
        let mut tensors = read_tensors(&folder.path().join(&file));
        tensors.pop();
        folder.write(&file, file_of(&tensors));
    });
    assert_error("a short shard", result.1, Kind::Format, &[&file, "index.json", "none of this name"]);
    // Weights that are no numbers are named by their shard's own name too.
    let (_folder, model) = opened(|folder| {
        folder.shard("stage_c");
        let mut tensors = read_tensors(&folder.path().join(&file));
        tensors.iter_mut().find(|t| t.name == "projection.weight").unwrap().fill(f32::NAN);
        folder.write(&file, file_of(&tensors));
    });
    let model = model.unwrap();
    let found = model.generate(&short(&model, "a cat"));
    assert_error("NaN in a shard", found, Kind::Format, &["stage_c", "projection.weight", "finite weights"]);
}
