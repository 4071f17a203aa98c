//! Guidance as batches: what is generated and what it is guided away from, side by side.

use crate::device::Context;
use crate::diffusion::latents::Prediction;
use crate::error::{Error, Result};
use crate::ops::batch::concat;
use crate::tensor::Tensor;

/// The conditioning `C` of `n` samples and, where guidance is on, of their unconditional twins.
///
/// Twins share a batch, so that each weight is read once for both. Only where the two texts differ in length
/// (possible in the stage-level calls) do they need a pass each.
#[derive(Debug)]
pub(in crate::pipeline) struct Guided<C> {
    pub samples: usize,
    passes: Vec<C>,
    twins: bool,
}

/// Whom a pass is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Who {
    Samples,
    Twins,
    /// The samples, then their twins.
    Both,
}

impl Who {
    /// The entry that each sample of a pass has of a list with one entry per sample, and one more for all twins.
    pub fn entries(self, samples: usize) -> Vec<usize> {
        let (of_samples, of_twins) = (0..samples, std::iter::repeat_n(samples, samples));
        match self {
            Who::Samples => of_samples.collect(),
            Who::Twins => of_twins.collect(),
            Who::Both => of_samples.chain(of_twins).collect(),
        }
    }
}

/// An embedding per unique text, and which of them a sample and its twin have.
#[derive(Debug)]
pub(in crate::pipeline) struct Texts {
    /// Entries of one length each, `[entries, T, width]`: one tensor, or two if the twins' length differs.
    pub conditional: Tensor,
    /// Per sample.
    pub index: Vec<usize>,
    /// The twins' texts; `None` where guidance is off.
    pub unconditional: Option<(Tensor, Vec<usize>)>,
}

impl Texts {
    /// All texts in one tensor, if they have one length, with both indices into it.
    fn merged(&self, cx: &Context) -> Result<Option<(Tensor, Vec<usize>)>> {
        let Some((unconditional, twins)) = &self.unconditional else {
            return Ok(Some((self.conditional.clone(), self.index.clone())));
        };
        if unconditional.dims()[1..] != self.conditional.dims()[1..] {
            return Ok(None);
        }
        let offset = self.conditional.dims()[0];
        let index = self.index.iter().copied().chain(twins.iter().map(|t| t + offset)).collect();
        Ok(Some((concat(cx, &[&self.conditional, unconditional])?, index)))
    }

    /// Calls `condition` once per pass: with the texts, which of them each sample of the pass has, and whom the
    /// pass is for.
    pub(super) fn guided<C>(
        &self,
        cx: &Context,
        condition: impl Fn(&Tensor, Vec<usize>, Who) -> Result<C>,
    ) -> Result<Guided<C>> {
        let passes = match (self.merged(cx)?, &self.unconditional) {
            (Some((texts, index)), None) => vec![condition(&texts, index, Who::Samples)?],
            (Some((texts, index)), Some(_)) => vec![condition(&texts, index, Who::Both)?],
            (None, Some((unconditional, twins))) => vec![
                condition(&self.conditional, self.index.clone(), Who::Samples)?,
                condition(unconditional, twins.clone(), Who::Twins)?,
            ],
            (None, None) => Vec::new(),
        };
        Ok(Guided { samples: self.index.len(), passes, twins: self.unconditional.is_some() })
    }
}

impl<C> Guided<C> {
    /// Runs `forward` over the samples and their twins: `(conditional, unconditional)` outputs.
    ///
    /// # Errors
    /// What `forward` returns; `OutOfMemory`.
    pub fn run(
        &self,
        cx: &Context,
        x: &Tensor,
        forward: impl Fn(&Tensor, &C) -> Result<Tensor>,
    ) -> Result<(Tensor, Option<Tensor>)> {
        match self.passes.as_slice() {
            [both] if self.twins => {
                let out = forward(&concat(cx, &[x, x])?, both)?;
                Ok((out.narrow(0, self.samples)?, Some(out.narrow(self.samples, self.samples)?)))
            }
            [samples] => Ok((forward(x, samples)?, None)),
            [samples, twins] => Ok((forward(x, samples)?, Some(forward(x, twins)?))),
            passes => Err(Error::internal("guidance", format!("{} passes", passes.len()))),
        }
    }

    /// The outputs as a prediction of this weight.
    ///
    /// # Errors
    /// As [`Guided::run`].
    pub fn predict(
        &self,
        cx: &Context,
        x: &Tensor,
        weight: f32,
        forward: impl Fn(&Tensor, &C) -> Result<Tensor>,
    ) -> Result<Prediction> {
        let (conditional, unconditional) = self.run(cx, x, forward)?;
        Ok(Prediction { conditional, unconditional: unconditional.map(|twins| (twins, weight)) })
    }
}
