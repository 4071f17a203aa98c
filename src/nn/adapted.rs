//! A dense layer that a low-rank adapter may join (LoRA, Hu et al. 2021, arXiv:2106.09685).

#[cfg(test)]
mod tests;

use super::{Linear, Params};
use crate::device::Context;
use crate::error::Result;
use crate::ops::linear::{Epilogue, Term, WeightLayout, linear, linear_sum};
use crate::tensor::Tensor;

/// What a source brings beside a layer's weight: its matrices are `lora.down` `[rank, inputs]` and `lora.up`
/// `[outputs, rank]` below the layer's name.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LowRank {
    /// The rank of the update.
    pub rank: usize,
    /// The factor of the update: alpha / rank.
    pub scale: f32,
}

/// y = x Wᵀ + scale (x downᵀ) upᵀ + bias, where the source brings an adapter; else a [`Linear`] and nothing more.
///
/// The weight alone is not the layer, so there is no access to it: what must read weights is a [`Linear`].
#[derive(Debug, Clone)]
pub struct AdaptedLinear {
    base: Linear,
    adapter: Option<Adapter>,
}

#[derive(Debug, Clone)]
struct Adapter {
    down: Tensor,
    up: Tensor,
    scale: f32,
}

impl AdaptedLinear {
    /// Reads `weight` `[outputs, inputs]`, `bias` `[outputs]` and, where the source brings an adapter, `lora.down` and
    /// `lora.up`.
    ///
    /// # Errors
    /// `Format` if one is missing or has another shape.
    pub fn load(p: &Params, inputs: usize, outputs: usize) -> Result<Self> {
        let base = Linear::load(p, inputs, outputs)?;
        let read = |LowRank { rank, scale }| {
            let down = p.tensor("lora.down", &[rank, inputs])?;
            Ok(Adapter { down, up: p.tensor("lora.up", &[outputs, rank])?, scale })
        };
        Ok(AdaptedLinear { base, adapter: p.adapter().map(read).transpose()? })
    }

    /// # Shapes
    /// `[.., inputs] -> [.., outputs]`
    ///
    /// # Errors
    /// As [`Linear::forward`].
    pub fn forward(&self, cx: &Context, x: &Tensor) -> Result<Tensor> {
        self.forward_then(cx, x, Epilogue::default())
    }

    /// The sum of both products with `then` applied while it is hot; the layer's own bias goes in first.
    ///
    /// # Errors
    /// As [`Linear::forward`].
    pub fn forward_then(&self, cx: &Context, x: &Tensor, then: Epilogue) -> Result<Tensor> {
        let Some(Adapter { down, up, scale }) = &self.adapter else {
            return self.base.forward_then(cx, x, then);
        };
        let narrowed = linear(cx, x, down, &Epilogue { gain: *scale, ..Epilogue::default() })?;
        let term = |x, weight| Term { x, weight, layout: WeightLayout::RowsAreOutputs, first_input: 0 };
        let terms = [term(x, self.base.weight()), term(&narrowed, up)];
        linear_sum(cx, &terms, &Epilogue { bias: self.base.bias(), ..then })
    }
}
