//! The contrastive pair in training, from its files to its files, and the retrieval score that it is there for.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use common::fixtures;
use safetensors::{Dtype, SafeTensors};
use wuerstchen::training::{Ema, Goal, Retrieval, TrainOptions, Trainer};
use wuerstchen::{Error, Image, Model, ModelOptions};

/// A folder that goes away with the test.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("wuerstchen-pair-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Scratch(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        drop(fs::remove_dir_all(&self.0));
    }
}

fn emoji() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/models/emoji-v1")
}

/// Coloured discs on white, and what they are called.
fn pictures(side: u32) -> (Vec<Image>, Vec<&'static str>) {
    let kinds: [(&str, [u8; 3]); 6] = [
        ("a red circle", [230, 40, 30]),
        ("a green circle", [40, 200, 60]),
        ("a blue circle", [40, 60, 230]),
        ("a yellow circle", [240, 220, 30]),
        ("a black circle", [20, 20, 20]),
        ("a purple circle", [150, 40, 200]),
    ];
    let disc = |colour: [u8; 3]| {
        let inside = |x: u32, y: u32| {
            let d = |v: u32| i64::from(v) * 2 + 1 - i64::from(side);
            d(x).pow(2) + d(y).pow(2) < i64::from(side * side) * 2 / 3
        };
        let pixels = (0..side).flat_map(|y| (0..side).map(move |x| (x, y)));
        let rgb = pixels.flat_map(|(x, y)| if inside(x, y) { colour } else { [255; 3] });
        Image::from_rgb(side, side, &rgb.collect::<Vec<u8>>(), 0).unwrap()
    };
    (kinds.iter().map(|&(_, colour)| disc(colour)).collect(), kinds.iter().map(|&(name, _)| name).collect())
}

fn options() -> TrainOptions {
    let mut options = TrainOptions::new(Goal::Pair);
    options.set_warmup_steps(2);
    options.set_learning_rate(1e-3).unwrap();
    options.set_ema(Ema { decay: 0.0, start: 0, every: 1 }).unwrap();
    options.set_seed(11);
    options
}

type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

fn tensors(path: &Path) -> Tensors {
    let file = fs::read(path).unwrap();
    let parsed = SafeTensors::deserialize(&file).unwrap();
    let entry =
        |view: safetensors::tensor::TensorView| (view.dtype(), view.shape().to_vec(), view.data().to_vec());
    parsed.iter().map(|(name, view)| (name.to_owned(), entry(view))).collect()
}

fn scalar(tensors: &Tensors, name: &str) -> f32 {
    f32::from_le_bytes(tensors[name].2[..4].try_into().unwrap())
}

/// Trains on the same pictures, so that the pair learns them by heart.
fn train(model: &Model, steps: usize, side: u32) -> (Trainer, Vec<f32>) {
    let (images, captions) = pictures(side);
    let mut trainer = Trainer::new(model, &options()).unwrap();
    let samples = trainer.prepare(&images.iter().collect::<Vec<_>>(), &captions).unwrap();
    let batch: Vec<_> = samples.iter().collect();
    let losses = (0..steps).map(|_| trainer.step_over(&batch).unwrap().loss).collect();
    (trainer, losses)
}

#[test]
fn a_trained_pair_goes_on_and_is_written_back_under_its_names() {
    let scratch = Scratch::new("on");
    let model = Model::open(&emoji(), &ModelOptions::default()).unwrap();
    let (trainer, losses) = train(&model, 12, 128);
    assert!(losses[11] < 0.7 * losses[0], "{losses:?}");
    let folder = scratch.0.join("model");
    trainer.export(&folder).unwrap();

    let (before, after) = (emoji(), folder.clone());
    let pair = |root: &Path| tensors(&root.join("clip_pair/model.safetensors"));
    let (old, new) = (pair(&before), pair(&after));
    let shapes = |tensors: &Tensors| -> Vec<_> {
        tensors.iter().map(|(name, (_, shape, _))| (name.clone(), shape.clone())).collect()
    };
    assert_eq!(shapes(&new), shapes(&old));
    assert!(scalar(&new, "logit_scale") <= 100f32.ln());
    let encoder = tensors(&after.join("image_encoder/model.safetensors"));
    let encoder_before = tensors(&before.join("image_encoder/model.safetensors"));
    assert_eq!(shapes(&encoder), shapes(&encoder_before));
    for (name, tensor) in &encoder {
        match name.strip_prefix("backbone.") {
            Some(inner) => assert!(tensor == &new[&format!("image.{inner}")], "{name}"),
            None if name.contains("running") => {}
            None => assert!(tensor == &encoder_before[name], "{name} is no part of the pair"),
        }
    }
    assert!(encoder["backbone.0.1.running_mean"].2 != encoder_before["backbone.0.1.running_mean"].2);

    let (images, captions) = pictures(128);
    let images: Vec<&Image> = images.iter().collect();
    let own: Vec<usize> = (0..images.len()).collect();
    let score = Retrieval::new(&folder).unwrap().score(&images, &own, &captions).unwrap();
    assert!(score.top_1 >= 0.5 && score.top_5 >= score.top_1 && score.top_20 == 1.0, "{score:?}");
    // The other parts came along.
    assert_eq!(
        fs::read(folder.join("stage_b/model.safetensors")).unwrap(),
        fs::read(emoji().join("stage_b/model.safetensors")).unwrap()
    );
}

#[test]
fn a_pair_begins_from_the_encoder_and_goes_on_from_a_checkpoint() {
    let scratch = Scratch::new("fresh");
    let model = Model::open(&fixtures().join("model"), &ModelOptions::default()).unwrap();
    let none = Retrieval::of(&model).map(drop).unwrap_err();
    assert!(matches!(none, Error::Unsupported { .. }), "{none}");

    let (mut trainer, _) = train(&model, 2, 64);
    trainer.save(&scratch.0.join("checkpoint")).unwrap();
    let mut resumed = Trainer::new(&model, &options()).unwrap();
    resumed.load(&scratch.0.join("checkpoint")).unwrap();
    let (images, captions) = pictures(64);
    let images: Vec<&Image> = images.iter().collect();
    let next = trainer.step(&images, &captions).unwrap();
    assert_eq!(resumed.step(&images, &captions).unwrap(), next);

    let folder = scratch.0.join("model");
    trainer.export(&folder).unwrap();
    let pair = tensors(&folder.join("clip_pair/model.safetensors"));
    assert_eq!(pair["image_projection.weight"].1, [24, 32]);
    assert_eq!(pair["text_projection.weight"].1, [24, 24]);
    assert!((scalar(&pair, "logit_scale") - (1.0 / 0.07f32).ln()).abs() < 0.02);
    assert_eq!(pair["image.0.1.num_batches_tracked"].0, Dtype::I64);
    let retrieval = Retrieval::new(&folder).unwrap();
    let directions = retrieval.embed_texts(&captions).unwrap();
    assert_eq!(directions.dims(), [6, 24]);
    for row in directions.slice::<f32>().unwrap().chunks_exact(24) {
        assert!((row.iter().map(|x| x * x).sum::<f32>() - 1.0).abs() < 1e-5);
    }
}
