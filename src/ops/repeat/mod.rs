//! Each element several times in a row: a bias per channel, spread over the patch that the channel becomes.

mod cuda;

use crate::device::Context;
use crate::error::Result;
use crate::ops::kernels;
use crate::tensor::{DType, Tensor, autograd};

/// `y[i * times + j] = x[i]` for j below `times`.
///
/// # Shapes
/// `[n]` of any float type -> `[n * times]`, `F32`
///
/// # Errors
/// `InvalidArgument` if the elements are not floats; `OutOfMemory`.
pub fn repeat_each(cx: &Context, x: &Tensor, times: usize) -> Result<Tensor> {
    let _span = cx.op("repeat");
    let repeated = match cx.cuda()? {
        Some(stream) => cuda::repeat(cx, stream, x, times)?,
        None => {
            let wide = kernels::widened(cx, "a repeated vector", x)?;
            let mut out = Tensor::new(cx, "a repeated vector", &[x.elements() * times], DType::F32)?;
            let repeats = out.slice_mut::<f32>()?.chunks_exact_mut(times.max(1));
            repeats.zip(wide.slice::<f32>()?).for_each(|(out, x)| out.fill(*x));
            out
        }
    };
    autograd::record(cx, repeated, &[Some(x)], || {
        let to = x.tracked();
        move |cx, flow| flow.give(cx, to, |g| gradient(cx, g, times))
    })
}

/// The sum of the gradients of an element's repetitions.
fn gradient(cx: &Context, g: &Tensor, times: usize) -> Result<Tensor> {
    if let Some(stream) = cx.cuda()? {
        return cuda::gradient(cx, stream, g, times);
    }
    let repeats = g.slice::<f32>()?.chunks_exact(times.max(1));
    let mut sums = Tensor::new(cx, "a repeated vector", &[repeats.len()], DType::F32)?;
    sums.slice_mut::<f32>()?.iter_mut().zip(repeats).for_each(|(sum, g)| *sum = g.iter().sum());
    Ok(sums)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cuda::Precision;
    use crate::ops::check::{gradients, gradients_on_device, on_device, random};

    #[test]
    fn repeats_and_sums_back() {
        let define = |x: &[Vec<f64>]| x[0].iter().flat_map(|&x| [x; 4]).collect();
        let op = |cx: &Context, x: &[Tensor]| repeat_each(cx, &x[0], 4);
        gradients(&[random(&[5], 1)], op, define);
        gradients_on_device(&[random(&[5], 1)], op);
        on_device(&[&random(&[300], 1)], &[(Precision::F32, 0.0), (Precision::BF16, 1e-2)], op);
    }
}
