//! From the structural names that layers ask for to the keys of checkpoints, one table per part.

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

/// A CLIP text encoder. Structural names are transformers 5's: `embeddings.token_embedding.weight`,
/// `encoder.layers.0.self_attn.q_proj.weight`, `final_layer_norm.weight`.
///
/// Earlier checkpoints, and all with a projection, put `text_model.` before them (but not before
/// `text_projection.weight`).
pub fn text_encoder(weights: &Weights) -> Renamed<'_> {
    const PREFIX: &str = "text_model.";
    let prefixed = weights.has(&format!("{PREFIX}embeddings.token_embedding.weight"));
    Renamed::new(weights, move |name| {
        if prefixed && !name.starts_with("text_projection.") {
            format!("{PREFIX}{name}")
        } else {
            name.to_owned()
        }
    })
}

// The tables of the other parts belong here: stage_a, stage_b, stage_c, image_encoder.
