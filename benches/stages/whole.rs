//! Opening a model, and whole pictures.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use serde_json::{Value, json};
use wuerstchen::image::from_pixels;
use wuerstchen::pipeline::{GenerateOptions, LogLevel, Model, Stage};

use super::memory::{COUNTER, Memory};
use super::{Arguments, Bench, MIB, Outcome, STAGE_C_GUIDANCE, median, repeat, weight_bytes};

pub fn open_time(path: &Path, arguments: &Arguments) -> Outcome<Value> {
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

/// The first picture of a process, part by part, to a PNG on disk. Reading the tokenizer is part of the first text.
pub fn first(path: &Path, arguments: &Arguments) -> Outcome<Value> {
    let mut parts = serde_json::Map::new();
    let mut last = Instant::now();
    let mut ends = |name: &str| {
        let now = Instant::now();
        parts.insert(name.to_owned(), json!((now - last).as_secs_f64()));
        last = now;
    };
    let model = Model::open(path, &arguments.options()?)?;
    ends("opening");
    let options = GenerateOptions::new(&model)?;
    let prompt = ["a red apple"];
    let text = model.encode_text(Stage::C, &prompt)?;
    let text_b = model.encode_text(Stage::B, &prompt)?;
    ends("text");
    let latents = model.stage_c_sample(&text, None, None, &options)?;
    ends("Stage C");
    let tokens = model.stage_b_sample(&latents, &text_b, None, &options)?;
    ends("Stage B");
    let pixels = model.stage_a_decode(&tokens)?;
    ends("Stage A");
    let file = std::env::temp_dir().join(format!("wuerstchen-first-{}.png", std::process::id()));
    from_pixels(&pixels)?.write_png(&file)?;
    ends("PNG");
    std::fs::remove_file(file)?;
    Ok(json!({ "who": "wuerstchen", "part": "first", "threads": arguments.threads, "parts": parts }))
}

pub fn generate(path: &Path, arguments: &Arguments) -> Outcome<Value> {
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
