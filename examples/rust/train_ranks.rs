//! Trains a stage on several processes together, each on its part of every batch.
//!
//! `mpirun -n 2 target/release/examples/train_ranks --model tests/fixtures/model --stage b --out weights.safetensors`
//!
//! The pictures are drawn by number, so that every process can make its own; a real program reads the files that are
//! its share. Process 0 prints a line of JSON per step and writes the weights.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use serde_json::json;
use wuerstchen::device::Reduce;
use wuerstchen::training::{Goal, MpiRanks, TrainOptions, Trainer};
use wuerstchen::weights::write_safetensors;
use wuerstchen::{Image, Model, ModelOptions};

const USAGE: &str =
    "usage: train_ranks --model FOLDER --stage b|c [--steps N] [--batch N] [--size PIXELS] [--threads N]
                   [--set OPTION=VALUE]... [--out FILE.safetensors]";

type Failure = Box<dyn std::error::Error>;

struct Arguments {
    model: PathBuf,
    goal: Goal,
    steps: usize,
    /// Samples per step, of all processes together.
    batch: usize,
    size: u32,
    /// Of each process; 0 takes its share of the cores.
    threads: u32,
    out: Option<PathBuf>,
    /// Names and values for [`TrainOptions::set`].
    settings: Vec<(String, String)>,
}

fn main() {
    let ranks = match MpiRanks::start() {
        Ok(ranks) => Arc::new(ranks),
        Err(error) => {
            eprintln!("train_ranks: {error}");
            std::process::exit(1);
        }
    };
    if let Err(error) = parse(std::env::args().skip(1)).and_then(|arguments| run(&arguments, &ranks)) {
        eprintln!("train_ranks, rank {}: {error}", ranks.rank());
        // The others cannot know, and would wait for this one in their next sum.
        ranks.abort();
    }
}

fn parse(mut words: impl Iterator<Item = String>) -> Result<Arguments, Failure> {
    let mut arguments = Arguments {
        model: PathBuf::new(),
        goal: Goal::StageC,
        steps: 5,
        batch: 8,
        size: 64,
        threads: 0,
        out: None,
        settings: Vec::new(),
    };
    while let Some(word) = words.next() {
        let value = words.next().ok_or(USAGE)?;
        match word.as_str() {
            "--model" => arguments.model = value.into(),
            "--stage" => {
                arguments.goal = match value.as_str() {
                    "b" => Goal::StageB,
                    "c" => Goal::StageC,
                    _ => return Err("--stage: expected b or c".into()),
                }
            }
            "--steps" => arguments.steps = value.parse()?,
            "--batch" => arguments.batch = value.parse()?,
            "--size" => arguments.size = value.parse()?,
            "--threads" => arguments.threads = value.parse()?,
            "--out" => arguments.out = Some(value.into()),
            "--set" => {
                let (key, value) = value.split_once('=').ok_or("--set: expected OPTION=VALUE")?;
                arguments.settings.push((key.into(), value.into()));
            }
            _ => return Err(format!("{word} is not known\n{USAGE}").into()),
        }
    }
    if arguments.model.as_os_str().is_empty() {
        return Err(USAGE.into());
    }
    Ok(arguments)
}

fn run(arguments: &Arguments, link: &Arc<MpiRanks>) -> Result<(), Failure> {
    let (ranks, rank) = (link.ranks(), link.rank());
    if !arguments.batch.is_multiple_of(ranks) {
        return Err(format!("--batch: {} samples do not divide by {ranks} processes", arguments.batch).into());
    }
    let mut model_options = ModelOptions::default();
    model_options.set_threads(threads(arguments.threads, ranks))?;
    let model = Model::open(&arguments.model, &model_options)?;
    let mut options = TrainOptions::new(arguments.goal);
    for (key, value) in &arguments.settings {
        options.set(key, value)?;
    }
    let mut trainer = Trainer::new(&model, &options)?;
    trainer.set_reduce(link.clone());

    let share = arguments.batch / ranks;
    for step in 0..arguments.steps {
        let first = step * arguments.batch + rank * share;
        let (images, captions): (Vec<Image>, Vec<&str>) = (first..first + share)
            .map(|number| sample(number, arguments.size))
            .collect::<Result<Vec<_>, _>>()?
            .into_iter()
            .unzip();
        let samples = trainer.prepare(&images.iter().collect::<Vec<_>>(), &captions)?;
        let started = Instant::now();
        let metrics = trainer.step_over(&samples.iter().collect::<Vec<_>>())?;
        if rank == 0 {
            let seconds = started.elapsed().as_secs_f64();
            println!("{}", json!({ "step": metrics.step, "loss": metrics.loss, "seconds": seconds }));
        }
    }
    expect_equal_weights(&trainer, link)?;
    if let Some(out) = arguments.out.as_ref().filter(|_| rank == 0) {
        let list = trainer.parameters().list();
        write_safetensors(out, list.iter().map(|parameter| (parameter.name.clone(), parameter.master())))?;
    }
    Ok(())
}

/// Processes on one machine share its cores.
fn threads(chosen: u32, ranks: usize) -> u32 {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    if chosen > 0 { chosen } else { (cores / ranks).max(1) as u32 }
}

/// A disc on a shaded ground, and what it is.
fn sample(number: usize, size: u32) -> Result<(Image, &'static str), Failure> {
    const COLOURS: [(&str, [u8; 3]); 4] = [
        ("a red disc", [220, 40, 40]),
        ("a green disc", [40, 180, 60]),
        ("a blue disc", [50, 60, 210]),
        ("a yellow disc", [230, 220, 50]),
    ];
    let (caption, colour) = COLOURS[number % COLOURS.len()];
    // Places and sizes that come again after 7 * 11 * 5 samples only.
    let place = |period: usize| 0.3 + 0.4 * (number % period) as f32 / period as f32;
    let (x, y, radius) = (place(7), place(11), 0.5 * place(5));
    let image = Image::build(size, size, |rgb| {
        for (i, pixel) in rgb.chunks_exact_mut(3).enumerate() {
            let [column, row] = [i % size as usize, i / size as usize].map(|p| p as f32 / size as f32);
            let inside = (column - x).hypot(row - y) < radius;
            let ground = (40.0 + 150.0 * column * row) as u8;
            pixel.copy_from_slice(&if inside { colour } else { [ground; 3] });
        }
    })?;
    Ok((image, caption))
}

/// Every process has made the same steps, to the bit.
fn expect_equal_weights(trainer: &Trainer, link: &Arc<MpiRanks>) -> Result<(), Failure> {
    // FNV-1a of all bits, cut to what a sum in f64 keeps exactly.
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for parameter in trainer.parameters().list() {
        for value in parameter.master().slice::<f32>()? {
            hash = (hash ^ u64::from(value.to_bits())).wrapping_mul(0x100_0000_01b3);
        }
    }
    let mut hashes = vec![0.0; link.ranks()];
    hashes[link.rank()] = (hash >> 12) as f64;
    link.sum_f64(&mut hashes)?;
    if hashes.iter().any(|&other| other != hashes[0]) {
        return Err(format!("the processes ended with different weights: {hashes:?}").into());
    }
    Ok(())
}
