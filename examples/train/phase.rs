//! One part of the model, from its checkpoint or from the start, to its last step.

use std::path::Path;
use std::time::Instant;

use wuerstchen::tensor::rng::Philox;
use wuerstchen::training::{Ema, Goal, Sample, TrainOptions, Trainer};
use wuerstchen::{Image, Model, ModelOptions};

use crate::Outcome;
use crate::arguments::{Arguments, name};
use crate::dataset::Dataset;
use crate::grid;
use crate::report::Report;

/// Pictures that are prepared at a time.
const PREPARE_AT_ONCE: usize = 64;

/// Streams of the random numbers of this program.
const ORDER: u64 = 1;
const CAPTIONS: u64 = 2;

/// Trains `goal` on, and writes the model after the last step.
pub fn train(goal: Goal, arguments: &Arguments, model_folder: &Path, data: &Dataset) -> Outcome<()> {
    let steps = arguments.steps(goal);
    let checkpoint = arguments.out.join("checkpoints").join(name(goal));
    let finished = arguments.out.join("checkpoints").join(format!("{}.done", name(goal)));
    if finished.exists() || steps == 0 {
        return Ok(());
    }
    std::fs::create_dir_all(arguments.out.join("checkpoints"))?;
    let mut model_options = ModelOptions::default();
    model_options.set_threads(arguments.threads)?;
    let model = Model::open(model_folder, &model_options)?;
    let mut trainer = Trainer::new(&model, &options(goal, arguments, steps)?)?;
    if checkpoint.exists() {
        trainer.load(&checkpoint)?;
        println!("{}: on from step {}", name(goal), trainer.progress().step);
    }

    // Latents, tokens and resized pixels never change: made once, they cost no step anything.
    let started = Instant::now();
    let samples = prepare(&trainer, data)?;
    println!("{}: {} samples prepared in {:.1?}", name(goal), samples.len(), started.elapsed());
    let mut report = Report::open(&arguments.out, name(goal), steps, trainer.progress().step)?;
    let mut order = Order::new(data.len(), arguments.seed);
    let captions = Philox::new(arguments.seed, CAPTIONS);
    while trainer.progress().step < steps {
        let first = trainer.progress().samples;
        let mut batch = Vec::with_capacity(arguments.batch);
        for number in first..first + arguments.batch as u64 {
            let i = order.at(number);
            let caption = data.caption(i, captions.uniform(number).into());
            batch.push(trainer.recaption(&samples[i], &caption)?);
        }
        let metrics = trainer.step_over(&batch.iter().collect::<Vec<_>>())?;
        report.step(&metrics, batch.len())?;
        if metrics.step.is_multiple_of(arguments.save_every) || metrics.step == steps {
            trainer.save(&checkpoint)?;
            report.plot()?;
        }
        if metrics.step.is_multiple_of(arguments.grid_every) && goal != Goal::Pair {
            let preview = arguments.out.join("preview");
            trainer.export(&preview)?;
            grid::draw(
                &preview,
                goal,
                data,
                &arguments.out.join(format!("grid-{}-{:06}.png", name(goal), metrics.step)),
            )?;
        }
    }
    trainer.export(model_folder)?;
    std::fs::write(finished, "")?;
    report.finish()?;
    Ok(())
}

/// The paper's settings, at the scale of a small model and a short training.
fn options(goal: Goal, arguments: &Arguments, steps: u64) -> Outcome<TrainOptions> {
    let mut options = TrainOptions::new(goal);
    options.set_learning_rate(if goal == Goal::StageB || goal == Goal::StageC { 5e-4 } else { 1e-3 })?;
    options.set_warmup_steps((steps / 20).min(500));
    options.set_ema(Ema { decay: 0.99, start: steps / 10, every: 5 })?;
    options.set_seed(arguments.seed);
    options.set("export_dtype", "f16")?;
    if goal == Goal::StageA && arguments.from.is_none() {
        options.set("init_codebook", "true")?;
    }
    for (key, value) in &arguments.set {
        options.set(key, value)?;
    }
    Ok(options)
}

fn prepare(trainer: &Trainer, data: &Dataset) -> Outcome<Vec<Sample>> {
    let mut samples = Vec::with_capacity(data.len());
    for images in data.images.chunks(PREPARE_AT_ONCE) {
        let images: Vec<&Image> = images.iter().collect();
        samples.extend(trainer.prepare(&images, &vec![""; images.len()])?);
    }
    Ok(samples)
}

/// Which picture comes as number n: every one once per epoch, in an order that only the seed and n decide.
struct Order {
    count: usize,
    seed: u64,
    epoch: u64,
    places: Vec<usize>,
}

impl Order {
    fn new(count: usize, seed: u64) -> Self {
        Order { count, seed, epoch: u64::MAX, places: Vec::new() }
    }

    fn at(&mut self, number: u64) -> usize {
        let (epoch, place) = (number / self.count as u64, (number % self.count as u64) as usize);
        if self.epoch != epoch {
            self.epoch = epoch;
            self.places = (0..self.count).collect();
            let random = Philox::new(self.seed, ORDER << 32 | epoch);
            for i in (1..self.count).rev() {
                self.places.swap(i, random.below(i as u64, i as u32 + 1) as usize);
            }
        }
        self.places[place]
    }
}
