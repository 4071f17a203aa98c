//! The exponential moving average of the weights: what is exported, since it draws better pictures.

use std::collections::HashMap;

use super::options::Ema;
use super::parameters::Parameters;
use crate::error::Result;
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
    pub fn new(parameters: &Parameters) -> Result<Self> {
        let copy = |place: usize| Ok((place, parameters.list()[place].master().detached()?));
        Ok(Average { of: parameters.trained().map(copy).collect::<Result<_>>()? })
    }

    /// After step number `step`, counted from 1: on every `every`th step a copy before `start`, from then on
    /// average = decay * average + (1 - decay) * weights.
    ///
    /// # Errors
    /// `Internal` for parameters of other sizes.
    pub fn follow(&mut self, parameters: &Parameters, settings: &Ema, step: u64) -> Result<()> {
        if !step.is_multiple_of(settings.every) {
            return Ok(());
        }
        let decay = if step < settings.start { 0.0 } else { settings.decay };
        for place in parameters.trained() {
            let weights = parameters.list()[place].master().slice::<f32>()?;
            if let Some(average) = self.of.get_mut(&place) {
                for (average, w) in average.slice_mut::<f32>()?.iter_mut().zip(weights) {
                    *average = *average * decay + w * (1.0 - decay);
                }
            }
        }
        Ok(())
    }
}
