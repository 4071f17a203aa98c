//! How each stage's batch is prepared, drawn and learnt from. A task holds its networks over the trainer's
//! parameters; the trainer does what is alike for all.

pub(super) mod pair;
pub(super) mod stage_a;
pub(super) mod stage_b;
pub(super) mod stage_c;

use std::path::Path;
use std::sync::Arc;

use super::Trainer;
use super::draws::Draws;
use super::export::TrainedPart;
use super::options::TrainOptions;
use super::parameters::Parameters;
use crate::device::{Context, Reduce};
use crate::error::{Error, Result};
use crate::image::Image;
use crate::nn::{RunningUpdate, Source};
use crate::ops::batch::concat;
use crate::pipeline::{Model, TokenIds};
use crate::tensor::Tensor;
use crate::tensor::autograd::{Gradients, Tape};

/// A picture and its caption as far as they never change in training: made once by [`super::Trainer::prepare`], used
/// in every epoch. What a stage does not need is not there.
#[derive(Debug, Clone, Default)]
pub struct Sample {
    /// In 0..1, or as the image encoder takes them: `[1, H, W, 3]`.
    pub(super) pixels: Option<Tensor>,
    /// From a frozen image encoder: `[1, h, w, C]`.
    pub(super) latents: Option<Tensor>,
    /// From a frozen Stage A: `I64 [1, H, W]`.
    pub(super) tokens: Option<Tensor>,
    /// Token ids of the caption, and how many are no padding.
    pub(super) text: Option<(Tensor, usize)>,
}

/// One part of a batch on its way through a network.
pub(super) struct Pass<'a> {
    /// Without a tape.
    pub cx: &'a Context,
    pub model: &'a Model,
    pub options: &'a TrainOptions,
    pub samples: &'a [&'a Sample],
    pub draws: Draws,
    /// Steps that were taken before this one.
    pub step: u64,
    /// What this part's loss counts in the batch's, over all ranks.
    pub share: f32,
    pub reduce: Option<&'a Arc<dyn Reduce>>,
    pub gradients: &'a mut Gradients,
    /// Told of each gradient as soon as it is complete.
    pub complete: &'a mut dyn FnMut(usize, &Tensor) -> Result<()>,
}

/// A step that has seen its whole batch.
pub(super) struct Commit<'a> {
    pub options: &'a TrainOptions,
    /// Steps that were taken before this one.
    pub step: u64,
    pub reduce: Option<&'a Arc<dyn Reduce>>,
}

/// What a part of a batch showed.
#[derive(Debug, Default)]
pub(super) struct Measured {
    pub loss: f64,
    /// The share of tokens or texts that were found; 0 where nothing is chosen.
    pub accuracy: f64,
    /// What the BatchNorms saw.
    pub seen: Vec<RunningUpdate>,
}

/// What a trainer trains.
pub(super) trait Task: Send + Sync {
    /// Everything about pictures of one size and their captions that does not change from epoch to epoch.
    ///
    /// # Errors
    /// `InvalidArgument` for pictures that the stage cannot take; `OutOfMemory`; `Cancelled`.
    fn prepare(
        &self,
        cx: &Context,
        model: &Model,
        images: &[&Image],
        captions: &[&str],
    ) -> Result<Vec<Sample>>;

    /// A caption as [`Task::prepare`] keeps it; nothing if the stage reads none.
    ///
    /// # Errors
    /// `InvalidArgument` for text that the tokenizer cannot split; `OutOfMemory`.
    fn caption(&self, cx: &Context, model: &Model, caption: &str) -> Result<Option<(Tensor, usize)>>;

    /// Loads the networks over the parameters.
    ///
    /// # Errors
    /// `OutOfMemory`.
    fn load(&mut self, parameters: &Parameters) -> Result<()>;

    /// Lets go of them, so that the parameters may change.
    fn unload(&mut self);

    /// Forward and backward over one part of a batch.
    ///
    /// # Errors
    /// `OutOfMemory`; `Cancelled`.
    fn learn(&mut self, pass: &mut Pass) -> Result<Measured>;

    /// What is done to the parameters before the networks see a batch, with nothing loaded over them.
    ///
    /// # Errors
    /// `OutOfMemory`; `Cancelled`.
    fn before_step(&mut self, _pass: &mut Pass, _parameters: &mut Parameters) -> Result<()> {
        Ok(())
    }

