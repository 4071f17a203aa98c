//! Stage A on pictures alone, against a discriminator that trains along.

mod adversary;
mod codebook;

use super::{Commit, Measured, Pass, Sample, Task, apart};
use crate::device::Context;
use crate::error::{Error, Result};
use crate::image::{Image, to_pixels};
use crate::nn::{Mode, Params, Source, TrainingPass};
use crate::ops::adamw::sum_of_squares;
use crate::ops::mix::mix;
use crate::pipeline::{Model, load};
use crate::stages::discriminator::DiscriminatorConfig;
use crate::stages::perceptual::Perceptual;
use crate::stages::stage_a::{StageA, StageAConfig};
use crate::tensor::Tensor;
use crate::tensor::autograd::{Gradients, Tape, leaf};
use crate::training::export::TrainedPart;
use crate::training::objectives::stage_a::{
    Reconstruction, adaptive_weight, last_layer_gradient, picture_loss, reconstruct,
};
use crate::training::options::TrainOptions;
use crate::training::parameters::{Parameters, Role};
use adversary::Adversary;
use codebook::Codebook;

/// What the parameters lie below.
pub(in crate::training) const PREFIX: &str = "stage_a";

/// Colours of a picture.
const COLOURS: usize = 3;

/// The only leaf of a tape over pixels.
const PIXELS: usize = 0;

pub(in crate::training) struct StageATask {
    config: StageAConfig,
    network: Option<StageA>,
    perceptual: Option<Perceptual>,
    adversary: Option<Adversary>,
    codebook: Codebook,
}

/// A loss and its gradient by the reconstructed pixels.
struct OfPixels {
    loss: f64,
    gradient: Tensor,
}

impl StageATask {
    pub fn new(
        cx: &Context,
        model: &Model,
        options: &TrainOptions,
        parameters: &mut Parameters,
    ) -> Result<Self> {
        let part = model.stage_a()?;
        let config = *part.network.config();
        let source = part.keys.source(&part.weights);
        parameters.add(cx, PREFIX, &source, Role::Trained, |p| StageA::load(p, config))?;
        let perceptual = options.perceptual.as_deref().map(load::perceptual).transpose()?;
        let wanted = options.adversary;
        let sizes = DiscriminatorConfig {
            inputs: COLOURS,
            condition: 0,
            channels: wanted.channels as usize,
            depth: wanted.depth as usize,
        };
        let adversary = match wanted.start {
            u64::MAX => None,
            _ => Some(Adversary::new(cx, sizes, options)?),
        };
        let codebook = Codebook::new(&config, options)?;
        Ok(StageATask {
            config,
            network: None,
            perceptual: perceptual.map(|part| part.network),
            adversary,
            codebook,
        })
    }

    fn network(&self) -> Result<&StageA> {
        self.network.as_ref().ok_or_else(|| Error::internal("Stage A", "not loaded"))
    }

    /// The loss of the picture by the pixels.
    fn of_picture(&self, cx: &Context, found: &Tensor, target: &Tensor) -> Result<OfPixels> {
        of_pixels(cx, found, |cx, found| picture_loss(cx, found, target, self.perceptual.as_ref()))
    }

    /// What the pixels' gradient is, with the adversary's part if it has joined.
    fn pixel_loss(&mut self, pass: &Pass, made: &Reconstruction, target: &Tensor) -> Result<OfPixels> {
        let picture = self.of_picture(pass.cx, &made.pixels, target)?;
        let joined = pass.step >= pass.options.adversary.start;
        let Some(adversary) = self.adversary.as_mut().filter(|_| joined) else { return Ok(picture) };
        let adversarial = adversary.deceive(pass.cx, &made.pixels)?;
        let network = self.network.as_ref().ok_or_else(|| Error::internal("Stage A", "not loaded"))?;
        let norm = |of: &OfPixels| {
            norm_of_mean(pass, &last_layer_gradient(pass.cx, network, &made.features, &of.gradient)?)
        };
        let weight =
            f64::from(pass.options.adversary.weight) * adaptive_weight(norm(&picture)?, norm(&adversarial)?);
        let ones = vec![1.0; target.dims()[0]];
        let weights = vec![weight as f32; target.dims()[0]];
        let gradient = mix(pass.cx, &picture.gradient, &adversarial.gradient, &ones, &weights)?;
        adversary.learn(pass.cx, target, &made.pixels, pass.share)?;
        Ok(OfPixels { loss: picture.loss + weight * adversarial.loss, gradient })
    }
}

/// `loss` of some pixels, and its gradient by them.
fn of_pixels(
    cx: &Context,
    found: &Tensor,
    loss: impl FnOnce(&Context, &Tensor) -> Result<Tensor>,
) -> Result<OfPixels> {
    let tape = Tape::new();
    let loss = loss(&tape.attach(cx), &leaf(&found.constant(), PIXELS))?;
    let mut gradients = Gradients::default();
    tape.backward_from(cx, &loss, 1.0, &mut gradients)?;
    let gradient = gradients
        .take(PIXELS)
        .ok_or_else(|| Error::internal("backward", "no gradient reached the pixels"))?;
    Ok(OfPixels { loss: f64::from(loss.slice::<f32>()?[0]), gradient: gradient.reshape(found.dims())? })
}

