//! What ops have to do, for who records where time goes: see [`crate::device::profile`].

use super::linear::{Epilogue, Term};
use crate::device::profile::Work;
use crate::tensor::Tensor;

/// Of an op that reads or writes each of `tensors` once: what is read and written twice stands there twice. A result
/// that does not exist yet is counted as an operand like it.
pub(crate) fn moving(tensors: &[&Tensor]) -> Work {
    Work { flops: 0, bytes: tensors.iter().map(|x| bytes(x)).sum() }
}

/// Of products: each of `rows` positions is multiplied by all elements of `weights`; `others` are read or written.
pub(crate) fn multiplying(rows: usize, weights: &[&Tensor], others: &[&Tensor]) -> Work {
    let elements: usize = weights.iter().map(|weight| weight.elements()).sum();
    Work { flops: 2 * (rows * elements) as u64, bytes: moving(weights).bytes + moving(others).bytes }
}

/// Of a convolution with a result of `dims`.
pub(crate) fn convolving(x: &Tensor, weight: &Tensor, dims: [usize; 4]) -> Work {
    let [n, height, width, channels] = dims;
    let mut work = multiplying(n * height * width, &[weight], &[x]);
    work.bytes += (n * height * width * channels) as u64 * size(x);
    work
}

/// Of a sum of products. Of a weight, only the inputs that a term sees are read.
pub(crate) fn of_terms(terms: &[Term], epilogue: &Epilogue) -> Work {
    let Some(first) = terms.first() else { return Work::default() };
    let rows = first.x.shape().rows();
    let outputs = first.outputs();
    let written = (rows * outputs) as u64 * size(first.x);
    let residual = epilogue.residual.map_or(0, bytes);
    let mut work = Work { flops: 0, bytes: written + residual };
    for term in terms {
        let weights = (term.x.shape().channels() * outputs) as u64;
        work.flops += 2 * rows as u64 * weights;
        work.bytes += bytes(term.x) + weights * size(term.weight);
    }
    work
}

fn bytes(x: &Tensor) -> u64 {
    x.elements() as u64 * size(x)
}

fn size(x: &Tensor) -> u64 {
    x.dtype().size() as u64
}
