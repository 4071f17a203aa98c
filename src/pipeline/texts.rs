//! From texts to what a stage is conditioned on.

use super::load::TextPart;
use crate::device::Context;
use crate::error::Result;
use crate::tensor::Tensor;

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
        self.embed_ids(cx, &self.token_ids(cx, texts)?)
    }
}
