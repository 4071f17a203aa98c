//! Models made anew: the names and shapes of real checkpoints, the distributions of the authors' constructors, and
//! pictures at the end.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use common::fixtures;
use safetensors::{Dtype, SafeTensors};
use wuerstchen::training::create_model;
use wuerstchen::{Error, GenerateOptions, Model};

const PARTS: [&str; 5] = ["text_encoder", "image_encoder", "stage_a", "stage_b", "stage_c"];

/// A folder that goes away with the test.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("wuerstchen-create-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Scratch(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        drop(fs::remove_dir_all(&self.0));
    }
}

/// A model folder without the weights of `blank` parts, and without whatever else is there.
fn copy_without(from: &Path, to: &Path, blank: &[&str]) {
    fs::create_dir_all(to).unwrap();
    fs::copy(from.join("model_index.json"), to.join("model_index.json")).unwrap();
    for part in PARTS.into_iter().chain(["tokenizer"]) {
        fs::create_dir_all(to.join(part)).unwrap();
        for entry in fs::read_dir(from.join(part)).unwrap() {
            let path = entry.unwrap().path();
            let is_weights = path.extension().is_some_and(|extension| extension == "safetensors");
            if !(is_weights && blank.contains(&part)) {
                fs::copy(&path, to.join(part).join(path.file_name().unwrap())).unwrap();
            }
        }
    }
}

fn weights(folder: &Path, part: &str) -> Vec<u8> {
    fs::read(folder.join(part).join("model.safetensors")).unwrap()
}

/// Type and shape of every tensor.
fn outline(file: &[u8]) -> BTreeMap<String, (Dtype, Vec<usize>)> {
    let parsed = SafeTensors::deserialize(file).unwrap();
    parsed.iter().map(|(name, view)| (name.to_owned(), (view.dtype(), view.shape().to_vec()))).collect()
}

fn floats(file: &[u8]) -> BTreeMap<String, (Vec<usize>, Vec<f64>)> {
    let parsed = SafeTensors::deserialize(file).unwrap();
    let float = |b: &[u8]| f64::from(f32::from_le_bytes(b.try_into().unwrap()));
    let all = parsed.iter().filter(|(_, view)| view.dtype() == Dtype::F32);
    all.map(|(name, view)| {
        (name.to_owned(), (view.shape().to_vec(), view.data().chunks_exact(4).map(float).collect()))
    })
    .collect()
}

#[test]
fn configurations_become_a_model_that_draws() {
    let scratch = Scratch::new("whole");
    let (configs, made) = (scratch.0.join("configs"), scratch.0.join("made"));
    copy_without(&fixtures().join("model"), &configs, &PARTS);
    create_model(&configs, &made, 7).unwrap();
    for part in PARTS {
        let expected = outline(&weights(&fixtures().join("model"), part));
        assert_eq!(outline(&weights(&made, part)), expected, "{part}");
        assert!(!configs.join(part).join("model.safetensors").exists());
    }
    let model = Model::open(&made, &common::options()).unwrap();
    let mut options = GenerateOptions::new(&model).unwrap();
    options.add_prompt("a red apple", None).unwrap();
    options.set("stage_c_steps", "3").unwrap();
    options.set("stage_b_steps", "3").unwrap();
    let images = model.generate(&options).unwrap();
    assert_eq!((images[0].width(), images[0].height()), (64, 64));

    let again = scratch.0.join("again");
    create_model(&configs, &again, 7).unwrap();
    let other = scratch.0.join("other");
    create_model(&configs, &other, 8).unwrap();
    for part in PARTS {
        assert!(weights(&again, part) == weights(&made, part), "{part}");
        assert!(weights(&other, part) != weights(&made, part), "{part}");
    }
}

