//! Gradients of products, which are products: for y = x Wᵀ, `dx = dy W` and `dW = dyᵀ x`. An op that is such a product
//! with an epilogue runs on a tape as its [`composed`] definition.

#[cfg(test)]
mod tests;

use super::cuda::{self, Part};
use super::{Epilogue, MAX_TERMS, Term, WeightLayout as Layout, sides, sum, values};
use crate::device::Context;
use crate::device::gemm::{Factors, Gemm, MatrixA, MatrixB, Values, gemm};
use crate::error::Result;
use crate::ops::activation::Activation;
use crate::ops::elementwise;
use crate::ops::kernels::{self, per_cpu};
use crate::ops::sums;
use crate::tensor::autograd::{self, Flow, Tracked, record};
use crate::tensor::{DType, MAX_RANK, Tensor};

/// Numbers of one task of an elementwise loop.
const CHUNK: usize = 16 << 10;

/// The fewest rows that a task sums: few partial sums are then left.
const LEAST_ROWS: usize = 64;

/// Columns whose partial sums one task adds.
const COLUMNS: usize = 256;

/// Whether a product with this epilogue must be recorded.
pub(crate) fn records(cx: &Context, factors: &[Option<&Tensor>], e: &Epilogue) -> bool {
    autograd::records(cx, factors)
        || autograd::records(cx, &[e.channel_scale, e.bias, e.residual, e.modulation])
}

/// A product and its epilogue, op by op. `product` computes and records what it can with the part of the epilogue
/// that it is given: bias, gain and residual at the most.
///
/// # Errors
/// Those of the ops.
pub(crate) fn composed(
    cx: &Context,
    e: &Epilogue,
    product: impl FnOnce(&Epilogue) -> Result<Tensor>,
) -> Result<Tensor> {
    let plain = Epilogue::default();
    let fused = match (e.channel_scale, e.activation) {
        (Some(_), _) => plain,
        (None, Activation::None) => Epilogue { modulation: None, ..*e },
        (None, _) => Epilogue { bias: e.bias, ..plain },
    };
    let mut out = product(&fused)?;
    if let Some(scale) = e.channel_scale {
        let shift = match e.bias {
            Some(bias) => bias.clone(),
            None => Tensor::zeros(cx, "no bias", &[scale.elements()], DType::F32)?,
        };
        out = as_samples(out, |out| elementwise::affine_channels(cx, out, scale, &shift))?;
    }
    if e.activation != Activation::None {
        out = elementwise::activate(cx, out, e.activation)?;
    }
    if (e.channel_scale.is_some() || e.activation != Activation::None)
        && (e.gain != 1.0 || e.residual.is_some())
    {
        out = add_scaled(cx, &out, e.gain, e.residual)?;
    }
    match e.modulation {
        Some(modulation) => as_samples(out, |out| elementwise::modulate(cx, out, modulation)),
        None => Ok(out),
    }
}

/// Runs an op that counts samples: a vector is one.
fn as_samples(x: Tensor, op: impl FnOnce(Tensor) -> Result<Tensor>) -> Result<Tensor> {
    match *x.dims() {
        [channels] => op(x.reshape(&[1, channels])?)?.reshape(&[channels]),
        _ => op(x),
    }
}

/// `v * gain + residual`.
fn add_scaled(cx: &Context, v: &Tensor, gain: f32, residual: Option<&Tensor>) -> Result<Tensor> {
    let scaled = scale(cx, v.clone(), gain)?;
    let out = match residual {
        Some(residual) => elementwise::add(cx, &scaled.constant(), &residual.constant())?,
        None => scaled,
    };
    record(cx, out, &[Some(v), residual], || {
        let (to_v, to_residual) = (v.tracked(), residual.and_then(Tensor::tracked));
        move |cx, flow| {
            flow.give(cx, to_v, |dy| scale(cx, dy.clone(), gain))?;
            flow.give(cx, to_residual, |dy| Ok(dy.clone()))
        }
    })
}

/// `x * by`.
pub(crate) fn scale(cx: &Context, x: Tensor, by: f32) -> Result<Tensor> {
    if by == 1.0 {
        return Ok(x);
    }
    if let Some(stream) = cx.cuda()? {
        return cuda::scale(cx, stream, x, by);
    }
    kernels::in_place(cx, "a scaled gradient", x, CHUNK, |_, part| part.iter_mut().for_each(|v| *v *= by))
}

