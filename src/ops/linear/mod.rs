//! Matrix products with everything that may follow them, applied while an output row is hot.

pub(crate) mod cuda;
pub(crate) mod gradient;
mod int8;
mod sum;
#[cfg(test)]
mod tests;

use crate::device::Context;
pub use crate::device::gemm::Layout as WeightLayout;
use crate::device::gemm::{Factors, Gemm, Layout, MatrixA, MatrixB, Values, gemm};
use crate::device::int8::{Factors as Quantised, Product, gemm as gemm_in_eight_bits};
use crate::device::simd::fma;
use crate::error::{Error, Result};
pub use crate::ops::activation::Activation;
use crate::ops::kernels;
use crate::simd_dispatch;
use crate::tensor::{DType, Tensor};
pub use sum::{MAX_TERMS, Term, linear_sum};

/// What follows a product, per output element:
/// v = activation(acc * channel_scale + bias) * gain + residual, then v * (1 + a) + b.
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
    /// `F32 [N or 1, 2 O]`: a, then b, for each sample of the batch or for all. The first of several dimensions
    /// of an input counts samples; a vector is one.
    pub modulation: Option<&'a Tensor>,
    /// The type of the result.
    pub result: ResultType,
}

/// The type of a product's result. On the CPU it is `F32` in any case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ResultType {
    /// That of activations on the device.
    Activations,
    /// `F32`: what leaves a network.
    F32,
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
            result: ResultType::Activations,
        }
    }
}

/// y = x Wᵀ, then the epilogue.
///
/// # Shapes
/// x `F32 [.., I]`, weight `[O, I]` of any float type -> `F32 [.., O]`; on a GPU x of any float type, and the result of
/// that of its activations
///
/// # Errors
/// `InvalidArgument` if shapes do not fit together; `OutOfMemory`; `Cancelled`; `Device`.
pub fn linear(cx: &Context, x: &Tensor, weight: &Tensor, epilogue: &Epilogue) -> Result<Tensor> {
    multiply(cx, x, weight, Layout::RowsAreOutputs, epilogue)
}

/// y = x W, then the epilogue: the weight holds a row for each input.
///
/// # Shapes
/// x `F32 [.., I]`, weight `[I, O]` of any float type -> `F32 [.., O]`; types on a GPU as in [`linear`]
///
/// # Errors
/// As [`linear`].
pub fn linear_transposed(cx: &Context, x: &Tensor, weight: &Tensor, epilogue: &Epilogue) -> Result<Tensor> {
    multiply(cx, x, weight, Layout::RowsAreInputs, epilogue)
}

fn multiply(
    cx: &Context,
    x: &Tensor,
    weight: &Tensor,
    layout: Layout,
    epilogue: &Epilogue,
) -> Result<Tensor> {
    let [inputs, _] = sides("linear weight", weight, layout)?;
    if x.dims().last() != Some(&inputs) {
        return Err(Error::argument("linear input", format!("{inputs} channels"), x.shape()));
    }
    linear_sum(cx, &[Term { x, weight, layout, first_input: 0 }], epilogue)
}

/// Inputs and outputs of a weight.
fn sides(what: &str, weight: &Tensor, layout: Layout) -> Result<[usize; 2]> {
    let [rows, columns] = weight.dims_of(what)?;
    Ok(match layout {
        Layout::RowsAreOutputs => [columns, rows],
        Layout::RowsAreInputs => [rows, columns],
    })
}

/// The left side of a product.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rows<'a> {
    /// Row after row.
    pub values: &'a [f32],
    /// Numbers per row.
    pub channels: usize,
    /// Rows that belong to one sample of the batch: what a modulation is counted by.
    pub per_sample: usize,
}

/// `out[r] = epilogue(rows[r] op(weight))`; residual and modulation are those of row `first_row + r`.
///
/// # Errors
/// `InvalidArgument` if a vector of the epilogue has another length; `OutOfMemory`; `Cancelled`.
pub(crate) fn product(
    cx: &Context,
    rows: &Rows,
    weight: &Tensor,
    layout: Layout,
    epilogue: &Epilogue,
    first_row: usize,
    out: &mut [f32],
) -> Result<()> {
    // Filters `[O, kh, kw, I]` have more dimensions.
    let outputs = match layout {
        Layout::RowsAreOutputs => weight.dims().first(),
        Layout::RowsAreInputs => weight.dims().last(),
    };
    let n = outputs.copied().unwrap_or(1);
    let k = rows.channels;
    let leading = if layout == Layout::RowsAreOutputs { k } else { n };
    let b = MatrixB { values: values(weight)?, layout, leading };
    let terms = [Factors { k, a: MatrixA::rows(rows.values, k), b }];
    let m = out.len().checked_div(n).unwrap_or(0);
    finished(
        cx,
        &Gemm { m, n, terms: &terms, accumulate: false },
        &[],
        epilogue,
        Place { first_row, per_sample: rows.per_sample },
        out,
    )
}

