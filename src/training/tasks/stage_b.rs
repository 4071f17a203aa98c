//! Stage B on tokens of the frozen Stage A, with the image encoder that trains along.

use super::{Measured, Pass, Sample, Task, apart, texts_apart};
use crate::device::Context;
use crate::diffusion::schedule::CosineSchedule;
use crate::error::{Error, Result};
use crate::image::Image;
use crate::nn::{DepthDraw, Mode, Params, TrainingPass};
use crate::ops::mix::mix;
use crate::pipeline::{Model, Stage, TokenIds};
use crate::stages::image_encoder::{ImageEncoder, ImageEncoderConfig};
use crate::stages::stage_b::{StageB, StageBConfig};
use crate::tensor::Tensor;
use crate::training::draws::{Draws, Use};
use crate::training::export::TrainedPart;
use crate::training::objectives::stage_b::{Batch, loss};
use crate::training::options::TrainOptions;
use crate::training::parameters::{Parameters, Role};

/// What the parameters lie below.
pub(in crate::training) const PREFIX: &str = "stage_b";
pub(in crate::training) const ENCODER_PREFIX: &str = "image_encoder";

/// Image embeddings are noised to times below this.
const EMBEDDING_TIME_MAX: f32 = 0.5;

pub(in crate::training) struct StageBTask {
    config: StageBConfig,
    encoder_config: ImageEncoderConfig,
    train_encoder: bool,
    empty: TokenIds,
    networks: Option<(StageB, ImageEncoder)>,
}

impl StageBTask {
    pub fn new(
        cx: &Context,
        model: &Model,
        options: &TrainOptions,
        parameters: &mut Parameters,
    ) -> Result<Self> {
        let (part, encoder) = (model.stage_b()?, model.encoder()?);
        model.stage_a()?;
        let config = part.network.config().clone();
        let source = part.keys.source(&part.weights);
        parameters.add(cx, PREFIX, &source, Role::Trained, |p| StageB::load(p, config.clone()))?;
        let encoder_config = encoder.network.config().clone();
        let source = encoder.keys.source(&encoder.weights);
        let role = if options.train_encoder { Role::Trained } else { Role::Frozen };
        parameters
            .add(cx, ENCODER_PREFIX, &source, role, |p| ImageEncoder::load(p, encoder_config.clone()))?;
        let empty = model.token_ids(cx, Stage::B, &[""])?;
        let train_encoder = options.train_encoder;
        Ok(StageBTask { config, encoder_config, train_encoder, empty, networks: None })
    }
}

impl Task for StageBTask {
    fn prepare(
        &self,
        cx: &Context,
        model: &Model,
        images: &[&Image],
        captions: &[&str],
    ) -> Result<Vec<Sample>> {
        for image in images {
            model.check_size(image)?;
        }
        let tokens = model.picture_tokens(cx, images)?;
        let images: Vec<Image> = images.iter().map(|image| (*image).clone()).collect();
        let pixels = model.encoder_pixels(cx, &images)?;
        let texts = texts_apart(&model.token_ids(cx, Stage::B, captions)?)?;
        let samples = apart(&tokens)?.into_iter().zip(apart(&pixels)?).zip(texts);
        let sample = |((tokens, pixels), text)| Sample {
            tokens: Some(tokens),
            pixels: Some(pixels),
            text: Some(text),
            latents: None,
        };
        Ok(samples.map(sample).collect())
    }

    fn caption(&self, cx: &Context, model: &Model, caption: &str) -> Result<Option<(Tensor, usize)>> {
        Ok(texts_apart(&model.token_ids(cx, Stage::B, &[caption])?)?.pop())
    }

    fn load(&mut self, parameters: &Parameters) -> Result<()> {
        let all = Params::new(parameters);
        let encoder = ImageEncoder::load(&all.sub(ENCODER_PREFIX), self.encoder_config.clone())?;
        self.networks = Some((StageB::load(&all.sub(PREFIX), self.config.clone())?, encoder));
        Ok(())
    }

