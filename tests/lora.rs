//! Low-rank adapters of Stage C: loaded, merged, trained and saved.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "common/errors.rs"]
mod errors;
#[path = "common/folder.rs"]
mod folder;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use errors::{Kind, assert_error};
use folder::{Folder, Stored, file_of, read_tensors, tiny, v2};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use wuerstchen::tensor::rng::Philox;
use wuerstchen::training::{Goal, TrainOptions, Trainer, merge_adapter};
use wuerstchen::{Image, Model, Result, Tensor};

const FILE: &str = "pytorch_lora_weights.safetensors";
/// Of the largest number: where a product is rounded is all that differs.
const TOLERANCE: f32 = 1e-5;

/// Random numbers that a test may name.
fn random(dims: &[usize], seed: u64) -> Tensor {
    let mut values = vec![0.0; dims.iter().product()];
    Philox::new(seed, 0).fill_normal(&mut values, 0);
    Tensor::from_slice(dims, &values).unwrap()
}

fn stored(name: impl Into<String>, tensor: &Tensor) -> Stored {
    let (name, shape) = (name.into(), tensor.dims().to_vec());
    Stored { name, dtype: Dtype::F32, shape, data: tensor.bytes().unwrap().to_vec() }
}

/// The tensors of an adapter of these ranks, one per AttnBlock, in peft's spelling.
fn adapter(channels: usize, ranks: [usize; 2], seed: u64) -> Vec<Stored> {
    let mut tensors = Vec::new();
    for (block, rank) in [2, 5].into_iter().zip(ranks) {
        for (i, module) in (0..).zip(["to_q", "to_k", "to_v", "to_out.0"]) {
            let name = format!("prior.blocks.{block}.attention.{module}");
            let seed = seed + 8 * block + 2 * i;
            tensors.push(stored(format!("{name}.lora_A.weight"), &random(&[rank, channels], seed)));
            tensors.push(stored(format!("{name}.lora_B.weight"), &random(&[channels, rank], seed + 1)));
        }
    }
    tensors
}

/// A model, its channels, and what its Stage C is asked.
struct Subject {
    folder: PathBuf,
    channels: usize,
    text_width: usize,
}

fn subjects() -> [Subject; 2] {
    [
        Subject { folder: tiny(), channels: 24, text_width: 24 },
        Subject { folder: v2("prior"), channels: 28, text_width: 20 },
    ]
}

impl Subject {
    fn inputs(&self) -> [Tensor; 3] {
        let times = Tensor::from_slice(&[2], &[0.9f32, 0.3]).unwrap();
        [random(&[2, 3, 4, 8], 1), times, random(&[2, 5, self.text_width], 2)]
    }

    fn predict(&self, model: &Model) -> Tensor {
        let [x, t, text] = self.inputs();
        model.stage_c_predict(&x, &t, &text).unwrap()
    }

    fn open(&self, options: &[(&str, &str)]) -> Result<Model> {
        open(&self.folder, options)
    }
}