/// Which rows of a result are computed.
#[derive(Debug, Clone, Copy)]
struct Place {
    /// The first of them.
    first_row: usize,
    /// As in [`Rows`].
    per_sample: usize,
}

/// A sum of products, of which those in eight bits come first, then the epilogue.
fn finished(
    cx: &Context,
    sum: &Gemm,
    quantised: &[Quantised],
    epilogue: &Epilogue,
    place: Place,
    out: &mut [f32],
) -> Result<()> {
    let outputs = sum.n;
    let vector =
        |what, v: Option<&Tensor>| v.map(|v| kernels::channel_vector(cx, what, v, outputs)).transpose();
    let scale = vector("linear channel scale", epilogue.channel_scale)?;
    let bias = vector("linear bias", epilogue.bias)?;
    let scale = scale.as_ref().map(Tensor::slice::<f32>).transpose()?;
    let bias = bias.as_ref().map(Tensor::slice::<f32>).transpose()?;
    let residual = epilogue.residual.map(Tensor::slice::<f32>).transpose()?;
    let per_sample = place.per_sample.max(1);
    let samples = (place.first_row + sum.m).div_ceil(per_sample);
    let modulation = epilogue.modulation.map(|m| modulation(m, samples, outputs)).transpose()?;
    let then = |row: usize, column: usize, out: &mut [f32]| {
        let row = place.first_row + row;
        affine(out, scale.map(|s| &s[column..]), bias.map(|b| &b[column..]));
        epilogue.activation.apply(out);
        if let Some(residual) = residual {
            add_residual(out, epilogue.gain, &residual[row * outputs + column..]);
        } else if epilogue.gain != 1.0 {
            out.iter_mut().for_each(|v| *v *= epilogue.gain);
        }
        if let Some((modulation, by_sample)) = modulation {
            let sample = if by_sample { row / per_sample } else { 0 };
            let of_sample = &modulation[sample * 2 * outputs..][..2 * outputs];
            let (a, b) = of_sample.split_at(outputs);
            modulate(out, &a[column..], &b[column..]);
        }
    };
    if quantised.is_empty() {
        return gemm(cx, sum, out, outputs, then);
    }
    let product = Product { m: sum.m, n: outputs, terms: quantised };
    if sum.terms.is_empty() {
        return gemm_in_eight_bits(cx, &product, out, then);
    }
    gemm_in_eight_bits(cx, &product, out, |_, _, _| ())?;
    gemm(cx, &Gemm { accumulate: true, ..*sum }, out, outputs, then)
}

/// The numbers of a modulation, and whether each sample has its own.
fn modulation(m: &Tensor, samples: usize, outputs: usize) -> Result<(&[f32], bool)> {
    let by_sample = modulation_by_sample(m, samples, outputs)?;
    Ok((m.slice()?, by_sample))
}

/// Whether each sample has a modulation of its own.
fn modulation_by_sample(m: &Tensor, samples: usize, outputs: usize) -> Result<bool> {
    let rows = m.shape().rows();
    if m.dims().last() != Some(&(2 * outputs)) || (rows != 1 && rows < samples) {
        let expected = format!("[{samples} or 1, {}]", 2 * outputs);
        return Err(Error::argument("linear modulation", expected, m.shape()));
    }
    Ok(rows > 1)
}

/// The numbers of a weight, where they lie.
fn values(weight: &Tensor) -> Result<Values<'_>> {
    match weight.dtype() {
        DType::F32 => Ok(Values::F32(weight.slice()?)),
        DType::F16 => Ok(Values::F16(weight.slice()?)),
        DType::BF16 => Ok(Values::BF16(weight.slice()?)),
        other => Err(Error::argument("linear weight", "a float type", other)),
    }
}

simd_dispatch! {
    fn affine<const FMA: bool>(out: &mut [f32], scale: Option<&[f32]>, bias: Option<&[f32]>) {
        match (scale, bias) {
            (None, None) => {}
            (None, Some(bias)) => out.iter_mut().zip(bias).for_each(|(v, b)| *v += b),
            (Some(scale), None) => out.iter_mut().zip(scale).for_each(|(v, s)| *v *= s),
            (Some(scale), Some(bias)) => {
                out.iter_mut().zip(scale.iter().zip(bias)).for_each(|(v, (s, b))| *v = fma::<FMA>(*v, *s, *b));
            }
        }
    }
}

simd_dispatch! {
    fn add_residual<const FMA: bool>(out: &mut [f32], gain: f32, residual: &[f32]) {
        out.iter_mut().zip(residual).for_each(|(v, r)| *v = fma::<FMA>(*v, gain, *r));
    }
}

simd_dispatch! {
    /// v * (1 + a) + b.
    pub(crate) fn modulate<const FMA: bool>(out: &mut [f32], a: &[f32], b: &[f32]) {
        out.iter_mut().zip(a.iter().zip(b)).for_each(|(v, (a, b))| *v = fma::<FMA>(*v, 1.0 + a, *b));
    }
}
