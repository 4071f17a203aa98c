//! Instance normalisation (Ulyanov et al. 2016), without affine parameters.

use crate::device::Context;
use crate::error::{Error, Result};
use crate::ops::reduce::Columns;
use crate::ops::standardise::{Standardise, standardise};
use crate::tensor::Tensor;
use crate::tensor::autograd::record;

/// `y = (x - mean) / sqrt(var + eps)`, mean and biased variance over the pixels of each sample and channel.
///
/// # Shapes
/// `x` and the result `[N, H, W, C]`, `F32`; on a GPU of any float type.
///
/// # Errors
/// `InvalidArgument` for another shape, or a picture without pixels; `OutOfMemory`; `Cancelled`.
pub fn instance_norm(cx: &Context, x: &Tensor, eps: f32) -> Result<Tensor> {
    let _span = cx.op("instance_norm");
    let [groups, height, width, channels] = x.dims_of::<4>("instance norm input")?;
    let columns = Columns { groups, rows: height * width, channels };
    if columns.rows == 0 {
        return Err(Error::argument("instance norm input", "at least one pixel", x.shape()));
    }
    let p = Standardise { what: "instance norm", columns, eps, affine: None, reduce: None };
    let (out, moments) = standardise(cx, x, &p)?;
    record(cx, out, &[Some(x)], || {
        let x = x.clone();
        move |cx, flow| {
            flow.give(cx, x.tracked(), |g| {
                let sums = moments.gradient_sums(cx, [g, &x])?;
                moments.gradient(cx, [g, &x], None, sums, None)
            })
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cuda::Precision;
    use crate::ops::check;

    fn definition(x: &[f64], [n, h, w, c]: [usize; 4], eps: f64) -> Vec<f64> {
        let pixels = h * w;
        let mut y = x.to_vec();
        for (sample, channel) in (0..n).flat_map(|n| (0..c).map(move |c| (n, c))) {
            let at = |p: usize| (sample * pixels + p) * c + channel;
            let mean = (0..pixels).map(|p| x[at(p)]).sum::<f64>() / pixels as f64;
            let variance = (0..pixels).map(|p| (x[at(p)] - mean).powi(2)).sum::<f64>() / pixels as f64;
            (0..pixels).for_each(|p| y[at(p)] = (x[at(p)] - mean) / (variance + eps).sqrt());
        }
        y
    }

    #[test]
    fn agrees_with_the_definition() {
        for dims in [[1usize, 1, 1, 1], [3, 5, 7, 33], [2, 40, 30, 5], [1, 2, 2, 600]] {
            let x = check::random(&dims, 1);
            let y = check::on_batch(&x, |cx, x, _, _| instance_norm(cx, x, 1e-5));
            check::close(&y, &dims, &definition(&check::wide(&x), dims, 1e-5), 1e-6);
            let tolerances = [(Precision::F32, 1e-6), (Precision::BF16, 2e-2), (Precision::F16, 4e-3)];
            check::on_device(&[&x], &tolerances, |cx, x| instance_norm(cx, &x[0], 1e-5));
        }
        assert!(instance_norm(&check::cx(), &check::random(&[2, 3, 4], 1), 1e-5).is_err());
        assert!(instance_norm(&check::cx(), &check::random(&[2, 0, 4, 1], 1), 1e-5).is_err());
    }

    #[test]
    fn gradients_are_those_of_the_definition() {
        let x = check::random(&[2, 4, 3, 8], 1);
        check::gradients_on_device(&[x], |cx, x| instance_norm(cx, &x[0], 0.1));
        for dims in [[1usize, 1, 1, 1], [2, 3, 5, 3], [3, 1, 2, 4]] {
            check::gradients(
                &[check::random(&dims, 1)],
                |cx, x| instance_norm(cx, &x[0], 0.1),
                |x| definition(&x[0], dims, f64::from(0.1f32)),
            );
        }
    }
}
