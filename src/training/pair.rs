//! The files of a contrastive pair in a model folder: two of the model's parts, and what lies in `clip_pair/`.

use std::collections::BTreeMap;
use std::path::Path;

use super::create::draw;
use super::objectives::contrast::PairConfig;
use crate::device::Context;
use crate::error::{Error, Result};
use crate::nn::Source;
use crate::ops::widen::widen;
use crate::pipeline::load::Part;
use crate::pipeline::{Model, Stage};
use crate::stages::image_encoder::ImageEncoder;
use crate::stages::text_encoder::TextEncoder;
use crate::tensor::{DType, Tensor};
use crate::weights::config::TextEncoderConfig;
use crate::weights::{Weights, write_safetensors};

/// Where the pair's own weights lie in a model folder.
const FOLDER: &str = "clip_pair";
const FILE: &str = "model.safetensors";

/// What the names of the two towers begin with in a [`super::objectives::contrast::Pair`]. All others are the pair's own.
pub(super) const TEXT: &str = "text_encoder.";
pub(super) const IMAGE: &str = "image_encoder.";

/// The features of the image encoder, as its own file calls them and as the pair's does.
const BACKBONE: &str = "backbone.";
const PAIRED_BACKBONE: &str = "image.";

/// The logarithm of CLIP's temperature before training: logits are cosines times 1 / 0.07.
const LOG_TEMPERATURE: &str = "logit_scale";
const TEMPERATURE: f64 = 1.0 / 0.07;

/// The weights of a pair: the text tower's, and the backbone and projections of `clip_pair/`. Without that folder the
/// backbone is the image encoder's own, and the projections are drawn as CLIP's.
pub(super) struct PairFiles<'a> {
    cx: &'a Context,
    text: &'a Part<TextEncoder>,
    image: &'a Part<ImageEncoder>,
    own: Option<Weights>,
    /// For projections that are drawn.
    seed: u64,
}

impl<'a> PairFiles<'a> {
    /// # Errors
    /// `Unsupported` for a model without an image encoder; `Io` and `Format` for a damaged `clip_pair/`.
    pub fn open(cx: &'a Context, model: &'a Model, seed: u64) -> Result<Self> {
        let path = model.folder().join(FOLDER).join(FILE);
        let own = match path.try_exists() {
            Ok(true) => Some(Weights::open_file(&path)?),
            Ok(false) => None,
            Err(source) => return Err(Error::io(&path, source)),
        };
        Ok(PairFiles { cx, text: model.tower(Stage::C)?, image: model.encoder()?, own, seed })
    }

    /// The same, of a model that has a trained pair.
    ///
    /// # Errors
    /// As [`PairFiles::open`]; `Unsupported` if there is none.
    pub fn open_trained(cx: &'a Context, model: &'a Model) -> Result<Self> {
        let files = Self::open(cx, model, 0)?;
        if files.own.is_none() {
            let reason = format!("the model folder has no {FOLDER}/{FILE}");
            return Err(Error::unsupported("telling pictures and texts apart", reason));
        }
        Ok(files)
    }

    /// The sizes. A pair that is not there yet gets the width that the text tower's configuration names.
    ///
    /// # Errors
    /// `Io` and `Format`, naming the file.
    pub fn config(&self) -> Result<PairConfig> {
        let trained = self.own.as_ref().and_then(|own| own.shape("text_projection.weight"));
        let width = match trained.and_then(<[usize]>::first) {
            Some(&width) => width,
            None => {
                let path = self.text.weights.path();
                TextEncoderConfig::read(path.parent().unwrap_or(path))?.projection_dim
            }
        };
        let (image, text) = (self.image.network.config().clone(), *self.text.network.config());
        Ok(PairConfig { image, text, width })
    }

    fn drawn(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let mut tensor = Tensor::new(self.cx, "a new projection", shape, DType::F32)?;
        let spread = match shape {
            // CLIP's own: transformers, modeling_clip.py, `CLIPModel` in `_init_weights`.
            [_, inputs] => draw::Spread::Normal((*inputs as f64).powf(-0.5)),
            _ => draw::Spread::Constant(TEMPERATURE.ln() as f32),
        };
        let rng = draw::stream(self.seed, &format!("{FOLDER}.{name}"));
        draw::fill(self.cx, tensor.slice_mut()?, rng, spread)?;
        Ok(tensor)
    }
}

impl Source for PairFiles<'_> {
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        if let Some(name) = name.strip_prefix(TEXT) {
            return self.text.keys.source(&self.text.weights).tensor(name, shape);
        }
        let Some(name) = name.strip_prefix(IMAGE) else {
            return match &self.own {
                // One number: its type matters to nobody but the loss.
                Some(own) if name == LOG_TEMPERATURE => widen(self.cx, &own.tensor_shaped(name, shape)?),
                Some(own) => own.tensor_shaped(name, shape),
                None => self.drawn(name, shape),
            };
        };
        let key = self.image.keys.key(name).name;
        match (&self.own, key.strip_prefix(BACKBONE)) {
            (Some(own), Some(inner)) => own.tensor_shaped(&format!("{PAIRED_BACKBONE}{inner}"), shape),
            _ => self.image.weights.tensor_shaped(&key, shape),
        }
    }

    fn has(&self, _: &str) -> bool {
        true
    }
}

/// Writes `clip_pair/` into a model folder: the backbone and the pair's own among `values`, which have the names of a
/// pair, and the counters of batches as they are in the image encoder that training began from.
///
/// # Errors
/// `Io`; `OutOfMemory`.
pub(super) fn write(model: &Model, values: Vec<(String, Tensor)>, folder: &Path) -> Result<()> {
    let image = model.encoder()?;
    let mut tensors = BTreeMap::new();
    let file = image.weights.names().into_iter();
    for (name, inner) in file.filter_map(|name| Some((name.clone(), name.strip_prefix(BACKBONE)?.to_owned())))
    {
        tensors.insert(format!("{PAIRED_BACKBONE}{inner}"), image.weights.tensor(&name)?);
    }
    for (name, tensor) in values {
        match name.strip_prefix(IMAGE) {
            Some(name) => {
                let key = image.keys.key(name).name;
                if let Some(inner) = key.strip_prefix(BACKBONE) {
                    tensors.insert(format!("{PAIRED_BACKBONE}{inner}"), tensor);
                }
            }
            None if name.starts_with(TEXT) => {}
            None => drop(tensors.insert(name, tensor)),
        }
    }
    let folder = folder.join(FOLDER);
    std::fs::create_dir_all(&folder).map_err(|source| Error::io(&folder, source))?;
    write_safetensors(&folder.join(FILE), tensors.iter().map(|(name, tensor)| (name.clone(), tensor)))
}
