//! The discriminator in training: its own parameters and optimiser, one step behind each of the generator's.

use std::cell::Cell;
use std::collections::HashMap;
use std::sync::Arc;

use super::OfPixels;
use super::of_pixels;
use crate::device::{Context, Reduce};
use crate::error::{Error, Result};
use crate::nn::{Params, Source};
use crate::stages::discriminator::{Discriminator, DiscriminatorConfig};
use crate::tensor::autograd::{Gradients, Tape};
use crate::tensor::{DType, Tensor};
use crate::training::create::draw::{self, Spread};
use crate::training::objectives::stage_a::{deception_loss, judgement_loss};
use crate::training::optimizer::{self, AdamW, Moments, clip_factor, gradient_norm};
use crate::training::options::TrainOptions;
use crate::training::parameters::{Parameters, Role};
use crate::training::reduction::Reduction;

/// What its parameters lie below, here and in checkpoints.
const PREFIX: &str = "discriminator";
/// What the moments are called before that.
const MOMENTS: [&str; 2] = ["first", "second"];
/// How many steps its optimiser took, in parts that `F32` holds exactly.
const STEPS: &str = "discriminator_steps";
const STEPS_PART: u64 = 1 << 24;

pub(super) struct Adversary {
    config: DiscriminatorConfig,
    settings: AdamW,
    compute_dtype: DType,
    parameters: Parameters,
    moments: Moments,
    network: Option<Discriminator>,
    /// Of this step.
    gradients: Gradients,
    /// Where this step's power iterations have come to, once it is summed up.
    directions: Vec<(usize, Tensor)>,
}

impl Adversary {
    /// A fresh one: weights and biases uniform in +-1 / sqrt(inputs of an output), as PyTorch begins convolutions.
    ///
    /// # Errors
    /// `InvalidArgument` for sizes that do not go together; `OutOfMemory`.
    pub fn new(cx: &Context, config: DiscriminatorConfig, options: &TrainOptions) -> Result<Self> {
        let mut parameters = Parameters::default();
        let fresh = Fresh { cx, seed: options.seed, inputs: Cell::new(1) };
        parameters.add(cx, PREFIX, &fresh, Role::Trained, |p| Discriminator::load(p, config))?;
        parameters.round_to(options.compute_dtype)?;
        Ok(Adversary {
            config,
            settings: options.optimizer,
            compute_dtype: options.compute_dtype,
            parameters,
            moments: Moments::default(),
            network: None,
            gradients: Gradients::default(),
            directions: Vec::new(),
        })
    }

    /// Loads the network over the parameters: power iterations begin where the last whole step left them.
    pub fn load(&mut self) -> Result<()> {
        self.network = Some(Discriminator::load(&Params::new(&self.parameters).sub(PREFIX), self.config)?);
        Ok(())
    }

    pub fn unload(&mut self) {
        self.network = None;
    }

    /// Forgets what a step has left behind that came to nothing.
    pub fn begin(&mut self) {
        self.gradients = Gradients::default();
        self.directions.clear();
    }

    /// What the generator learns from these pictures.
    pub fn deceive(&mut self, cx: &Context, made: &Tensor) -> Result<OfPixels> {
        let network = self.iterated(cx)?.constant();
        of_pixels(cx, made, |cx, made| deception_loss(cx, &network, made))
    }

    /// Adds what the discriminator learns from these pictures, which count `share` of the step's.
    pub fn learn(&mut self, cx: &Context, real: &Tensor, made: &Tensor, share: f32) -> Result<()> {
        let network = self.iterated(cx)?;
        let tape = Tape::new();
        let loss = judgement_loss(&tape.attach(cx), network, real, &made.constant())?;
        tape.backward_from(cx, &loss, share, &mut self.gradients)
    }

    /// The network after one more power iteration, as PyTorch takes one in each pass of training.
    fn iterated(&mut self, cx: &Context) -> Result<&Discriminator> {
        let network =
            self.network.as_mut().ok_or_else(|| Error::internal("the discriminator", "not loaded"))?;
        network.iterate(cx)?;
        Ok(network)
    }

    /// The gradients of all ranks, and where the power iterations stand.
    pub fn sum_up(&mut self, reduce: Option<&Arc<dyn Reduce>>) -> Result<()> {
        let Some(network) = &self.network else { return Ok(()) };
        let mut reduction = Reduction::new(reduce)?;
        for place in self.parameters.trained() {
            if let Some(gradient) = self.gradients.get(place) {
                reduction.send(place, gradient)?;
            }
        }
        reduction.finish(&mut self.gradients)?;
        for (name, vector) in network.directions() {
            if let Some(place) = self.parameters.place(&name) {
                self.directions.push((place, vector.detached()?));
            }
        }
        Ok(())
    }

