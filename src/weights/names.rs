//! Weights under the structural names that layers ask for.

use super::Weights;
use crate::error::Result;
use crate::nn::Source;
use crate::tensor::Tensor;

/// Weights under other names: `rename` turns a structural name into the checkpoint's key.
pub struct Renamed<'a> {
    weights: &'a Weights,
    rename: Box<dyn Fn(&str) -> String + Send + Sync + 'a>,
}

impl<'a> Renamed<'a> {
    /// The weights, seen through `rename`.
    pub fn new(weights: &'a Weights, rename: impl Fn(&str) -> String + Send + Sync + 'a) -> Self {
        Renamed { weights, rename: Box::new(rename) }
    }
}

impl Source for Renamed<'_> {
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        self.weights.tensor_shaped(&(self.rename)(name), shape)
    }

    fn has(&self, name: &str) -> bool {
        self.weights.has(&(self.rename)(name))
    }
}
