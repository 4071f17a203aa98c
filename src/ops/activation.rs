//! Pointwise nonlinearities, as kernels apply them to a part of an output that is still in cache.

use crate::device::simd::{
    gelu, gelu_gradient, leaky_relu, quick_gelu, quick_gelu_gradient, sigmoid, sigmoid_gradient, silu,
    silu_gradient,
};
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

    /// g <- g act'(x) for every input x and gradient g, as many of each, on the calling thread. Where a straight line
    /// bends, at 0, the derivative is that of its left side.
    pub fn gradient(self, inputs: &[f32], gradients: &mut [f32]) {
        gradient(inputs, gradients, self);
    }

    /// The number of the function in kernels for GPUs, as `kernel.cuh` has it, and the slope of the leaky ReLU.
    pub(crate) fn code(self) -> (i32, f32) {
        match self {
            Activation::None => (0, 0.0),
            Activation::Relu => (1, 0.0),
            Activation::LeakyRelu(slope) => (2, slope),
            Activation::QuickGelu => (3, 0.0),
            Activation::Sigmoid => (4, 0.0),
            Activation::Silu => (5, 0.0),
            Activation::Gelu => (6, 0.0),
        }
    }

    /// Whether the derivative at x is that at act(x), so that a result in the place of its input loses nothing.
    pub(crate) fn differentiates_from_result(self) -> bool {
        match self {
            Activation::None | Activation::Relu => true,
            Activation::LeakyRelu(slope) => slope > 0.0,
            _ => false,
        }
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

/// g <- f(g, x) for every pair. A loop and no closure: one of this length would not be inlined, and so miss the
/// instructions that its caller is compiled for.
macro_rules! each {
    ($inputs:ident, $gradients:ident, |$g:ident, $x:ident| $value:expr) => {
        for (g, x) in $gradients.iter_mut().zip($inputs) {
            let ($g, $x) = (*g, *x);
            *g = $value;
        }
    };
}

simd_dispatch! {
    /// Multiplies `gradients` by the derivatives.
    fn gradient<const FMA: bool>(inputs: &[f32], gradients: &mut [f32], activation: Activation) {
        match activation {
            Activation::None => {}
            // A choice, not a product: an infinite gradient of what was cut off must not become NaN.
            Activation::Relu => each!(inputs, gradients, |g, x| if x > 0.0 { g } else { 0.0 }),
            Activation::LeakyRelu(slope) => each!(inputs, gradients, |g, x| if x > 0.0 { g } else { slope * g }),
            Activation::Gelu => each!(inputs, gradients, |g, x| g * gelu_gradient::<FMA>(x)),
            Activation::QuickGelu => each!(inputs, gradients, |g, x| g * quick_gelu_gradient::<FMA>(x)),
            Activation::Silu => each!(inputs, gradients, |g, x| g * silu_gradient::<FMA>(x)),
            Activation::Sigmoid => each!(inputs, gradients, |g, x| g * sigmoid_gradient::<FMA>(x)),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::device::simd::{Level, tests::at_level};
    use crate::ops::check;
    pub use crate::ops::check::activation as naive;

    const ALL: [Activation; 7] = [
        Activation::None,
        Activation::Relu,
        Activation::LeakyRelu(0.2),
        Activation::Gelu,
        Activation::QuickGelu,
        Activation::Silu,
        Activation::Sigmoid,
    ];

    fn inputs() -> Vec<f32> {
        (-300..=300).map(|i| i as f32 / 25.0).chain([-80.0, 80.0]).collect()
    }

    #[test]
    fn agrees_with_the_definition() {
        for activation in ALL {
            let inputs = inputs();
            let mut values = inputs.clone();
            apply(&mut values, activation);
            for (&x, &y) in inputs.iter().zip(&values) {
                let expected = check::activation(activation, f64::from(x));
                let error = (f64::from(y) - expected).abs() / expected.abs().max(1.0);
                assert!(error < 1e-6, "{activation:?}({x}) = {y}, expected {expected}");
            }
        }
    }

    /// The derivatives, in f64.
    fn derivative(activation: Activation, x: f64) -> f64 {
        let gated = |rate: f64| {
            let gate = 1.0 / (1.0 + (-rate * x).exp());
            gate + rate * x * gate * (1.0 - gate)
        };
        match activation {
            Activation::None => 1.0,
            Activation::Relu => f64::from(u8::from(x > 0.0)),
            Activation::LeakyRelu(slope) => {
                if x > 0.0 {
                    1.0
                } else {
                    f64::from(slope)
                }
            }
            Activation::Silu => gated(1.0),
            Activation::QuickGelu => gated(1.702),
            Activation::Sigmoid => 1.0 / (2.0 + x.exp() + (-x).exp()),
            Activation::Gelu => {
                let distribution = if x == 0.0 { 0.5 } else { check::activation(activation, x) / x };
                distribution + x * (-x * x / 2.0).exp() / std::f64::consts::TAU.sqrt()
            }
        }
    }

    #[test]
    fn gradients_are_those_of_the_definition() {
        let inputs = inputs();
        for (activation, level) in ALL.into_iter().flat_map(|a| Level::available().map(move |l| (a, l))) {
            let mut values = vec![2f32; inputs.len()];
            at_level(level, || activation.gradient(&inputs, &mut values));
            for (&x, &g) in inputs.iter().zip(&values) {
                let expected = 2.0 * derivative(activation, f64::from(x));
                let error = (f64::from(g) - expected).abs();
                assert!(error < 2e-6, "{level:?} {activation:?}'({x}) = {g}, expected {expected}");
            }
            if activation.differentiates_from_result() {
                let (mut results, mut again) = (inputs.clone(), vec![2f32; inputs.len()]);
                activation.apply(&mut results);
                activation.gradient(&results, &mut again);
                assert_eq!(again, values, "{activation:?}");
            }
        }
    }

    #[test]
    fn extremes_have_finite_gradients() {
        for activation in ALL {
            let mut values = [1f32; 4];
            activation.gradient(&[1e30, -1e30, 3e38, -3e38], &mut values);
            assert!(values.iter().all(|g| g.is_finite()), "{activation:?}: {values:?}");
        }
    }
}