fn open(folder: &Path, options: &[(&str, &str)]) -> Result<Model> {
    let mut all = folder::options();
    all.set_threads(2)?;
    for (key, value) in options {
        all.set(key, value)?;
    }
    Model::open(folder, &all)
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn largest(tensor: &Tensor) -> f32 {
    tensor.slice::<f32>().unwrap().iter().fold(0.0, |m, v| m.max(v.abs()))
}

fn difference(a: &Tensor, b: &Tensor) -> f32 {
    let pairs = a.slice::<f32>().unwrap().iter().zip(b.slice::<f32>().unwrap());
    pairs.fold(0.0, |m, (a, b)| m.max((a - b).abs()))
}

fn assert_close(found: &Tensor, expected: &Tensor) {
    let error = difference(found, expected) / largest(expected);
    assert!(error <= TOLERANCE, "differs by {error:e} of the largest number");
}

#[test]
fn merged_weights_are_the_adapter() {
    for subject in subjects() {
        let folder = Folder::empty();
        folder.write(FILE, file_of(&adapter(subject.channels, [2, 3], 100)));
        let base = subject.predict(&subject.open(&[]).unwrap());
        let adapted = subject.open(&[("lora", text(folder.path())), ("lora_scale", "0.3")]).unwrap();
        let adapted = subject.predict(&adapted);
        assert!(difference(&adapted, &base) > 0.05 * largest(&base), "the adapter does something");
        let out = folder.path().join("merged");
        merge_adapter(&subject.folder, folder.path(), 0.3, &out).unwrap();
        assert_close(&subject.predict(&open(&out, &[]).unwrap()), &adapted);
    }
}

#[test]
fn a_scale_of_zero_is_the_base() {
    for subject in subjects() {
        let folder = Folder::empty();
        folder.write(FILE, file_of(&adapter(subject.channels, [4, 1], 200)));
        let base = subject.predict(&subject.open(&[]).unwrap());
        let file = folder.path().join(FILE);
        let off = subject.open(&[("lora_scale", "0"), ("lora", text(&file))]).unwrap();
        assert_eq!(subject.predict(&off).bytes().unwrap(), base.bytes().unwrap());
        let out = folder.path().join("merged");
        merge_adapter(&subject.folder, &file, 0.0, &out).unwrap();
        assert_eq!(subject.predict(&open(&out, &[]).unwrap()).bytes().unwrap(), base.bytes().unwrap());
        let none = subject.open(&[("lora", text(&file)), ("lora", "")]).unwrap();
        assert_eq!(subject.predict(&none).bytes().unwrap(), base.bytes().unwrap());
    }
}

#[test]
fn several_adapters_add_up() {
    for subject in subjects() {
        let folder = Folder::empty();
        let [first, second] =
            [("first.safetensors", 300), ("second.safetensors", 400)].map(|(name, seed)| {
                folder.write(name, file_of(&adapter(subject.channels, [2, 1], seed)));
                folder.path().join(name)
            });
        let [first, second] = [&first, &second].map(|path| text(path));
        let both = [("lora", first), ("lora_scale", "0.2"), ("lora", second), ("lora_scale", "-0.1")];
        let both = subject.predict(&subject.open(&both).unwrap());
        let out = folder.path().join("merged");
        merge_adapter(&subject.folder, Path::new(first), 0.2, &out).unwrap();
        let second_over_first = open(&out, &[("lora", second), ("lora_scale", "-0.1")]).unwrap();
        assert_close(&subject.predict(&second_over_first), &both);
    }
}

#[test]
fn older_spellings_and_alphas_are_read() {
    let [subject, _] = subjects();
    let folder = Folder::empty();
    let tensors = adapter(subject.channels, [2, 4], 500);
    folder.write("new.safetensors", file_of(&tensors));
    let old = |name: &str| {
        let name = name
            .replace("prior.", "unet.")
            .replace(".0.lora", ".lora")
            .replace("attention.", "attention.processor.");
        name.replace(".lora_A", "_lora.down").replace(".lora_B", "_lora.up")
    };
    let mut renamed: Vec<Stored> =
        tensors.iter().map(|t| Stored { name: old(&t.name), ..t.clone() }).collect();
    folder.write("old.safetensors", file_of(&renamed));
    // An alpha of half the rank.
    for (block, alpha) in [(2, 1f32), (5, 2.0)] {
        for module in ["to_q", "to_k", "to_v", "to_out.0"] {
            let alpha = Tensor::from_slice(&[], &[alpha]).unwrap();
            renamed.push(stored(format!("blocks.{block}.attention.{module}.alpha"), &alpha));
        }
    }
    folder.write("alpha.safetensors", file_of(&renamed));
    let notes = serde_json::json!({"prior.r": 2, "prior.lora_alpha": 1.0,
        "prior.alpha_pattern": {"^blocks.5.attention.to_q": 2, "blocks.5.attention.to_k": 2, "5.attention.to_v": 2,
            "blocks.5.attention.to_out.0": 2}});
    let views =
        tensors.iter().map(|t| (&t.name, TensorView::new(t.dtype, t.shape.clone(), &t.data).unwrap()));
    let notes = HashMap::from([("lora_adapter_metadata".to_owned(), notes.to_string())]);
    folder.write("notes.safetensors", safetensors::serialize(views, Some(notes)).unwrap());
    let predict = |file: &str, scale: &str| {
        let path = folder.path().join(file);
        subject.predict(&subject.open(&[("lora", text(&path)), ("lora_scale", scale)]).unwrap())
    };
    let [new, half] = ["0.25", "0.125"].map(|scale| predict("new.safetensors", scale));
    assert_eq!(predict("old.safetensors", "0.25").bytes().unwrap(), new.bytes().unwrap());
    assert_eq!(predict("alpha.safetensors", "0.25").bytes().unwrap(), half.bytes().unwrap());
    assert_eq!(predict("notes.safetensors", "0.25").bytes().unwrap(), half.bytes().unwrap());
}

#[test]
fn adapters_of_other_models_are_refused() {
    let [subject, other] = subjects();
    let folder = Folder::empty();
    let file = folder.path().join(FILE);
    let refused = |tensors: &[Stored], said: &[&str]| {
        folder.write(FILE, file_of(tensors));
        assert_error("an adapter", subject.open(&[("lora", text(&file))]), Kind::Format, said);
    };
    let a = "prior.blocks.2.attention.to_q.lora_A.weight";
    refused(&adapter(other.channels, [2, 2], 1), &[FILE, a, "[2, 24]", "[2, 28]"]);
    let mut tensors = adapter(subject.channels, [2, 2], 1);
    tensors[1].resize(1, 3);
    refused(&tensors, &[FILE, "prior.blocks.2.attention.to_q.lora_B.weight", "[24, 2]", "[24, 3]"]);
    for tensor in &mut tensors {
        tensor.name = tensor.name.replace("blocks.5", "blocks.8");
    }
    tensors[1].resize(1, 2);
    refused(&tensors, &[FILE, "prior.blocks.8.attention.to_k.lora_A.weight", "the model has"]);
    tensors[0].name = "text_encoder.layers.0.to_q.lora_A.weight".into();
    refused(&tensors, &[FILE, "text_encoder.layers.0.to_q.lora_A.weight"]);

    let missing = folder.path().join("none");
    assert_error("no file", subject.open(&[("lora", text(&missing))]), Kind::Io, &["none"]);
    let decoder = open(&v2("decoder"), &[("lora", text(&file))]);
    assert_error("no Stage C", decoder, Kind::Argument, &["lora", "Stage C"]);
    let mut options = folder::options();
    let not_finite = options.set("lora_scale", "inf");
    assert_error("a scale", not_finite, Kind::Argument, &["lora_scale", "finite"]);
    let inside = merge_adapter(folder.path(), &file, 1.0, &folder.path().join("a/b"));
    assert!(inside.is_err());
}

#[test]
fn numbers_that_are_none_are_named() {
    let [subject, _] = subjects();
    let folder = Folder::empty();
    let mut tensors = adapter(subject.channels, [1, 1], 1);
    tensors[0].fill(f32::NAN);
    folder.write(FILE, file_of(&tensors));
    let model = subject.open(&[("lora", text(folder.path()))]).unwrap();
    let options = folder::short(&model, "a red apple");
    let said = [FILE, "prior.blocks.2.attention.to_q.lora_A.weight", "finite"];
    assert_error("not a number", model.generate(&options), Kind::Format, &said);
}

/// A picture of a plain colour with a stripe.
fn striped(side: u32, colour: [u8; 3]) -> Image {
    let pixel = |i: u32| if i % side < side / 4 { [250, 250, 250] } else { colour };
    let pixels: Vec<u8> = (0..side * side).flat_map(pixel).collect();
    Image::from_rgb(side, side, &pixels, 0).unwrap()
}

/// A model that can be trained: v2's published folders have no image encoder.
fn trainable(subject: &Subject) -> Folder {
    let folder = Folder::of(&subject.folder);
    if !subject.folder.join("image_encoder").exists() {
        folder.link("image_encoder", &tiny().join("image_encoder"));
    }
    folder
}

fn lora_options(rank: &str) -> TrainOptions {
    let mut options = TrainOptions::new(Goal::StageC);
    let settings = [
        ("lora_rank", rank),
        ("lora_alpha", "6"),
        ("learning_rate", "0.01"),
        ("warmup_steps", "0"),
        ("ema_start", "1000000"),
        ("ema_every", "1"),
        ("text_dropout", "0"),
        ("seed", "5"),
    ];
    settings.into_iter().for_each(|(key, value)| options.set(key, value).unwrap());
    options
}

fn train(trainer: &mut Trainer, steps: usize) -> Vec<f32> {
    let images = [[220, 30, 30], [30, 30, 220]].map(|colour| striped(128, colour));
    let images = [&images[0], &images[1], &images[0], &images[1]];
    let samples =
        trainer.prepare(&images, &["a red apple", "a blue ball", "a red apple", "a blue ball"]).unwrap();
    let samples: Vec<_> = samples.iter().collect();
    (0..steps).map(|_| trainer.step_over(&samples).unwrap().loss).collect()
}

#[test]
fn training_an_adapter() {
    for subject in subjects() {
        let model_folder = trainable(&subject);
        let model = open(model_folder.path(), &[]).unwrap();
        let mut trainer = Trainer::new(&model, &lora_options("3")).unwrap();
        let trained: usize = trainer.parameters().trained().count();
        assert_eq!(trained, 2 * 4 * 2, "two matrices of four projections of two blocks");
        let losses = train(&mut trainer, 40);
        let mean = |losses: &[f32]| losses.iter().sum::<f32>() / losses.len() as f32;
        assert!(mean(&losses[30..]) < 0.97 * mean(&losses[..10]), "{losses:?}");

        // The file, opened over the base, is what the trainer exports: the base with the update added.
        let out = Folder::empty();
        let file = trainer.save_adapter(out.path()).unwrap();
        assert_eq!(file, out.path().join(FILE));
        let exported = out.path().join("exported");
        trainer.export(&exported).unwrap();
        let adapted = subject.predict(&open(model_folder.path(), &[("lora", text(&file))]).unwrap());
        let base = subject.predict(&model);
        assert!(difference(&adapted, &base) > 1e-3 * largest(&base), "the adapter does something");
        assert_close(&subject.predict(&open(&exported, &[]).unwrap()), &adapted);
        let merged = out.path().join("merged");
        merge_adapter(model_folder.path(), &file, 1.0, &merged).unwrap();
        assert_close(&subject.predict(&open(&merged, &[]).unwrap()), &adapted);

        assert_untouched(&model_folder, &exported);
        assert_eq!(names(&file), names_of_adapter(), "as diffusers names them");
        leave(&subject, &file);
        let continued =
            Trainer::new(&open(model_folder.path(), &[("lora", text(&file))]).unwrap(), &lora_options("3"));
        assert_error(
            "adapters under adapters",
            continued.map(drop),
            Kind::Unsupported,
            &["adapters", "merge"],
        );
    }
}

/// Leaves an adapter of the v2 prior to `tests/reference/lora_parity.py`, if that is who runs the test.
fn leave(subject: &Subject, file: &Path) {
    if let Some(folder) = std::env::var_os("LORA_SAVED_TO")
        && subject.folder == v2("prior")
    {
        std::fs::copy(file, Path::new(&folder).join(FILE)).unwrap();
    }
}

/// All but the projections is as it was.
fn assert_untouched(base: &Folder, exported: &Path) {
    let part = ["stage_c", "prior"].into_iter().find(|part| base.path().join(part).exists()).unwrap();
    let name = folder::weights_of(base.path(), part);
    let (was, is) = (read_tensors(&base.path().join(&name)), read_tensors(&exported.join(&name)));
    assert_eq!(was.len(), is.len());
    let changed: Vec<&str> = was
        .iter()
        .zip(&is)
        .filter(|(was, is)| was.data != is.data)
        .map(|(was, _)| was.name.as_str())
        .collect();
    let is_projection = |name: &&str| name.contains(".attention.") && name.contains("weight");
    assert!(!changed.is_empty() && changed.iter().all(is_projection), "{changed:?}");
}

fn names(file: &Path) -> Vec<String> {
    read_tensors(file).into_iter().map(|t| t.name).collect()
}

fn names_of_adapter() -> Vec<String> {
    let mut names: Vec<String> = adapter(1, [1, 1], 0).into_iter().map(|t| t.name).collect();
    names.sort();
    names
}

#[test]
fn checkpoints_hold_the_adapter_alone() {
    let [subject, _] = subjects();
    let model = open(&subject.folder, &[]).unwrap();
    let (whole, interrupted, folder) = (lora_options("2"), lora_options("2"), Folder::empty());
    let mut whole = Trainer::new(&model, &whole).unwrap();
    let losses = train(&mut whole, 4);
    let mut first = Trainer::new(&model, &interrupted).unwrap();
    assert_eq!(train(&mut first, 2), losses[..2]);
    let checkpoint = folder.path().join("checkpoint");
    first.save(&checkpoint).unwrap();
    assert_eq!(read_tensors(&checkpoint.join("parameters.safetensors")).len(), 16);
    let mut second = Trainer::new(&model, &interrupted).unwrap();
    second.load(&checkpoint).unwrap();
    assert_eq!(train(&mut second, 2), losses[2..]);
    let mut other = Trainer::new(&model, &lora_options("3")).unwrap();
    let said = ["lora.down", "[3, 24]", "[2, 24]"];
    assert_error("another rank", other.load(&checkpoint), Kind::Format, &said);
}

#[test]
fn half_precision_and_recomputing_train_too() {
    let [subject, _] = subjects();
    let model = open(&subject.folder, &[]).unwrap();
    let plain = train(&mut Trainer::new(&model, &lora_options("2")).unwrap(), 3);
    let mut options = lora_options("2");
    options.set("recompute", "true").unwrap();
    assert_eq!(train(&mut Trainer::new(&model, &options).unwrap(), 3), plain);
    options.set("compute_dtype", "bf16").unwrap();
    let rounded = train(&mut Trainer::new(&model, &options).unwrap(), 3);
    for (rounded, plain) in rounded.iter().zip(&plain) {
        assert!((rounded - plain).abs() < 0.02 * plain, "{rounded} instead of {plain}");
    }
}

#[test]
fn options_that_contradict() {
    let model = open(&tiny(), &[]).unwrap();
    let mut stage_b = TrainOptions::new(Goal::StageB);
    stage_b.set("lora_rank", "2").unwrap();
    let refused = Trainer::new(&model, &stage_b).map(drop);
    assert_error("Stage B", refused, Kind::Argument, &["lora_rank", "Stage C"]);
    let mut still = lora_options("2");
    still.set("lora_alpha", "0").unwrap();
    let refused = Trainer::new(&model, &still).map(drop);
    assert_error("no alpha", refused, Kind::Argument, &["lora_alpha"]);
    let whole = Trainer::new(&model, &TrainOptions::new(Goal::StageC)).unwrap();
    let refused = whole.save_adapter(Path::new("nowhere")).map(drop);
    assert_error("nothing to save", refused, Kind::Unsupported, &["lora_rank"]);
}
