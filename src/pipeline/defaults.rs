//! What a generation starts from where the caller says nothing: the model's own recommendations, else the published
//! values of its generation.

use super::generate_options::{StageBOptions, StageCOptions};
use super::options::{Choice, Sampler};
use crate::weights::config::ModelIndex;

/// v1: the paper's values (sections 3.3 and 4.2). v2: those that its authors published with the weights.
struct Published {
    stage_c_steps: u32,
    stage_c_guidance: f32,
    stage_b_steps: u32,
    stage_b_guidance: f32,
}

const V1: Published =
    Published { stage_c_steps: 60, stage_c_guidance: 4.0, stage_b_steps: 8, stage_b_guidance: 2.0 };
const V2: Published =
    Published { stage_c_steps: 29, stage_c_guidance: 4.0, stage_b_steps: 12, stage_b_guidance: 0.0 };

/// v1: temperature of Stage B in its first and last step.
const STAGE_B_TEMPERATURE: (f32, f32) = (0.7, 0.3);

/// The times of v2's Stage C: half as far apart in the first third, where the picture is decided, as after it.
const V2_EARLY_STEPS: usize = 19;
const V2_LATE_STEPS: usize = 10;
const V2_EARLY_END: f64 = 2.0 / 3.0;

fn published(index: &ModelIndex) -> Published {
    if index.pipeline.generation() == 1 { V1 } else { V2 }
}

pub(super) fn stage_c(index: &ModelIndex) -> StageCOptions {
    let (own, published) = (&index.defaults, published(index));
    let spaced_unevenly = index.pipeline.generation() == 2 && own.stage_c_steps.is_none();
    StageCOptions {
        steps: own.stage_c_steps.unwrap_or(published.stage_c_steps),
        guidance: own.stage_c_guidance.unwrap_or(published.stage_c_guidance),
        sampler: match own.stage_c_sampler.as_deref() {
            Some("ddim") => Sampler::Ddim,
            _ => Sampler::Ddpm,
        },
        recommended: spaced_unevenly.then(v2_times),
        timesteps: None,
    }
}

pub(super) fn stage_b(index: &ModelIndex) -> StageBOptions {
    let (own, published) = (&index.defaults, published(index));
    StageBOptions {
        steps: own.stage_b_steps.unwrap_or(published.stage_b_steps),
        guidance: own.stage_b_guidance.unwrap_or(published.stage_b_guidance),
        temperature: own.stage_b_temperature.unwrap_or(STAGE_B_TEMPERATURE),
        choice: match own.stage_b_choice.as_deref() {
            Some("argmax") => Choice::Argmax,
            Some("quant") => Choice::Quant,
            _ => Choice::Multinomial,
        },
        timesteps: None,
    }
}

/// diffusers' DEFAULT_STAGE_C_TIMESTEPS: 20 times from 1 to 2/3, then 10 more to 0, spaced in f64 like NumPy's.
fn v2_times() -> Vec<f32> {
    let step = (V2_EARLY_END - 1.0) / V2_EARLY_STEPS as f64;
    let early = (0..V2_EARLY_STEPS).map(|i| i as f64 * step + 1.0);
    let step = -V2_EARLY_END / V2_LATE_STEPS as f64;
    let late = (0..V2_LATE_STEPS).map(|i| i as f64 * step + V2_EARLY_END);
    early.chain(late).chain([0.0]).map(|t| t as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `numpy.linspace` gives, in `f32`.
    #[test]
    fn the_times_of_v2_are_the_published_ones() {
        let times = v2_times();
        assert_eq!(times.len(), 30);
        assert_eq!((times[0], times[29]), (1.0, 0.0));
        assert_eq!(
            (times[1], times[18], times[19], times[20]),
            (0.982_456_15, 0.684_210_54, 0.666_666_7, 0.6)
        );
        assert!(times.windows(2).all(|pair| pair[0] > pair[1]));
    }
}
