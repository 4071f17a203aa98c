//! Times the stages of a v1 or v2 model through the library's own API, for `benches/run.py` to set beside PyTorch.
//!
//! ```text
//! cargo bench --bench stages -- --model DIR --part text|text-b|c|b|a|hoist|open|generate [--threads N] [--repeats N]
//!                                [--stage-c-steps N] [--stage-b-steps N]
//! ```
//!
//! `c` and `b` report a denoising step by itself: what a generation computes once (text keys and values, timestep
//! modulations, in v2 the image embedding at every level) is in `setup_s`. `text-b` is v2's second text tower.
//! `hoist` sets a step of v2's decoder beside one that computes all of that itself, and the layers that the image
//! embedding joins beside the same with its mapping not folded into them. `open` reports the time and memory
//! of opening, `generate` the peak of memory and what the second picture allocates. Each prints one line of JSON.
//! `make_full_size.py` and `make_full_size_v2.py` in `tests/reference` write models of the published sizes.

use std::alloc::{GlobalAlloc, Layout, System};
use std::collections::HashMap;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use serde_json::{Value, json};
use wuerstchen::Tensor;
use wuerstchen::device::{Context, Device};
use wuerstchen::ops::linear::{Epilogue, Term, WeightLayout, linear_sum};
use wuerstchen::pipeline::{GenerateOptions, LogLevel, Model, ModelOptions, Progress, Stage, load};
use wuerstchen::stages::blocks::Conditioning;
use wuerstchen::stages::diffnext::DiffNeXt;

type Outcome<T> = Result<T, Box<dyn Error>>;

/// The rival's settings. v2's decoder has no guidance by default.
const STAGE_C_GUIDANCE: f32 = 4.0;
const STAGE_B_GUIDANCE: [f32; 2] = [2.0, 0.0];
const BATCH: usize = 2;
/// v2: what the prior's latents are multiplied by, and how much wider Stage A's latents are.
const LATENT_MEAN: f32 = 42.0;
const LATENT_DIM_SCALE: f64 = 10.67;
const MIB: f64 = 1024. * 1024.;

