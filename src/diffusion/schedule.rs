//! The cosine noise schedule over continuous time (Nichol and Dhariwal 2021, arXiv:2102.09672, equation 17).

use std::f32::consts::PI;

/// alpha_bar stays within these, so that neither signal nor noise ever vanishes.
const ALPHA_BAR_MIN: f32 = 1e-4;
const ALPHA_BAR_MAX: f32 = 0.9999;

/// The offset of the published models.
pub const DEFAULT_OFFSET: f32 = 0.008;

/// alpha_bar(t) = cos²((t + s)/(1 + s) π/2) / cos²(s/(1 + s) π/2), clamped to 1e-4 … 0.9999; t in 0..1, 1 is noise.
///
/// Evaluated in `f32`, operation by operation as the reference does: 1 - alpha_bar near t = 0 amplifies any
/// other rounding several thousand times.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CosineSchedule {
    offset: f32,
    at_zero: f32,
    scaler: f32,
}

impl Default for CosineSchedule {
    fn default() -> Self {
        Self::new(DEFAULT_OFFSET, 1.0)
    }
}

impl CosineSchedule {
    /// A schedule with offset `s`. A scaler above 1 spends more of the time at high noise: t becomes
    /// 1 - (1 - t)^scaler; one below 1 does the contrary: t^scaler.
    pub fn new(offset: f32, scaler: f32) -> Self {
        let at_zero = squared_cosine(offset / (1.0 + offset));
        CosineSchedule { offset, at_zero, scaler }
    }

    /// The share of the signal's variance that is left at time `t`.
    pub fn alpha_bar(&self, t: f32) -> f32 {
        let t = match self.scaler {
            s if s > 1.0 => 1.0 - (1.0 - t).powf(s),
            s if s < 1.0 => t.powf(s),
            _ => t,
        };
        let alpha_bar = squared_cosine((t + self.offset) / (1.0 + self.offset)) / self.at_zero;
        alpha_bar.clamp(ALPHA_BAR_MIN, ALPHA_BAR_MAX)
    }
}

fn squared_cosine(x: f32) -> f32 {
    let cosine = ((x * PI * 0.5) as f64).cos() as f32;
    cosine * cosine
}

/// `steps + 1` times from `start` to `end`, evenly spaced, filled from both ends as PyTorch's `linspace` is: the
/// time embedding multiplies a difference in the last bit by 10,000.
pub fn linspace(start: f32, end: f32, steps: usize) -> Vec<f32> {
    if steps == 0 {
        return vec![start];
    }
    let step = (end - start) / steps as f32;
    let points = steps + 1;
    (0..points)
        .map(|i| match i < points / 2 {
            true => step.mul_add(i as f32, start),
            false => (-step).mul_add((steps - i) as f32, end),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ends_are_clamped() {
        let schedule = CosineSchedule::default();
        assert_eq!(schedule.alpha_bar(0.0), ALPHA_BAR_MAX);
        assert_eq!(schedule.alpha_bar(1.0), ALPHA_BAR_MIN);
    }

    #[test]
    fn times_reach_both_ends() {
        for steps in [1, 2, 6, 7, 60] {
            let times = linspace(1.0, 0.0, steps);
            assert_eq!((times[0], times[steps], times.len()), (1.0, 0.0, steps + 1));
            assert!(times.windows(2).all(|pair| pair[0] > pair[1]));
        }
    }
}
