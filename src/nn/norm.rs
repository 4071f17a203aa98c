//! Normalisation layers that have weights.

use super::{Params, RunningUpdate, TrainingPass};
use crate::device::Context;
use crate::error::Result;
use crate::ops::batch_norm::{BatchNorm as BatchNormOp, batch_norm};
use crate::ops::fold_norm::{FixedNorm, fold_norm};
use crate::ops::layer_norm::{LayerNorm as LayerNormOp, layer_norm};
use crate::tensor::Tensor;

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

/// How fast running statistics follow, where nothing else is said.
const MOMENTUM: f32 = 0.1;

/// BatchNorm (Ioffe and Szegedy 2015): by its running statistics at inference, by those of the batch in training.
#[derive(Debug, Clone)]
pub struct BatchNorm {
    name: String,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    eps: f32,
    momentum: f32,
}

impl BatchNorm {
    /// Reads `weight`, `bias`, `running_mean` and `running_var`, each `[channels]`.
    ///
    /// # Errors
    /// `Format` if one is missing or has another shape.
    pub fn load(p: &Params, channels: usize, eps: f32) -> Result<Self> {
        let read = |name| p.tensor(name, &[channels]);
        Ok(BatchNorm {
            name: p.prefix().to_owned(),
            weight: read("weight")?,
            bias: read("bias")?,
            running_mean: read("running_mean")?,
            running_var: read("running_var")?,
            eps,
            momentum: MOMENTUM,
        })
    }

    /// The same layer, whose running statistics follow the batches at another speed.
    #[must_use]
    pub fn with_momentum(self, momentum: f32) -> Self {
        BatchNorm { momentum, ..self }
    }

    /// y = x * scale + shift per channel, both `[C]`: what the layer is at inference. Computed anew, since they are a
    /// few hundred numbers.
    ///
    /// # Errors
    /// `OutOfMemory`; `Cancelled`.
    pub fn affine(&self, cx: &Context) -> Result<[Tensor; 2]> {
        let norm = FixedNorm {
            weight: &self.weight,
            bias: &self.bias,
            mean: &self.running_mean,
            variance: &self.running_var,
            eps: self.eps,
        };
        fold_norm(cx, &norm)
    }

    /// By the statistics of the batch, which `pass` notes.
    ///
    /// # Shapes
    /// `[N, H, W, C] -> [N, H, W, C]`
    ///
    /// # Errors
    /// `InvalidArgument` for another number of channels; `OutOfMemory`; `Cancelled`.
    pub fn forward_training(&self, cx: &Context, x: &Tensor, pass: &TrainingPass) -> Result<Tensor> {
        let norm = BatchNormOp { weight: &self.weight, bias: &self.bias, eps: self.eps };
        let (y, statistics) = batch_norm(cx, x, &norm, pass.reduce())?;
        pass.note(RunningUpdate { name: self.name.clone(), momentum: self.momentum, statistics });
        Ok(y)
    }
}