#[test]
fn weights_that_are_there_stay() {
    let scratch = Scratch::new("partial");
    let (source, folder) = (fixtures().join("model"), scratch.0.join("model"));
    copy_without(&source, &folder, &["stage_b", "stage_c"]);
    create_model(&folder, &folder, 1).unwrap();
    for part in ["text_encoder", "image_encoder", "stage_a"] {
        assert!(weights(&folder, part) == weights(&source, part), "{part}");
    }
    assert!(weights(&folder, "stage_b") != weights(&source, "stage_b"));
    assert_eq!(fs::read_dir(&scratch.0).unwrap().count(), 1, "nothing is left beside it");
}

#[test]
fn errors_name_what_is_wrong_and_leave_nothing() {
    let scratch = Scratch::new("errors");
    let (configs, made) = (scratch.0.join("configs"), scratch.0.join("made"));
    copy_without(&fixtures().join("model"), &configs, &PARTS);
    let inside = create_model(&configs, &configs.join("made"), 0).unwrap_err();
    assert!(matches!(inside, Error::InvalidArgument { .. }), "{inside}");
    let other_generation = create_model(&fixtures().join("v2/model"), &made, 0).unwrap_err();
    assert!(matches!(other_generation, Error::Unsupported { .. }), "{other_generation}");
    let config = configs.join("stage_b/config.json");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, text.replace("\"num_labels\": 64", "\"num_labels\": 65")).unwrap();
    let message = create_model(&configs, &made, 0).unwrap_err().to_string();
    assert!(message.contains(&config.display().to_string()) && message.contains("num_labels"), "{message}");
    fs::remove_file(&config).unwrap();
    let message = create_model(&configs, &made, 0).unwrap_err().to_string();
    assert!(message.contains(&config.display().to_string()), "{message}");
    assert!(!made.exists());
}

/// What the authors' constructors, torchvision's and transformers' leave in a tensor of the checkpoint: constant, or the
/// standard deviation of a normal or uniform distribution. Written from their code by the checkpoint's own names.
enum Expected {
    Constant(f64),
    Normal(f64),
    /// Uniform between minus and plus this.
    Uniform(f64),
}

fn xavier(shape: &[usize], gain: f64) -> Expected {
    let kernel: usize = shape[2..].iter().product();
    Expected::Uniform(gain * (6.0 / ((shape[0] + shape[1]) * kernel) as f64).sqrt())
}

/// The default of Linear, Conv2d and ConvTranspose2d, for the weight and the bias of a layer whose weight is `shape`.
fn layer(shape: &[usize]) -> Expected {
    Expected::Uniform((1.0 / shape[1..].iter().product::<usize>() as f64).sqrt())
}

fn expected_of_stage(part: &str, name: &str, shape: &[usize]) -> Expected {
    let (blocks, conditionings): (f64, &[&str]) = match part {
        "stage_b" => (6.0, &["byt5_mapper.weight", "effnet_mapper.weight"]),
        _ => (6.0, &["projection.weight", "cond_mapper.0.weight", "cond_mapper.2.weight"]),
    };
    match name {
        _ if conditionings.contains(&name) => Expected::Normal(0.02),
        "embedding.1.weight" => xavier(shape, 0.02),
        "in_mapper.0.weight" | "out_mapper.1.weight" => Expected::Normal(1.0 / 32.0),
        "clf.1.weight" | "out.1.weight" => Expected::Constant(0.0),
        "up_blocks.0.12.1.weight" => layer(shape),
        // [192, 96, 2, 2] is the weight beside it.
        "up_blocks.0.12.1.bias" => layer(&[192, 96, 2, 2]),
        _ if name.ends_with("bias") || name.contains(".mapper.") => Expected::Constant(0.0),
        _ if name.ends_with("gamma") || name.ends_with("beta") => Expected::Constant(0.0),
        _ if name.ends_with("channelwise.4.weight") => xavier(shape, (1.0 / blocks).sqrt()),
        _ => xavier(shape, 1.0),
    }
}

