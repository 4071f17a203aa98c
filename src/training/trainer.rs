//! A stage in training: batches in, better weights out.

use std::sync::Arc;

use super::average::Average;
use super::draws::Draws;
use super::optimizer::{self, Moments, clip_factor, gradient_norm};
use super::options::{Goal, TrainOptions};
use super::parameters::Parameters;
use super::reduction::Reduction;
use super::tasks::pair::PairTask;
use super::tasks::stage_a::StageATask;
use super::tasks::stage_b::StageBTask;
use super::tasks::stage_c::StageCTask;
use super::tasks::{Commit, Measured, Pass, Sample, Task};
use crate::device::cuda::Precision;
use crate::device::threads::run_apart_with_reserve;
use crate::device::{CancelToken, Context, Reduce};
use crate::error::{Error, Result};
use crate::image::Image;
use crate::nn::RunningUpdate;
use crate::pipeline::{LogLevel, Model};
use crate::tensor::Tensor;
use crate::tensor::autograd::Gradients;

/// What lists of a step (names, nodes of the tape) take in memory beside its tensors, at worst.
pub(super) const LISTS_BYTES: usize = 32 << 20;

/// A stage of a model, in training. The model itself is not changed: [`Trainer::export`] writes another.
pub struct Trainer {
    pub(super) model: Model,
    /// On the model's device. One for all steps: tensors of a GPU belong to its stream.
    cx: Context,
    pub(super) options: TrainOptions,
    pub(super) task: Box<dyn Task>,
    pub(super) parameters: Parameters,
    pub(super) moments: Moments,
    pub(super) average: Average,
    pub(super) progress: Progress,
    pub(super) data_position: Option<serde_json::Value>,
    reduce: Option<Arc<dyn Reduce>>,
    cancel: CancelToken,
    /// The networks are not loaded over the parameters as they are now.
    stale: bool,
}

/// Where training stands.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Progress {
    /// Steps taken, skipped ones included.
    pub step: u64,
    /// Steps that changed nothing since a loss or gradient was not finite.
    pub skipped: u64,
    /// Samples seen by all ranks together.
    pub samples: u64,
}

/// What one step showed.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct TrainMetrics {
    /// The number of the step, counted from 1.
    pub step: u64,
    /// The loss was not finite: nothing was changed.
    pub skipped: bool,
    /// Of the whole batch, over all ranks, before the update.
    pub loss: f32,
    /// The norm of all gradients together, before clipping.
    pub grad_norm: f32,
    /// The rate of this step.
    pub learning_rate: f32,
    /// Stage B: the share of tokens that were found. A pair: the share of texts. 0 elsewhere.
    pub accuracy: f32,
}

impl Trainer {
    /// Begins training the options' stage of `base`, from its weights.
    ///
    /// # Errors
    /// `Unsupported` if the model lacks a part that the stage learns from, or carries adapters; `InvalidArgument` for
    /// options that contradict each other; `OutOfMemory`.
    pub fn new(base: &Model, options: &TrainOptions) -> Result<Self> {
        run_apart_with_reserve("a trainer", LISTS_BYTES, || Self::new_here(base, options))
    }

    fn new_here(base: &Model, options: &TrainOptions) -> Result<Self> {
        options.check()?;
        let factors = options.compute_dtype.precision().unwrap_or(Precision::F32);
        let cx = Context::new(&base.device().for_training(factors)?);
        let mut parameters = Parameters::default();
        let task: Box<dyn Task> = match options.goal {
            Goal::StageA => Box::new(StageATask::new(&cx, base, options, &mut parameters)?),
            Goal::StageB => Box::new(StageBTask::new(&cx, base, options, &mut parameters)?),
            Goal::StageC => Box::new(StageCTask::new(&cx, base, options, &mut parameters)?),
            Goal::Pair => Box::new(PairTask::new(&cx, base, options, &mut parameters)?),
        };
        let average = Average::new(&cx, &parameters)?;
        let mut trainer = Trainer {
            model: base.clone(),
            cx,
            options: options.clone(),
            task,
            parameters,
            moments: Moments::default(),
            average,
            progress: Progress::default(),
            data_position: None,
            reduce: None,
            cancel: CancelToken::new(),
            stale: true,
        };
        trainer.reload()?;
        Ok(trainer)
    }

    /// Joins other processes that train the same stage with the same options, each on its own part of every batch:
    /// gradients and statistics are summed by `reduce`. To be called before the first step.
    pub fn set_reduce(&mut self, reduce: Arc<dyn Reduce>) {
        self.reduce = (reduce.ranks() > 1).then_some(reduce);
    }

    /// Stops a running step, and every later one, with `Cancelled`. What the step would have changed stays as it was.
    pub fn cancel_token(&self) -> CancelToken {
        self.cancel.clone()
    }

    /// Where training stands.
    pub fn progress(&self) -> Progress {
        self.progress
    }

    /// Where the data loader stands, to be kept in checkpoints.
    pub fn set_data_position(&mut self, position: Option<serde_json::Value>) {
        self.data_position = position;
    }

