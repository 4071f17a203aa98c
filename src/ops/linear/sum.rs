//! A sum of products that share their outputs: what a dense layer over concatenated inputs computes, without
//! the concatenation.

use super::{Epilogue, linear};
use crate::device::Context;
use crate::device::gemm::Layout;
use crate::error::{Error, Result};
use crate::ops::widen::widen;
use crate::tensor::{DType, Tensor};

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
/// # Shapes
/// every x `F32 [.., I_i]` with the same outer dimensions -> `F32 [.., O]`
///
/// # Errors
/// `InvalidArgument` without terms or if shapes do not fit together; `OutOfMemory`; `Cancelled`.
pub fn linear_sum(cx: &Context, terms: &[Term], epilogue: &Epilogue) -> Result<Tensor> {
    let Some(first) = terms.first() else {
        return Err(Error::argument("linear sum", "at least one term", 0));
    };
    let outputs = |term: &Term| -> Result<usize> {
        let [rows, columns] = term.weight.dims_of("linear weight")?;
        Ok(if term.layout == Layout::RowsAreOutputs { rows } else { columns })
    };
    let n = outputs(first)?;
    let k: usize = terms.iter().map(|t| t.x.shape().channels()).sum();
    let mut weight = Tensor::new(cx, "joined weights", &[n, k], DType::F32)?;
    let mut dims = first.x.dims().to_vec();
    if let Some(last) = dims.last_mut() {
        *last = k;
    }
    let mut x = Tensor::new(cx, "joined inputs", &dims, DType::F32)?;
    let mut at = 0;
    for term in terms {
        let wide = widen(cx, term.weight)?;
        let [rows, columns] = wide.dims_of("linear weight")?;
        let values = wide.slice::<f32>()?;
        let inputs = term.x.shape().channels();
        for o in 0..n {
            for i in 0..inputs {
                let from = term.first_input + i;
                weight.slice_mut::<f32>()?[o * k + at + i] = match term.layout {
                    Layout::RowsAreOutputs => values[o * columns + from],
                    Layout::RowsAreInputs => values[from * columns + o],
                };
            }
        }
        let _ = rows;
        let source = term.x.slice::<f32>()?;
        for (out, from) in x.slice_mut::<f32>()?.chunks_exact_mut(k).zip(source.chunks_exact(inputs)) {
            out[at..at + inputs].copy_from_slice(from);
        }
        at += inputs;
    }
    linear(cx, &x, &weight, epilogue)
}