    /// One step of its optimiser over what was summed up, if anything was: clipped by itself, with a warm-up of its
    /// own. Gradients that are not finite change nothing.
    pub fn update(&mut self, cx: &Context) -> Result<()> {
        self.network = None;
        let gradients = std::mem::take(&mut self.gradients);
        let directions = std::mem::take(&mut self.directions);
        let learnt = self.parameters.trained().any(|place| gradients.get(place).is_some());
        let norm = gradient_norm(cx, &self.parameters, &gradients)?;
        if !learnt || !norm.is_finite() {
            return Ok(());
        }
        let scale = clip_factor(norm, self.settings.clip);
        optimizer::step(cx, &self.settings, &mut self.parameters, &mut self.moments, &gradients, scale)?;
        for (place, vector) in directions {
            self.parameters.values_mut(place)?.copy_from_slice(vector.slice()?);
        }
        self.parameters.round_to(self.compute_dtype)
    }

    /// Everything that its next step depends on.
    pub fn state(&self) -> Vec<(String, Tensor)> {
        let list = self.parameters.list();
        let mut state: Vec<_> = list.iter().map(|p| (p.name.clone(), p.master().clone())).collect();
        for (&place, moments) in &self.moments.of {
            let name = |kind| format!("{kind}.{}", list[place].name);
            state.extend(MOMENTS.iter().zip(moments).map(|(kind, moment)| (name(kind), moment.clone())));
        }
        let steps =
            [self.moments.steps / STEPS_PART, self.moments.steps % STEPS_PART].map(|part| part as f32);
        // Two numbers: they fit where a whole step did.
        state.extend(Tensor::from_slice(&[2], &steps).map(|steps| (STEPS.into(), steps)));
        state
    }

    /// Takes back what [`Adversary::state`] gave; after an error nothing has changed. A state without a discriminator
    /// is that of training without one, which it then joins as it is.
    ///
    /// # Errors
    /// `Format` if something is missing or has another shape.
    pub fn restore(&mut self, state: &dyn Source) -> Result<()> {
        if !state.has(STEPS) {
            return Ok(());
        }
        let list = self.parameters.list();
        let read = |name: &str, like: &Tensor| state.tensor(name, like.dims())?.detached();
        let masters = list.iter().map(|p| read(&p.name, p.master())).collect::<Result<Vec<_>>>()?;
        let steps = state.tensor(STEPS, &[2])?;
        let [many, few] = steps.slice::<f32>()? else { return Err(Error::internal(STEPS, "two numbers")) };
        let steps = *many as u64 * STEPS_PART + *few as u64;
        let mut of = HashMap::new();
        for place in self.parameters.trained().filter(|_| steps > 0) {
            let moment = |kind: &str| read(&format!("{kind}.{}", list[place].name), list[place].master());
            of.insert(place, [moment(MOMENTS[0])?, moment(MOMENTS[1])?]);
        }
        self.network = None;
        self.begin();
        for (place, master) in masters.iter().enumerate() {
            self.parameters.values_mut(place)?.copy_from_slice(master.slice()?);
        }
        self.moments = Moments { steps, of };
        self.parameters.round_to(self.compute_dtype)
    }
}

/// The weights of a discriminator that has learnt nothing.
struct Fresh<'a> {
    cx: &'a Context,
    seed: u64,
    /// Inputs of an output of the last weight: its bias comes after it.
    inputs: Cell<usize>,
}

impl Source for Fresh<'_> {
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let direction = matches!(name.rsplit('.').next(), Some("weight_u" | "weight_v"));
        if let [_, inputs @ ..] = shape
            && !inputs.is_empty()
        {
            self.inputs.set(inputs.iter().product());
        }
        let spread = match direction {
            true => Spread::Normal(1.0),
            false => Spread::Uniform((self.inputs.get() as f64).sqrt().recip()),
        };
        let mut tensor = Tensor::new(self.cx, "a new weight", shape, DType::F32)?;
        let values = tensor.slice_mut::<f32>()?;
        draw::fill(self.cx, values, draw::stream(self.seed, &format!("{PREFIX}.{name}")), spread)?;
        if direction {
            let norm = values.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
            values.iter_mut().for_each(|x| *x = (f64::from(*x) / norm) as f32);
        }
        Ok(tensor)
    }

    fn has(&self, _: &str) -> bool {
        true
    }
}
