//! A sum of products that share their outputs: what a dense layer over concatenated inputs computes, without
//! the concatenation.

use super::cuda::{self, Part};
use super::int8::Weights;
use super::{Epilogue, Place, finished, gradient, sides, values};
use crate::device::Context;
use crate::device::gemm::{Factors, Gemm, Layout, MatrixA, MatrixB, Values};
use crate::error::{Error, Result};
use crate::ops::work;
use crate::tensor::{DType, MAX_RANK, Tensor};

/// The most terms of a sum: their list is held inline.
pub const MAX_TERMS: usize = 8;

/// One product of a sum: x times some of the inputs of a weight.
#[derive(Debug, Clone, Copy)]
pub struct Term<'a> {
    /// `F32 [.., I]`.
    pub x: &'a Tensor,
    /// `[O, K]` or `[K, O]` of any float type, K >= first_input + I.
    pub weight: &'a Tensor,
    /// Which of the two.
    pub layout: Layout,
    /// The input of the weight that the first channel of x is.
    pub first_input: usize,
}

/// y = sum over terms of x W[first_input .. first_input + I]ᵀ, then the epilogue.
///
/// Neither inputs nor weights are copied. Terms are summed in their order.
///
/// # Shapes
/// every x `F32 [.., I_i]` with the same outer dimensions -> `F32 [.., O]`; types on a GPU as in
/// [`linear`](super::linear)
///
/// # Errors
/// `InvalidArgument` without terms, with more than [`MAX_TERMS`], or if shapes do not fit together;
/// `OutOfMemory`; `Cancelled`.
pub fn linear_sum(cx: &Context, terms: &[Term], epilogue: &Epilogue) -> Result<Tensor> {
    let _span = cx.op("linear").working(|| work::of_terms(terms, epilogue));
    if terms.iter().any(|term| gradient::records(cx, &[Some(term.x), Some(term.weight)], epilogue)) {
        return gradient::recorded(cx, terms, epilogue);
    }
    compute(cx, terms, epilogue)
}

/// [`linear_sum`] without a tape.
pub(super) fn compute(cx: &Context, terms: &[Term], epilogue: &Epilogue) -> Result<Tensor> {
    let Some(first) = terms.first().filter(|_| terms.len() <= MAX_TERMS) else {
        return Err(Error::argument("linear sum", format!("1 to {MAX_TERMS} terms"), terms.len()));
    };
    let [_, outputs] = sides("linear weight", first.weight, first.layout)?;
    let Some((_, outer)) = first.x.dims().split_last() else {
        return Err(Error::argument("linear input", "at least one dimension", first.x.shape()));
    };
    let none = Part { first: 0, leading: 0, layout: Layout::RowsAreOutputs };
    let mut parts = [(first, none); MAX_TERMS];
    for (part, term) in parts.iter_mut().zip(terms) {
        *part = (term, term.part(outer, outputs)?);
    }
    let parts = &parts[..terms.len()];
    let mut dims = [outputs; MAX_RANK];
    dims[..outer.len()].copy_from_slice(outer);
    let dims = &dims[..=outer.len()];
    if let Some(residual) = epilogue.residual.filter(|r| r.dims() != dims) {
        return Err(Error::argument("linear residual", format!("{dims:?}"), residual.shape()));
    }
    let m = first.x.shape().rows();
    let samples = outer.first().copied().unwrap_or(1);
    let per_sample = m / samples.max(1);
    if let Some(stream) = cx.cuda()? {
        return cuda::compute(cx, stream, parts, epilogue, (dims, per_sample));
    }
    let none = MatrixB { values: Values::F32(&[]), layout: Layout::RowsAreOutputs, leading: 0 };
    let mut factors = [Factors { k: 0, a: MatrixA::rows(&[], 0), b: none }; MAX_TERMS];
    let (mut quantised, mut count) = (Weights::default(), 0);
    for (term, part) in parts {
        let whole = term.factors(part)?;
        if !quantised.take(cx, term.weight, &whole, outputs)? {
            factors[count] = whole;
            count += 1;
        }
    }
    let sum = Gemm { m, n: outputs, terms: &factors[..count], accumulate: false };
    let mut out = Tensor::new(cx, "linear output", dims, DType::F32)?;
    let place = Place { first_row: 0, per_sample };
    quantised.with(|quantised| finished(cx, &sum, quantised, epilogue, place, out.slice_mut()?))?;
    Ok(out)
}

impl<'a> Term<'a> {
    /// Outputs of its weight.
    pub(crate) fn outputs(&self) -> usize {
        let dims = self.weight.dims();
        let side = if self.layout == Layout::RowsAreOutputs { dims.first() } else { dims.last() };
        side.copied().unwrap_or(0)
    }

    /// The part of its weight, in a sum over rows of the dimensions `outer` with this many outputs.
    ///
    /// # Errors
    /// `InvalidArgument` if this term does not belong to such a sum, or its weight lacks some of its inputs.
    fn part(&self, outer: &[usize], outputs: usize) -> Result<Part> {
        let [inputs, n] = sides("linear weight", self.weight, self.layout)?;
        if n != outputs {
            return Err(Error::argument("linear weight", format!("{outputs} outputs"), self.weight.shape()));
        }
        let Some((&k, _)) = self.x.dims().split_last().filter(|(_, own)| *own == outer) else {
            let expected = format!("channels after the dimensions {outer:?}");
            return Err(Error::argument("linear input", expected, self.x.shape()));
        };
        if self.first_input.checked_add(k).is_none_or(|end| end > inputs) {
            let expected = format!("{k} inputs from input {} on", self.first_input);
            return Err(Error::argument("linear weight", expected, self.weight.shape()));
        }
        let (first, leading) = match self.layout {
            Layout::RowsAreOutputs => (self.first_input, inputs),
            Layout::RowsAreInputs => (self.first_input * n, n),
        };
        Ok(Part { first, leading, layout: self.layout })
    }

    /// # Errors
    /// `InvalidArgument` for other types than those of a product.
    fn factors(&self, part: &Part) -> Result<Factors<'a>> {
        let k = self.x.shape().channels();
        let values = values(self.weight)?.skip(part.first);
        let b = MatrixB { values, layout: part.layout, leading: part.leading };
        Ok(Factors { k, a: MatrixA::rows(self.x.slice()?, k), b })
    }
}
