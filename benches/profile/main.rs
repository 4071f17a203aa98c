//! Says where the time of a model's stages goes: per op, beside what this machine can do at most, and as flame graphs.
//!
//! ```text
//! cargo bench --bench profile -- --model DIR [--out DIR] [--parts text,text-b,c,b,a] [--threads N] [--steps N]
//!                                 [--dtype f32|bf16|i8]
//! ```
//!
//! `tools/profile.sh` runs it. Each part is run once to warm up, then recorded: `c` and `b` over `--steps` denoising
//! steps, the others as often. All times are of one step or pass. The time is the wall time of the thread that calls
//! the ops, so that the table sums to the step. The limit of an op is the longer of two times: its multiply-adds at the
//! rate of a loop of nothing else, and its bytes at the rate of a plain copy of as many, both measured here with the
//! same threads. More than 100 % of it means that operands were still in a cache, or that a product has another type
//! than f32. With `--out`, the folder gets the tables, and per part a flame graph (SVG) and its folded stacks.

#[path = "../common/inputs.rs"]
#[allow(dead_code)] // of benches/stages
mod inputs;
mod limits;
mod report;

use std::collections::HashMap;
use std::error::Error;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use wuerstchen::device::profile::Recorder;
use wuerstchen::pipeline::{GenerateOptions, Model, ModelOptions, Stage};

use inputs::{Inputs, Random, STAGE_C_GUIDANCE};
use limits::Limits;
use report::{Report, Run};

type Outcome<T> = Result<T, Box<dyn Error>>;

fn main() -> Outcome<()> {
    let arguments = Arguments::parse()?;
    let Some(path) = &arguments.model else {
        println!("profile: nothing to do without --model DIR (see the head of benches/profile/main.rs)");
        return Ok(());
    };
    let mut options = ModelOptions::default();
    options.set_threads(arguments.threads)?;
    options.set("compute_dtype", &arguments.dtype)?;
    let inputs = Inputs::new(Model::open(path, &options)?, path);
    let mut report = Report::new(arguments.out.clone(), Limits::measure(arguments.threads as usize)?)?;
    let generation = inputs.model.info().generation;
    report.say(&format!("{}: generation {generation}, computing in {}", path.display(), arguments.dtype))?;
    for part in arguments.parts(&inputs) {
        report.add(&profile(&inputs, &part, arguments.steps)?)?;
    }
    report.end()
}

/// Runs a part to warm up, then with a recorder.
fn profile(inputs: &Inputs, part: &str, steps: u32) -> Outcome<Run> {
    let (title, within): (_, &[_]) = match part {
        "text" => ("Text tower, 2 prompts", &["text_encoder"]),
        "text-b" => ("Text tower of the decoder, 2 prompts", &["text_encoder"]),
        "c" => ("Stage C, one step", &["stage_c", "step"]),
        "b" => ("Stage B, one step", &["stage_b", "step"]),
        "a" => ("Stage A, decoding", &["stage_a"]),
        other => return Err(format!("--parts: expected text, text-b, c, b or a, found {other}").into()),
    };
    let pass = pass(inputs, part)?;
    pass(&inputs.model, 2)?;
    let recorder = Recorder::new();
    let recorded = inputs.model.recorded_by(&recorder);
    let start = Instant::now();
    pass(&recorded, steps)?;
    let wall = start.elapsed();
    Ok(Run { part: part.into(), title, within, wall, totals: recorder.totals() })
}

/// What runs a part with some model: over so many steps, or so many times.
type Pass<'a> = Box<dyn Fn(&Model, u32) -> Outcome<()> + 'a>;

fn pass<'a>(inputs: &'a Inputs, part: &str) -> Outcome<Pass<'a>> {
    let mut random = Random(1);
    let mut text = |stage| -> Outcome<_> {
        Ok((inputs.text(&mut random, stage, 1)?, inputs.text(&mut random, stage, 1)?))
    };
    Ok(match part {
        "c" => {
            let (text, negative) = text(Stage::C)?;
            Box::new(move |model, steps| {
                let mut options = GenerateOptions::new(model)?;
                options.set_stage_c(steps, STAGE_C_GUIDANCE)?;
                model.stage_c_sample(&text, Some(&negative), None, &options)?;
                Ok(())
            })
        }
        "b" => {
            let (text, negative) = text(Stage::B)?;
            let latents = inputs.image_embedding(&mut random)?;
            let guidance = inputs.stage_b_guidance();
            Box::new(move |model, steps| {
                let mut options = GenerateOptions::new(model)?;
                options.set_stage_b(steps, guidance)?;
                let negative = (guidance > 1.).then_some(&negative);
                model.stage_b_sample(&latents, &text, negative, &options)?;
                Ok(())
            })
        }
        "a" => {
            let latents = match inputs.is_v1() {
                true => inputs.tokens(&mut random)?,
                false => inputs.grid_latents(&mut random)?,
            };
            Box::new(move |model, times| {
                (0..times).try_for_each(|_| model.stage_a_decode(&latents).map(drop))?;
                Ok(())
            })
        }
        _ => {
            let stage = if part == "text-b" { Stage::B } else { Stage::C };
            Box::new(move |model, times| {
                let prompts = ["a red bird on a branch, oil painting, detailed", ""];
                (0..times).try_for_each(|_| model.encode_text(stage, &prompts).map(drop))?;
                Ok(())
            })
        }
    })
}

struct Arguments {
    model: Option<PathBuf>,
    out: Option<PathBuf>,
    parts: String,
    threads: u32,
    steps: u32,
    dtype: String,
}

impl Arguments {
    fn parse() -> Outcome<Self> {
        let mut given = HashMap::new();
        let mut words = std::env::args().skip(1);
        while let Some(word) = words.next() {
            match word.strip_prefix("--") {
                Some("bench" | "test") => {} // cargo's own
                Some(name) => {
                    let value = words.next().ok_or_else(|| format!("{word}: a value is missing"))?;
                    given.insert(name.to_owned(), value);
                }
                None => return Err(format!("unexpected argument {word}").into()),
            }
        }
        let mut take = |name: &str, default: &str| given.remove(name).unwrap_or_else(|| default.into());
        let path = |word: String| Some(word).filter(|word| !word.is_empty()).map(PathBuf::from);
        let arguments = Arguments {
            model: path(take("model", "")),
            out: path(take("out", "")),
            parts: take("parts", ""),
            threads: take("threads", "0").parse()?,
            steps: take("steps", "4").parse::<u32>()?.max(1),
            dtype: take("dtype", "f32"),
        };
        match given.keys().next() {
            Some(name) => Err(format!("unknown option --{name}").into()),
            None => Ok(arguments),
        }
    }

    /// Those asked for, or all that the model has.
    fn parts(&self, inputs: &Inputs) -> Vec<String> {
        let all = if inputs.is_v1() { "text,c,b,a" } else { "text,text-b,c,b,a" };
        let parts = if self.parts.is_empty() { all } else { &self.parts };
        parts.split(',').map(str::to_owned).collect()
    }
}

/// In milliseconds.
fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
