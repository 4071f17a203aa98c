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
    let _span = cx.op("widen");
    kernels::widened(cx, "widened weights", x)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cuda::Precision;
    use crate::ops::check;
    use crate::tensor::DType;

    #[test]
    fn widens_where_the_numbers_lie() {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let x = check::cast(&check::random(&[3, 67], 1), dtype);
            let y = check::on_threads(|cx| widen(cx, &x));
            check::close(&y, x.dims(), &check::wide(&x), 0.0);
            let Some(cx) = check::cuda(Precision::BF16) else { continue };
            let (stream, there) = (cx.cuda().unwrap().unwrap().clone(), check::moved(&cx, &x));
            let before = stream.downloads();
            let y = widen(&cx, &there).unwrap();
            assert_eq!(stream.downloads(), before, "the host read from the device");
            check::close(&y, x.dims(), &check::wide(&x), 0.0);
        }
    }
}
