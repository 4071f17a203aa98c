//! Times the stages of a v1 or v2 model through the library's own API, for `benches/run.py` to set beside PyTorch.
//!
//! ```text
//! cargo bench --bench stages -- --model DIR --part text|text-b|c|b|a|hoist|open|generate|first [--threads N] [--repeats N]
//!                                [--stage-c-steps N] [--stage-b-steps N] [--batch N] [--device cpu|cuda]
//!                                [--dtype f32|f16|bf16|i8]
//! ```
//!
//! `c` and `b` report a denoising step by itself: what a generation computes once (text keys and values, timestep
//! modulations, in v2 the image embedding at every level) is in `setup_s`. `text-b` is v2's second text tower.
//! `hoist` sets a step of v2's decoder beside one that computes all of that itself, and the layers that the image
//! embedding joins beside the same with its mapping not folded into them. `picture` is a whole picture, or `--batch` of
//! them, with the model's own steps. On a GPU, whose work runs behind the host's, a step is timed as the difference
//! between long and short walks. `open` reports the time and memory
//! of opening, `generate` the peak of memory and what the second picture allocates. Each prints one line of JSON.
//! `make_full_size.py` and `make_full_size_v2.py` in `tests/reference` write models of the published sizes.

mod hoist;
#[path = "../common/inputs.rs"]
mod inputs;
mod memory;
mod whole;

use std::collections::HashMap;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use serde_json::{Value, json};
use wuerstchen::Tensor;
use wuerstchen::pipeline::{GenerateOptions, Model, ModelOptions, Progress, Stage};

use hoist::hoist;
use inputs::{Inputs, Random, STAGE_C_GUIDANCE};
use memory::{Memory, reset_peak};
use whole::{first, generate, open_time};

type Outcome<T> = Result<T, Box<dyn Error>>;

const BATCH: usize = 2;
const MIB: f64 = 1024. * 1024.;

fn main() -> Outcome<()> {
    let arguments = Arguments::parse()?;
    let Some(model) = &arguments.model else {
        println!("stages: nothing to do without --model DIR (see the head of benches/stages/main.rs)");
        return Ok(());
    };
    let report = match arguments.part.as_str() {
        "text" => text(model, &arguments, Stage::C),
        "text-b" => text(model, &arguments, Stage::B),
        "c" => stage_c(model, &arguments),
        "b" => stage_b(model, &arguments),
        "a" => stage_a(model, &arguments),
        "hoist" => hoist(model, &arguments),
        "open" => open_time(model, &arguments),
        "generate" => generate(model, &arguments),
        "first" => first(model, &arguments),
        "picture" => picture(model, &arguments),
        other => Err(format!(
            "--part: expected text, text-b, c, b, a, picture, hoist, open, generate or first, found {other}"
        )
        .into()),
    }?;
    println!("{report}");
    Ok(())
}

struct Arguments {
    model: Option<PathBuf>,
    part: String,
    threads: u32,
    repeats: usize,
    stage_c_steps: u32,
    stage_b_steps: u32,
    batch: u32,
    device: String,
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
        let arguments = Arguments {
            part: take("part", "open"),
            threads: take("threads", "0").parse()?,
            repeats: take("repeats", "3").parse::<usize>()?.max(1),
            stage_c_steps: take("stage-c-steps", "2").parse()?,
            stage_b_steps: take("stage-b-steps", "2").parse()?,
            batch: take("batch", "1").parse()?,
            device: take("device", "cpu"),
            dtype: take("dtype", ""),
            model: Some(take("model", "")).filter(|path| !path.is_empty()).map(PathBuf::from),
        };
        match given.keys().next() {
            Some(name) => Err(format!("unknown option --{name}").into()),
            None => Ok(arguments),
        }
    }

    fn options(&self) -> Outcome<ModelOptions> {
        let mut options = ModelOptions::default();
        options.set_threads(self.threads)?;
        options.set_device(&self.device)?;
        if !self.dtype.is_empty() {
            options.set("compute_dtype", &self.dtype)?;
        }
        Ok(options)
    }
}

// ---------------------------------------------------------------- the parts that have a rival

fn text(path: &Path, arguments: &Arguments, stage: Stage) -> Outcome<Value> {
    let bench = Bench::open(path, arguments)?;
    let prompts = ["a red bird on a branch, oil painting, detailed", ""];
    let seconds = repeat(arguments.repeats, || Ok(bench.model.encode_text(stage, &prompts)?))?;
    Ok(bench.report(&arguments.part, &seconds, json!({})))
}

