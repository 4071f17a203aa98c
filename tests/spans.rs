//! Where time goes: every op has a span, and every op of a generation lies in the span of its stage.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "common/folder.rs"]
mod folder;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use folder::{picture, short, tiny, v2};
use serde_json::Value;
use wuerstchen::device::profile::{Recorder, Total};
use wuerstchen::{Image, Model, ModelOptions};

/// Public functions of `src/ops/` that open no span of their own, and why.
const WITHOUT: &[(&str, &str)] =
    &[("linear", "linear_sum opens it, which it calls"), ("linear_transposed", "as linear")];

/// Files and folders of an op that hold what its public functions call.
const NO_OPS: [&str; 5] = ["cpu", "cuda", "gradient", "tests", "check"];

/// Spans that every part of a generation lies in.
const STAGES: [&str; 4] = ["text_encoder", "stage_c", "stage_b", "stage_a"];

const STEPS: u64 = 3;

#[test]
fn every_op_opens_a_span_at_its_head() {
    let ops = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/ops");
    let (mut seen, mut wrong) = (Vec::new(), Vec::new());
    for file in sources(&ops) {
        // `layer_norm/mod.rs` and `widen.rs` are the ops layer_norm and widen.
        let place = file.strip_prefix(&ops).unwrap().iter().next().unwrap().to_str().unwrap();
        let folder = place.trim_end_matches(".rs");
        for op in public_functions(&fs::read_to_string(&file).unwrap()) {
            let named = [folder, op.name.as_str()].map(|name| format!("span = cx.op(\"{name}\")"));
            let opens = named.iter().any(|named| op.first_line.contains(named.as_str()));
            if opens == WITHOUT.iter().any(|(name, _)| *name == op.name) {
                wrong.push(format!("{}: {}: {}", file.display(), op.name, op.first_line));
            }
            seen.push(op.name);
        }
    }
    assert!(wrong.is_empty(), "a span is missing, or no longer is:\n{}", wrong.join("\n"));
    for known in ["layer_norm", "linear_sum", "depthwise_conv", "attention", "renoise"] {
        assert!(seen.iter().any(|name| name == known), "{known} was not found at all");
    }
    for (name, _) in WITHOUT {
        assert!(seen.iter().any(|seen| seen == name), "there is no {name} any more");
    }
}

#[test]
fn functions_are_found() {
    let text = "pub fn a(\n    cx: &Context,\n    x: &Tensor,\n) -> X {\n    first(cx);\n    second();\n}\n\n\
                fn hidden(cx: &Context) {\n}\npub fn without(x: u8) {\n    x\n}\n    pub fn method(cx: &Context) {\n";
    let found = public_functions(text);
    assert_eq!(found.len(), 1);
    assert_eq!((found[0].name.as_str(), found[0].first_line.as_str()), ("a", "first(cx);"));
}

struct Function {
    name: String,
    first_line: String,
}

/// Free functions that are public and take a context.
fn public_functions(text: &str) -> Vec<Function> {
    let of = |after: &str| {
        let (head, body) = after.split_once("{\n")?;
        let name = head.split(['(', '<']).next()?.to_owned();
        let first_line = body.lines().next()?.trim().to_owned();
        head.contains("cx: &Context").then_some(Function { name, first_line })
    };
    format!("\n{text}").split("\npub fn ").skip(1).filter_map(of).collect()
}

fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if NO_OPS.contains(&name.trim_end_matches(".rs")) {
            continue;
        }
        if path.is_dir() {
            files.extend(sources(&path));
        } else if name.ends_with(".rs") {
            files.push(path);
        }
    }
    files
}

/// A picture, and what was heard of making it.
fn recorded(folder: &Path) -> (Image, Vec<Total>) {
    let mut options = ModelOptions::default();
    options.set_threads(2).unwrap();
    options.set_device("cpu").unwrap();
    let model = Model::open(folder, &options).unwrap();
    let recorder = Recorder::new();
    let heard = model.recorded_by(&recorder);
    let image = picture(&heard, &short(&heard, "a red bird"));
    let totals = recorder.totals();
    let unheard = picture(&model, &short(&model, "a red bird"));
    assert_eq!(unheard.data(), image.data(), "recording changed the picture");
    assert_eq!(recorder.totals().len(), totals.len(), "the model was not to be recorded");
    (image, totals)
}

