//! What training takes from an opened model: its parts, and the ways from pictures and texts into them.

use std::path::Path;

use super::load::{ImagePart, Part, TextPart};
use super::model::Model;
use super::options::{LogLevel, Stage};
use super::walks::check_finite;
use crate::device::{Context, Device};
use crate::diffusion::schedule::CosineSchedule;
use crate::error::{Error, Result};
use crate::image::{Fit, Image, preprocess, to_pixels};
use crate::nn::Mode;
use crate::stages::image_encoder::ImageEncoder;
use crate::stages::stage_a::StageA;
use crate::stages::stage_b::StageB;
use crate::stages::stage_c::StageC;
use crate::stages::text_encoder::TextEncoder;
use crate::tensor::{DType, Tensor};
use crate::weights::lora::ScaledAdapter;

/// Token ids of some texts.
#[derive(Debug, Clone)]
pub(crate) struct TokenIds {
    /// `I64 [N, T]`, padded.
    pub ids: Tensor,
    /// Tokens of each text that are no padding.
    pub lengths: Vec<usize>,
}

impl Model {
    /// The folder that was opened.
    pub(crate) fn folder(&self) -> &Path {
        &self.inner.root
    }

    pub(crate) fn device(&self) -> &Device {
        &self.inner.device
    }

    pub(crate) fn say(&self, level: LogLevel, message: impl FnOnce() -> String) {
        self.log(level, message);
    }

    /// # Errors
    /// `Unsupported` if no folder holds it.
    pub(crate) fn stage_a(&self) -> Result<&Part<StageA>> {
        Ok(&self.decoder()?.stage_a)
    }

    /// # Errors
    /// `Unsupported` if no folder holds it, or for v2, whose Stage B predicts noise.
    pub(crate) fn stage_b(&self) -> Result<&Part<StageB>> {
        self.token_predictor()
    }

    /// Stage C and its schedule.
    ///
    /// # Errors
    /// `Unsupported` if no folder holds it, or adapters were opened with it.
    pub(crate) fn stage_c(&self) -> Result<(&Part<StageC>, CosineSchedule)> {
        let prior = self.prior()?;
        if !prior.adapters.is_empty() {
            let reason = "merge them into a model folder first, or open it without";
            return Err(Error::unsupported("training a Stage C with adapters", reason));
        }
        Ok((&prior.stage_c, prior.schedule))
    }

    /// Stage C and the adapters that were opened with it.
    ///
    /// # Errors
    /// `Unsupported` if no folder holds it.
    pub(crate) fn adapted_stage_c(&self) -> Result<(&Part<StageC>, &[ScaledAdapter])> {
        let prior = self.prior()?;
        Ok((&prior.stage_c, &prior.adapters))
    }

    /// # Errors
    /// `Unsupported` if the folder has none.
    pub(crate) fn encoder(&self) -> Result<&Part<ImageEncoder>> {
        Ok(&self.image_encoder()?.encoder)
    }

    /// The text tower of a stage.
    ///
    /// # Errors
    /// `InvalidArgument` for Stage A; `Unsupported` if no folder holds the stage.
    pub(crate) fn tower(&self, stage: Stage) -> Result<&Part<TextEncoder>> {
        Ok(&self.text_of(stage)?.tower)
    }

    /// # Errors
    /// `InvalidArgument` for text that the tokenizer cannot split; `OutOfMemory`.
    pub(crate) fn token_ids(&self, cx: &Context, stage: Stage, texts: &[&str]) -> Result<TokenIds> {
        self.text_of(stage)?.token_ids(cx, texts)
    }

    /// The token that ends every text.
    ///
    /// # Errors
    /// As [`Model::tower`].
    pub(crate) fn end_of_text(&self, stage: Stage) -> Result<i64> {
        let special = self.text_of(stage)?.tokenizer.special_ids();
        special.eos.map(i64::from).ok_or_else(|| Error::internal("a tokenizer", "it has no end of texts"))
    }