/// The backward pass of an epilogue of bias, gain and residual.
pub(crate) struct Finish {
    to_bias: Option<Tracked>,
    to_residual: Option<Tracked>,
    gain: f32,
}

impl Finish {
    pub(crate) fn of(e: &Epilogue) -> Self {
        let tracked = |t: Option<&Tensor>| t.and_then(Tensor::tracked);
        Finish { to_bias: tracked(e.bias), to_residual: tracked(e.residual), gain: e.gain }
    }

    /// Gives bias and residual theirs, and returns the gradient of the product.
    pub(crate) fn give(&self, cx: &Context, flow: &mut Flow) -> Result<Tensor> {
        flow.give(cx, self.to_residual, |dy| Ok(dy.clone()))?;
        let of_product = scale(cx, flow.gradient().clone(), self.gain)?;
        flow.give(cx, self.to_bias, |_| column_sums(cx, &of_product))?;
        Ok(of_product)
    }
}

/// [`super::linear_sum`] on a tape.
pub(super) fn recorded(cx: &Context, terms: &[Term], epilogue: &Epilogue) -> Result<Tensor> {
    composed(cx, epilogue, |fused| {
        let out = sum::compute(cx, terms, fused)?;
        let mut inputs = [None; 2 * MAX_TERMS + 2];
        (inputs[0], inputs[1]) = (fused.bias, fused.residual);
        for (pair, term) in inputs[2..].chunks_exact_mut(2).zip(terms) {
            (pair[0], pair[1]) = (Some(term.x), Some(term.weight));
        }
        record(cx, out, &inputs, || {
            let kept: Vec<Kept> = terms.iter().map(Kept::of).collect();
            let finish = Finish::of(fused);
            move |cx, flow| {
                let dy = finish.give(cx, flow)?;
                kept.iter().try_for_each(|term| term.give_input(cx, flow, &dy))?;
                (0..kept.len()).try_for_each(|i| Kept::give_weight(&kept, i, cx, flow, &dy))
            }
        })
    })
}

/// What the backward pass of a term needs.
struct Kept {
    /// Where the gradient of x goes, and the weight that it takes.
    toward_x: Option<(Tracked, Tensor)>,
    /// Where that of the weight goes, and the x that it takes.
    toward_weight: Option<(Tracked, Tensor)>,
    /// The dimensions of the weight, and which of its inputs the term has.
    weight: [usize; 2],
    layout: Layout,
    first_input: usize,
    inputs: usize,
}

impl Kept {
    fn of(term: &Term) -> Self {
        Kept {
            toward_x: term.x.tracked().map(|to| (to, term.weight.clone())),
            toward_weight: term.weight.tracked().map(|to| (to, term.x.clone())),
            weight: std::array::from_fn(|i| term.weight.dims().get(i).copied().unwrap_or(1)),
            layout: term.layout,
            first_input: term.first_input,
            inputs: term.x.shape().channels(),
        }
    }

    fn give_input(&self, cx: &Context, flow: &mut Flow, dy: &Tensor) -> Result<()> {
        let Some((to, weight)) = &self.toward_x else { return Ok(()) };
        flow.give(cx, Some(*to), |_| {
            let [_, outputs] = sides("linear weight", weight, self.layout)?;
            // The product with the weight read the other way, from its first input on.
            let (first, layout, leading) = match self.layout {
                Layout::RowsAreOutputs => (self.first_input, Layout::RowsAreInputs, self.weight[1]),
                Layout::RowsAreInputs => (self.first_input * outputs, Layout::RowsAreOutputs, outputs),
            };
            let mut dx = like(cx, dy, self.inputs)?;
            if let Some(stream) = cx.cuda()? {
                let part = Part { first, leading, layout: self.layout };
                cuda::input_gradient(cx, stream, dy, (weight, part), &mut dx)?;
                return Ok(dx);
            }
            let b = MatrixB { values: values(weight)?.skip(first), layout, leading };
            let terms = [Factors { k: outputs, a: MatrixA::rows(dy.slice()?, outputs), b }];
            let product = Gemm { m: dy.shape().rows(), n: self.inputs, terms: &terms, accumulate: false };
            gemm(cx, &product, dx.slice_mut()?, self.inputs, |_, _, _| ())?;
            Ok(dx)
        })
    }