fn stage_a(path: &Path, arguments: &Arguments) -> Outcome<Value> {
    let bench = Bench::open(path, arguments)?;
    let mut random = Random(1);
    let input = if bench.is_v1() { bench.tokens(&mut random)? } else { bench.grid_latents(&mut random)? };
    let seconds = repeat(arguments.repeats, || Ok(bench.model.stage_a_decode(&input)?))?;
    Ok(bench.report("a", &seconds, json!({})))
}

fn stage_c(path: &Path, arguments: &Arguments) -> Outcome<Value> {
    let bench = Bench::open(path, arguments)?;
    let mut random = Random(2);
    let (text, negative) = (bench.text(&mut random, Stage::C, 1)?, bench.text(&mut random, Stage::C, 1)?);
    let steps = time_steps(&bench.model, arguments, |options, count| {
        options.set_stage_c(count, STAGE_C_GUIDANCE)?;
        Ok(bench.model.stage_c_sample(&text, Some(&negative), None, options)?)
    })?;

    // The bare network, which computes everything anew.
    let noised = bench.latents(&mut random, BATCH)?;
    let t = Tensor::from_slice(&[BATCH], &[0.5f32; BATCH])?;
    let both = bench.text(&mut random, Stage::C, BATCH)?;
    let predict = repeat(1, || Ok(bench.model.stage_c_predict(&noised, &t, &both)?))?;
    Ok(bench.report(
        "c",
        &steps.steps,
        json!({ "setup_s": steps.setup(), "timed_by": steps.by, "predict_s": predict[1] }),
    ))
}

fn stage_b(path: &Path, arguments: &Arguments) -> Outcome<Value> {
    let bench = Bench::open(path, arguments)?;
    let mut random = Random(3);
    let (text, negative) = (bench.text(&mut random, Stage::B, 1)?, bench.text(&mut random, Stage::B, 1)?);
    let latents = bench.image_embedding(&mut random)?;
    let guidance = bench.stage_b_guidance();
    let negative = (guidance > 1.).then_some(&negative);
    let steps = time_steps(&bench.model, arguments, |options, count| {
        options.set_stage_b(count, guidance)?;
        Ok(bench.model.stage_b_sample(&latents, &text, negative, options)?)
    })?;
    Ok(bench.report("b", &steps.steps, json!({ "setup_s": steps.setup(), "timed_by": steps.by })))
}

/// An open model and what its opening cost.
struct Bench {
    inputs: Inputs,
    threads: u32,
    open_s: f64,
    opened: Memory,
}

impl std::ops::Deref for Bench {
    type Target = Inputs;

    fn deref(&self) -> &Inputs {
        &self.inputs
    }
}

impl Bench {
    fn open(path: &Path, arguments: &Arguments) -> Outcome<Self> {
        let start = Instant::now();
        let model = Model::open(path, &arguments.options()?)?;
        let open_s = start.elapsed().as_secs_f64();
        let opened = Memory::now()?;
        reset_peak();
        let inputs = Inputs::new(model, path);
        Ok(Bench { inputs, threads: arguments.threads, open_s, opened })
    }

    /// `seconds`: the warm-up, then the timed passes.
    fn report(&self, part: &str, seconds: &[f64], more: Value) -> Value {
        let timed = &seconds[1..];
        let mut report = json!({
            "who": "wuerstchen",
            "part": part,
            "threads": self.threads,
            "repeats": timed.len(),
            "median_s": median(timed),
            "min_s": timed.iter().copied().fold(f64::INFINITY, f64::min),
            "seconds": timed,
            "warm_up_s": seconds[0],
            "load_s": self.open_s,
            "rss_loaded_mib": self.opened.rss_mib,
            "rss_peak_mib": Memory::now().map_or(0., |memory| memory.peak_mib),
            "version": env!("CARGO_PKG_VERSION"),
        });
        if let (Some(report), Value::Object(more)) = (report.as_object_mut(), more) {
            report.extend(more);
        }
        report
    }
}

/// Runs `pass` once to warm up and `repeats` times more; the seconds of each.
fn repeat<T>(repeats: usize, mut pass: impl FnMut() -> Outcome<T>) -> Outcome<Vec<f64>> {
    (0..=repeats)
        .map(|_| {
            let start = Instant::now();
            std::hint::black_box(pass()?);
            Ok(start.elapsed().as_secs_f64())
        })
        .collect()
}

/// As [`repeat`], for several passes by turns, so that what else the machine does falls on all alike.
fn in_turn(repeats: usize, passes: &[&dyn Fn() -> Outcome<()>]) -> Outcome<Vec<Vec<f64>>> {
    let mut seconds = vec![Vec::new(); passes.len()];
    for _ in 0..=repeats {
        for (pass, seconds) in passes.iter().zip(&mut seconds) {
            seconds.extend(&repeat(0, pass)?);
        }
    }
    Ok(seconds)
}

