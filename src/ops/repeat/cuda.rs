//! Repeated elements on a GPU.

use std::sync::Arc;

use crate::device::Context;
use crate::device::cuda::{Launch, Precision, Stream, kernels};
use crate::error::Result;
use crate::tensor::{DType, Tensor};

kernels!(KERNELS, "repeat");

/// [`super::repeat_each`] without recording. `F32` in every precision, as biases are used.
pub fn repeat(cx: &Context, stream: &Arc<Stream>, x: &Tensor, times: usize) -> Result<Tensor> {
    let from = x.on_as(cx, stream, "a repeated vector", Precision::F32)?;
    launch(cx, stream, "repeat_each", from.address(), (x.elements() * times, times))
}

/// The sums over the repetitions.
pub fn gradient(cx: &Context, stream: &Arc<Stream>, g: &Tensor, times: usize) -> Result<Tensor> {
    let elements = g.elements() / times.max(1);
    launch(cx, stream, "repeat_each_gradient", g.on(cx, stream)?.address(), (elements, times))
}

/// Both kernels take their input, `[count]` or `times` as many, and give `[count]`.
fn launch(
    cx: &Context,
    stream: &Arc<Stream>,
    kernel: &'static str,
    from: u64,
    (count, times): (usize, usize),
) -> Result<Tensor> {
    let mut out = Tensor::new(cx, "a repeated vector", &[count], DType::F32)?;
    if count == 0 {
        return Ok(out);
    }
    let to = out.on_mut(stream)?;
    // SAFETY: as the kernels declare; `out` has `count` numbers, and the callers' input what is read for them.
    unsafe {
        stream.launch(
            &KERNELS,
            kernel,
            None,
            Launch::elements(count),
            &[&from, &to, &(count as i64), &(times as i32)],
        )?;
    }
    Ok(out)
}