fn main() -> Outcome<()> {
    let arguments = Arguments::parse()?;
    let Some(model) = &arguments.model else {
        println!("stages: nothing to do without --model DIR (see the head of benches/stages.rs)");
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
        other => {
            Err(format!("--part: expected text, text-b, c, b, a, hoist, open or generate, found {other}")
                .into())
        }
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
    let steps = time_steps(&bench.model, arguments.repeats, |options, count| {
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
    let steps = time_steps(&bench.model, arguments.repeats, |options, count| {
        options.set_stage_b(count, guidance)?;
        Ok(bench.model.stage_b_sample(&latents, &text, negative, options)?)
    })?;
    Ok(bench.report("b", &steps.steps, json!({ "setup_s": steps.setup(), "timed_by": steps.by })))
}

/// v2: a step of the decoder, and the parts that it would repeat if they were not computed once.
fn hoist(path: &Path, arguments: &Arguments) -> Outcome<Value> {
    let bench = Bench::open(path, arguments)?;
    if bench.is_v1() {
        return Err("hoist: a v2 model is needed".into());
    }
    let device = match arguments.threads {
        0 => Device::cpu(std::thread::available_parallelism()?.get())?,
        threads => Device::cpu(threads as usize)?,
    };
    let cx = Context::new(&device);
    let part = load::decoder(&path.join("decoder"))?;
    let network = &part.network;
    let mut random = Random(4);
    let layers = JoinedLayers::new(&part, bench.grid(), &mut random)?;
    let text = bench.text(&mut random, Stage::B, 1)?;
    let image = bench.image_embedding(&mut random)?;
    let x = bench.grid_latents(&mut random)?;

    let once = (network.modulations(&cx, &[0.5])?, network.attend_to_text(&cx, &text)?);
    let injected = network.inject(&cx, &image, bench.grid())?;
    let seconds = in_turn(
        arguments.repeats,
        &[
            &|| {
                let conditioning =
                    Conditioning { modulations: &once.0, attended: std::slice::from_ref(&once.1) };
                keep(network.forward(&cx, &x, conditioning, &injected)?)
            },
            &|| {
                let modulations = network.modulations(&cx, &[0.5])?;
                let attended = [network.attend_to_text(&cx, &text)?];
                let injected = network.inject(&cx, &image, bench.grid())?;
                let conditioning = Conditioning { modulations: &modulations, attended: &attended };
                keep(network.forward(&cx, &x, conditioning, &injected)?)
            },
            &|| keep(network.modulations(&cx, &[0.5])?),
            &|| keep(network.attend_to_text(&cx, &text)?),
            &|| keep(network.inject(&cx, &image, bench.grid())?),
            &|| layers.run(&cx, true),
            &|| layers.run(&cx, false),
        ],
    )?;
    let more = json!({
        "whole_s": median(&seconds[1][1..]),
        "modulations_s": median(&seconds[2][1..]),
        "text_s": median(&seconds[3][1..]),
        "injection_s": median(&seconds[4][1..]),
        "layers_folded_s": median(&seconds[5][1..]),
        "layers_unfolded_s": median(&seconds[6][1..]),
    });
    Ok(bench.report("hoist", &seconds[0], more))
}

/// An open model and what its opening cost.
struct Bench {
    model: Model,
    path: PathBuf,
    threads: u32,
    open_s: f64,
    opened: Memory,
}

impl Bench {
    fn open(path: &Path, arguments: &Arguments) -> Outcome<Self> {
        let start = Instant::now();
        let model = Model::open(path, &arguments.options()?)?;
        let open_s = start.elapsed().as_secs_f64();
        let opened = Memory::now()?;
        reset_peak();
        Ok(Bench { model, path: path.into(), threads: arguments.threads, open_s, opened })
    }

    fn is_v1(&self) -> bool {
        self.model.info().generation == 1
    }

    fn stage_b_guidance(&self) -> f32 {
        STAGE_B_GUIDANCE[usize::from(!self.is_v1())]
    }

    /// The folder of a text tower or of the two networks around Stage A's latents.
    fn folder(&self, stage: Stage) -> &'static str {
        match (self.is_v1(), stage) {
            (true, Stage::A) => "stage_a",
            (true, _) => "text_encoder",
            (false, Stage::A) => "vqgan",
            (false, Stage::B) => "text_encoder",
            (false, Stage::C) => "prior_text_encoder",
        }
    }

    /// Rows and columns of Stage B's grid.
    fn grid(&self) -> (usize, usize) {
        let info = self.model.info();
        match self.is_v1() {
            true => (info.default_height as usize / 4, info.default_width as usize / 4),
            false => {
                let side = |latents: u32| (f64::from(latents) * LATENT_DIM_SCALE) as usize;
                (side(info.latent_height), side(info.latent_width))
            }
        }
    }

    /// Random tokens `[1, H, W]` of Stage B's grid.
    fn tokens(&self, random: &mut Random) -> Outcome<Tensor> {
        let labels =
            config(&self.path, self.folder(Stage::A))?["codebook_size"].as_i64().ok_or("codebook_size")?;
        let (height, width) = self.grid();
        let tokens: Vec<i64> = (0..height * width).map(|_| random.below(labels)).collect();
        Ok(Tensor::from_slice(&[1, height, width], &tokens)?)
    }

    /// v2: random latents of Stage A, `[1, H, W, C]`.
    fn grid_latents(&self, random: &mut Random) -> Outcome<Tensor> {
        let channels = side(&config(&self.path, self.folder(Stage::A))?, "latent_channels")?;
        let (height, width) = self.grid();
        random.normal(&[1, height, width, channels])
    }

    /// A random text condition `[n, T, width]` of a stage's tower.
    fn text(&self, random: &mut Random, stage: Stage, n: usize) -> Outcome<Tensor> {
        let config = config(&self.path, self.folder(stage))?;
        random.normal(&[n, side(&config, "max_position_embeddings")?, side(&config, "hidden_size")?])
    }

    /// Random latents `[n, h, w, C]`.
    fn latents(&self, random: &mut Random, n: usize) -> Outcome<Tensor> {
        let info = self.model.info();
        random.normal(&[
            n,
            info.latent_height as usize,
            info.latent_width as usize,
            info.latent_channels as usize,
        ])
    }

    /// Random latents `[1, h, w, C]` as Stage B takes them.
    fn image_embedding(&self, random: &mut Random) -> Outcome<Tensor> {
        let mut latents = self.latents(random, 1)?;
        if !self.is_v1() {
            latents.slice_mut::<f32>()?.iter_mut().for_each(|x| *x = *x * LATENT_MEAN - 1.);
        }
        Ok(latents)
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

/// The first layers of the decoder's blocks that the image embedding joins.
struct JoinedLayers {
    layers: Vec<JoinedLayer>,
}

/// One of them with random inputs: its own, and the embedding as it is kept and as diffusers maps it in every step.
struct JoinedLayer {
    weight: Tensor,
    own: Tensor,
    image: Tensor,
    folded: Tensor,
    mapped: Tensor,
}

impl JoinedLayers {
    fn new(part: &load::Part<DiffNeXt>, grid: (usize, usize), random: &mut Random) -> Outcome<Self> {
        let config = part.network.config();
        let mut layers = Vec::new();
        for name in part.weights.names() {
            let parts: Vec<&str> = name.split('.').collect();
            let [way @ ("down_blocks" | "up_blocks"), level, _, "channelwise", "0", "weight"] = parts[..]
            else {
                continue;
            };
            let level: usize = level.parse()?;
            let level = if way == "down_blocks" { level } else { config.levels.len() - 1 - level };
            if !config.injects[level] {
                continue;
            }
            let weight = part.weights.tensor(&name)?;
            let [hidden, inputs] = weight.dims_of("a first layer")?;
            let side = |side: usize| (side / config.patch_size) >> level;
            let mut map = |channels: usize| random.normal(&[1, side(grid.0), side(grid.1), channels]);
            layers.push(JoinedLayer {
                own: map(inputs - config.condition_width)?,
                image: map(config.image_channels)?,
                mapped: map(config.condition_width)?,
                folded: random.normal(&[config.image_channels, hidden])?,
                weight,
            });
        }
        Ok(JoinedLayers { layers })
    }

    fn run(&self, cx: &Context, folded: bool) -> Outcome<()> {
        for layer in &self.layers {
            let layout = WeightLayout::RowsAreOutputs;
            let own = Term { x: &layer.own, weight: &layer.weight, layout, first_input: 0 };
            let image = match folded {
                true => {
                    let layout = WeightLayout::RowsAreInputs;
                    Term { x: &layer.image, weight: &layer.folded, layout, first_input: 0 }
                }
                false => Term { x: &layer.mapped, first_input: layer.own.shape().channels(), ..own },
            };
            keep(linear_sum(cx, &[own, image], &Epilogue::default())?)?;
        }
        Ok(())
    }
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
    repeats: usize,
    sample: impl Fn(&mut GenerateOptions, u32) -> Outcome<Tensor>,
) -> Outcome<Steps> {
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

// ---------------------------------------------------------------- opening, memory, allocations

fn open_time(path: &Path, arguments: &Arguments) -> Outcome<Value> {
    let lines = Arc::new(Mutex::new(Vec::new()));
    let receiver = lines.clone();
    let mut options = arguments.options()?;
    options.set_log(
        LogLevel::Debug,
        Some(Arc::new(move |_: LogLevel, line: &str| {
            receiver.lock().unwrap_or_else(PoisonError::into_inner).push(line.to_owned());
        })),
    );

    let before = Memory::now()?;
    let start = Instant::now();
    let model = Model::open(path, &options)?;
    let first_s = start.elapsed().as_secs_f64();
    let after = Memory::now()?;
    let log = std::mem::take(&mut *lines.lock().unwrap_or_else(PoisonError::into_inner));
    let info = model.info();
    drop(model);

    let options = arguments.options()?;
    let again = repeat(arguments.repeats, || Ok(Model::open(path, &options)?))?;
    Ok(json!({
        "who": "wuerstchen",
        "part": "open",
        "first_s": first_s,
        "median_s": median(&again),
        "tokenizer_s": tokenizer_seconds(path)?,
        "rss_before_mib": before.rss_mib,
        "rss_after_mib": after.rss_mib,
        "anonymous_after_mib": after.anonymous_mib,
        "mapped_resident_after_mib": after.file_mib,
        "weights_on_disk_mib": weight_bytes(path)? as f64 / MIB,
        "bytes_mapped": info.bytes_mapped,
        "bytes_host": info.bytes_host,
        "log": log,
    }))
}

/// Reading the tokenizer alone, if the folder has it in the usual place.
fn tokenizer_seconds(path: &Path) -> Outcome<Option<f64>> {
    let file = path.join("tokenizer/tokenizer.json");
    if !file.exists() {
        return Ok(None);
    }
    let start = Instant::now();
    let tokenizer = tokenizers::Tokenizer::from_file(file).map_err(|error| error.to_string())?;
    std::hint::black_box(tokenizer);
    Ok(Some(start.elapsed().as_secs_f64()))
}

fn generate(path: &Path, arguments: &Arguments) -> Outcome<Value> {
    let bench = Bench::open(path, arguments)?;
    let mut options = GenerateOptions::new(&bench.model)?;
    options.add_prompt("a red bird on a branch", None)?;
    options.set_seed(7)?;
    options.set_stage_c(arguments.stage_c_steps, STAGE_C_GUIDANCE)?;
    options.set_stage_b(arguments.stage_b_steps, bench.stage_b_guidance())?;

    let mut seconds = Vec::new();
    let mut pictures = Vec::new();
    let mut records = Vec::new();
    for _ in 0..2 {
        COUNTER.start();
        let start = Instant::now();
        pictures.push(bench.model.generate(&options)?);
        seconds.push(start.elapsed().as_secs_f64());
        records.push(COUNTER.stop());
    }
    let (first, second) = (&records[0], &records[1]);
    let memory = Memory::now()?;

    let output_bytes = pictures[1][0].data().len();
    let same = pictures[0][0].data() == pictures[1][0].data();
    // A buffer may be rounded up to its alignment.
    let is_output = |bytes: usize| (output_bytes..=output_bytes + 64).contains(&bytes);
    let others: Vec<usize> = second.large.iter().copied().filter(|&bytes| !is_output(bytes)).collect();
    let outputs = second.large.len() - others.len();
    let all_listed = second.large_count == second.large.len();
    if !same {
        return Err("the same seed gave two different pictures".into());
    }
    Ok(json!({
        "who": "wuerstchen",
        "part": "generate",
        "threads": arguments.threads,
        "stage_c_steps": arguments.stage_c_steps,
        "stage_b_steps": arguments.stage_b_steps,
        "seconds": seconds,
        "rss_peak_mib": memory.peak_mib,
        "anonymous_after_mib": memory.anonymous_mib,
        "mapped_resident_after_mib": memory.file_mib,
        "weights_on_disk_mib": weight_bytes(path)? as f64 / MIB,
        "first": { "allocations": first.allocations, "bytes": first.bytes, "large": first.large_count },
        "second": {
            "allocations": second.allocations,
            "bytes": second.bytes,
            "large": second.large_count,
            "large_outputs": outputs,
            "large_others": others,
        },
        "second_allocates_only_the_output": others.is_empty() && outputs == 1 && all_listed,
    }))
}

/// Allocations at least this large are listed one by one.
const LARGE_BYTES: usize = 4096;
const LISTED: usize = 256;

/// The system allocator, counting between `start` and `stop`.
struct Counter {
    on: AtomicBool,
    allocations: AtomicUsize,
    bytes: AtomicUsize,
    large: AtomicUsize,
    sizes: [AtomicUsize; LISTED],
}

struct Counted {
    allocations: usize,
    bytes: usize,
    large_count: usize,
    /// The first [`LISTED`] of them.
    large: Vec<usize>,
}

// The library's own takes this place unless its default features are off, as in `run.py`; nothing is counted then.
#[cfg_attr(not(feature = "host-memory-guard"), global_allocator)]
#[cfg_attr(feature = "host-memory-guard", allow(dead_code))]
static COUNTER: Counter = Counter {
    on: AtomicBool::new(false),
    allocations: AtomicUsize::new(0),
    bytes: AtomicUsize::new(0),
    large: AtomicUsize::new(0),
    sizes: [const { AtomicUsize::new(0) }; LISTED],
};

impl Counter {
    fn start(&self) {
        for counter in [&self.allocations, &self.bytes, &self.large] {
            counter.store(0, Ordering::SeqCst);
        }
        self.on.store(true, Ordering::SeqCst);
    }

    fn stop(&self) -> Counted {
        self.on.store(false, Ordering::SeqCst);
        let large_count = self.large.load(Ordering::SeqCst);
        let listed = &self.sizes[..large_count.min(LISTED)];
        Counted {
            allocations: self.allocations.load(Ordering::SeqCst),
            bytes: self.bytes.load(Ordering::SeqCst),
            large_count,
            large: listed.iter().map(|size| size.load(Ordering::SeqCst)).collect(),
        }
    }

    fn count(&self, bytes: usize) {
        if !self.on.load(Ordering::Relaxed) {
            return;
        }
        self.allocations.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        if bytes >= LARGE_BYTES {
            let at = self.large.fetch_add(1, Ordering::Relaxed);
            if let Some(size) = self.sizes.get(at) {
                size.store(bytes, Ordering::Relaxed);
            }
        }
    }
}

// SAFETY: every call is passed on to the system allocator unchanged; counting touches only atomics.
unsafe impl GlobalAlloc for Counter {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        self.count(layout.size());
        // SAFETY: the caller's promises are the ones that `System` asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        self.count(layout.size());
        // SAFETY: as in `alloc`.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        self.count(new_size);
        // SAFETY: as in `alloc`.
        unsafe { System.realloc(block, layout, new_size) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: as in `alloc`.
        unsafe { System.dealloc(block, layout) }
    }
}

/// What the kernel says of this process's resident memory, in MiB.
struct Memory {
    rss_mib: f64,
    peak_mib: f64,
    anonymous_mib: f64,
    file_mib: f64,
}

impl Memory {
    fn now() -> Outcome<Self> {
        let status = std::fs::read_to_string("/proc/self/status")?;
        let field = |name: &str| -> Outcome<f64> {
            let line = status.lines().find(|line| line.starts_with(name)).ok_or(name.to_owned())?;
            let kib = line.split_whitespace().nth(1).ok_or(name.to_owned())?;
            Ok(kib.parse::<f64>()? / 1024.)
        };
        Ok(Memory {
            rss_mib: field("VmRSS:")?,
            peak_mib: field("VmHWM:")?,
            anonymous_mib: field("RssAnon:")?,
            file_mib: field("RssFile:")?,
        })
    }
}

/// Makes the kernel's peak start again at the present size; where that is forbidden it includes opening.
fn reset_peak() {
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

// ---------------------------------------------------------------- small helpers

fn config(model: &Path, part: &str) -> Outcome<Value> {
    Ok(serde_json::from_slice(&std::fs::read(model.join(part).join("config.json"))?)?)
}

/// A size in a part's config.
fn side(config: &Value, name: &str) -> Outcome<usize> {
    Ok(config[name].as_u64().ok_or_else(|| name.to_owned())? as usize)
}

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

/// SplitMix64 (Steele et al. 2014): input values, nothing more.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: i64) -> i64 {
        (self.next() >> 1) as i64 % end
    }

    /// In (0, 1].
    fn uniform(&mut self) -> f64 {
        ((self.next() >> 11) + 1) as f64 / (1u64 << 53) as f64
    }

    /// Standard normal values (Box and Muller 1958).
    fn normal(&mut self, dims: &[usize]) -> Outcome<Tensor> {
        let values: Vec<f32> = (0..dims.iter().product())
            .map(|_| {
                let (radius, angle) = ((-2. * self.uniform().ln()).sqrt(), self.uniform());
                (radius * (std::f64::consts::TAU * angle).cos()) as f32
            })
            .collect();
        Ok(Tensor::from_slice(dims, &values)?)
    }
}
