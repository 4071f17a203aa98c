//! The sum of gradients on a GPU.

use std::sync::Arc;

use crate::device::Context;
use crate::device::cuda::{Launch, Parameter, Stream, kernels};
use crate::error::Result;
use crate::tensor::Tensor;

kernels!(KERNELS, "accumulate");

/// Adds the numbers of `added` to those of `sum` from number `start` on.
pub fn accumulate(
    cx: &Context,
    stream: &Arc<Stream>,
    (sum, start): (&mut Tensor, usize),
    added: &Tensor,
) -> Result<()> {
    let count = added.elements().min(sum.elements().saturating_sub(start));
    let added = added.on(cx, stream)?;
    let part = sum.on_mut(stream)? + (start * size_of::<f32>()) as u64;
    let parameters: [&dyn Parameter; 3] = [&part, &added.address(), &(count as i64)];
    // SAFETY: as the kernel declares; both have this many numbers of F32, which the caller checked.
    unsafe { stream.launch(&KERNELS, "accumulate", None, Launch::elements(count), &parameters) }
}
