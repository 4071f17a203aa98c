//! What training tells: a bar while it runs, a line of JSON per step, a plot of the losses.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use indicatif::{ProgressBar, ProgressStyle};
use plotters::prelude::*;
use plotters::style::{FontStyle, register_font};
use serde_json::{Value, json};
use wuerstchen::training::TrainMetrics;

use crate::Outcome;

/// The plot's size in pixels.
const PLOT_SIZE: (u32, u32) = (1000, 500);

/// Losses are smoothed for the eye: a running mean that takes this share of each new value.
const SMOOTHING: f64 = 0.02;

pub struct Report {
    part: &'static str,
    folder: PathBuf,
    lines: BufWriter<File>,
    bar: ProgressBar,
    last: Instant,
}

impl Report {
    pub fn open(folder: &Path, part: &'static str, steps: u64, done: u64) -> Outcome<Self> {
        let path = folder.join("metrics.jsonl");
        keep_until(&path, part, done)?;
        let lines = BufWriter::new(OpenOptions::new().create(true).append(true).open(path)?);
        let style =
            ProgressStyle::with_template("{prefix} {bar:30} {pos}/{len} {msg} {per_sec}, {eta} left")?;
        let bar = ProgressBar::new(steps).with_style(style).with_prefix(part).with_position(done);
        bar.reset_eta();
        Ok(Report { part, folder: folder.into(), lines, bar, last: Instant::now() })
    }

    pub fn step(&mut self, metrics: &TrainMetrics, samples: usize) -> Outcome<()> {
        let seconds = self.last.elapsed().as_secs_f64();
        self.last = Instant::now();
        let line = json!({
            "part": self.part,
            "step": metrics.step,
            "loss": metrics.loss,
            "grad_norm": metrics.grad_norm,
            "learning_rate": metrics.learning_rate,
            "accuracy": metrics.accuracy,
            "skipped": metrics.skipped,
            "samples_per_s": samples as f64 / seconds,
        });
        writeln!(self.lines, "{line}")?;
        self.lines.flush()?;
        self.bar.set_message(format!("loss {:.4} acc {:.3}", metrics.loss, metrics.accuracy));
        self.bar.inc(1);
        Ok(())
    }

    /// Draws the losses of all parts so far, each relative to where it began.
    pub fn plot(&mut self) -> Outcome<()> {
        self.lines.flush()?;
        plot(&read(&self.folder.join("metrics.jsonl"))?, &self.folder.join("loss.png"))
    }

    pub fn finish(mut self) -> Outcome<()> {
        self.plot()?;
        self.bar.finish();
        Ok(())
    }
}

/// Drops the lines of steps that a checkpoint does not know of: they will be taken again.
fn keep_until(path: &Path, part: &str, done: u64) -> Outcome<()> {
    if !path.exists() {
        return Ok(());
    }
    let content = std::fs::read_to_string(path)?;
    let known = |line: &&str| match serde_json::from_str::<Value>(line) {
        Ok(value) => value["part"] != part || value["step"].as_u64().is_some_and(|step| step <= done),
        Err(_) => false,
    };
    let kept: Vec<&str> = content.lines().filter(known).collect();
    std::fs::write(path, kept.iter().map(|line| format!("{line}\n")).collect::<String>())?;
    Ok(())
}

/// Steps and smoothed losses of each part.
type Curves = BTreeMap<String, Vec<(f64, f64)>>;

fn read(path: &Path) -> Outcome<Curves> {
    let mut curves = Curves::new();
    for line in BufReader::new(File::open(path)?).lines() {
        let value: Value = serde_json::from_str(&line?)?;
        let (Some(step), Some(loss)) = (value["step"].as_f64(), value["loss"].as_f64()) else { continue };
        let curve = curves.entry(value["part"].as_str().unwrap_or_default().into()).or_default();
        let smoothed = curve.last().map_or(loss, |(_, before)| before + (loss - before) * SMOOTHING);
        curve.push((step, smoothed));
    }
    Ok(curves)
}

fn plot(curves: &Curves, path: &Path) -> Outcome<()> {
    register_font("sans-serif", FontStyle::Normal, dejavu::sans::regular())
        .map_err(|_| "a font that is none")?;
    let steps = curves.values().flatten().map(|point| point.0).fold(1.0, f64::max);
    let relative = |curve: &[(f64, f64)]| {
        let first = curve.first().map_or(1.0, |point| point.1);
        curve.iter().map(|&(step, loss)| (step, loss / first)).collect::<Vec<_>>()
    };
    let area = BitMapBackend::new(path, PLOT_SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .margin(15)
        .x_label_area_size(40)
        .y_label_area_size(50)
        .build_cartesian_2d(0.0..steps, 0.0..1.1)?;
    chart.configure_mesh().x_desc("step").y_desc("loss / first loss").draw()?;
    for (i, (part, curve)) in curves.iter().enumerate() {
        let colour = Palette99::pick(i).to_rgba();
        let last = curve.last().map_or(0.0, |point| point.1);
        chart
            .draw_series(LineSeries::new(relative(curve), colour))?
            .label(format!("{part}: {last:.4}"))
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], colour));
    }
    chart.configure_series_labels().background_style(WHITE).border_style(BLACK).draw()?;
    area.present()?;
    Ok(())
}