    /// Where the data loader stood when the checkpoint was written that was loaded last.
    pub fn data_position(&self) -> Option<&serde_json::Value> {
        self.data_position.as_ref()
    }

    /// The numbers in training.
    pub fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    /// The options that training began with.
    pub fn options(&self) -> &TrainOptions {
        &self.options
    }

    /// Everything about pictures and their captions that stays the same from epoch to epoch: latents and tokens of
    /// frozen networks, resized pixels. Keeping the samples saves that work in every later step.
    ///
    /// # Errors
    /// `InvalidArgument` for no pictures, pictures of different sizes, another number of captions than of pictures, or
    /// a size that the stage cannot take; `OutOfMemory`; `Cancelled`.
    pub fn prepare(&self, images: &[&Image], captions: &[&str]) -> Result<Vec<Sample>> {
        if images.is_empty() {
            return Err(Error::argument("images", "at least one", 0));
        }
        if images.len() != captions.len() {
            return Err(Error::argument(
                "captions",
                format!("{}, one per image", images.len()),
                captions.len(),
            ));
        }
        let size = |image: &Image| (image.width(), image.height());
        if let Some(other) = images.iter().find(|image| size(image) != size(images[0])) {
            let (width, height) = size(images[0]);
            let expected = format!("pictures of one size, {width} x {height} like the first");
            return Err(Error::argument(
                "images",
                expected,
                format!("{} x {}", other.width(), other.height()),
            ));
        }
        run_apart_with_reserve("preparing samples", LISTS_BYTES, || {
            self.task.prepare(&self.context(), &self.model, images, captions)
        })
    }

    /// A sample with another caption: its picture is not looked at again.
    ///
    /// # Errors
    /// `InvalidArgument` for text that the tokenizer cannot split; `OutOfMemory`.
    pub fn recaption(&self, sample: &Sample, caption: &str) -> Result<Sample> {
        run_apart_with_reserve("a caption", LISTS_BYTES, || {
            let text = self.task.caption(&self.context(), &self.model, caption)?;
            Ok(Sample { text, ..sample.clone() })
        })
    }

    /// One step of the optimiser over a batch.
    ///
    /// # Errors
    /// As [`Trainer::prepare`] and [`Trainer::step_over`].
    pub fn step(&mut self, images: &[&Image], captions: &[&str]) -> Result<TrainMetrics> {
        let samples = self.prepare(images, captions)?;
        self.step_over(&samples.iter().collect::<Vec<_>>())
    }

    /// One step of the optimiser over prepared samples. With several ranks each gives its own part of the batch, all
    /// of one size. A loss or gradient that is not finite changes nothing but the counts.
    ///
    /// # Errors
    /// `InvalidArgument` for fewer samples than parts that the options cut a batch into, or samples of another stage;
    /// `OutOfMemory`; `Cancelled`. After an error nothing has changed.
    pub fn step_over(&mut self, samples: &[&Sample]) -> Result<TrainMetrics> {
        let parts = self.options.accumulation as usize;
        if samples.len() < parts {
            let expected = format!("at least {parts}, as grad_accumulation says");
            return Err(Error::argument("samples", expected, samples.len()));
        }
        let mut taken = None;
        let outcome = run_apart_with_reserve("a training step", LISTS_BYTES, || {
            taken = Some(self.step_here(samples)?);
            Ok(())
        });
        // A step that changed the weights counts, even if its lists took the last memory there was.
        match (taken, outcome) {
            (Some(metrics), _) => Ok(metrics),
            (None, Err(error)) => Err(error),
            (None, Ok(())) => Err(Error::internal("a training step", "it ended without a result")),
        }
    }

    fn step_here(&mut self, samples: &[&Sample]) -> Result<TrainMetrics> {
        if self.stale {
            self.reload()?;
        }
        let cx = self.context();
        let (ranks, _) = self.ranks();
        let Learnt { gradients, mut totals, seen } = self.learn(&cx, samples)?;
        let commit =
            Commit { options: &self.options, step: self.progress.step, reduce: self.reduce.as_ref() };
        self.task.sum_up(&cx, &commit)?;
        if let Some(reduce) = &self.reduce {
            reduce.sum_f64(&mut totals)?;
        }
        self.expect_equal_parts(samples.len(), totals)?;
        self.parameters.expect_gradients(&gradients)?;
        let norm = gradient_norm(&cx, &self.parameters, &gradients)?;
        let [loss, accuracy, ..] = totals;
        let metrics = TrainMetrics {
            step: self.progress.step + 1,
            skipped: !loss.is_finite() || !norm.is_finite(),
            loss: loss as f32,
            grad_norm: norm as f32,
            learning_rate: self.options.optimizer.rate(self.moments.steps),
            accuracy: accuracy as f32,
        };
        if metrics.skipped {
            self.progress.skipped += 1;
            let (step, norm) = (metrics.step, metrics.grad_norm);
            self.model
                .say(LogLevel::Warning, || format!("step {step} skipped: loss {loss}, gradient norm {norm}"));
        } else {
            self.update(&gradients, norm, &seen)?;
        }
        self.progress.step += 1;
        self.progress.samples += (samples.len() * ranks) as u64;
        Ok(metrics)
    }

