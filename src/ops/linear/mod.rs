//! Linear layers: y = x W^T, with everything that may follow a product fused into its store.

mod cpu;
#[cfg(test)]
mod tests;

pub use super::activation::Activation;

use crate::device::Context;
use crate::device::gemm::{Gemm, Layout, MatrixB, Values};
use crate::error::{Error, Result};
use crate::tensor::{DType, MAX_RANK, Tensor};

/// What follows the product, fused into it:
///
/// v = act(acc * channel_scale + bias) * gain + residual; y = v * (1 + a\[n\]) + b\[n\]
///
/// # Shapes
/// O outputs; n is the index into x's first dimension.
#[derive(Debug, Clone, Copy)]
pub struct Epilogue<'a> {
    /// `[O]`, any float type.
    pub channel_scale: Option<&'a Tensor>,
    /// `[O]`, any float type.
    pub bias: Option<&'a Tensor>,
    /// Applied after the bias.
    pub activation: Activation,
    /// Factor of the activation's result; 1 by default.
    pub gain: f32,
    /// As many elements as the result, F32.
    pub residual: Option<&'a Tensor>,
    /// `[N or 1, 2 * O]`, any float type: a, then b.
    pub modulation: Option<&'a Tensor>,
}

impl Default for Epilogue<'_> {
    fn default() -> Self {
        Epilogue {
            channel_scale: None,
            bias: None,
            activation: Activation::None,
            gain: 1.0,
            residual: None,
            modulation: None,
        }
    }
}

/// y\[.., o\] = sum over i of x\[.., i\] * w\[o, i\], then the epilogue.
///
/// # Shapes
/// x `[.., I]` F32; weight `[O, I]` or `[O, I, 1, 1]`, any float type; result `[.., O]` F32.
///
/// # Errors
/// `InvalidArgument` naming the tensor whose shape or type does not fit; `OutOfMemory`; `Cancelled`.
pub fn linear(cx: &Context, x: &Tensor, weight: &Tensor, e: &Epilogue) -> Result<Tensor> {
    let inputs = x.shape().channels();
    let outputs = match *weight.dims() {
        [o, i] | [o, i, 1, 1] if i == inputs => o,
        _ => return Err(Error::argument("linear: weight", format!("[O, {inputs}]"), weight.shape())),
    };
    product(cx, x, weight, outputs, Layout::RowsAreOutputs, e)
}

/// y\[.., o\] = sum over i of x\[.., i\] * w\[i, o\], then the epilogue.
///
/// # Shapes
/// x `[.., I]` F32; weight `[I, O..]`, any float type, seen as `[I, O]`; result `[.., O]` F32.
///
/// # Errors
/// As [`linear`].
pub fn linear_transposed(cx: &Context, x: &Tensor, weight: &Tensor, e: &Epilogue) -> Result<Tensor> {
    let inputs = x.shape().channels();
    let outputs = match weight.dims() {
        [i, rest @ ..] if *i == inputs => rest.iter().product(),
        _ => return Err(Error::argument("linear: weight", format!("[{inputs}, O]"), weight.shape())),
    };
    product(cx, x, weight, outputs, Layout::RowsAreInputs, e)
}

fn product(
    cx: &Context,
    x: &Tensor,
    weight: &Tensor,
    outputs: usize,
    layout: Layout,
    e: &Epilogue,
) -> Result<Tensor> {
    let (rows, inputs) = (x.shape().rows(), x.shape().channels());
    let mut dims = [1; MAX_RANK];
    let rank = x.dims().len().max(1);
    dims[..x.dims().len()].copy_from_slice(x.dims());
    dims[rank - 1] = outputs;
    let mut y = Tensor::new(cx, "linear: result", &dims[..rank], DType::F32)?;
    let leading = if layout == Layout::RowsAreOutputs { inputs } else { outputs };
    let b = MatrixB { values: values(weight, "linear: weight")?, layout, leading };
    let gemm = Gemm { m: rows, n: outputs, k: inputs, a: x.slice()?, lda: inputs, b };
    let samples = if rank > 1 { x.dims()[0] } else { 1 };
    cpu::run(cx, &gemm, samples, e, y.slice_mut()?)?;
    Ok(y)
}

/// A tensor of any float type as a matrix product reads it.
///
/// # Errors
/// `InvalidArgument`, naming `what`, for another type.
pub fn values<'a>(tensor: &'a Tensor, what: &str) -> Result<Values<'a>> {
    Ok(match tensor.dtype() {
        DType::F32 => Values::F32(tensor.slice()?),
        DType::F16 => Values::F16(tensor.slice()?),
        DType::BF16 => Values::BF16(tensor.slice()?),
        other => return Err(Error::argument(what, "a float type", other)),
    })
}
