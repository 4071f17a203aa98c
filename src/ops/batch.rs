//! Batches: tensors joined along their first dimension.

use crate::device::Context;
use crate::error::{Error, Result};
use crate::tensor::{MAX_RANK, Tensor};

/// # Shapes
/// each `[n_i, ..]`, alike but for the first dimension -> `[sum of n_i, ..]`
///
/// # Errors
/// `InvalidArgument` for no tensors or shapes and types that differ; `OutOfMemory`.
pub fn concat(cx: &Context, parts: &[&Tensor]) -> Result<Tensor> {
    let Some((first, dims)) = parts.first().and_then(|p| p.dims().split_first().map(|(_, inner)| (p, inner)))
    else {
        return Err(Error::argument("concat", "at least one tensor with a first dimension", "none"));
    };
    let mut entries = 0;
    for part in parts {
        if part.dims().get(1..) != Some(dims) || part.dtype() != first.dtype() {
            let expected = format!("[n, ..{dims:?}] of {}", first.dtype());
            return Err(Error::argument("concat", expected, format!("{} of {}", part.shape(), part.dtype())));
        }
        entries += part.dims()[0];
    }
    let mut shape = [entries; MAX_RANK];
    shape[1..=dims.len()].copy_from_slice(dims);
    Tensor::from_parts(cx, "a batch", &shape[..=dims.len()], parts)
}
