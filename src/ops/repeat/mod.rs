//! Each element several times in a row: a bias per channel, spread over the patch that the channel becomes.

use crate::device::Context;
use crate::error::Result;
use crate::ops::kernels;
use crate::tensor::{DType, Tensor, autograd};

/// `y[i * times + j] = x[i]` for j below `times`.
///
/// # Shapes
/// `[n]` of any float type -> `[n * times]`
///
/// # Errors
/// `InvalidArgument` if the elements are not floats; `OutOfMemory`.
pub fn repeat_each(cx: &Context, x: &Tensor, times: usize) -> Result<Tensor> {
    let wide = kernels::widened(cx, "a repeated vector", x)?;
    let mut repeated = Tensor::new(cx, "a repeated vector", &[x.elements() * times], DType::F32)?;
    for (out, x) in repeated.slice_mut::<f32>()?.chunks_exact_mut(times.max(1)).zip(wide.slice::<f32>()?) {
        out.fill(*x);
    }
    autograd::record(cx, repeated, &[Some(x)], || {
        let (to, elements) = (x.tracked(), x.elements());
        move |cx, flow| {
            flow.give(cx, to, |gradient| {
                let mut sums = Tensor::new(cx, "a repeated vector", &[elements], DType::F32)?;
                let repeats = gradient.slice::<f32>()?.chunks_exact(times.max(1));
                sums.slice_mut::<f32>()?.iter_mut().zip(repeats).for_each(|(sum, g)| *sum = g.iter().sum());
                Ok(sums)
            })
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check::{gradients, random};

    #[test]
    fn repeats_and_sums_back() {
        let define = |x: &[Vec<f64>]| x[0].iter().flat_map(|&x| [x; 4]).collect();
        gradients(&[random(&[5], 1)], |cx, x| repeat_each(cx, &x[0], 4), define);
    }
}
