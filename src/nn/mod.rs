//! Layers with weights, built only from ops. What they load their weights through is defined here.

mod adapted;
mod linear;
mod norm;
mod training;

pub use adapted::{AdaptedLinear, LowRank};
pub use linear::Linear;
pub use norm::{BatchNorm, LayerNorm};
pub use training::{DepthDraw, DepthFactors, Mode, RunningUpdate, TrainingPass};

use crate::error::Result;
use crate::tensor::Tensor;

/// Where layers get their weights from, by the structural name that this library gives them.
pub trait Source {
    /// The weight `name`, which must have this shape.
    ///
    /// # Errors
    /// `Format`, naming the file and the tensor, if it is missing or has another shape or no float elements.
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor>;

    /// Whether there is a weight `name`.
    fn has(&self, name: &str) -> bool;

    /// The low-rank adapter that the source brings for the layer `name`, if it does.
    fn adapter(&self, _name: &str) -> Option<LowRank> {
        None
    }
}

/// The weights below one name: what a layer's constructor takes.
///
/// A block that is given `params.sub("blocks.0")` and asks it for `depthwise.weight` gets the source's
/// `blocks.0.depthwise.weight`.
#[derive(Clone)]
pub struct Params<'a> {
    source: &'a dyn Source,
    prefix: String,
}

impl<'a> Params<'a> {
    /// All weights of a source.
    pub fn new(source: &'a dyn Source) -> Self {
        Params { source, prefix: String::new() }
    }

    /// The weights below `name`, which may have several parts: `"blocks.0"`.
    #[must_use]
    pub fn sub(&self, name: impl std::fmt::Display) -> Self {
        Params { source: self.source, prefix: self.join(&name.to_string()) }
    }

    /// The weight `name`, which must have this shape.
    ///
    /// # Errors
    /// `Format`, naming the file and the tensor.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        self.source.tensor(&self.join(name), shape)
    }

    /// The name that these weights lie below.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// Whether there is a weight `name`.
    pub fn has(&self, name: &str) -> bool {
        self.source.has(&self.join(name))
    }

    /// The low-rank adapter of the layer that these weights belong to.
    pub fn adapter(&self) -> Option<LowRank> {
        self.source.adapter(&self.prefix)
    }

    fn join(&self, name: &str) -> String {
        if self.prefix.is_empty() { name.to_owned() } else { format!("{}.{name}", self.prefix) }
    }
}