/// The norm of the mean over ranks of a gradient.
fn norm_of_mean(pass: &Pass, gradient: &Tensor) -> Result<f64> {
    let Some(reduce) = pass.reduce else { return Ok(sum_of_squares(pass.cx, &[gradient])?.sqrt()) };
    let share = 1.0 / reduce.ranks() as f64;
    // Some thousand numbers: a 1x1 convolution to the colours of four pixels.
    let mut mean: Vec<f64> = gradient.slice::<f32>()?.iter().map(|g| f64::from(*g) * share).collect();
    reduce.sum_f64(&mut mean)?;
    Ok(mean.iter().map(|g| g * g).sum::<f64>().sqrt())
}

impl Task for StageATask {
    fn prepare(&self, cx: &Context, _: &Model, images: &[&Image], _: &[&str]) -> Result<Vec<Sample>> {
        let factor = self.config.factor() as u32;
        let fits =
            |image: &&&Image| image.width().is_multiple_of(factor) && image.height().is_multiple_of(factor);
        if let Some(image) = images.iter().find(|image| !fits(image)) {
            let expected = format!("sides in multiples of {factor} pixels");
            return Err(Error::argument(
                "images",
                expected,
                format!("{} x {}", image.width(), image.height()),
            ));
        }
        let pixels = apart(&to_pixels(cx, images)?)?;
        Ok(pixels.into_iter().map(|pixels| Sample { pixels: Some(pixels), ..Sample::default() }).collect())
    }

    fn caption(&self, _: &Context, _: &Model, _: &str) -> Result<Option<(Tensor, usize)>> {
        Ok(None)
    }

    fn load(&mut self, parameters: &Parameters) -> Result<()> {
        self.network = Some(StageA::load(&Params::new(parameters).sub(PREFIX), self.config)?);
        self.adversary.as_mut().map_or(Ok(()), Adversary::load)
    }

    fn unload(&mut self) {
        self.network = None;
        if let Some(adversary) = &mut self.adversary {
            adversary.unload();
        }
    }

    fn parts<'a>(&self, model: &'a Model) -> Result<Vec<TrainedPart<'a>>> {
        let part = model.stage_a()?;
        Ok(vec![TrainedPart { prefix: PREFIX, weights: &part.weights, keys: &part.keys }])
    }

    fn before_step(&mut self, pass: &mut Pass, parameters: &mut Parameters) -> Result<()> {
        self.codebook.begin();
        if let Some(adversary) = &mut self.adversary {
            adversary.begin();
        }
        if pass.step > 0 || !pass.options.init_codebook {
            return Ok(());
        }
        self.load(parameters)?;
        let pixels = pass.stacked("pixels", |sample| sample.pixels.as_ref())?;
        let training = TrainingPass::new(pass.reduce.cloned(), None);
        let encoded = self.network()?.encode(pass.cx, &pixels, Mode::Training(&training))?;
        self.unload();
        self.codebook.fill(pass, &encoded, parameters)
    }

    fn learn(&mut self, pass: &mut Pass) -> Result<Measured> {
        let target = pass.stacked("pixels", |sample| sample.pixels.as_ref())?;
        let tape = pass.tape();
        let training = TrainingPass::new(pass.reduce.cloned(), None);
        let made = reconstruct(&tape.attach(pass.cx), self.network()?, &target, Mode::Training(&training))?;
        self.codebook.note(&made);
        let of_pixels = self.pixel_loss(pass, &made, &target)?;
        let share = vec![pass.share; target.dims()[0]];
        let zeros = vec![0.0; target.dims()[0]];
        let seed = mix(pass.cx, &of_pixels.gradient, &of_pixels.gradient, &share, &zeros)?;
        let of_quantization = Tensor::from_slice(&[1], &[pass.share])?;
        pass.backward_from(&tape, &[(&made.pixels, seed), (&made.quantization, of_quantization)])?;
        let quantization = f64::from(made.quantization.slice::<f32>()?[0]);
        Ok(Measured { loss: of_pixels.loss + quantization, accuracy: 0.0, seen: training.into_seen() })
    }

    fn sum_up(&mut self, cx: &Context, commit: &Commit) -> Result<()> {
        if let Some(adversary) = &mut self.adversary {
            adversary.sum_up(commit.reduce)?;
        }
        self.codebook.sum_up(cx, commit)
    }

    fn after_step(&mut self, cx: &Context, parameters: &mut Parameters) -> Result<()> {
        if let Some(adversary) = &mut self.adversary {
            adversary.update(cx)?;
        }
        self.codebook.update(parameters)
    }

    fn state(&self) -> Vec<(String, Tensor)> {
        let mut state = self.codebook.state();
        state.extend(self.adversary.iter().flat_map(Adversary::state));
        state
    }

    fn restore(&mut self, state: &dyn Source) -> Result<()> {
        self.unload();
        // Read as a whole before anything changes.
        let idle = self.codebook.read(state)?;
        if let Some(adversary) = &mut self.adversary {
            adversary.restore(state)?;
        }
        self.codebook.restore(idle);
        Ok(())
    }
}