    /// Embedded texts, `[N, T, width]`.
    ///
    /// # Errors
    /// `OutOfMemory`; `Cancelled`; `Format`, naming the tensor, for weights that are not finite.
    pub(crate) fn embed_ids(&self, cx: &Context, stage: Stage, tokens: &TokenIds) -> Result<Tensor> {
        self.text_of(stage)?.embed_ids(cx, tokens)
    }

    /// Pictures of one size as the image encoder takes them, `[N, H, W, 3]`.
    ///
    /// # Errors
    /// `InvalidArgument` for no pictures; `Unsupported` without an image encoder; `OutOfMemory`; `Cancelled`.
    pub(crate) fn encoder_pixels(&self, cx: &Context, images: &[Image]) -> Result<Tensor> {
        let ImagePart { normalisation, .. } = self.image_encoder()?;
        let Some(first) = images.first() else {
            return Err(Error::argument("images", "at least one", 0));
        };
        let (height, width) = self.inner.geometry.encoder_size(first.width(), first.height());
        preprocess(cx, images, [height, width], Fit::Stretch, normalisation)
    }

    /// Latents of such pixels as Stage C learns them, `[N, h, w, C]`.
    ///
    /// # Errors
    /// As [`Model::encoder_pixels`]; `Format`, naming the tensor, for weights that are not finite.
    pub(crate) fn encode_pixels(&self, cx: &Context, pixels: &Tensor) -> Result<Tensor> {
        let part = self.encoder()?;
        let latents = part.network.forward(cx, pixels, Mode::Inference)?;
        check_finite(&latents, "image encoder", &part.weights)?;
        Ok(latents)
    }

    /// Stage A's tokens of pictures of one size, `I64 [N, h, w]`.
    ///
    /// # Errors
    /// `InvalidArgument` for a size that does not divide; `Unsupported` without Stage A; `OutOfMemory`; `Cancelled`;
    /// `Format`, naming the tensor, for weights that are not finite.
    pub(crate) fn picture_tokens(&self, cx: &Context, images: &[&Image]) -> Result<Tensor> {
        let Part { network, weights, .. } = self.stage_a()?;
        let encoded = network.encode(cx, &to_pixels(cx, images)?, Mode::Inference)?;
        check_finite(&encoded, "Stage A", weights)?;
        network.quantize(cx, &encoded)
    }

    /// # Errors
    /// `InvalidArgument` unless the stages can make pictures of this size.
    pub(crate) fn check_size(&self, image: &Image) -> Result<()> {
        self.inner.geometry.check_side("an image's width", image.width())?;
        self.inner.geometry.check_side("an image's height", image.height())
    }
}

impl TextPart {
    /// # Errors
    /// `InvalidArgument` for text that the tokenizer cannot split; `OutOfMemory`.
    pub(super) fn token_ids(&self, cx: &Context, texts: &[&str]) -> Result<TokenIds> {
        let mut ids = Tensor::new(cx, "token ids", &[texts.len(), self.length], DType::I64)?;
        let mut lengths = Vec::with_capacity(texts.len());
        for (row, text) in ids.slice_mut::<i64>()?.chunks_exact_mut(self.length).zip(texts) {
            let encoded = self.tokenizer.encode(text, self.length)?;
            row.copy_from_slice(&encoded.ids);
            lengths.push(encoded.tokens_used);
        }
        Ok(TokenIds { ids, lengths })
    }

    /// One vector per position of each text, padding included.
    ///
    /// # Shapes
    /// -> `[N, T, width]`
    ///
    /// # Errors
    /// `OutOfMemory`; `Cancelled`; `Format`, naming the tensor, for weights that are not finite.
    pub(super) fn embed_ids(&self, cx: &Context, tokens: &TokenIds) -> Result<Tensor> {
        let _span = cx.span("text_encoder");
        let lengths = self.mask_padding.then_some(tokens.lengths.as_slice());
        let hidden = self.tower.network.forward(cx, &tokens.ids, lengths)?;
        check_finite(&hidden, "text encoder", &self.tower.weights)?;
        Ok(hidden)
    }
}
