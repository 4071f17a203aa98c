//! Classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598).

pub use crate::ops::sampler_step::cpu::guide;

/// `steps` values from `start` to `end`, for weights and temperatures that change over the steps.
pub fn ramp(start: f32, end: f32, steps: usize) -> Vec<f32> {
    match steps {
        0 => Vec::new(),
        _ => super::schedule::linspace(start, end, steps - 1),
    }
}