    /// Gives the weight of term `i` its gradient, unless an earlier term has the same: all that share one write into
    /// one tensor.
    fn give_weight(all: &[Kept], i: usize, cx: &Context, flow: &mut Flow, dy: &Tensor) -> Result<()> {
        let Some((to, _)) = all[i].toward_weight else { return Ok(()) };
        if all[..i].iter().any(|earlier| earlier.shares_weight(&all[i])) {
            return Ok(());
        }
        flow.give(cx, Some(to), |_| {
            let sharing = || all[i..].iter().filter(|other| other.shares_weight(&all[i]));
            let whole = sharing().count() == 1 && all[i].is_whole();
            let allocate = if whole { Tensor::new } else { Tensor::zeros };
            let mut dw = allocate(cx, "a weight's gradient", &all[i].weight, DType::F32)?;
            sharing().try_for_each(|term| term.add_weight(cx, dy, !whole, &mut dw))?;
            Ok(dw)
        })
    }

    fn shares_weight(&self, other: &Kept) -> bool {
        let of = |kept: &Kept| kept.toward_weight.as_ref().map(|(to, _)| *to);
        of(self) == of(other) && self.weight == other.weight && self.layout == other.layout
    }

    fn is_whole(&self) -> bool {
        let all = self.weight[if self.layout == Layout::RowsAreOutputs { 1 } else { 0 }];
        self.inputs == all
    }

    /// Writes or adds what this term gives to its inputs of the weight.
    fn add_weight(&self, cx: &Context, dy: &Tensor, accumulate: bool, dw: &mut Tensor) -> Result<()> {
        let Some((_, x)) = &self.toward_weight else { return Ok(()) };
        let outputs = dy.shape().channels();
        if self.inputs == 0 || outputs == 0 {
            return Ok(());
        }
        let (factors, first, leading) = match self.layout {
            Layout::RowsAreOutputs => ([dy, x], self.first_input, self.weight[1]),
            Layout::RowsAreInputs => ([x, dy], self.first_input * outputs, outputs),
        };
        let place = Place { leading, accumulate };
        if let Some(stream) = cx.cuda()? {
            return cuda::transposed_product(cx, stream, factors, place, (dw, first));
        }
        let [a, b] = [Matrix::of(factors[0])?, Matrix::of(factors[1])?];
        transposed_product(cx, a, b, place, &mut dw.slice_mut()?[first..])
    }
}

/// Numbers in rows.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Matrix<'a> {
    /// Row after row.
    pub values: &'a [f32],
    /// Numbers per row.
    pub columns: usize,
}

impl<'a> Matrix<'a> {
    /// The rows of a tensor.
    fn of(x: &'a Tensor) -> Result<Self> {
        Ok(Matrix { values: x.slice()?, columns: x.shape().channels() })
    }
}

/// Where a product goes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place {
    /// Distance between its rows.
    pub leading: usize,
    /// Whether to add to what is there.
    pub accumulate: bool,
}

/// `out[i, j] (+)= sum over r of a[r, i] b[r, j]`, as `dyᵀ x` is: the sum runs over the rows of both.
///
/// # Errors
/// `InvalidArgument` if `out` is too short; `OutOfMemory`; `Cancelled`.
pub(crate) fn transposed_product(
    cx: &Context,
    a: Matrix,
    b: Matrix,
    place: Place,
    out: &mut [f32],
) -> Result<()> {
    let k = a.values.len().checked_div(a.columns).unwrap_or(0);
    let factors = Factors {
        k,
        a: MatrixA::columns(a.values, a.columns),
        b: MatrixB { values: Values::F32(b.values), layout: Layout::RowsAreInputs, leading: b.columns },
    };
    let product = Gemm { m: a.columns, n: b.columns, terms: &[factors], accumulate: place.accumulate };
    gemm(cx, &product, out, place.leading, |_, _, _| ())
}

