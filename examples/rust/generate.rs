//! Draws pictures of prompts.
//!
//! `cargo run --release --example generate -- --out apple.png "a red apple"`

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::sync::Arc;

use wuerstchen::pipeline::{GenerateOptions, Model, ModelOptions, Progress};

const USAGE: &str =
    "usage: generate [--model FOLDER] [--decoder FOLDER] [--negative TEXT] [--size WxH] [--steps N] [--guidance W]
                [--seed N] [--images N] [--device NAME] [--threads N] [--out FILE.png] PROMPT...";

type Failure = Box<dyn std::error::Error>;

struct Arguments {
    model: PathBuf,
    decoder: PathBuf,
    out: PathBuf,
    device: String,
    threads: u32,
    negative: Option<String>,
    prompts: Vec<String>,
    /// Names and values for [`GenerateOptions::set`]: what is not here stays as the model recommends it.
    settings: Vec<(&'static str, String)>,
}

fn main() {
    if let Err(error) = parse(std::env::args().skip(1)).and_then(|arguments| run(&arguments)) {
        eprintln!("generate: {error}");
        std::process::exit(1);
    }
}

fn parse(mut words: impl Iterator<Item = String>) -> Result<Arguments, Failure> {
    let mut arguments = Arguments {
        model: "examples/models/emoji-v1".into(),
        decoder: PathBuf::new(),
        out: "out.png".into(),
        device: "auto".into(),
        threads: 0,
        negative: None,
        prompts: Vec::new(),
        settings: Vec::new(),
    };
    while let Some(word) = words.next() {
        if !word.starts_with("--") {
            arguments.prompts.push(word);
            continue;
        }
        let value = words.next().ok_or(USAGE)?;
        match word.as_str() {
            "--model" => arguments.model = value.into(),
            "--decoder" => arguments.decoder = value.into(),
            "--out" => arguments.out = value.into(),
            "--device" => arguments.device = value,
            "--threads" => arguments.threads = value.parse()?,
            "--negative" => arguments.negative = Some(value),
            "--size" => {
                let (width, height) = value.split_once('x').ok_or("--size: expected WxH")?;
                arguments.settings.push(("width", width.into()));
                arguments.settings.push(("height", height.into()));
            }
            "--steps" => arguments.settings.push(("stage_c_steps", value)),
            "--guidance" => arguments.settings.push(("stage_c_guidance", value)),
            "--seed" => arguments.settings.push(("seed", value)),
            "--images" => arguments.settings.push(("images_per_prompt", value)),
            _ => return Err(format!("{word} is not known\n{USAGE}").into()),
        }
    }
    if arguments.prompts.is_empty() {
        return Err(USAGE.into());
    }
    Ok(arguments)
}

fn run(arguments: &Arguments) -> Result<(), Failure> {
    let mut model_options = ModelOptions::default();
    model_options.set_device(&arguments.device)?;
    model_options.set_threads(arguments.threads)?;
    model_options.set_decoder_path(&arguments.decoder)?;
    let model = Model::open(&arguments.model, &model_options)?;

    let mut options = GenerateOptions::new(&model)?;
    for prompt in &arguments.prompts {
        options.add_prompt(prompt, arguments.negative.as_deref())?;
    }
    for (name, value) in &arguments.settings {
        options.set(name, value)?;
    }
    let on_terminal = std::io::stderr().is_terminal();
    if on_terminal {
        options.set_progress(Some(Arc::new(draw_bar)))?;
    }
    let images = model.generate(&options);
    if on_terminal {
        eprint!("\r\x1b[K");
    }

    let images = images?;
    for (i, image) in images.iter().enumerate() {
        let mut path = arguments.out.clone();
        if images.len() > 1 {
            let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            path.set_file_name(format!("{stem}-{}.png", i + 1));
        }
        image.write_png(&path)?;
        println!("{}", path.display());
    }
    Ok(())
}

/// Draws one line such as `C [#####.....] 5/10  0.4 s`.
fn draw_bar(progress: &Progress) {
    const WIDTH: u32 = 30;
    let done = WIDTH * progress.step / progress.steps.max(1);
    let (full, rest) = ("#".repeat(done as usize), ".".repeat((WIDTH - done) as usize));
    let Progress { stage, step, steps, seconds, .. } = progress;
    eprint!("\r\x1b[K{stage:?} [{full}{rest}] {step}/{steps}  {seconds:.1} s");
    // A bar that cannot be shown is no reason to stop.
    let _ = std::io::stderr().flush();
}
