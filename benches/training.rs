//! Times training steps through the library's own API, for `benches/train.py` to set beside PyTorch.
//!
//! ```text
//! cargo bench --bench training -- --model DIR --part a|b|c [--batch N] [--size PX] [--threads N] [--repeats N]
//!                               [--dtype f32|f16|bf16] [--recompute]
//! ```
//!
//! A step is everything from prepared samples (latents and tokens of frozen networks are made before) to changed
//! weights: the text tower, forward, backward, clipping, AdamW. The first step warms up. Prints one line of JSON.

use std::error::Error;
use std::path::PathBuf;
use std::time::Instant;

use serde_json::json;
use wuerstchen::training::{Goal, Sample, TrainOptions, Trainer};
use wuerstchen::{Image, Model, ModelOptions};

type Outcome<T> = Result<T, Box<dyn Error>>;

const MIB: f64 = 1024. * 1024.;

struct Arguments {
    model: Option<PathBuf>,
    part: String,
    batch: usize,
    size: u32,
    threads: u32,
    repeats: usize,
    recompute: bool,
    dtype: String,
}

impl Arguments {
    fn parse() -> Outcome<Self> {
        let mut parsed = Arguments {
            model: None,
            part: "c".into(),
            batch: 16,
            size: 128,
            threads: 0,
            repeats: 5,
            recompute: false,
            dtype: "f32".into(),
        };
        let mut words = std::env::args().skip(1);
        while let Some(word) = words.next() {
            let mut value = || words.next().ok_or_else(|| format!("{word}: a value must follow"));
            match word.as_str() {
                "--model" => parsed.model = Some(value()?.into()),
                "--part" => parsed.part = value()?,
                "--batch" => parsed.batch = value()?.parse()?,
                "--size" => parsed.size = value()?.parse()?,
                "--threads" => parsed.threads = value()?.parse()?,
                "--repeats" => parsed.repeats = value()?.parse()?,
                "--dtype" => parsed.dtype = value()?,
                "--recompute" => parsed.recompute = true,
                // cargo's own
                "--bench" => {}
                _ => return Err(format!("{word}: unknown").into()),
            }
        }
        Ok(parsed)
    }
}

fn main() -> Outcome<()> {
    let arguments = Arguments::parse()?;
    let Some(folder) = &arguments.model else {
        println!("training: nothing to do without --model DIR (see the head of benches/training.rs)");
        return Ok(());
    };
    let goal = match arguments.part.as_str() {
        "a" => Goal::StageA,
        "b" => Goal::StageB,
        "c" => Goal::StageC,
        other => return Err(format!("--part: expected a, b or c, found {other}").into()),
    };
    let mut model_options = ModelOptions::default();
    model_options.set_threads(arguments.threads)?;
    let model = Model::open(folder, &model_options)?;
    let mut options = TrainOptions::new(goal);
    options.set_warmup_steps(0);
    options.set("recompute", if arguments.recompute { "true" } else { "false" })?;
    options.set("compute_dtype", &arguments.dtype)?;
    let mut trainer = Trainer::new(&model, &options)?;
    let images = images(&arguments)?;
    let images: Vec<&Image> = images.iter().collect();
    let captions = vec!["a red apple"; images.len()];
    let samples = trainer.prepare(&images, &captions)?;
    let samples: Vec<&Sample> = samples.iter().collect();

    // Weights, gradients, two moments; beside them the average, which the rival has not.
    let trained: usize = trainer
        .parameters()
        .trained()
        .map(|place| trainer.parameters().list()[place].master().elements())
        .sum();
    let resident_before = resident("VmRSS:")?;
    reset_peak();
    let mut seconds = Vec::new();
    let mut loss = 0.0;
    for _ in 0..=arguments.repeats {
        let started = Instant::now();
        loss = trainer.step_over(&samples)?.loss;
        seconds.push(started.elapsed().as_secs_f64());
    }
    let peak = resident("VmHWM:")?;
    // What keeping prepared samples saves: a step that makes latents and tokens itself.
    let started = Instant::now();
    trainer.step(&images, &captions)?;
    let unprepared = started.elapsed().as_secs_f64();
    let mut sorted = seconds[1..].to_vec();
    sorted.sort_by(f64::total_cmp);
    let report = json!({
        "who": "wuerstchen",
        "part": arguments.part,
        "batch": arguments.batch,
        "median_s": sorted[sorted.len() / 2],
        "min_s": sorted[0],
        "seconds": seconds[1..],
        "warm_up_s": seconds[0],
        "loss": loss,
        "trained_parameters": trained,
        "rss_before_mib": resident_before / MIB,
        "rss_peak_mib": peak / MIB,
        "unprepared_s": unprepared,
    });
    println!("{report}");
    Ok(())
}

/// Pictures of noise: what they show does not matter to the time.
fn images(arguments: &Arguments) -> Outcome<Vec<Image>> {
    let side = arguments.size;
    let mut state = 1u32;
    let mut noise = || {
        Image::build(side, side, |bytes| {
            for byte in bytes {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                *byte = (state >> 24) as u8;
            }
        })
    };
    Ok((0..arguments.batch).map(|_| noise()).collect::<wuerstchen::Result<_>>()?)
}

/// A line of what the kernel says of this process, in bytes.
fn resident(field: &str) -> Outcome<f64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix(field)).ok_or("no such field")?;
    let kib: f64 = line.trim().trim_end_matches("kB").trim().parse()?;
    Ok(kib * 1024.)
}

fn reset_peak() {
    // Where it cannot be reset the peak includes what came before.
    drop(std::fs::write("/proc/self/clear_refs", "5"));
}
