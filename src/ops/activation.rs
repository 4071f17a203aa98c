//! Pointwise nonlinearities, as kernels apply them to a part of an output that is still in cache.

use crate::ops::kernels::{exp, mul_add, per_cpu};

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
    /// x sigmoid(x).
    Silu,
}

/// erf to within 2e-7 (Abramowitz and Stegun 7.1.26).
#[inline(always)]
fn erf<const FMA: bool>(x: f32) -> f32 {
    let a = x.abs();
    let t = 1.0 / mul_add::<FMA>(a, 0.327_591_1, 1.0);
    let mut p = mul_add::<FMA>(1.061_405_4, t, -1.453_152_1);
    p = mul_add::<FMA>(p, t, 1.421_413_8);
    p = mul_add::<FMA>(p, t, -0.284_496_74);
    p = mul_add::<FMA>(p, t, 0.254_829_6);
    let tail = p * t * exp::<FMA>(-a * a);
    (1.0 - tail).copysign(x)
}

/// Applies `activation` in place.
#[inline(always)]
pub(crate) fn apply<const FMA: bool>(values: &mut [f32], activation: Activation) {
    match activation {
        Activation::None => {}
        Activation::Relu => values.iter_mut().for_each(|v| *v = v.max(0.0)),
        Activation::LeakyRelu(slope) => {
            values.iter_mut().for_each(|v| *v = if *v > 0.0 { *v } else { *v * slope });
        }
        Activation::Gelu => {
            for v in values {
                *v = 0.5 * *v * (1.0 + erf::<FMA>(*v * std::f32::consts::FRAC_1_SQRT_2));
            }
        }
        Activation::Silu => {
            for v in values {
                *v /= 1.0 + exp::<FMA>(-*v);
            }
        }
    }
}

per_cpu! {
    /// Applies `activation` in place.
    pub(crate) fn apply_to(values: &mut [f32], activation: Activation) = apply
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// The definitions, in f64.
    pub fn naive(activation: Activation, x: f64) -> f64 {
        match activation {
            Activation::None => x,
            Activation::Relu => x.max(0.0),
            Activation::LeakyRelu(slope) => x.max(0.0) + f64::from(slope) * x.min(0.0),
            Activation::Silu => x / (1.0 + (-x).exp()),
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
            Activation::Silu,
        ] {
            let inputs: Vec<f32> = (-300..=300).map(|i| i as f32 / 25.0).chain([-90.0, 90.0]).collect();
            let mut values = inputs.clone();
            apply_to(&mut values, activation);
            for (&x, &y) in inputs.iter().zip(&values) {
                let expected = naive(activation, f64::from(x));
                let error = (f64::from(y) - expected).abs() / expected.abs().max(1.0);
                assert!(error < 1e-6, "{activation:?}({x}) = {y}, expected {expected}");
            }
        }
    }

    #[test]
    fn exp_agrees_with_std() {
        for i in -8700..=8800 {
            let x = i as f32 / 100.0;
            let expected = f64::from(x).exp();
            assert!((f64::from(exp::<false>(x)) / expected - 1.0).abs() < 3e-7, "exp({x})");
        }
        assert_eq!(exp::<false>(-1000.0), 0.0);
    }
}
