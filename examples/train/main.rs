//! Trains a model from scratch in the paper's order, one command from pictures with captions to a model folder:
//!
//! ```text
//! examples/train/fetch-emoji.sh build/emoji
//! cargo run --release --example train -- build/emoji build/trained
//! ```
//!
//! First the tokenizer, from the captions; then the text tower with the image encoder as a contrastive pair, Stage A,
//! Stage B with the encoder, Stage C. Interrupt it at any time: the same command goes on where it stood. The folder gets
//!
//! | | |
//! |---|---|
//! | `model/` | the model so far, whole from the start |
//! | `checkpoints/` | what the next step depends on, one folder per part |
//! | `metrics.jsonl` | one line per step: part, step, loss, gradient norm, rate, accuracy, samples per second |
//! | `loss.png` | the losses over the steps |
//! | `grid-PART-STEP.png` | what the model draws for the same prompts, as it learns |
//!
//! `--from MODEL` begins with a trained model instead, `--only c` (or `pair`, `a`, `b`, several with commas) trains
//! that part alone, `--steps c=2000` changes how long. Captions are the lines of each picture's text file: one is drawn
//! anew each time that the picture comes by.

mod arguments;
mod dataset;
mod grid;
mod phase;
mod report;

use std::path::Path;

use wuerstchen::text::train_tokenizer;
use wuerstchen::training::{Goal, create_model};
use wuerstchen::{Model, ModelOptions};

use arguments::Arguments;
use dataset::Dataset;

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

/// The paper's order.
const ORDER: [Goal; 4] = [Goal::Pair, Goal::StageA, Goal::StageB, Goal::StageC];

/// Tokens that a new model knows, the marks at the beginning and the end included.
const VOCABULARY: usize = 2050;

fn main() {
    if let Err(error) = run() {
        eprintln!("train: {error}");
        std::process::exit(1);
    }
}

fn run() -> Outcome<()> {
    let arguments = Arguments::parse()?;
    std::fs::create_dir_all(&arguments.out)?;
    let model = arguments.out.join("model");
    if !model.exists() {
        begin(&arguments, &model)?;
    }
    let side = Model::open(&model, &ModelOptions::default())?.info().default_width;
    println!("reading {}", arguments.data.display());
    let data = Dataset::read(&arguments.data, side)?;
    println!("{} pictures of {side} x {side} pixels", data.len());
    for goal in ORDER.into_iter().filter(|goal| arguments.wants(*goal)) {
        phase::train(goal, &arguments, &model, &data)?;
    }
    println!("the model is in {}", model.display());
    Ok(())
}

/// Makes the folder that training then changes: a copy of a trained model, or a new one of the sizes in `configs`.
fn begin(arguments: &Arguments, model: &Path) -> Outcome<()> {
    if let Some(from) = &arguments.from {
        return copy(from, model);
    }
    let configs = arguments.out.join("configs");
    copy(&arguments.configs, &configs)?;
    println!("a tokenizer of {VOCABULARY} pieces from the captions");
    let captions = Dataset::captions_of(&arguments.data)?;
    let captions: Vec<&str> = captions.iter().map(String::as_str).collect();
    std::fs::create_dir_all(configs.join("tokenizer"))?;
    train_tokenizer(captions.iter().copied(), VOCABULARY, &configs.join("tokenizer"))?;
    create_model(&configs, model, arguments.seed)?;
    Ok(())
}

fn copy(from: &Path, to: &Path) -> Outcome<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let path = entry?.path();
        let target = to.join(path.file_name().unwrap_or_default());
        if path.is_dir() { copy(&path, &target)? } else { std::fs::write(&target, std::fs::read(&path)?)? }
    }
    Ok(())
}
