//! Scores a model by retrieval: how often the pictures it draws of captions are recognised, by its own contrastive
//! pair, among the captions of the whole data set.
//!
//! ```text
//! cargo run --release --example evaluate -- examples/models/emoji-v1 build/emoji build/emoji-held-out
//! ```
//!
//! The captions that are drawn are spread over each data set; those of the second were not trained on. `--judge MODEL`
//! takes another model's pair, so that two models have one judge; `--dtype i8` computes in that type, and says how far the
//! pictures are from those of f32. Rows: the pictures themselves (what the pair can tell at best), the same through
//! Stage A, through Stage B from their true latents, and drawn from the captions alone.

mod dataset;

use std::path::PathBuf;

use wuerstchen::training::{Retrieval, RetrievalScore};
use wuerstchen::{GenerateOptions, Image, Model, ModelOptions};

use dataset::Dataset;

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

const USAGE: &str =
    "usage: evaluate MODEL DATA [HELD-OUT]… [--judge MODEL] [--captions N] [--seed N] [--dtype TYPE]";

struct Arguments {
    model: PathBuf,
    data: Vec<PathBuf>,
    judge: Option<PathBuf>,
    captions: usize,
    seed: u64,
    /// What the model computes in; empty for its device's best.
    dtype: String,
}

fn main() {
    if let Err(error) = run() {
        eprintln!("evaluate: {error}");
        std::process::exit(1);
    }
}

fn run() -> Outcome<()> {
    let arguments = parse()?;
    let model = Model::open(&arguments.model, &in_type(&arguments.dtype)?)?;
    let judge = Retrieval::new(arguments.judge.as_ref().unwrap_or(&arguments.model))?;
    let side = model.info().default_width;
    let sets =
        arguments.data.iter().map(|folder| Dataset::read(folder, side)).collect::<Outcome<Vec<_>>>()?;
    // Every caption of every set is a candidate.
    let labels: Vec<String> =
        sets.iter().flat_map(|set| (0..set.len()).map(|i| set.caption(i, 0.0))).collect();
    let labels: Vec<&str> = labels.iter().map(String::as_str).collect();
    let mut first = 0;
    for (folder, set) in arguments.data.iter().zip(&sets) {
        let count = arguments.captions.min(set.len());
        let chosen: Vec<usize> = (0..count).map(|i| i * set.len() / count).collect();
        let own: Vec<usize> = chosen.iter().map(|i| first + i).collect();
        println!("{}: {count} captions among {}", folder.display(), labels.len());
        let show = |what: &str, images: &[Image]| -> Outcome<()> {
            let RetrievalScore { top_1, top_5, top_20 } =
                judge.score(&images.iter().collect::<Vec<_>>(), &own, &labels)?;
            println!("  {what:24} top-1 {top_1:.3}  top-5 {top_5:.3}  top-20 {top_20:.3}");
            Ok(())
        };
        let real: Vec<Image> = chosen.iter().map(|&i| set.images[i].clone()).collect();
        show("the pictures", &real)?;
        show(
            "through Stage A",
            &real.iter().map(|image| through_a(&model, image)).collect::<Outcome<Vec<_>>>()?,
        )?;
        let captions: Vec<&str> = own.iter().map(|&i| labels[i]).collect();
        show("Stage B, true latents", &drawn(&model, &captions, Some(&real), arguments.seed)?)?;
        let pictures = drawn(&model, &captions, None, arguments.seed)?;
        show("drawn from the captions", &pictures)?;
        if !arguments.dtype.is_empty() {
            let exact = Model::open(&arguments.model, &in_type("f32")?)?;
            let distances = distances(&pictures, &drawn(&exact, &captions, None, arguments.seed)?);
            let mean = distances.iter().sum::<f64>() / distances.len().max(1) as f64;
            let most = distances.iter().copied().fold(0.0, f64::max);
            println!("  from those of f32, of 255: {mean:.2} on average, {most:.2} at most");
        }
        first += set.len();
    }
    Ok(())
}

/// Options of a model that computes in `dtype`; empty for its device's best.
fn in_type(dtype: &str) -> Outcome<ModelOptions> {
    let mut options = ModelOptions::default();
    if !dtype.is_empty() {
        options.set("compute_dtype", dtype)?;
    }
    Ok(options)
}

/// The mean absolute difference of each picture from another.
fn distances(pictures: &[Image], others: &[Image]) -> Vec<f64> {
    let distance = |(a, b): (&Image, &Image)| {
        let sum: u64 = a.data().iter().zip(b.data()).map(|(a, b)| u64::from(a.abs_diff(*b))).sum();
        sum as f64 / a.data().len() as f64
    };
    pictures.iter().zip(others).map(distance).collect()
}

fn through_a(model: &Model, image: &Image) -> Outcome<Image> {
    let pixels = model.stage_a_decode(&model.stage_a_encode(&[image])?)?;
    Ok(wuerstchen::image::to_image(image.width(), image.height(), pixels.slice()?)?)
}

/// One picture per caption with the model's own settings, from noise or from the latents of `images`.
fn drawn(model: &Model, captions: &[&str], images: Option<&[Image]>, seed: u64) -> Outcome<Vec<Image>> {
    let mut pictures = Vec::new();
    for (i, caption) in captions.iter().enumerate() {
        let mut options = GenerateOptions::new(model)?;
        options.add_prompt(caption, None)?;
        options.set_seed(seed + i as u64)?;
        if let Some(images) = images {
            options.set_init_image(&images[i], 0.0)?;
        }
        pictures.extend(model.generate(&options)?);
    }
    Ok(pictures)
}

fn parse() -> Outcome<Arguments> {
    let mut places: Vec<PathBuf> = Vec::new();
    let mut parsed = Arguments {
        model: PathBuf::new(),
        data: Vec::new(),
        judge: None,
        captions: 96,
        seed: 0,
        dtype: String::new(),
    };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        if !word.starts_with("--") {
            places.push(word.into());
            continue;
        }
        let value = words.next().ok_or(USAGE)?;
        match word.as_str() {
            "--judge" => parsed.judge = Some(value.into()),
            "--captions" => parsed.captions = value.parse()?,
            "--seed" => parsed.seed = value.parse()?,
            "--dtype" => parsed.dtype = value,
            _ => return Err(format!("{word}: unknown\n{USAGE}").into()),
        }
    }
    if places.len() < 2 {
        return Err(USAGE.into());
    }
    parsed.model = places.remove(0);
    parsed.data = places;
    Ok(parsed)
}
