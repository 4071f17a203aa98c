//! The matrix product behind convolutions and token choice: rows times transposed weight.
//!
//! A stand-in: [`product`] is the one place to change for the blocked product of `device::gemm`.

use crate::device::Context;
use crate::error::Result;
use crate::ops::activation::Activation;
use crate::ops::kernels::{self, dot, mul_add, per_cpu};
use crate::tensor::Tensor;

/// What follows a product, per output element: `residual + gain * activation(channel_scale * y + bias)`.
#[derive(Debug, Clone, Copy)]
pub struct Epilogue<'a> {
    /// `[O]`: a folded batch normalisation.
    pub channel_scale: Option<&'a Tensor>,
    /// `[O]`.
    pub bias: Option<&'a Tensor>,
    /// The nonlinearity.
    pub activation: Activation,
    /// The factor before the residual.
    pub gain: f32,
    /// Of the shape of the result.
    pub residual: Option<&'a Tensor>,
}

impl Default for Epilogue<'_> {
    fn default() -> Self {
        Epilogue { channel_scale: None, bias: None, activation: Activation::None, gain: 1.0, residual: None }
    }
}

/// `out[r, o] = epilogue(sum over k of rows[r, k] * weight[o, k])`; the residual is read from row `first_row` on.
pub(crate) fn product(
    cx: &Context,
    rows: &[f32],
    weight: &Tensor,
    epilogue: &Epilogue,
    first_row: usize,
    out: &mut [f32],
) -> Result<()> {
    let outputs = weight.dims()[0];
    let inner = weight.elements() / outputs.max(1);
    let weight = kernels::widened(cx, "product weight", weight)?;
    let scale = epilogue.channel_scale.map(|v| kernels::channel_vector(cx, "channel scale", v, outputs));
    let bias = epilogue.bias.map(|v| kernels::channel_vector(cx, "bias", v, outputs));
    let (scale, bias) = (scale.transpose()?, bias.transpose()?);
    let weight = weight.slice::<f32>()?;
    let scale = scale.as_ref().map(Tensor::slice::<f32>).transpose()?;
    let bias = bias.as_ref().map(Tensor::slice::<f32>).transpose()?;
    let residual = epilogue.residual.map(Tensor::slice::<f32>).transpose()?;
    kernels::parallel_chunks(cx, out, outputs, |r, out| {
        products(&rows[r * inner..][..inner], weight, out);
        for (o, v) in out.iter_mut().enumerate() {
            *v = *v * scale.map_or(1.0, |s| s[o]) + bias.map_or(0.0, |b| b[o]);
        }
        epilogue.activation.apply(out);
        if let Some(residual) = residual {
            for (v, r) in out.iter_mut().zip(&residual[(first_row + r) * outputs..]) {
                *v = mul_add::<false>(*v, epilogue.gain, *r);
            }
        } else if epilogue.gain != 1.0 {
            out.iter_mut().for_each(|v| *v *= epilogue.gain);
        }
    })
}

#[inline(always)]
fn body<const FMA: bool>(row: &[f32], weight: &[f32], out: &mut [f32]) {
    for (out, weight) in out.iter_mut().zip(weight.chunks_exact(row.len())) {
        *out = dot::<FMA>(row, weight);
    }
}

per_cpu! {
    /// One row times every row of the weight.
    fn products(row: &[f32], weight: &[f32], out: &mut [f32]) = body
}
