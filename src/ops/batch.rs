//! Batches: tensors joined along their first dimension.

use crate::device::Context;
use crate::error::{Error, Result};
use crate::ops::work;
use crate::tensor::autograd::{Tracked, record};
use crate::tensor::{MAX_RANK, Tensor};

/// # Shapes
/// each `[n_i, ..]`, alike but for the first dimension -> `[sum of n_i, ..]`
///
/// # Errors
/// `InvalidArgument` for no tensors or shapes and types that differ; `OutOfMemory`.
pub fn concat(cx: &Context, parts: &[&Tensor]) -> Result<Tensor> {
    let _span = cx.op("concat").working(|| work::moving(&[parts, parts].concat()));
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
    let joined = Tensor::from_parts(cx, "a batch", &shape[..=dims.len()], parts)?;
    let inputs: Vec<Option<&Tensor>> = parts.iter().map(|&part| Some(part)).collect();
    record(cx, joined, &inputs, || {
        let to: Vec<(Option<Tracked>, usize)> = parts.iter().map(|p| (p.tracked(), p.dims()[0])).collect();
        move |cx, flow| {
            let mut first = 0;
            for (to, count) in to {
                flow.give(cx, to, |g| g.narrow(first, count))?;
                first += count;
            }
            Ok(())
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check;

    #[test]
    fn gradients_are_those_of_the_parts() {
        let inputs = [check::random(&[1, 3, 2], 1), check::random(&[4, 3, 2], 2)];
        check::gradients(
            &inputs,
            |cx, x| concat(cx, &[&x[1], &x[0], &x[1]]),
            |x| [&x[1][..], &x[0], &x[1]].concat(),
        );
        let constant = check::random(&[2, 3, 2], 3);
        let gradient = |cx: &Context, x: &[Tensor]| concat(cx, &[&x[0], &constant]);
        check::gradients(&inputs[..1], gradient, |x| [&x[0][..], &check::wide(&constant)].concat());
    }
}
