//! Guidance as batches: what is generated and what it is guided away from, side by side.

use crate::device::Context;
use crate::diffusion::guidance::guide;
use crate::error::Result;
use crate::ops::batch::concat;
use crate::stages::blocks::Attended;
use crate::tensor::{DType, Tensor};

/// The conditioning of `n` samples and, where guidance is on, of their unconditional twins.
///
/// Twins share a batch, so that each weight is read once for both. Only where the two texts differ in length
/// (possible in the stage-level calls) do they need a pass each.
#[derive(Debug)]
pub(super) struct Guided {
    pub samples: usize,
    passes: Vec<Vec<Attended>>,
    twins: bool,
}

/// An embedding per unique text, and which of them a sample and its twin have.
#[derive(Debug)]
pub(super) struct Texts {
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

    /// Calls `attend` once per unique text and sorts the results by sample. `others` are further token groups
    /// that come before the text, for the samples and for their twins.
    pub fn attended(
        &self,
        cx: &Context,
        others: Option<(&Attended, Vec<usize>, Vec<usize>)>,
        attend: impl Fn(&Tensor) -> Result<Attended>,
    ) -> Result<Guided> {
        let samples = self.index.len();
        let twins = self.unconditional.is_some();
        let group = |text: Attended, index: Vec<usize>, other: Option<Vec<usize>>| {
            let mut groups = Vec::with_capacity(2);
            if let (Some((attended, _, _)), Some(other)) = (&others, other) {
                groups.push(attended.with_index(other));
            }
            groups.push(text.with_index(index));
            groups
        };
        let of_samples = others.as_ref().map(|(_, samples, _)| samples.clone());
        let of_twins = others.as_ref().map(|(_, _, twins)| twins.clone());
        let passes = match (self.merged(cx)?, &self.unconditional) {
            (Some((texts, index)), unconditional) => {
                let both = match (of_samples, of_twins, unconditional) {
                    (Some(mut samples), Some(twins), Some(_)) => {
                        samples.extend(twins);
                        Some(samples)
                    }
                    (samples, _, _) => samples,
                };
                vec![group(attend(&texts)?, index, both)]
            }
            (None, Some((unconditional, twins))) => vec![
                group(attend(&self.conditional)?, self.index.clone(), of_samples),
                group(attend(unconditional)?, twins.clone(), of_twins),
            ],
            (None, None) => Vec::new(),
        };
        Ok(Guided { samples, passes, twins })
    }
}

impl Guided {
    /// Runs `forward` over the samples and their twins: `(conditional, unconditional)` outputs.
    ///
    /// # Errors
    /// What `forward` returns; `OutOfMemory`.
    pub fn run(
        &self,
        cx: &Context,
        x: &Tensor,
        forward: impl Fn(&Tensor, &[Attended]) -> Result<Tensor>,
    ) -> Result<(Tensor, Option<Tensor>)> {
        match self.passes.as_slice() {
            [both] if self.twins => {
                let out = forward(&concat(cx, &[x, x])?, both)?;
                Ok((out.narrow(0, self.samples)?, Some(out.narrow(self.samples, self.samples)?)))
            }
            [conditional, unconditional] => Ok((forward(x, conditional)?, Some(forward(x, unconditional)?))),
            passes => Ok((forward(x, passes.first().map_or(&[], Vec::as_slice))?, None)),
        }
    }

    /// The guided output: unconditional + weight (conditional - unconditional).
    ///
    /// # Errors
    /// As [`Guided::run`].
    pub fn run_guided(
        &self,
        cx: &Context,
        x: &Tensor,
        weight: f32,
        forward: impl Fn(&Tensor, &[Attended]) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let (conditional, unconditional) = self.run(cx, x, forward)?;
        let Some(unconditional) = unconditional else { return Ok(conditional) };
        let mut guided = Tensor::new(cx, "guided prediction", conditional.dims(), DType::F32)?;
        let values = guided.slice_mut::<f32>()?;
        values.copy_from_slice(conditional.slice()?);
        guide(values, unconditional.slice()?, weight);
        Ok(guided)
    }
}
