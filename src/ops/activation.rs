//! Pointwise activations: v = act(x), applied in place to runs of values.

use crate::device::simd;
use crate::simd_dispatch;

/// A pointwise function.
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
        match self {
            Activation::None => {}
            Activation::Gelu => gelu(values),
            Activation::QuickGelu => quick_gelu(values),
            Activation::Silu => silu(values),
            Activation::Sigmoid => sigmoid(values),
            Activation::Relu => leaky_relu(values, 0.0),
            Activation::LeakyRelu(slope) => leaky_relu(values, slope),
        }
    }
}

macro_rules! pointwise {
    ($($name:ident),*) => {$(
        simd_dispatch! {
            fn $name<const FMA: bool>(values: &mut [f32]) {
                for v in values {
                    *v = simd::$name::<FMA>(*v);
                }
            }
        }
    )*};
}

pointwise!(gelu, quick_gelu, silu, sigmoid);

simd_dispatch! {
    fn leaky_relu<const _FMA: bool>(values: &mut [f32], slope: f32) {
        for v in values {
            *v = simd::leaky_relu(*v, slope);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_activation_is_its_equation() {
        let x: Vec<f32> = (-50..50).map(|i| i as f32 * 0.1).collect();
        let sigmoid = |x: f32| 1.0 / (1.0 + (-x).exp());
        let table: [(Activation, &dyn Fn(f32) -> f32); 6] = [
            (Activation::None, &|x| x),
            (Activation::QuickGelu, &|x| x * sigmoid(1.702 * x)),
            (Activation::Silu, &|x| x * sigmoid(x)),
            (Activation::Sigmoid, &sigmoid),
            (Activation::Relu, &|x| x.max(0.0)),
            (Activation::LeakyRelu(0.2), &|x| if x > 0.0 { x } else { 0.2 * x }),
        ];
        for (activation, want) in table {
            let mut got = x.clone();
            activation.apply(&mut got);
            for (x, got) in x.iter().zip(got) {
                assert!((got - want(*x)).abs() < 1e-6, "{activation:?} {x}");
            }
        }
        // From a table of the normal distribution: GELU(1) = Phi(1), GELU(-2) = -2 Phi(-2).
        let mut got = [1.0, -2.0];
        Activation::Gelu.apply(&mut got);
        assert!((got[0] - 0.841_344_7).abs() < 1e-6 && (got[1] + 0.045_500_26).abs() < 1e-6);
    }
}
