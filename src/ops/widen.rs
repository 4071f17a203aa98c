//! Small weights as `F32`: a copy in pooled memory, or the tensor itself where it is `F32` already.

use crate::device::Context;
use crate::error::Result;
use crate::ops::kernels;
use crate::tensor::Tensor;

/// # Shapes
/// any -> the same, `F32`
///
/// # Errors
/// `InvalidArgument` if the elements are not floats; `OutOfMemory`.
pub fn widen(cx: &Context, x: &Tensor) -> Result<Tensor> {
    kernels::widened(cx, "widened weights", x)
}
