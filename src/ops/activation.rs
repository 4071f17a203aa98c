//! Pointwise nonlinearities, as kernels apply them to a part of an output that is still in cache.

use crate::device::simd::{gelu, leaky_relu, quick_gelu, sigmoid, silu};
use crate::simd_dispatch;

/// A pointwise nonlinearity.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum Activation {
    /// x.
    #[default]
    None,
    /// max(x, 0).
    Relu,
    /// x where it is positive, else this many times x.
    LeakyRelu(f32),
    /// x Phi(x), exact (not the tanh form).
    Gelu,
    /// x sigmoid(1.702 x), as some CLIP towers have it.
    QuickGelu,
    /// x sigmoid(x).
    Silu,
    /// 1 / (1 + e^-x).
    Sigmoid,
}

impl Activation {
    /// x <- act(x) for every value, on the calling thread.
    pub fn apply(self, values: &mut [f32]) {
        apply(values, self);
    }
}

simd_dispatch! {
    /// Applies `activation` in place.
    fn apply<const FMA: bool>(values: &mut [f32], activation: Activation) {
        match activation {
            Activation::None => {}
            Activation::Relu => values.iter_mut().for_each(|v| *v = v.max(0.0)),
            Activation::LeakyRelu(slope) => values.iter_mut().for_each(|v| *v = leaky_relu(*v, slope)),
            Activation::Gelu => values.iter_mut().for_each(|v| *v = gelu::<FMA>(*v)),
            Activation::QuickGelu => values.iter_mut().for_each(|v| *v = quick_gelu::<FMA>(*v)),
            Activation::Silu => values.iter_mut().for_each(|v| *v = silu::<FMA>(*v)),
            Activation::Sigmoid => values.iter_mut().for_each(|v| *v = sigmoid::<FMA>(*v)),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// The definitions, in f64.
    pub fn naive(activation: Activation, x: f64) -> f64 {
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        match activation {
            Activation::None => x,
            Activation::Relu => x.max(0.0),
            Activation::LeakyRelu(slope) => x.max(0.0) + f64::from(slope) * x.min(0.0),
            Activation::Silu => x * sigmoid(x),
            Activation::QuickGelu => x * sigmoid(1.702 * x),
            Activation::Sigmoid => sigmoid(x),
            Activation::Gelu => {
                // Phi by Simpson's rule over the density from 0.
                let (steps, density) = (2000, |t: f64| (-t * t / 2.0).exp());
                let h = x / f64::from(steps);
                let sum: f64 = (0..steps)
                    .map(|i| {
                        let t = f64::from(i) * h;
                        density(t) + 4.0 * density(t + h / 2.0) + density(t + h)
                    })
                    .sum();
                x * (0.5 + sum * h / 6.0 / std::f64::consts::TAU.sqrt())
            }
        }
    }

    #[test]
    fn agrees_with_the_definition() {
        for activation in [
            Activation::None,
            Activation::Relu,
            Activation::LeakyRelu(0.2),
            Activation::Gelu,
            Activation::QuickGelu,
            Activation::Silu,
            Activation::Sigmoid,
        ] {
            let inputs: Vec<f32> = (-300..=300).map(|i| i as f32 / 25.0).chain([-80.0, 80.0]).collect();
            let mut values = inputs.clone();
            apply(&mut values, activation);
            for (&x, &y) in inputs.iter().zip(&values) {
                let expected = naive(activation, f64::from(x));
                let error = (f64::from(y) - expected).abs() / expected.abs().max(1.0);
                assert!(error < 1e-6, "{activation:?}({x}) = {y}, expected {expected}");
            }
        }
    }
}
