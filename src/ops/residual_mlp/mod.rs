//! A residual pointwise MLP behind a LayerNorm, some rows at a time: its wide hidden layer never exists whole.

#[cfg(test)]
mod tests;

use crate::device::Context;
use crate::device::gemm::Layout;
use crate::error::{Error, Result};
use crate::ops::elementwise::activate;
use crate::ops::kernels;
pub use crate::ops::layer_norm::LayerNorm;
use crate::ops::layer_norm::{layer_norm, normalize};
pub use crate::ops::linear::Activation;
use crate::ops::linear::{Epilogue, Rows, linear, product};
use crate::ops::scaled_residual::scaled_residual;
use crate::ops::work;
use crate::tensor::autograd::records;
use crate::tensor::{DType, Tensor};

/// About how many numbers of the hidden layer are held at a time: 16 MiB. Each group of rows packs both weights
/// anew, which fewer rows would not pay for.
const SCRATCH_ELEMENTS: usize = 4 << 20;

/// A dense layer of an MLP.
#[derive(Debug, Clone, Copy)]
pub struct Dense<'a> {
    /// `[O, I]` of any float type.
    pub weight: &'a Tensor,
    /// `[O]` of any float type.
    pub bias: Option<&'a Tensor>,
}

/// The parameters of [`residual_mlp`].
#[derive(Debug, Clone, Copy)]
pub struct ResidualMlp<'a> {
    /// What the MLP sees of x.
    pub norm: LayerNorm<'a>,
    /// From C channels to H.
    pub expand: Dense<'a>,
    /// Between the layers.
    pub activation: Activation,
    /// From H channels to C.
    pub project: Dense<'a>,
    /// The factor of the MLP's result: one element of any float type.
    pub gain: &'a Tensor,
}

/// y = x + gain * (W2 act(W1 norm(x) + b1) + b2), for each row apart.
///
/// # Shapes
/// x and the result: `F32 [.., C]`
///
/// # Errors
/// `InvalidArgument` if shapes do not fit together; `OutOfMemory`; `Cancelled`.
pub fn residual_mlp(cx: &Context, x: &Tensor, p: &ResidualMlp) -> Result<Tensor> {
    let span = cx.op("residual_mlp");
    let channels = x.shape().channels();
    let [hidden, _] = p.expand.weight.dims_of("mlp expand weight")?;
    check("mlp expand weight", p.expand.weight, [hidden, channels])?;
    check("mlp project weight", p.project.weight, [channels, hidden])?;
    if records(cx, &p.tensors(x)) {
        return composed(cx, x, p);
    }
    if cx.cuda()?.is_some() {
        return with_whole_layers(cx, x, p);
    }
    let weights = [p.expand.weight, p.project.weight];
    let _span = span.working(|| work::multiplying(x.shape().rows(), &weights, &[x, x]));
    let gain = kernels::scalar("mlp gain", p.gain)?;
    let input = x.slice::<f32>()?;
    let rows = rows_at_once(x.shape().rows(), hidden);
    let mut normed = Tensor::new(cx, "mlp input", &[rows, channels], DType::F32)?;
    let mut inner = Tensor::new(cx, "mlp hidden layer", &[rows, hidden], DType::F32)?;
    let mut out = Tensor::new(cx, "mlp output", x.dims(), DType::F32)?;
    let first = Epilogue { bias: p.expand.bias, activation: p.activation, ..Epilogue::default() };
    let second = Epilogue { bias: p.project.bias, gain, residual: Some(x), ..Epilogue::default() };
    for (i, out) in out.slice_mut::<f32>()?.chunks_mut((rows * channels).max(1)).enumerate() {
        let (start, count) = (i * rows, out.len() / channels);
        let normed = &mut normed.slice_mut::<f32>()?[..out.len()];
        let inner = &mut inner.slice_mut::<f32>()?[..count * hidden];
        normalize(cx, &input[start * channels..][..out.len()], channels, &p.norm, normed)?;
        dense(cx, normed, channels, p.expand.weight, &first, 0, inner)?;
        dense(cx, inner, hidden, p.project.weight, &second, start, out)?;
    }
    Ok(out)
}

impl ResidualMlp<'_> {
    /// Everything that may be tracked.
    fn tensors<'a>(&'a self, x: &'a Tensor) -> [Option<&'a Tensor>; 10] {
        let LayerNorm { affine, scale, shift, .. } = self.norm;
        let (weight, bias) = affine.unzip();
        let [expand, project] = [self.expand, self.project];
        let dense = [Some(expand.weight), expand.bias, Some(project.weight), project.bias];
        let [first, first_bias, second, second_bias] = dense;
        [Some(x), weight, bias, scale, shift, first, first_bias, second, second_bias, Some(self.gain)]
    }
}

/// The same of ops that record themselves: the hidden layer exists whole.
fn composed(cx: &Context, x: &Tensor, p: &ResidualMlp) -> Result<Tensor> {
    let layer =
        |x: &Tensor, p: &Dense| linear(cx, x, p.weight, &Epilogue { bias: p.bias, ..Epilogue::default() });
    let hidden = layer(&layer_norm(cx, x, &p.norm)?, &p.expand)?;
    let y = layer(&activate(cx, hidden, p.activation)?, &p.project)?;
    scaled_residual(cx, &y, p.gain, x)
}

/// The same on a GPU, which has no cache to hold some rows of the hidden layer in.
fn with_whole_layers(cx: &Context, x: &Tensor, p: &ResidualMlp) -> Result<Tensor> {
    let first = Epilogue { bias: p.expand.bias, activation: p.activation, ..Epilogue::default() };
    let second = Epilogue { bias: p.project.bias, ..Epilogue::default() };
    let hidden = linear(cx, &layer_norm(cx, x, &p.norm)?, p.expand.weight, &first)?;
    scaled_residual(cx, &linear(cx, &hidden, p.project.weight, &second)?, p.gain, x)
}

/// One layer over some rows.
fn dense(
    cx: &Context,
    values: &[f32],
    channels: usize,
    weight: &Tensor,
    epilogue: &Epilogue,
    first_row: usize,
    out: &mut [f32],
) -> Result<()> {
    // No modulation follows: samples need not be told apart.
    let rows = Rows { values, channels, per_sample: 1 };
    product(cx, &rows, weight, Layout::RowsAreOutputs, epilogue, first_row, out)
}

/// The rows of a group: as even as [`SCRATCH_ELEMENTS`] allows.
fn rows_at_once(rows: usize, hidden: usize) -> usize {
    let most = (SCRATCH_ELEMENTS / hidden.max(1)).max(1);
    rows.div_ceil(rows.div_ceil(most).max(1))
}

fn check(what: &str, weight: &Tensor, dims: [usize; 2]) -> Result<()> {
    if weight.dims() == dims {
        return Ok(());
    }
    Err(Error::argument(what, format!("{dims:?}"), weight.shape()))
}
