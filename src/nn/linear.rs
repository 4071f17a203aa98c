//! Dense layers. A 1x1 convolution is one of them, since channels are last.

use super::Params;
use crate::device::Context;
use crate::error::Result;
use crate::ops::linear::{Activation, Epilogue, ResultType, linear};
use crate::ops::residual_mlp::Dense;
use crate::tensor::Tensor;

/// y = x Wᵀ + bias, with whatever the epilogue adds.
#[derive(Debug, Clone)]
pub struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Linear {
    /// Reads `weight` `[outputs, inputs]` and `bias` `[outputs]`.
    ///
    /// # Errors
    /// `Format` if either is missing or has another shape.
    pub fn load(p: &Params, inputs: usize, outputs: usize) -> Result<Self> {
        let bias = Some(p.tensor("bias", &[outputs])?);
        Ok(Linear { weight: p.tensor("weight", &[outputs, inputs])?, bias })
    }

    /// Reads a 1x1 convolution: `weight` `[outputs, inputs, 1, 1]` and `bias`.
    ///
    /// # Errors
    /// As [`Linear::load`].
    pub fn load_conv1x1(p: &Params, inputs: usize, outputs: usize) -> Result<Self> {
        let layer = Self::load_conv1x1_without_bias(p, inputs, outputs)?;
        Ok(Linear { bias: Some(p.tensor("bias", &[outputs])?), ..layer })
    }

    /// Reads a 1x1 convolution that has no bias.
    ///
    /// # Errors
    /// As [`Linear::load`].
    pub fn load_conv1x1_without_bias(p: &Params, inputs: usize, outputs: usize) -> Result<Self> {
        let weight = p.tensor("weight", &[outputs, inputs, 1, 1])?.reshape(&[outputs, inputs])?;
        Ok(Linear { weight, bias: None })
    }

    /// A layer over tensors at hand.
    pub fn from_parts(weight: Tensor, bias: Option<Tensor>) -> Self {
        Linear { weight, bias }
    }

    /// The weight `[outputs, inputs]`.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// The bias `[outputs]`, if there is one.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// The layer as a part of an MLP.
    pub fn as_dense(&self) -> Dense<'_> {
        Dense { weight: &self.weight, bias: self.bias.as_ref() }
    }

    /// # Shapes
    /// `[.., inputs] -> [.., outputs]`
    ///
    /// # Errors
    /// `InvalidArgument` for other inputs; `OutOfMemory`; `Cancelled`.
    pub fn forward(&self, cx: &Context, x: &Tensor) -> Result<Tensor> {
        self.forward_then(cx, x, Epilogue::default())
    }

    /// As [`Linear::forward`], with a result in `F32` on every device: what leaves a network.
    ///
    /// # Errors
    /// As [`Linear::forward`].
    pub fn forward_f32(&self, cx: &Context, x: &Tensor) -> Result<Tensor> {
        self.forward_then(cx, x, Epilogue { result: ResultType::F32, ..Epilogue::default() })
    }

    /// The product with `then` applied while it is hot; the layer's own bias goes in first.
    ///
    /// # Errors
    /// As [`Linear::forward`].
    pub fn forward_then(&self, cx: &Context, x: &Tensor, then: Epilogue) -> Result<Tensor> {
        linear(cx, x, &self.weight, &Epilogue { bias: self.bias.as_ref(), ..then })
    }

    /// act(x Wᵀ * scale + shift) per output channel, for a layer without bias that a BatchNorm follows.
    ///
    /// # Errors
    /// As [`Linear::forward`].
    pub fn forward_scaled(
        &self,
        cx: &Context,
        x: &Tensor,
        scale: &Tensor,
        shift: &Tensor,
        activation: Activation,
    ) -> Result<Tensor> {
        let then =
            Epilogue { channel_scale: Some(scale), bias: Some(shift), activation, ..Epilogue::default() };
        linear(cx, x, &self.weight, &then)
    }
}
