//! The loss of telling two kinds apart, from numbers before the sigmoid: nothing overflows.

mod cuda;
#[cfg(test)]
mod tests;

use crate::device::Context;
use crate::error::{Error, Result};
use crate::tensor::autograd::record;
use crate::tensor::{DType, Tensor};

/// The mean of `-t ln p - (1 - t) ln(1 - p)`, `p = sigmoid(x)`, where t is the target of the element's sample.
///
/// # Shapes
/// `x` `[N, ..]`, `F32`, with at least one element; N targets; the result `[1]`.
///
/// # Errors
/// `InvalidArgument` for another number of targets; `OutOfMemory`.
pub fn binary_cross_entropy(cx: &Context, x: &Tensor, targets: &[f32]) -> Result<Tensor> {
    let _span = cx.op("binary_cross_entropy");
    let samples = x.dims().first().copied().unwrap_or(0);
    if targets.len() != samples || x.elements() == 0 {
        let expected = format!("a target for each sample of {}", x.shape());
        return Err(Error::argument("binary cross-entropy", expected, targets.len()));
    }
    // A number for each patch of a picture: too few for several threads.
    let per_sample = x.elements() / samples;
    let out = match cx.cuda()? {
        Some(stream) => cuda::loss(cx, stream, x, targets)?,
        None => {
            let pairs = x.slice::<f32>()?.chunks_exact(per_sample).zip(targets);
            let sum: f64 =
                pairs.map(|(x, &t)| x.iter().map(|&x| loss(f64::from(x), f64::from(t))).sum::<f64>()).sum();
            Tensor::from_slice(&[1], &[(sum / x.elements() as f64) as f32])?
        }
    };
    record(cx, out, &[Some(x)], || {
        let (x, targets) = (x.clone(), targets.to_vec());
        move |cx, flow| {
            flow.give(cx, x.tracked(), |g| {
                if let Some(stream) = cx.cuda()? {
                    return cuda::gradient(cx, stream, &x, &targets, g);
                }
                let scale = f64::from(g.slice::<f32>()?[0]) / x.elements() as f64;
                let mut out = Tensor::new(cx, "binary cross-entropy gradient", x.dims(), DType::F32)?;
                let samples = x.slice::<f32>()?.chunks_exact(per_sample).zip(&targets);
                for (out, (x, &t)) in out.slice_mut::<f32>()?.chunks_exact_mut(per_sample).zip(samples) {
                    for (out, &x) in out.iter_mut().zip(x) {
                        *out = (scale * (sigmoid(f64::from(x)) - f64::from(t))) as f32;
                    }
                }
                Ok(out)
            })
        }
    })
}

/// max(x, 0) - t x + ln(1 + e^-|x|).
fn loss(x: f64, t: f64) -> f64 {
    x.max(0.0) - t * x + (-x.abs()).exp().ln_1p()
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}
