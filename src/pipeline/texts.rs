//! From texts to what a stage is conditioned on.

use super::load::TextPart;
use super::walks::check_finite;
use crate::device::Context;
use crate::error::Result;
use crate::tensor::{DType, Tensor};

impl TextPart {
    /// Token ids of a text, padded to the tower's length.
    ///
    /// # Shapes
    /// -> `I64 [T]`
    ///
    /// # Errors
    /// `InvalidArgument` for text that the tokenizer cannot split.
    pub(super) fn tokenize(&self, text: &str) -> Result<Tensor> {
        let ids = self.tokenizer.encode(text, self.length)?.ids;
        Tensor::from_slice(&[ids.len()], &ids)
    }

    /// One vector per position of each text, padding included.
    ///
    /// # Shapes
    /// -> `[N, T, width]`
    ///
    /// # Errors
    /// As [`TextPart::tokenize`]; `OutOfMemory`; `Cancelled`; `Format`, naming the tensor, for weights that are not
    /// finite.
    pub(super) fn embed(&self, cx: &Context, texts: &[&str]) -> Result<Tensor> {
        let mut ids = Tensor::new(cx, "token ids", &[texts.len(), self.length], DType::I64)?;
        let mut lengths = Vec::with_capacity(texts.len());
        for (row, text) in ids.slice_mut::<i64>()?.chunks_exact_mut(self.length).zip(texts) {
            let encoded = self.tokenizer.encode(text, self.length)?;
            row.copy_from_slice(&encoded.ids);
            lengths.push(encoded.tokens_used);
        }
        let lengths = self.mask_padding.then_some(lengths.as_slice());
        let hidden = self.tower.network.forward(cx, &ids, lengths)?;
        check_finite(&hidden, "text encoder", &self.tower.weights)?;
        Ok(hidden)
    }
}
