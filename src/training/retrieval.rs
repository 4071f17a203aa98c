//! How well pictures are recognised: the share whose own caption is among the nearest of many, by a model's own
//! contrastive pair. Of drawn pictures it says how far they show what was asked for.

use std::path::Path;

use super::objectives::contrast::{Pair, text_ends};
use super::pair::PairFiles;
use super::trainer::LISTS_BYTES;
use crate::device::Context;
use crate::device::threads::run_apart_with_reserve;
use crate::error::{Error, Result};
use crate::image::Image;
use crate::nn::{Mode, Params};
use crate::ops::batch::concat;
use crate::pipeline::{Model, ModelOptions, Stage};
use crate::tensor::{DType, Tensor};

/// Pictures or texts that are embedded at once.
const BATCH: usize = 32;

/// A contrastive pair that compares pictures with texts: cosines of the projected mean features of the backbone, and of
/// the text tower's projected output at the first end of the text.
pub struct Retrieval {
    model: Model,
    pair: Pair,
    /// The token that ends every text.
    end: i64,
}

/// How many pictures have their own caption among the nearest, as shares of all.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct RetrievalScore {
    /// No other caption is nearer.
    pub top_1: f64,
    /// At most four others are nearer.
    pub top_5: f64,
    /// At most nineteen others are nearer.
    pub top_20: f64,
}

impl Retrieval {
    /// The pair of a model folder.
    ///
    /// # Errors
    /// As [`Model::open`] and [`Retrieval::of`].
    pub fn new(folder: &Path) -> Result<Self> {
        Self::of(&Model::open(folder, &ModelOptions::default())?)
    }

    /// The pair of an opened model.
    ///
    /// # Errors
    /// `Unsupported` if its folder has no `clip_pair` or no image encoder; `Io` and `Format`, naming the file and the
    /// tensor; `OutOfMemory`.
    pub fn of(model: &Model) -> Result<Self> {
        run_apart_with_reserve("a pair", LISTS_BYTES, || {
            let cx = Context::new(model.device());
            let files = PairFiles::open_trained(&cx, model)?;
            let pair = Pair::load(&Params::new(&files), &files.config()?)?;
            Ok(Retrieval { model: model.clone(), pair, end: model.end_of_text(Stage::C)? })
        })
    }

    /// Where pictures lie, as directions of length 1, `[N, D]`. They are brought to the size that the model was trained
    /// at: the pair has seen no other.
    ///
    /// # Errors
    /// `InvalidArgument` for no pictures; `OutOfMemory`.
    pub fn embed_images(&self, images: &[&Image]) -> Result<Tensor> {
        let info = self.model.info();
        let (width, height) = (info.default_width, info.default_height);
        self.embed("images", images.chunks(BATCH), |cx, images| {
            let sized = images.iter().map(|image| image.resized(cx, width, height));
            let pixels = self.model.encoder_pixels(cx, &sized.collect::<Result<Vec<_>>>()?)?;
            self.pair.embed_images(cx, &pixels, Mode::Inference)
        })
    }

    /// Where texts lie, as directions of length 1, `[N, D]`.
    ///
    /// # Errors
    /// `InvalidArgument` for no texts, or one that the tokenizer cannot split; `OutOfMemory`.
    pub fn embed_texts(&self, texts: &[&str]) -> Result<Tensor> {
        self.embed("texts", texts.chunks(BATCH), |cx, texts| {
            let ids = self.model.token_ids(cx, Stage::C, texts)?.ids;
            self.pair.embed_texts(cx, &ids, &text_ends(&ids, self.end)?)
        })
    }

    /// How many pictures are recognised among all of `captions`; picture i is one of caption `own[i]`.
    ///
    /// # Errors
    /// `InvalidArgument` for no pictures or captions, or an `own` that does not fit them; `OutOfMemory`.
    pub fn score(&self, images: &[&Image], own: &[usize], captions: &[&str]) -> Result<RetrievalScore> {
        if own.len() != images.len() {
            return Err(Error::argument("own", format!("{}, one per image", images.len()), own.len()));
        }
        if let Some(wrong) = own.iter().find(|&&own| own >= captions.len()) {
            return Err(Error::argument("own", format!("numbers below {}", captions.len()), wrong));
        }
        let ranks = ranks(&self.embed_images(images)?, &self.embed_texts(captions)?, own)?;
        let share = |k: usize| ranks.iter().filter(|&&rank| rank < k).count() as f64 / ranks.len() as f64;
        Ok(RetrievalScore { top_1: share(1), top_5: share(5), top_20: share(20) })
    }

    fn embed<'a, T: Sync + 'a>(
        &self,
        what: &str,
        batches: impl Iterator<Item = &'a [T]> + Send,
        embed: impl Fn(&Context, &[T]) -> Result<Tensor> + Sync,
    ) -> Result<Tensor> {
        run_apart_with_reserve("an embedding", LISTS_BYTES, || {
            let cx = Context::new(self.model.device());
            let parts =
                batches.map(|batch| directions(&cx, &embed(&cx, batch)?)).collect::<Result<Vec<_>>>()?;
            if parts.is_empty() {
                return Err(Error::argument(what, "at least one", 0));
            }
            concat(&cx, &parts.iter().collect::<Vec<_>>())
        })
    }
}

/// Each row divided by its length; a row of zeros stays.
fn directions(cx: &Context, x: &Tensor) -> Result<Tensor> {
    let mut out = Tensor::new(cx, "directions", x.dims(), DType::F32)?;
    let width = x.shape().channels().max(1);
    let rows = out.slice_mut::<f32>()?.chunks_exact_mut(width).zip(x.slice::<f32>()?.chunks_exact(width));
    for (out, row) in rows {
        let length = row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt().max(f64::MIN_POSITIVE);
        out.iter_mut().zip(row).for_each(|(out, &x)| *out = (f64::from(x) / length) as f32);
    }
    Ok(out)
}

/// For each picture, how many captions are nearer than its own.
fn ranks(images: &Tensor, captions: &Tensor, own: &[usize]) -> Result<Vec<usize>> {
    let width = images.shape().channels().max(1);
    let captions: Vec<&[f32]> = captions.slice::<f32>()?.chunks_exact(width).collect();
    let cosine =
        |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>();
    let pictures = images.slice::<f32>()?.chunks_exact(width).zip(own);
    Ok(pictures
        .map(|(picture, &own)| {
            let reached = cosine(picture, captions[own]);
            captions.iter().filter(|caption| cosine(picture, caption) > reached).count()
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rank_counts_the_nearer_captions() {
        let captions = Tensor::from_slice(&[4, 2], &[1f32, 0., 0.6, 0.8, 0., 1., 1., 0.]).unwrap();
        let images = Tensor::from_slice(&[3, 2], &[1f32, 0., 0., 1., 0.8, 0.6]).unwrap();
        // An equal caption is not nearer.
        assert_eq!(ranks(&images, &captions, &[3, 0, 1]).unwrap(), [0, 2, 0]);
        assert_eq!(ranks(&images, &captions, &[2, 2, 2]).unwrap(), [3, 0, 3]);
    }

    #[test]
    fn directions_have_length_1() {
        let cx = Context::new(&crate::Device::cpu(1).unwrap());
        let x = Tensor::from_slice(&[2, 2], &[3f32, -4., 0., 0.]).unwrap();
        assert_eq!(directions(&cx, &x).unwrap().slice::<f32>().unwrap(), [0.6, -0.8, 0.0, 0.0]);
    }
}
