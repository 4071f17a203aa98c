//! The exponential moving average of the weights: what is exported, since it draws better pictures.

use std::collections::HashMap;

use super::options::Ema;
use super::parameters::Parameters;
use crate::device::Context;
use crate::error::Result;
use crate::ops::adamw::moving_average;
use crate::tensor::Tensor;

/// The average of every trained parameter, by its place.
#[derive(Debug, Default)]
pub struct Average {
    /// `F32`, in the parameter's shape.
    pub of: HashMap<usize, Tensor>,
}

impl Average {
    /// An average that starts as a copy of the weights.
    ///
    /// # Errors
    /// `OutOfMemory`.
    pub fn new(cx: &Context, parameters: &Parameters) -> Result<Self> {
        let copy = |place: usize| Ok((place, parameters.list()[place].master().copied(cx)?));
        Ok(Average { of: parameters.trained().map(copy).collect::<Result<_>>()? })
    }

    /// After step number `step`, counted from 1: on every `every`th step a copy before `start`, from then on
    /// average = decay * average + (1 - decay) * weights.
    ///
    /// # Errors
    /// `InvalidArgument` for parameters of other sizes.
    pub fn follow(&mut self, cx: &Context, parameters: &Parameters, settings: &Ema, step: u64) -> Result<()> {
        if !step.is_multiple_of(settings.every) {
            return Ok(());
        }
        let decay = if step < settings.start { 0.0 } else { settings.decay };
        for place in parameters.trained() {
            if let Some(average) = self.of.get_mut(&place) {
                // That of a checkpoint comes from the host.
                average.settle(cx)?;
                moving_average(cx, average, parameters.list()[place].master(), decay)?;
            }
        }
        Ok(())
    }
}
