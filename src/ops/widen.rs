//! Small weights as `F32`: a copy in pooled memory, or the tensor itself where it is `F32` already.

use half::{bf16, f16};

use crate::device::Context;
use crate::error::{Error, Result};
use crate::tensor::{DType, Tensor};

/// # Shapes
/// any -> the same, `F32`
///
/// # Errors
/// `InvalidArgument` if the elements are not floats; `OutOfMemory`.
pub fn widen(cx: &Context, x: &Tensor) -> Result<Tensor> {
    if x.dtype() == DType::F32 {
        return Ok(x.clone());
    }
    let mut y = Tensor::new(cx, "widened weights", x.dims(), DType::F32)?;
    let out = y.slice_mut::<f32>()?;
    match x.dtype() {
        DType::F16 => out.iter_mut().zip(x.slice::<f16>()?).for_each(|(y, x)| *y = x.to_f32()),
        DType::BF16 => out.iter_mut().zip(x.slice::<bf16>()?).for_each(|(y, x)| *y = x.to_f32()),
        other => return Err(Error::argument("widen", "a float tensor", other)),
    }
    Ok(y)
}
