//! The pair that the models start from: texts and pictures that belong together point the same way (CLIP, Radford et
//! al. 2021).

use crate::device::Context;
use crate::error::{Error, Result};
use crate::nn::{Linear, Mode, Params};
use crate::ops::contrast::{ContrastiveLoss, contrastive_loss};
use crate::ops::pool::pool;
use crate::ops::select::select_tokens;
use crate::stages::image_encoder::{ImageEncoder, ImageEncoderConfig};
use crate::stages::text_encoder::{TextEncoder, TextEncoderConfig};
use crate::tensor::Tensor;

/// The sizes of a pair.
#[derive(Debug, Clone, PartialEq)]
pub struct PairConfig {
    /// Of the image encoder, whose head is not used.
    pub image: ImageEncoderConfig,
    /// Of the text tower.
    pub text: TextEncoderConfig,
    /// Dimensions of the common space.
    pub width: usize,
}

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
    /// Reads both towers, the projections `[D, features]` and `[D, width]` without bias, and the logarithm of the
    /// temperature, a scalar.
    ///
    /// # Errors
    /// `Format` for missing or misshapen weights.
    pub fn load(p: &Params, config: &PairConfig) -> Result<Self> {
        let projection = |name: &str, inputs| {
            Ok(Linear::from_parts(p.sub(name).tensor("weight", &[config.width, inputs])?, None))
        };
        Ok(Pair {
            text: TextEncoder::load(&p.sub("text_encoder"), config.text)?,
            image: ImageEncoder::load(&p.sub("image_encoder"), config.image.clone())?,
            image_projection: projection("image_projection", config.image.feature_channels)?,
            text_projection: projection("text_projection", config.text.width)?,
            log_temperature: p.tensor("logit_scale", &[])?.reshape(&[1])?,
        })
    }

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

    /// Where texts lie in the common space, read at their ends; the length is arbitrary. Attention is causal, so that
    /// what follows an end does not matter: padding needs no mask.
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

/// The position of the first token `end` of each text, where CLIP reads what the text says: a tokenizer may spell what
/// it does not know as `end` too.
///
/// # Errors
/// `InvalidArgument` for ids that are not `I64 [N, T]`, or a text without an end.
pub fn text_ends(ids: &Tensor, end: i64) -> Result<Vec<usize>> {
    let [_, length] = ids.dims_of("token ids")?;
    let find = |text: &[i64]| {
        let place = text.iter().position(|&id| id == end);
        place.ok_or_else(|| Error::argument("token ids", format!("a token {end} in every text"), "none"))
    };
    ids.slice::<i64>()?.chunks_exact(length.max(1)).map(find).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_ends_at_its_first_end() {
        let ids = Tensor::from_slice(&[2, 4], &[8i64, 1, 9, 9, 8, 9, 3, 9]).unwrap();
        assert_eq!(text_ends(&ids, 9).unwrap(), [2, 1]);
        assert!(text_ends(&ids, 1).is_err());
    }
}
