//! The mean over the pixels of an image.

mod cuda;

use crate::device::Context;
use crate::error::Result;
use crate::ops::kernels::{self, per_cpu};
use crate::tensor::autograd::record;
use crate::tensor::{DType, Tensor};

/// Pixels that are summed in one go. Fixed, so that the order of the whole sum is.
const PIXELS: usize = 64;

#[inline(always)]
fn sum_body<const FMA: bool>(rows: &[f32], sums: &mut [f32]) {
    sums.fill(0.0);
    for row in rows.chunks_exact(sums.len()) {
        for (sum, v) in sums.iter_mut().zip(row) {
            *sum += v;
        }
    }
}

per_cpu! {
    /// The sum over rows, column by column.
    fn sum_rows(rows: &[f32], sums: &mut [f32]) = sum_body
}

/// `y[n, c] = mean over i, j of x[n, i, j, c]`; 0 for an image without pixels.
///
/// # Shapes
/// `x` `[N, H, W, C]`; the result `[N, C]`. `F32`, on a GPU of any float type.
///
/// # Errors
/// `InvalidArgument` if `x` is not `[N, H, W, C]` of such a type.
pub fn pool(cx: &Context, x: &Tensor) -> Result<Tensor> {
    let _span = cx.op("pool");
    let [_, height, width, _] = x.dims_of::<4>("pool input")?;
    let out = match cx.cuda()? {
        Some(stream) => cuda::pool(cx, stream, x)?,
        None => pool_on_host(cx, x)?,
    };
    record(cx, out, &[Some(x)], || {
        let (to, dims) = (x.tracked(), x.shape());
        move |cx, flow| flow.give(cx, to, |g| spread(cx, g, dims.dims(), height * width))
    })
}

fn pool_on_host(cx: &Context, x: &Tensor) -> Result<Tensor> {
    let [samples, height, width, channels] = x.dims_of::<4>("pool input")?;
    let input = x.slice::<f32>()?;
    let pixels = height * width;
    let blocks = pixels.div_ceil(PIXELS);
    let mut partial = Tensor::new(cx, "pool sums", &[samples, blocks, channels], DType::F32)?;
    kernels::parallel_chunks(cx, partial.slice_mut()?, channels, |i, sums| {
        let (n, first) = (i / blocks, i % blocks * PIXELS);
        let count = PIXELS.min(pixels - first) * channels;
        sum_rows(&input[(n * pixels + first) * channels..][..count], sums);
    })?;
    let partial = partial.slice::<f32>()?;
    let mut out = Tensor::new(cx, "pool", &[samples, channels], DType::F32)?;
    kernels::parallel_chunks(cx, out.slice_mut()?, channels, |n, means| {
        sum_rows(&partial[n * blocks * channels..][..blocks * channels], means);
        means.iter_mut().for_each(|v| *v /= pixels.max(1) as f32);
    })?;
    Ok(out)
}

/// A share of the mean's gradient for each of its pixels.
fn spread(cx: &Context, g: &Tensor, dims: &[usize], pixels: usize) -> Result<Tensor> {
    if let Some(stream) = cx.cuda()? {
        return cuda::spread(cx, stream, g, dims, pixels);
    }
    let (channels, share) = (g.shape().channels(), 1.0 / pixels.max(1) as f32);
    let means = g.slice::<f32>()?;
    let mut out = Tensor::new(cx, "gradient of a pool", dims, DType::F32)?;
    let rows = kernels::rows_per_task(channels);
    kernels::parallel_chunks(cx, out.slice_mut()?, rows * channels, |i, part| {
        for (row, pixel) in (i * rows..).zip(part.chunks_exact_mut(channels)) {
            let means = &means[row / pixels * channels..];
            pixel.iter_mut().zip(means).for_each(|(v, g)| *v = g * share);
        }
    })?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cuda::Precision;
    use crate::ops::check;

    #[test]
    fn agrees_with_the_definition() {
        for dims in [[1usize, 1, 1, 1], [3, 5, 7, 33], [2, 9, 15, 130], [1, 8, 8, 4]] {
            let [n, h, w, c] = dims;
            let x = check::random(&dims, 1);
            let wide = check::wide(&x);
            let expected: Vec<f64> = (0..n * c)
                .map(|i| {
                    let image = &wide[i / c * h * w * c..][..h * w * c];
                    image.iter().skip(i % c).step_by(c).sum::<f64>() / (h * w) as f64
                })
                .collect();
            check::close(&check::on_batch(&x, |cx, x, _, _| pool(cx, x)), &[n, c], &expected, 5e-7);
            let halves = [(Precision::F32, 1e-6), (Precision::BF16, 1e-2), (Precision::F16, 2e-3)];
            check::on_device(&[&x], &halves, |cx, t| pool(cx, &t[0]));
        }
        assert!(pool(&check::cx(), &check::random(&[2, 3, 4], 1)).is_err());
    }

    #[test]
    fn gradients_are_those_of_the_definition() {
        for [n, h, w, c] in [[1usize, 1, 1, 1], [3, 2, 7, 5]] {
            check::gradients_on_device(&[check::random(&[n, h, w, c], 1)], |cx, x| pool(cx, &x[0]));
            check::gradients(
                &[check::random(&[n, h, w, c], 1)],
                |cx, x| pool(cx, &x[0]),
                |x| {
                    let of = |i: usize, p: usize| x[0][(i / c * h * w + p) * c + i % c] / (h * w) as f64;
                    (0..n * c).map(|i| (0..h * w).map(|p| of(i, p)).sum()).collect()
                },
            );
        }
    }
}