    /// After the whole batch, before anything changes: sums over ranks what the task has gathered on its own.
    ///
    /// # Errors
    /// What summing failed with; `OutOfMemory`; `Cancelled`.
    fn sum_up(&mut self, _cx: &Context, _commit: &Commit) -> Result<()> {
        Ok(())
    }

    /// What else changes after the optimiser has changed the parameters, with nothing loaded over them. Not called for
    /// a step that is skipped.
    ///
    /// # Errors
    /// `Internal` if something is; `OutOfMemory`.
    fn after_step(&mut self, _cx: &Context, _parameters: &mut Parameters) -> Result<()> {
        Ok(())
    }

    /// The parts of the model that it changes.
    ///
    /// # Errors
    /// `Unsupported` if the model lacks one.
    fn parts<'a>(&self, model: &'a Model) -> Result<Vec<TrainedPart<'a>>>;

    /// Writes what the exported model `folder` holds beside those parts.
    ///
    /// # Errors
    /// `Io`; `OutOfMemory`.
    fn write_beside(&self, _trainer: &Trainer, _folder: &Path) -> Result<()> {
        Ok(())
    }

    /// What the task keeps beside the parameters, for a checkpoint.
    fn state(&self) -> Vec<(String, Tensor)> {
        Vec::new()
    }

    /// Takes back what [`Task::state`] gave.
    ///
    /// # Errors
    /// `Format` if something is missing or has another shape.
    fn restore(&mut self, _state: &dyn Source) -> Result<()> {
        Ok(())
    }
}

impl Pass<'_> {
    /// Walks back from the loss of this part.
    ///
    /// # Errors
    /// `OutOfMemory`; `Cancelled`.
    pub fn backward(&mut self, tape: &Tape, loss: &Tensor) -> Result<()> {
        let seed = Tensor::from_slice(loss.dims(), &[self.share])?;
        self.backward_from(tape, &[(loss, seed)])
    }

    /// Walks back from tensors whose gradients, times the share of this part, are known.
    ///
    /// # Errors
    /// `OutOfMemory`; `Cancelled`.
    pub fn backward_from(&mut self, tape: &Tape, seeds: &[(&Tensor, Tensor)]) -> Result<()> {
        tape.backward_watched(self.cx, seeds, self.gradients, self.complete)
    }

    /// A fresh tape, as the options want it.
    pub fn tape(&self) -> Arc<Tape> {
        if self.options.recompute { Tape::recomputing() } else { Tape::new() }
    }

    /// One tensor of each sample, as a batch.
    ///
    /// # Errors
    /// `InvalidArgument` if a sample lacks it (it was prepared for another stage) or has another shape.
    pub fn stacked(&self, what: &str, of: impl Fn(&Sample) -> Option<&Tensor>) -> Result<Tensor> {
        let tensors = self.samples.iter().map(|sample| {
            of(sample)
                .ok_or_else(|| Error::argument("samples", format!("{what}, as this stage prepares"), "none"))
        });
        concat(self.cx, &tensors.collect::<Result<Vec<_>>>()?)
    }

    /// Token ids of the captions, with those of `empty` in the place of the samples that `dropped` picks.
    ///
    /// # Errors
    /// As [`Pass::stacked`].
    pub fn texts(&self, empty: &TokenIds, dropped: &[bool]) -> Result<TokenIds> {
        let mut rows = Vec::with_capacity(self.samples.len());
        let mut lengths = Vec::with_capacity(self.samples.len());
        for (sample, &dropped) in self.samples.iter().zip(dropped) {
            let (ids, length) = match &sample.text {
                Some((ids, length)) if !dropped => (ids, *length),
                Some(_) => (&empty.ids, empty.lengths.first().copied().unwrap_or(1)),
                None => return Err(Error::argument("samples", "captions, as this stage prepares", "none")),
            };
            rows.push(ids);
            lengths.push(length);
        }
        Ok(TokenIds { ids: concat(self.cx, &rows)?, lengths })
    }
}

/// The entries of the first dimension, each on its own and in memory of its own.
///
/// # Errors
/// `OutOfMemory`.
pub(super) fn apart(batch: &Tensor) -> Result<Vec<Tensor>> {
    let count = batch.dims().first().copied().unwrap_or(0);
    (0..count).map(|n| batch.narrow(n, 1)?.detached()).collect()
}

/// The token ids of each caption.
///
/// # Errors
/// `OutOfMemory`.
pub(super) fn texts_apart(tokens: &TokenIds) -> Result<Vec<(Tensor, usize)>> {
    Ok(apart(&tokens.ids)?.into_iter().zip(tokens.lengths.iter().copied()).collect())
}