/// `dx = dy W`: the gradient of the input of [`linear`](super::linear), or with the other layout of
/// [`linear_transposed`](super::linear_transposed).
///
/// # Shapes
/// `dy` `F32 [.., O]`, `weight` `[O, I]` or `[I, O]` of any float type -> `F32 [.., I]`
///
/// # Errors
/// `InvalidArgument` if shapes do not fit together; `OutOfMemory`; `Cancelled`.
pub(crate) fn input_gradient(cx: &Context, dy: &Tensor, weight: &Tensor, layout: Layout) -> Result<Tensor> {
    let plain = Epilogue::default();
    match layout {
        Layout::RowsAreOutputs => super::linear_transposed(cx, dy, weight, &plain),
        Layout::RowsAreInputs => super::linear(cx, dy, weight, &plain),
    }
}

/// `dW = dyᵀ x`, or `xᵀ dy` for a weight whose rows are inputs.
///
/// # Shapes
/// `x` `F32 [.., I]`, `dy` `F32 [.., O]` of as many rows -> `F32 [O, I]`, or `[I, O]`
///
/// # Errors
/// `InvalidArgument` if the rows are not as many; `OutOfMemory`; `Cancelled`.
pub(crate) fn weight_gradient(cx: &Context, x: &Tensor, dy: &Tensor, layout: Layout) -> Result<Tensor> {
    let [a, b] = match layout {
        Layout::RowsAreOutputs => [dy, x],
        Layout::RowsAreInputs => [x, dy],
    };
    let [rows, columns] = [a, b].map(|factor| factor.shape().channels());
    let mut dw = Tensor::new(cx, "a weight's gradient", &[rows, columns], DType::F32)?;
    let place = Place { leading: columns, accumulate: false };
    match cx.cuda()? {
        Some(stream) => cuda::transposed_product(cx, stream, [a, b], place, (&mut dw, 0))?,
        None => transposed_product(cx, Matrix::of(a)?, Matrix::of(b)?, place, dw.slice_mut()?)?,
    }
    Ok(dw)
}

/// `sums[c] = sum over rows of dy[.., c]`: the gradient of a bias. Rows are summed in groups of a size that C decides,
/// then the groups in ascending order.
///
/// # Shapes
/// `dy` `F32 [.., C]` -> `F32 [C]`
///
/// # Errors
/// `InvalidArgument` if `dy` is not `F32`; `OutOfMemory`; `Cancelled`.
pub(crate) fn column_sums(cx: &Context, dy: &Tensor) -> Result<Tensor> {
    if let Some(stream) = cx.cuda()? {
        return sums::columns_on(cx, stream, "sums of rows", dy);
    }
    let (rows, channels) = (dy.shape().rows(), dy.shape().channels());
    let values = dy.slice::<f32>()?;
    let per_group = kernels::rows_per_task(channels).max(LEAST_ROWS);
    let groups = rows.div_ceil(per_group);
    let mut partial = Tensor::new(cx, "sums of rows", &[groups, channels], DType::F32)?;
    kernels::parallel_chunks(cx, partial.slice_mut()?, channels, |i, sums| {
        let first = i * per_group;
        sum_rows(&values[first * channels..], per_group.min(rows - first), channels, sums);
    })?;
    let partial = partial.slice::<f32>()?;
    let mut out = Tensor::new(cx, "sums of rows", &[channels], DType::F32)?;
    kernels::parallel_chunks(cx, out.slice_mut()?, COLUMNS, |i, sums| {
        sum_rows(partial.get(i * COLUMNS..).unwrap_or(&[]), groups, channels, sums);
    })?;
    Ok(out)
}

#[inline(always)]
fn sum_body<const FMA: bool>(values: &[f32], rows: usize, stride: usize, sums: &mut [f32]) {
    sums.fill(0.0);
    for row in 0..rows {
        for (sum, v) in sums.iter_mut().zip(&values[row * stride..]) {
            *sum += v;
        }
    }
}

per_cpu! {
    /// The first columns of `rows` rows, `stride` apart, summed in ascending order.
    fn sum_rows(values: &[f32], rows: usize, stride: usize, sums: &mut [f32]) = sum_body
}

/// An uninitialised tensor of the shape of `x` with other channels.
fn like(cx: &Context, x: &Tensor, channels: usize) -> Result<Tensor> {
    let mut dims = [channels; MAX_RANK];
    let outer = x.dims().len().saturating_sub(1);
    dims[..outer].copy_from_slice(&x.dims()[..outer]);
    Tensor::new(cx, "an input's gradient", &dims[..=outer], DType::F32)
}
