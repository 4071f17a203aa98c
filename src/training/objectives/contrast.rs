//! The pair that the models start from: texts and pictures that belong together point the same way (CLIP, Radford et
//! al. 2021).

use crate::device::Context;
use crate::error::Result;
use crate::nn::{Linear, Mode};
use crate::ops::contrast::{ContrastiveLoss, contrastive_loss};
use crate::ops::pool::pool;
use crate::ops::select::select_tokens;
use crate::stages::image_encoder::ImageEncoder;
use crate::stages::text_encoder::TextEncoder;
use crate::tensor::Tensor;

/// The networks of a pair.
#[derive(Debug)]
pub struct Pair {
    /// Pictures to features.
    pub image: ImageEncoder,
    /// Features to the common space.
    pub image_projection: Linear,
    /// Tokens to vectors.
    pub text: TextEncoder,
    /// Vectors to the common space.
    pub text_projection: Linear,
    /// The logarithm of what cosines are multiplied by, one element.
    pub log_temperature: Tensor,
}

/// One batch of N samples.
#[derive(Debug, Clone, Copy)]
pub struct Batch<'a> {
    /// Pictures as the encoder takes them, `[N, H, W, 3]`.
    pub pixels: &'a Tensor,
    /// Token ids, `I64 [N, T]`.
    pub ids: &'a Tensor,
    /// The position of each text's end.
    pub ends: &'a [usize],
}

impl Pair {
    /// Where pictures lie in the common space; the length is arbitrary.
    ///
    /// # Shapes
    /// `[N, H, W, 3] -> [N, D]`
    ///
    /// # Errors
    /// `InvalidArgument` for other shapes; `OutOfMemory`; `Cancelled`.
    pub fn embed_images(&self, cx: &Context, pixels: &Tensor, mode: Mode) -> Result<Tensor> {
        self.image_projection.forward(cx, &pool(cx, &self.image.features(cx, pixels, mode)?)?)
    }

    /// Where texts lie in the common space, read at their ends; the length is arbitrary.
    ///
    /// # Shapes
    /// ids `I64 [N, T]` -> `[N, D]`
    ///
    /// # Errors
    /// `InvalidArgument` for other shapes; `OutOfMemory`; `Cancelled`.
    pub fn embed_texts(&self, cx: &Context, ids: &Tensor, ends: &[usize]) -> Result<Tensor> {
        let hidden = self.text.forward(cx, ids, None)?;
        self.text_projection.forward(cx, &select_tokens(cx, &hidden, ends)?)
    }

    /// The symmetric cross-entropy of telling which text belongs to which picture of the batch.
    ///
    /// # Errors
    /// As [`Pair::embed_images`].
    pub fn loss(&self, cx: &Context, batch: &Batch, mode: Mode) -> Result<ContrastiveLoss> {
        let images = self.embed_images(cx, batch.pixels, mode)?;
        let texts = self.embed_texts(cx, batch.ids, batch.ends)?;
        contrastive_loss(cx, &images, &texts, &self.log_temperature)
    }
}