    /// Forward and backward over a batch, part by part; gradients are those of all ranks, `totals` this one's.
    fn learn(&mut self, cx: &Context, samples: &[&Sample]) -> Result<Learnt> {
        let (ranks, rank) = self.ranks();
        let first = self.progress.samples + (rank * samples.len()) as u64;
        let mut gradients = Gradients::default();
        let mut reduction = Reduction::new(self.reduce.as_ref())?;
        let size = samples.len() as f64;
        let mut totals = [0.0, 0.0, size, size * size];
        let mut seen = Vec::new();
        let parts = even_parts(samples.len(), self.options.accumulation as usize);
        for (i, range) in parts.iter().enumerate() {
            let last = i + 1 == parts.len();
            let share = range.len() as f64 / (samples.len() * ranks) as f64;
            let mut complete = |leaf: usize, gradient: &Tensor| {
                if last { reduction.send(leaf, gradient) } else { Ok(()) }
            };
            let mut pass = Pass {
                cx,
                model: &self.model,
                options: &self.options,
                samples: &samples[range.clone()],
                draws: Draws {
                    seed: self.options.seed,
                    first: first + range.start as u64,
                    count: range.len(),
                },
                step: self.progress.step,
                share: share as f32,
                reduce: self.reduce.as_ref(),
                gradients: &mut gradients,
                complete: &mut complete,
            };
            if i == 0 {
                self.task.unload();
                let prepared = self.task.before_step(&mut pass, &mut self.parameters);
                self.task.load(&self.parameters)?;
                prepared?;
            }
            let measured: Measured = self.task.learn(&mut pass)?;
            totals[0] += measured.loss * share;
            totals[1] += measured.accuracy * share;
            seen.extend(measured.seen);
        }
        reduction.finish(&mut gradients)?;
        Ok(Learnt { gradients, totals, seen })
    }

    /// How many processes train together, and which of them this is.
    fn ranks(&self) -> (usize, usize) {
        self.reduce.as_ref().map_or((1, 0), |reduce| (reduce.ranks(), reduce.rank()))
    }

    /// # Errors
    /// `InvalidArgument` if ranks were given parts of different sizes. Every rank sees the same sums, so all refuse or
    /// none.
    fn expect_equal_parts(&self, size: usize, [_, _, sizes, squares]: [f64; 4]) -> Result<()> {
        let (ranks, rank) = self.ranks();
        // The square of a sum is the number of its terms times the sum of their squares only if all are equal.
        if sizes * sizes == squares * ranks as f64 {
            return Ok(());
        }
        let found = format!("{size} on rank {rank}, {sizes} in all");
        Err(Error::argument("samples", "as many on every rank", found))
    }

    /// Changes the weights, which a cancel must not leave half done.
    fn update(&mut self, gradients: &Gradients, norm: f64, seen: &[RunningUpdate]) -> Result<()> {
        let cx = self.cx.clone();
        let settings = self.options.optimizer;
        self.task.unload();
        let scale = clip_factor(norm, settings.clip);
        let updated =
            optimizer::step(&cx, &settings, &mut self.parameters, &mut self.moments, gradients, scale)
                .and_then(|()| self.parameters.follow(&cx, seen))
                .and_then(|()| self.task.after_step(&cx, &mut self.parameters))
                .and_then(|()| {
                    self.average.follow(&cx, &self.parameters, &self.options.ema, self.progress.step + 1)
                });
        // The weights have changed: networks that cannot be loaded for want of memory are loaded by the next step.
        let _ = self.reload();
        updated
    }

    /// Loads the networks over the parameters as they are now.
    pub(super) fn reload(&mut self) -> Result<()> {
        self.stale = true;
        self.task.unload();
        self.parameters.round_to(self.options.compute_dtype)?;
        self.task.load(&self.parameters)?;
        self.stale = false;
        Ok(())
    }

    /// The stream that all steps run on.
    #[cfg(test)]
    pub(super) fn stream(&self) -> Option<&Arc<crate::device::cuda::Stream>> {
        self.cx.cuda().ok().flatten()
    }

    pub(super) fn context(&self) -> Context {
        let cx = self.cx.clone().cancelled_by(&self.cancel);
        match &self.options.cancel {
            Some(token) => cx.cancelled_by(token),
            None => cx,
        }
    }
}

/// What a batch showed.
struct Learnt {
    gradients: Gradients,
    /// Loss and accuracy, each this rank's share; its samples, and their square.
    totals: [f64; 4],
    seen: Vec<RunningUpdate>,
}

/// `count` samples in `parts` runs that differ by one at most.
fn even_parts(count: usize, parts: usize) -> Vec<std::ops::Range<usize>> {
    (0..parts).map(|i| i * count / parts..(i + 1) * count / parts).collect()
}
