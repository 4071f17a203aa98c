//! The contrastive pair in training, from its files to its files, and the retrieval score that it is there for.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use common::{context, fixtures};
use safetensors::{Dtype, SafeTensors};
use wuerstchen::nn::{Mode, Params, Source, TrainingPass};
use wuerstchen::pipeline::load::{self, Part};
use wuerstchen::stages::image_encoder::ImageEncoder;
use wuerstchen::stages::text_encoder::TextEncoder;
use wuerstchen::tensor::autograd::{Gradients, Tape};
use wuerstchen::training::objectives::contrast::{Batch, Pair, PairConfig};
use wuerstchen::training::parameters::{Parameters, Role};
use wuerstchen::training::{Ema, Goal, Retrieval, TrainOptions, Trainer};
use wuerstchen::{Error, Image, Model, Result, Tensor};

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
    let model = Model::open(&emoji(), &common::options()).unwrap();
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
    let model = Model::open(&fixtures().join("model"), &common::options()).unwrap();
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

#[test]
fn the_temperature_stays_below_its_bound() {
    let scratch = Scratch::new("bound");
    let folder = scratch.0.join("model");
    let model = Model::open(&emoji(), &common::options()).unwrap();
    Trainer::new(&model, &options()).unwrap().export(&folder).unwrap();
    let path = folder.join("clip_pair/model.safetensors");
    let mut file = fs::read(&path).unwrap();
    let view = |file: &[u8]| {
        SafeTensors::deserialize(file).unwrap().tensor("logit_scale").unwrap().data().as_ptr() as usize
    };
    let place = view(&file) - file.as_ptr() as usize;
    file[place..place + 4].copy_from_slice(&7f32.to_le_bytes());
    fs::write(&path, file).unwrap();
    let (trainer, _) = train(&Model::open(&folder, &common::options()).unwrap(), 1, 128);
    trainer.export(&folder).unwrap();
    assert_eq!(scalar(&tensors(&path), "logit_scale"), 100f32.ln());
}

/// The weights of the two towers, and projections of numbers that repeat.
struct Towers {
    text: Part<TextEncoder>,
    image: Part<ImageEncoder>,
}

impl Source for Towers {
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        if let Some(name) = name.strip_prefix("text_encoder.") {
            return self.text.keys.source(&self.text.weights).tensor(name, shape);
        }
        if let Some(name) = name.strip_prefix("image_encoder.") {
            return self.image.keys.source(&self.image.weights).tensor(name, shape);
        }
        let count = shape.iter().product::<usize>();
        let values: Vec<f32> = (0..count).map(|i| (i as f32 * 1.7).sin() * 0.5 + 0.6).collect();
        Tensor::from_slice(shape, &values)
    }

    fn has(&self, _: &str) -> bool {
        true
    }
}

/// The gradients of all parameters at once: along them the loss must change by the square of their length.
#[test]
fn the_loss_changes_as_its_gradient_says() {
    let cx = context();
    let model = fixtures().join("model");
    let image = load::image_encoder(&model.join("image_encoder")).unwrap().encoder;
    let towers = Towers { text: load::text_encoder(&model.join("text_encoder")).unwrap(), image };
    let config = PairConfig {
        image: towers.image.network.config().clone(),
        text: *towers.text.network.config(),
        width: 10,
    };
    let mut parameters = Parameters::default();
    parameters.add(&cx, "pair", &towers, Role::Trained, |p| Pair::load(p, &config)).unwrap();
    parameters.set_role(Role::Frozen, |name| name.contains("image_encoder.head"));
    let wave = |n: usize| (0..n).map(|i| ((i * i) as f32 * 0.013).sin()).collect::<Vec<f32>>();
    let pixels = Tensor::from_slice(&[5, 24, 40, 3], &wave(5 * 24 * 40 * 3)).unwrap();
    let ids: Vec<i64> = (0..5 * 7).map(|i| (i * 37 + i / 7) % 2048).collect();
    let ids = Tensor::from_slice(&[5, 7], &ids).unwrap();
    let batch = Batch { pixels: &pixels, ids: &ids, ends: &[6, 3, 0, 5, 2] };
    let loss = |parameters: &Parameters, gradients: Option<&mut Gradients>| {
        let pair = Pair::load(&Params::new(parameters).sub("pair"), &config).unwrap();
        let (tape, pass) = (Tape::new(), TrainingPass::new(None, None));
        let found = pair.loss(&tape.attach(&cx), &batch, Mode::Training(&pass)).unwrap();
        if let Some(gradients) = gradients {
            tape.backward_from(&cx, &found.loss, 1.0, gradients).unwrap();
        }
        f64::from(found.loss.slice::<f32>().unwrap()[0])
    };
    let mut gradients = Gradients::default();
    loss(&parameters, Some(&mut gradients));
    parameters.expect_gradients(&gradients).unwrap();
    let places: Vec<usize> = parameters.trained().collect();
    // Each kind of layer apart, so that none hides behind a larger one.
    let groups = [
        "text_encoder.tokens",
        "text_encoder.layers",
        "image_encoder.stem",
        "image_encoder.stages",
        "projection",
        "logit_scale",
    ];
    for group in groups {
        let of_group: Vec<usize> =
            places.iter().copied().filter(|&place| parameters.list()[place].name.contains(group)).collect();
        let gradient = |place: usize| gradients.get(place).unwrap().slice::<f32>().unwrap();
        let squares: f64 = of_group.iter().flat_map(|&p| gradient(p)).map(|&g| f64::from(g).powi(2)).sum();
        let step = 1e-3 / squares.sqrt();
        let moved = |parameters: &mut Parameters, by: f64| {
            for &place in &of_group {
                let values = parameters.values_mut(place).unwrap();
                values.iter_mut().zip(gradient(place)).for_each(|(x, &g)| *x += (f64::from(g) * by) as f32);
            }
            loss(parameters, None)
        };
        let above = moved(&mut parameters, step);
        let below = moved(&mut parameters, -2.0 * step);
        moved(&mut parameters, step);
        let slope = (above - below) / (2.0 * step);
        assert!((slope / squares - 1.0).abs() < 0.02, "{group}: {slope} instead of {squares}");
    }
}
