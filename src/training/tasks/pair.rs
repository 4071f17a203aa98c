//! The text tower and the image encoder's backbone as a contrastive pair. Each part of a batch, and each rank's share
//! of it, is told apart on its own: the larger they are, the more there is to learn.

use super::stage_b::depth_factors;
use super::{Measured, Pass, Sample, Task, apart, texts_apart};
use crate::device::Context;
use crate::error::{Error, Result};
use crate::image::Image;
use crate::nn::{Mode, Params, TrainingPass};
use crate::pipeline::{Model, Stage};
use crate::tensor::Tensor;
use crate::training::Trainer;
use crate::training::export::TrainedPart;
use crate::training::objectives::contrast::{Batch, Pair, PairConfig, text_ends};
use crate::training::options::TrainOptions;
use crate::training::pair::{self, PairFiles};
use crate::training::parameters::{Parameters, Role};

/// What the parameters lie below, and those of the two towers.
const PREFIX: &str = "pair";
const TEXT_PREFIX: &str = "pair.text_encoder";
const IMAGE_PREFIX: &str = "pair.image_encoder";
/// The head that makes Stage C's latents: it is no part of the pair.
const HEAD_PREFIX: &str = "pair.image_encoder.head.";
/// What cosines are multiplied by stays below this, as CLIP's does (Radford et al. 2021, section 2.5).
const LOG_TEMPERATURE: &str = "pair.logit_scale";
const TEMPERATURE_MAX: f32 = 100.0;

pub(in crate::training) struct PairTask {
    config: PairConfig,
    /// The token that ends every text.
    end: i64,
    pair: Option<Pair>,
}

impl PairTask {
    pub fn new(
        cx: &Context,
        model: &Model,
        options: &TrainOptions,
        parameters: &mut Parameters,
    ) -> Result<Self> {
        let files = PairFiles::open(cx, model, options.seed)?;
        let config = files.config()?;
        parameters.add(cx, PREFIX, &files, Role::Trained, |p| Pair::load(p, &config))?;
        parameters.set_role(Role::Frozen, |name| name.starts_with(HEAD_PREFIX));
        Ok(PairTask { config, end: model.end_of_text(Stage::C)?, pair: None })
    }
}

impl Task for PairTask {
    fn prepare(
        &self,
        cx: &Context,
        model: &Model,
        images: &[&Image],
        captions: &[&str],
    ) -> Result<Vec<Sample>> {
        let images: Vec<Image> = images.iter().map(|image| (*image).clone()).collect();
        let pixels = apart(&model.encoder_pixels(cx, &images)?)?;
        let texts = texts_apart(&model.token_ids(cx, Stage::C, captions)?)?;
        let sample = |(pixels, text)| Sample { pixels: Some(pixels), text: Some(text), ..Sample::default() };
        Ok(pixels.into_iter().zip(texts).map(sample).collect())
    }

    fn caption(&self, cx: &Context, model: &Model, caption: &str) -> Result<Option<(Tensor, usize)>> {
        Ok(texts_apart(&model.token_ids(cx, Stage::C, &[caption])?)?.pop())
    }

    fn load(&mut self, parameters: &Parameters) -> Result<()> {
        self.pair = Some(Pair::load(&Params::new(parameters).sub(PREFIX), &self.config)?);
        Ok(())
    }

    fn unload(&mut self) {
        self.pair = None;
    }

    fn parts<'a>(&self, model: &'a Model) -> Result<Vec<TrainedPart<'a>>> {
        let (text, image) = (model.tower(Stage::C)?, model.encoder()?);
        Ok(vec![
            TrainedPart { prefix: TEXT_PREFIX, weights: &text.weights, keys: &text.keys },
            TrainedPart { prefix: IMAGE_PREFIX, weights: &image.weights, keys: &image.keys },
        ])
    }

    fn learn(&mut self, pass: &mut Pass) -> Result<Measured> {
        let pair = self.pair.as_ref().ok_or_else(|| Error::internal("the pair", "not loaded"))?;
        let pixels = pass.stacked("pixels", |sample| sample.pixels.as_ref())?;
        let ids = pass.stacked("captions", |sample| sample.text.as_ref().map(|(ids, _)| ids))?;
        let ends = text_ends(&ids, self.end)?;
        let tape = pass.tape();
        let cx = tape.attach(pass.cx);
        let training = TrainingPass::new(pass.reduce.cloned(), Some(depth_factors(pass.draws)));
        let batch = Batch { pixels: &pixels, ids: &ids, ends: &ends };
        let found = pair.loss(&cx, &batch, Mode::Training(&training))?;
        pass.backward(&tape, &found.loss)?;
        Ok(Measured {
            loss: f64::from(found.loss.slice::<f32>()?[0]),
            accuracy: f64::from(found.accuracy.slice::<f32>()?[0]),
            seen: training.into_seen(),
        })
    }

    fn after_step(&mut self, _: &Context, parameters: &mut Parameters) -> Result<()> {
        if let Some(place) = parameters.place(LOG_TEMPERATURE) {
            let most = TEMPERATURE_MAX.ln();
            parameters.values_mut(place)?.iter_mut().for_each(|log| *log = log.min(most));
        }
        Ok(())
    }

    fn write_beside(&self, trainer: &Trainer, folder: &std::path::Path) -> Result<()> {
        pair::write(&trainer.model, trainer.exported(PREFIX)?, folder)
    }
}
