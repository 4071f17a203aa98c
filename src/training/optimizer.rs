//! AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2), the clipping before it and the warm-up of its
//! rate.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use super::parameters::Parameters;
use crate::device::Context;
use crate::error::Result;
use crate::ops::adamw::{AdamWStep, adamw, sum_of_squares};
use crate::tensor::autograd::Gradients;
use crate::tensor::{DType, Tensor};

/// Keeps the factor of clipping finite, as PyTorch's `clip_grad_norm_` does.
const CLIP_EPS: f64 = 1e-6;

/// The settings of the optimiser.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// The rate after the warm-up.
    pub learning_rate: f32,
    /// How slowly the first and second moments follow.
    pub betas: [f32; 2],
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Of all parameters, also biases and norms, as the authors train.
    pub weight_decay: f32,
    /// Steps over which the rate grows linearly from 0.
    pub warmup_steps: u64,
    /// The largest norm of all gradients together; longer ones are scaled down. 0 does not clip.
    pub clip: f32,
}

impl AdamW {
    /// The rate of step `step`, counted from 0: the first step of a warm-up has rate 0 and only fills the moments.
    pub fn rate(&self, step: u64) -> f32 {
        if step >= self.warmup_steps {
            return self.learning_rate;
        }
        (f64::from(self.learning_rate) * step as f64 / self.warmup_steps as f64) as f32
    }
}

/// What the optimiser remembers: per trained parameter the moving means of the gradient and of its square.
#[derive(Debug, Default)]
pub struct Moments {
    /// Steps taken.
    pub steps: u64,
    /// By the parameter's place.
    pub of: HashMap<usize, [Tensor; 2]>,
}

/// The norm of all gradients together, summed in a fixed order.
///
/// # Errors
/// `Cancelled`; `OutOfMemory`.
pub fn gradient_norm(cx: &Context, parameters: &Parameters, gradients: &Gradients) -> Result<f64> {
    let all: Vec<&Tensor> = parameters.trained().filter_map(|place| gradients.get(place)).collect();
    Ok(sum_of_squares(cx, &all)?.sqrt())
}

/// The factor that gradients of this norm are multiplied by.
pub fn clip_factor(norm: f64, clip: f32) -> f32 {
    if clip <= 0.0 { 1.0 } else { (f64::from(clip) / (norm + CLIP_EPS)).min(1.0) as f32 }
}

/// One step over all trained parameters: `m = b1 m + (1 - b1) g`, `v = b2 v + (1 - b2) g^2`,
/// `w = w - rate (wd w + (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps))`, g the gradient times `scale`.
///
/// # Errors
/// `Internal` for a parameter that a network still holds; `OutOfMemory`, before anything was changed; `Cancelled`.
pub fn step(
    cx: &Context,
    settings: &AdamW,
    parameters: &mut Parameters,
    moments: &mut Moments,
    gradients: &Gradients,
    scale: f32,
) -> Result<()> {
    let places: Vec<usize> = parameters.trained().collect();
    for &place in &places {
        if let Entry::Vacant(absent) = moments.of.entry(place) {
            let dims = parameters.list()[place].master().dims();
            let zeros = || Tensor::zeros(cx, "optimiser state", dims, DType::F32)?.copied(cx);
            absent.insert([zeros()?, zeros()?]);
        }
    }
    let rate = settings.rate(moments.steps);
    moments.steps += 1;
    let t = moments.steps as f64;
    let correction = settings.betas.map(|beta| 1.0 - f64::from(beta).powf(t));
    let update = AdamWStep {
        scale,
        betas: settings.betas,
        decay: (1.0 - f64::from(rate) * f64::from(settings.weight_decay)) as f32,
        size: (f64::from(rate) / correction[0]) as f32,
        root: correction[1].sqrt() as f32,
        eps: settings.eps,
    };
    for place in places {
        let (Some(gradient), Some([first, second])) = (gradients.get(place), moments.of.get_mut(&place))
        else {
            continue;
        };
        // Those of a checkpoint come from the host.
        first.settle(cx)?;
        second.settle(cx)?;
        let master = parameters.master_mut(place);
        master.settle(cx)?;
        adamw(cx, &update, master, [first, second], gradient)?;
    }
    Ok(())
}
