//! The noise prediction of Stage C from its last layer (paper, section 3.2): (x - a) / (|1 - b| + 1e-5).

use crate::device::Context;
use crate::error::{Error, Result};
use crate::tensor::{DType, Tensor};

/// Keeps the quotient finite where b reaches 1.
const EPS: f32 = 1e-5;

/// # Shapes
/// x `[N, H, W, C]`, head `[N, H, W, 2 C]` (a, then b) -> `[N, H, W, C]`
///
/// # Errors
/// `InvalidArgument` for other shapes; `OutOfMemory`.
pub fn noise_from_head(cx: &Context, x: &Tensor, head: &Tensor) -> Result<Tensor> {
    let channels = x.shape().channels();
    if head.shape().rows() != x.shape().rows() || head.shape().channels() != 2 * channels {
        let expected = format!("{:?} with {} channels", x.dims(), 2 * channels);
        return Err(Error::argument("noise head", expected, head.shape()));
    }
    let mut noise = Tensor::new(cx, "predicted noise", x.dims(), DType::F32)?;
    let rows = x.slice::<f32>()?.chunks_exact(channels).zip(head.slice::<f32>()?.chunks_exact(2 * channels));
    for (out, (x, head)) in noise.slice_mut::<f32>()?.chunks_exact_mut(channels).zip(rows) {
        let (a, b) = head.split_at(channels);
        for (((out, x), a), b) in out.iter_mut().zip(x).zip(a).zip(b) {
            *out = (x - a) / ((1.0 - b).abs() + EPS);
        }
    }
    Ok(noise)
}