/// Makes sure that a result is computed though nobody looks at it.
fn keep<T>(result: T) -> Outcome<()> {
    std::hint::black_box(result);
    Ok(())
}

/// The steps of one sampling run.
struct Steps {
    /// From the call to the end of the first step, then each further step.
    steps: Vec<f64>,
    /// What the times come from.
    by: &'static str,
}

impl Steps {
    /// What happens once per generation: the first step's time beyond a later step's.
    fn setup(&self) -> f64 {
        self.steps[0] - median(&self.steps[1..])
    }
}

/// Samples with `repeats + 1` steps, after a short run to warm up. A step lasts from one progress event to the next;
/// a sampler that reports none is timed as the difference between a long and a one-step run.
fn time_steps(
    model: &Model,
    arguments: &Arguments,
    sample: impl Fn(&mut GenerateOptions, u32) -> Outcome<Tensor>,
) -> Outcome<Steps> {
    if arguments.device != "cpu" {
        return time_steps_by_difference(model, arguments.repeats, sample);
    }
    let repeats = arguments.repeats;
    let count = repeats as u32 + 1;
    let events = Arc::new(Mutex::new(Vec::with_capacity(repeats + 2)));
    let mut options = GenerateOptions::new(model)?;
    let receiver = events.clone();
    options.set_progress(Some(Arc::new(move |_: &Progress| {
        receiver.lock().unwrap_or_else(PoisonError::into_inner).push(Instant::now());
    })))?;

    sample(&mut options, 2)?;
    events.lock().unwrap_or_else(PoisonError::into_inner).clear();
    let start = Instant::now();
    sample(&mut options, count)?;
    let whole_s = start.elapsed().as_secs_f64();

    let events = std::mem::take(&mut *events.lock().unwrap_or_else(PoisonError::into_inner));
    if events.len() == count as usize {
        let starts = std::iter::once(&start).chain(&events);
        let steps = starts.zip(&events).map(|(from, to)| (*to - *from).as_secs_f64()).collect();
        return Ok(Steps { steps, by: "progress" });
    }
    let start = Instant::now();
    sample(&mut options, 1)?;
    let one_s = start.elapsed().as_secs_f64();
    let step_s = (whole_s - one_s) / f64::from(count - 1);
    Ok(Steps { steps: vec![one_s, step_s], by: "difference" })
}

/// Steps of the short walk that a long one is set beside: the first run of a step, its recording, and one launch.
const SHORT_WALK: u32 = 3;
/// Steps more of the long one.
const MORE_STEPS: u32 = 20;

/// As [`time_steps`], from whole walks: the time of a long one less that of a short one, `repeats` times.
fn time_steps_by_difference(
    model: &Model,
    repeats: usize,
    sample: impl Fn(&mut GenerateOptions, u32) -> Outcome<Tensor>,
) -> Outcome<Steps> {
    let mut options = GenerateOptions::new(model)?;
    let mut time = |steps: u32| {
        let start = Instant::now();
        sample(&mut options, steps)?;
        Outcome::Ok(start.elapsed().as_secs_f64())
    };
    time(SHORT_WALK)?;
    let mut steps = vec![time(SHORT_WALK)?];
    for _ in 0..repeats {
        let difference = time(SHORT_WALK + MORE_STEPS)? - time(SHORT_WALK)?;
        steps.push(difference / f64::from(MORE_STEPS));
    }
    Ok(Steps { steps, by: "difference" })
}

/// Whole pictures, with the steps that the model recommends.
fn picture(path: &Path, arguments: &Arguments) -> Outcome<Value> {
    let bench = Bench::open(path, arguments)?;
    let mut options = GenerateOptions::new(&bench.model)?;
    options.add_prompt("a red bird on a branch, oil painting, detailed", None)?;
    options.set_images_per_prompt(arguments.batch)?;
    let seconds = repeat(arguments.repeats, || Ok(bench.model.generate(&options)?))?;
    let device_bytes = bench.model.info().bytes_device;
    Ok(bench.report("picture", &seconds, json!({ "batch": arguments.batch, "device_bytes": device_bytes })))
}

// ---------------------------------------------------------------- opening, memory, allocations

/// Bytes of all weight files of a model folder.
fn weight_bytes(model: &Path) -> Outcome<u64> {
    let mut sum = 0;
    for entry in std::fs::read_dir(model)? {
        let part = entry?.path();
        for file in ["model.safetensors", "diffusion_pytorch_model.safetensors"] {
            sum += std::fs::metadata(part.join(file)).map_or(0, |data| data.len());
        }
    }
    Ok(sum)
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[middle] } else { (sorted[middle - 1] + sorted[middle]) / 2. }
}
