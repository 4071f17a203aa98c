//! Normalisation layers that have weights.

use super::Params;
use crate::device::Context;
use crate::error::Result;
use crate::ops::layer_norm::{LayerNorm as LayerNormOp, layer_norm};
use crate::ops::widen::widen;
use crate::tensor::{DType, Tensor};

/// LayerNorm over channels with learnt scale and shift (Ba et al. 2016, arXiv:1607.06450).
#[derive(Debug, Clone)]
pub struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f32,
}

impl LayerNorm {
    /// Reads `weight` and `bias`, both `[channels]`.
    ///
    /// # Errors
    /// `Format` if either is missing or has another shape.
    pub fn load(p: &Params, channels: usize, eps: f32) -> Result<Self> {
        Ok(LayerNorm { weight: p.tensor("weight", &[channels])?, bias: p.tensor("bias", &[channels])?, eps })
    }

    /// # Shapes
    /// `[.., C] -> [.., C]`
    ///
    /// # Errors
    /// `InvalidArgument` for another number of channels; `OutOfMemory`; `Cancelled`.
    pub fn forward(&self, cx: &Context, x: &Tensor) -> Result<Tensor> {
        let affine = Some((&self.weight, &self.bias));
        layer_norm(cx, x, &LayerNormOp { eps: self.eps, affine, ..LayerNormOp::default() })
    }
}

/// BatchNorm with running statistics (Ioffe and Szegedy 2015), as the scale and shift that it is at inference.
#[derive(Debug, Clone)]
pub struct BatchNorm {
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    eps: f32,
}

/// y = x * scale + shift per channel; both `[C]`, `F32`.
#[derive(Debug)]
pub struct ChannelAffine {
    /// weight / sqrt(running_var + eps)
    pub scale: Tensor,
    /// bias - running_mean * scale
    pub shift: Tensor,
}

impl BatchNorm {
    /// Reads `weight`, `bias`, `running_mean` and `running_var`, each `[channels]`.
    ///
    /// # Errors
    /// `Format` if one is missing or has another shape.
    pub fn load(p: &Params, channels: usize, eps: f32) -> Result<Self> {
        let read = |name| p.tensor(name, &[channels]);
        Ok(BatchNorm {
            weight: read("weight")?,
            bias: read("bias")?,
            running_mean: read("running_mean")?,
            running_var: read("running_var")?,
            eps,
        })
    }

    /// The scale and shift, computed anew: a few hundred numbers, against keeping a second copy of them.
    ///
    /// # Errors
    /// `OutOfMemory`; `Cancelled`.
    pub fn affine(&self, cx: &Context) -> Result<ChannelAffine> {
        let [weight, bias] = [widen(cx, &self.weight)?, widen(cx, &self.bias)?];
        let [mean, var] = [widen(cx, &self.running_mean)?, widen(cx, &self.running_var)?];
        let mut scale = Tensor::new(cx, "batch norm", weight.dims(), DType::F32)?;
        let mut shift = Tensor::new(cx, "batch norm", weight.dims(), DType::F32)?;
        let inputs = weight.slice::<f32>()?.iter().zip(bias.slice::<f32>()?);
        let statistics = mean.slice::<f32>()?.iter().zip(var.slice::<f32>()?);
        let outputs = scale.slice_mut::<f32>()?.iter_mut().zip(shift.slice_mut::<f32>()?);
        for (((w, b), (mean, var)), (scale, shift)) in inputs.zip(statistics).zip(outputs) {
            *scale = w / (var + self.eps).sqrt();
            *shift = b - mean * *scale;
        }
        Ok(ChannelAffine { scale, shift })
    }
}
