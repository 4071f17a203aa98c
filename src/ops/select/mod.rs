//! One token of each sequence: what CLIP's text towers pool their output from (Radford et al. 2021).

mod cuda;

use crate::device::Context;
use crate::error::{Error, Result};
use crate::ops::kernels;
use crate::tensor::autograd::record;
use crate::tensor::{DType, Tensor};

/// `y[n, c] = x[n, positions[n], c]`.
///
/// # Shapes
/// `x` `[N, T, C]`, `F32`, on a GPU of any float type; N positions; the result `[N, C]`.
///
/// # Errors
/// `InvalidArgument` for another number of positions, or one outside `0 .. T`.
pub fn select_tokens(cx: &Context, x: &Tensor, positions: &[usize]) -> Result<Tensor> {
    let _span = cx.op("select");
    let [samples, tokens, channels] = x.dims_of::<3>("selected tokens")?;
    if positions.len() != samples || positions.iter().any(|&position| position >= tokens) {
        let expected = format!("{samples} within 0 .. {tokens}");
        return Err(Error::argument("positions of tokens", expected, format!("{positions:?}")));
    }
    let out = match cx.cuda()? {
        Some(stream) => cuda::select(cx, stream, x, positions)?,
        None => {
            let input = x.slice::<f32>()?;
            let mut out = Tensor::new(cx, "selected tokens", &[samples, channels], DType::F32)?;
            kernels::parallel_chunks(cx, out.slice_mut()?, channels, |n, part| {
                part.copy_from_slice(&input[(n * tokens + positions[n]) * channels..][..channels]);
            })?;
            out
        }
    };
    record(cx, out, &[Some(x)], || {
        let (to, positions) = (x.tracked(), positions.to_vec());
        move |cx, flow| flow.give(cx, to, |g| gradient(cx, g, tokens, &positions))
    })
}

/// The gradient of all tokens: 0 for those that were not selected.
fn gradient(cx: &Context, g: &Tensor, tokens: usize, positions: &[usize]) -> Result<Tensor> {
    if let Some(stream) = cx.cuda()? {
        return cuda::gradient(cx, stream, g, tokens, positions);
    }
    let (values, channels) = (g.slice::<f32>()?, g.shape().channels());
    let dims = [positions.len(), tokens, channels];
    let mut all = Tensor::new(cx, "gradient of tokens", &dims, DType::F32)?;
    kernels::parallel_chunks(cx, all.slice_mut()?, tokens * channels, |n, part| {
        part.fill(0.0);
        part[positions[n] * channels..][..channels].copy_from_slice(&values[n * channels..][..channels]);
    })?;
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cuda::Precision;
    use crate::ops::check;

    #[test]
    fn agrees_with_the_definition_and_so_do_gradients() {
        for [n, t, c] in [[1usize, 1, 1], [3, 5, 7]] {
            let x = check::random(&[n, t, c], 1);
            let positions: Vec<usize> = (0..n).map(|n| n * 2 % t).collect();
            let definition = |x: &[f64]| -> Vec<f64> {
                positions.iter().enumerate().flat_map(|(n, p)| x[(n * t + p) * c..][..c].to_vec()).collect()
            };
            let y = check::on_threads(|cx| select_tokens(cx, &x, &positions));
            check::close(&y, &[n, c], &definition(&check::wide(&x)), 0.0);
            let op = |cx: &Context, x: &[Tensor]| select_tokens(cx, &x[0], &positions);
            check::on_device(&[&x], &[(Precision::F32, 0.0), (Precision::BF16, 1e-2)], op);
            check::gradients_on_device(std::slice::from_ref(&x), op);
            check::gradients(&[x], op, |x| definition(&x[0]));
        }
        let (cx, x) = (check::cx(), check::random(&[2, 3, 4], 1));
        assert!(select_tokens(&cx, &x, &[0]).is_err());
        assert!(select_tokens(&cx, &x, &[0, 3]).is_err());
    }
}
