//! Stage C on latents of the frozen image encoder and texts of the frozen tower.

use super::{Measured, Pass, Sample, Task, apart, texts_apart};
use crate::device::Context;
use crate::diffusion::schedule::CosineSchedule;
use crate::error::{Error, Result};
use crate::image::Image;
use crate::nn::{LowRank, Params};
use crate::pipeline::{Model, Stage, TokenIds};
use crate::stages::stage_c::{StageC, StageCConfig};
use crate::tensor::Tensor;
use crate::training::draws::{Use, narrowing};
use crate::training::export::TrainedPart;
use crate::training::objectives::stage_c::{Batch, loss};
use crate::training::options::TrainOptions;
use crate::training::parameters::{Parameters, Role};

/// What the parameters lie below.
pub(in crate::training) const PREFIX: &str = "stage_c";

pub(in crate::training) struct StageCTask {
    config: StageCConfig,
    schedule: CosineSchedule,
    empty: TokenIds,
    network: Option<StageC>,
}

impl StageCTask {
    pub fn new(
        cx: &Context,
        model: &Model,
        options: &TrainOptions,
        parameters: &mut Parameters,
    ) -> Result<Self> {
        let (part, schedule) = model.stage_c()?;
        // The frozen encoder must be there.
        model.encoder()?;
        let config = *part.network.config();
        let source = part.keys.source(&part.weights);
        let rank = options.lora.rank as usize;
        let role = if rank > 0 { Role::Frozen } else { Role::Trained };
        parameters.add(cx, PREFIX, &source, role, |p| StageC::load(p, config))?;
        if rank > 0 {
            let adapter = LowRank { rank, scale: options.lora.alpha / rank as f32 };
            let init = |layer, inputs, out: &mut [f32]| narrowing(options.seed, layer, inputs, out);
            parameters.adapt(cx, adapter, init)?;
        }
        let empty = model.token_ids(cx, Stage::C, &[""])?;
        Ok(StageCTask { config, schedule, empty, network: None })
    }
}

impl Task for StageCTask {
    fn prepare(
        &self,
        cx: &Context,
        model: &Model,
        images: &[&Image],
        captions: &[&str],
    ) -> Result<Vec<Sample>> {
        let images: Vec<Image> = images.iter().map(|image| (*image).clone()).collect();
        let latents = model.encode_pixels(cx, &model.encoder_pixels(cx, &images)?)?;
        let texts = texts_apart(&model.token_ids(cx, Stage::C, captions)?)?;
        let samples = apart(&latents)?.into_iter().zip(texts);
        Ok(samples
            .map(|(latents, text)| Sample { latents: Some(latents), text: Some(text), ..Sample::default() })
            .collect())
    }

    fn caption(&self, cx: &Context, model: &Model, caption: &str) -> Result<Option<(Tensor, usize)>> {
        Ok(texts_apart(&model.token_ids(cx, Stage::C, &[caption])?)?.pop())
    }

    fn load(&mut self, parameters: &Parameters) -> Result<()> {
        self.network = Some(StageC::load(&Params::new(parameters).sub(PREFIX), self.config)?);
        Ok(())
    }

    fn unload(&mut self) {
        self.network = None;
    }

    fn parts<'a>(&self, model: &'a Model) -> Result<Vec<TrainedPart<'a>>> {
        let part = model.stage_c()?.0;
        Ok(vec![TrainedPart { prefix: PREFIX, weights: &part.weights, keys: &part.keys }])
    }

    fn learn(&mut self, pass: &mut Pass) -> Result<Measured> {
        let network = self.network.as_ref().ok_or_else(|| Error::internal("Stage C", "not loaded"))?;
        let latents = pass.stacked("latents", |sample| sample.latents.as_ref())?;
        let dropped = pass.draws.chosen(Use::TextDropout, 0, pass.options.text_dropout);
        let text = pass.model.embed_ids(pass.cx, Stage::C, &pass.texts(&self.empty, &dropped)?)?;
        let noise = pass.draws.normal(pass.cx, Use::Noise, latents.dims())?;
        let batch = Batch { latents: &latents, noise: &noise, times: &pass.draws.times(), text: &text };
        let tape = pass.tape();
        let cx = tape.attach(pass.cx);
        let loss = loss(&cx, network, &self.schedule, pass.options.weighting, &batch)?;
        pass.backward(&tape, &loss)?;
        Ok(Measured { loss: f64::from(loss.slice::<f32>()?[0]), ..Measured::default() })
    }
}
