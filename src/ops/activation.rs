//! Pointwise nonlinearities, as kernels apply them to a part of an output that is still in cache.

use crate::ops::kernels::{exp, mul_add, per_cpu};

/// A pointwise nonlinearity.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum Activation {
    /// x
    #[default]
    None,
    /// 0.5 x (1 + erf(x / sqrt 2))
    Gelu,
    /// x sigmoid(1.702 x)
    QuickGelu,
    /// x sigmoid(x)
    Silu,
    /// 1 / (1 + e^-x)
    Sigmoid,
    /// max(x, 0)
    Relu,
    /// x if positive, else slope * x
    LeakyRelu(f32),
}

impl Activation {
    /// x <- act(x) for every value, on the calling thread.
    pub fn apply(self, values: &mut [f32]) {
        apply_to(values, self);
    }
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
fn apply<const FMA: bool>(values: &mut [f32], activation: Activation) {
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
        Activation::QuickGelu => {
            for v in values {
                *v /= 1.0 + exp::<FMA>(-1.702 * *v);
            }
        }
        Activation::Silu => {
            for v in values {
                *v /= 1.0 + exp::<FMA>(-*v);
            }
        }
        Activation::Sigmoid => {
            for v in values {
                *v = 1.0 / (1.0 + exp::<FMA>(-*v));
            }
        }
    }
}

per_cpu! {
    /// Applies `activation` in place.
    fn apply_to(values: &mut [f32], activation: Activation) = apply
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check;

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
            let inputs: Vec<f32> = (-300..=300).map(|i| i as f32 / 25.0).chain([-90.0, 90.0]).collect();
            let mut values = inputs.clone();
            apply_to(&mut values, activation);
            for (&x, &y) in inputs.iter().zip(&values) {
                let expected = check::activation(activation, f64::from(x));
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