/// Those whose stack begins so.
fn below<'a>(totals: &'a [Total], stack: &str) -> Vec<&'a Total> {
    let stack: Vec<&str> = stack.split(';').collect();
    totals.iter().filter(|t| t.stack.len() >= stack.len() && t.stack[..stack.len()] == stack).collect()
}

fn at<'a>(totals: &'a [Total], stack: &str) -> &'a Total {
    totals.iter().find(|t| t.stack.join(";") == stack).unwrap_or_else(|| panic!("no span {stack}"))
}

#[test]
fn a_generation_lies_in_the_spans_of_its_stages_and_steps() {
    for folder in [tiny(), v2("model")] {
        let (_, totals) = recorded(&folder);
        for total in totals.iter().filter(|t| t.is_op) {
            // What joins pictures and texts to batches lies between the stages.
            let inside = STAGES.contains(&total.stack[0].as_str());
            assert!(inside || total.name == "concat", "{folder:?}: {:?}", total.stack);
        }
        for stage in STAGES {
            assert!(at(&totals, stage).calls > 0);
        }
        for stage in ["stage_c;step", "stage_b;step"] {
            assert_eq!(at(&totals, stage).calls, STEPS, "{folder:?}: {stage}");
            let ops: BTreeSet<&str> =
                below(&totals, stage).iter().filter(|t| t.is_op).map(|t| t.name).collect();
            for op in ["attention", "depthwise_conv", "layer_norm", "linear", "response_norm", "sampler_step"]
            {
                assert!(ops.contains(op), "{folder:?}: {stage} has no {op}, only {ops:?}");
            }
        }
        let roots = totals.iter().filter(|t| t.stack.len() == 1).map(|t| t.time);
        assert_eq!(totals.iter().map(|t| t.own).sum::<Duration>(), roots.sum());
    }
}

#[test]
fn blocks_calls_and_work_are_those_of_the_network() {
    let (_, totals) = recorded(&tiny());
    let read = fs::read(tiny().join("stage_c/config.json")).unwrap();
    let config: Value = serde_json::from_slice(&read).unwrap();
    let side = |name: &str| config[name].as_u64().unwrap();
    let (latent, channels, depth) = (side("c_in"), side("c"), side("depth"));

    let step = below(&totals, "stage_c;step");
    let blocks: BTreeSet<&String> =
        step.iter().map(|t| &t.stack).filter(|s| s.len() > 2).map(|s| &s[2]).collect();
    let attn = blocks.iter().filter(|name| name.starts_with("attn_block.")).count() as u64;
    let res = blocks.iter().filter(|name| name.starts_with("res_block.")).count() as u64;
    assert_eq!((attn, res), (depth, depth), "{blocks:?}");
    let calls = |op: &str| step.iter().filter(|t| t.name == op).map(|t| t.calls).sum::<u64>();
    assert_eq!((calls("attention"), calls("depthwise_conv")), (STEPS * depth, STEPS * depth));

    // Beside the blocks there are a layer from latents to channels and one from channels to twice the latents; a sample
    // and its twin go through them.
    let mut options = ModelOptions::default();
    options.set_device("cpu").unwrap();
    let info = Model::open(&tiny(), &options).unwrap().info();
    let rows = 2 * u64::from(info.latent_height) * u64::from(info.latent_width);
    let weights = latent * channels + channels * 2 * latent;
    let layers = at(&totals, "stage_c;step;linear");
    assert_eq!(layers.calls, 2 * STEPS);
    assert_eq!(layers.work.flops, STEPS * 2 * rows * weights);
    // x, the weights, the result, all of them f32: tests/fixtures/model is.
    let moved = rows * latent + rows * channels + rows * channels + rows * 2 * latent + weights;
    assert_eq!(layers.work.bytes, STEPS * 4 * moved);
    // q and k of the same width, all keys seen: those of the grid and of the text.
    let attention = step.iter().find(|t| t.name == "attention").unwrap();
    let keys = rows / 2 + text_length();
    assert_eq!(attention.work.flops, STEPS * 4 * rows * keys * channels);
}

fn text_length() -> u64 {
    let read = fs::read(tiny().join("model_index.json")).unwrap();
    let index: Value = serde_json::from_slice(&read).unwrap();
    let tower = fs::read(tiny().join("text_encoder/config.json")).unwrap();
    let tower: Value = serde_json::from_slice(&tower).unwrap();
    index["text_length"].as_u64().or(tower["max_position_embeddings"].as_u64()).unwrap()
}