fn expected_of_stage_a(name: &str, shape: &[usize]) -> Expected {
    let beside: &[usize] = match name {
        "in_block.1.bias" => &[48, 12, 1, 1],
        "down_blocks.1.bias" => &[96, 48, 4, 4],
        "up_blocks.0.0.bias" => &[96, 4, 1, 1],
        "up_blocks.5.bias" => &[96, 48, 4, 4],
        "out_block.0.bias" => &[12, 48, 1, 1],
        "vquantizer.codebook.weight" => return Expected::Uniform(1.0 / 1024.0),
        _ if name.ends_with("running_var") || name == "down_blocks.3.1.weight" => {
            return Expected::Constant(1.0);
        }
        _ if name.contains("channelwise") || name.contains("depthwise") => {
            return if name.ends_with("weight") { xavier(shape, 1.0) } else { Expected::Constant(0.0) };
        }
        _ if name.ends_with("bias") || name.ends_with("gammas") || name.ends_with("running_mean") => {
            return Expected::Constant(0.0);
        }
        _ => shape,
    };
    layer(beside)
}

fn expected(part: &str, name: &str, shape: &[usize]) -> Expected {
    match part {
        "stage_a" => expected_of_stage_a(name, shape),
        "image_encoder" => match name {
            "mapper.0.weight" => layer(shape),
            _ if name.ends_with("bias") || name.ends_with("running_mean") => Expected::Constant(0.0),
            _ if shape.len() == 1 => Expected::Constant(1.0),
            _ => Expected::Normal((2.0 / (shape[0] * shape[2] * shape[3]) as f64).sqrt()),
        },
        "text_encoder" => {
            let (width, layers) = (128f64, 3f64);
            let in_proj = width.powf(-0.5) * (2.0 * layers).powf(-0.5);
            match name.rsplit('.').nth(1).unwrap() {
                _ if name.ends_with("bias") => Expected::Constant(0.0),
                "token_embedding" | "position_embedding" => Expected::Normal(0.02),
                "q_proj" | "k_proj" | "v_proj" | "fc2" => Expected::Normal(in_proj),
                "out_proj" => Expected::Normal(width.powf(-0.5)),
                "fc1" => Expected::Normal((2.0 * width).powf(-0.5)),
                _ => Expected::Constant(1.0),
            }
        }
        _ => expected_of_stage(part, name, shape),
    }
}

fn check_spread(name: &str, values: &[f64], expected: &Expected) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let deviation = (values.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n).sqrt();
    let largest = values.iter().fold(0f64, |m, x| m.max(x.abs()));
    let (wanted, kurtosis) = match *expected {
        Expected::Constant(value) => {
            assert!(values.iter().all(|&x| x == value), "{name}: not all {value}");
            return;
        }
        Expected::Normal(deviation) => (deviation, 3.0),
        Expected::Uniform(bound) => {
            assert!(largest <= bound * 1.000_001 && largest > bound * (1.0 - 12.0 / n), "{name}: {largest}");
            (bound / 3f64.sqrt(), 1.8)
        }
    };
    // Five standard errors: one tensor in a million.
    assert!(mean.abs() < 5.0 * wanted / n.sqrt(), "{name}: mean {mean}, deviation {wanted}");
    let error = (deviation / wanted - 1.0).abs();
    assert!(
        error < 5.0 * ((kurtosis - 1.0) / 4.0 / n).sqrt() + 1.0 / n,
        "{name}: {deviation} instead of {wanted}"
    );
}

#[test]
fn every_tensor_is_spread_as_the_authors_constructors_do() {
    let scratch = Scratch::new("spread");
    let (configs, made) = (scratch.0.join("configs"), scratch.0.join("made"));
    let emoji = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/models/emoji-v1");
    copy_without(&emoji, &configs, &PARTS);
    create_model(&configs, &made, 3).unwrap();
    for part in PARTS {
        let file = weights(&made, part);
        let tensors = floats(&file);
        for (name, (shape, values)) in &tensors {
            check_spread(&format!("{part}: {name}"), values, &expected(part, name, shape));
        }
        if part == "stage_b" {
            assert_eq!(tensors["in_mapper.0.weight"].1, tensors["out_mapper.1.weight"].1);
        }
    }
}