    fn unload(&mut self) {
        self.networks = None;
    }

    fn parts<'a>(&self, model: &'a Model) -> Result<Vec<TrainedPart<'a>>> {
        let (part, encoder) = (model.stage_b()?, model.encoder()?);
        let mut parts = vec![TrainedPart { prefix: PREFIX, weights: &part.weights, keys: &part.keys }];
        if self.train_encoder {
            let prefix = ENCODER_PREFIX;
            parts.push(TrainedPart { prefix, weights: &encoder.weights, keys: &encoder.keys });
        }
        Ok(parts)
    }

    fn learn(&mut self, pass: &mut Pass) -> Result<Measured> {
        let Some((network, encoder)) = &self.networks else {
            return Err(Error::internal("Stage B", "not loaded"));
        };
        let tokens = pass.stacked("tokens", |sample| sample.tokens.as_ref())?;
        let pixels = pass.stacked("pixels", |sample| sample.pixels.as_ref())?;
        let dropped = pass.draws.chosen(Use::TextDropout, 0, pass.options.text_dropout);
        let text = pass.model.embed_ids(pass.cx, Stage::B, &pass.texts(&self.empty, &dropped)?)?;
        let times = pass.draws.times();
        let codes = self.config.codebook_size as u32;
        let (noised, replaced) = pass.draws.noised_tokens(pass.cx, &tokens, &times, codes)?;

        let tape = pass.tape();
        let cx = tape.attach(pass.cx);
        let training = TrainingPass::new(pass.reduce.cloned(), Some(depth_factors(pass.draws)));
        let mode = if self.train_encoder { Mode::Training(&training) } else { Mode::Inference };
        let latents = disturbed(&cx, encoder.forward(&cx, &pixels, mode)?, pass.draws, pass.options)?;
        let batch = Batch {
            tokens: &tokens,
            noised: &noised,
            replaced: &replaced,
            times: &times,
            latents: &latents,
            text: &text,
        };
        let found = loss(&cx, network, &batch)?;
        pass.backward(&tape, &found.loss)?;
        Ok(Measured {
            loss: f64::from(found.loss.slice::<f32>()?[0]),
            accuracy: found.correct()? as f64 / tokens.elements() as f64,
            seen: training.into_seen(),
        })
    }
}

/// Image embeddings as Stage B must learn to bear them: some zeroed, others noised as Stage C's are imperfect.
fn disturbed(cx: &Context, latents: Tensor, draws: Draws, options: &TrainOptions) -> Result<Tensor> {
    let zeroed = draws.chosen(Use::Embedding, 0, options.image_dropout);
    let noised = draws.chosen(Use::Embedding, 1, options.image_noise);
    let times = draws.uniform(Use::Embedding, 2);
    let schedule = CosineSchedule::default();
    let shares =
        zeroed.iter().zip(&noised).zip(&times).map(|((&zeroed, &noised), &u)| match (zeroed, noised) {
            (true, _) => (0.0, 0.0),
            (false, true) => {
                let share = schedule.alpha_bar(EMBEDDING_TIME_MAX * u);
                (share.sqrt(), (1.0 - share).sqrt())
            }
            (false, false) => (1.0, 0.0),
        });
    let (signal, strength): (Vec<f32>, Vec<f32>) = shares.unzip();
    let noise = draws.normal(cx, Use::EmbeddingNoise, latents.dims())?;
    mix(cx, &latents, &noise, &signal, &strength)
}

/// Blocks of the encoder that are left out, per sample.
pub(super) fn depth_factors(draws: Draws) -> Box<crate::nn::DepthFactors> {
    Box::new(move |DepthDraw { block, probability, .. }| {
        let left_out = draws.chosen(Use::Depth, block as u64, probability);
        left_out.into_iter().map(|out| if out { 0.0 } else { 1.0 / (1.0 - probability) }).collect()
    })
}
