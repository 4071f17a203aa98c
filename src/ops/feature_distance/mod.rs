//! How far two maps of features point in different directions: one layer's part of LPIPS (Zhang et al. 2018,
//! arXiv:1801.03924, equation 1).

mod cuda;

use crate::device::Context;
use crate::device::scratch::Doubles;
use crate::error::{Error, Result};
use crate::ops::kernels::{self, mul_add, per_cpu};
use crate::simd_dispatch;
use crate::tensor::autograd::{record, refuse};
use crate::tensor::{DType, Tensor};

/// Added to the length of a pixel's features.
const NORM_EPS: f32 = 1e-10;

/// Sums that a pixel keeps side by side.
const LANES: usize = 16;

/// The mean over samples and pixels of `sum over c of w[c] (x[c] / (|x| + 1e-10) - y[c] / (|y| + 1e-10))^2`, the
/// lengths over the channels of a pixel. Where a length is 0 the gradient is 0. No gradient goes to `w`.
///
/// # Shapes
/// `x` and `y` `[N, H, W, C]`, `F32`, on a GPU of any float type, with at least one pixel; `w` C elements of any float
/// type; the result `F32 [1]`.
///
/// # Errors
/// `InvalidArgument` if shapes do not fit; `OutOfMemory`; `Cancelled`.
pub fn feature_distance(cx: &Context, x: &Tensor, y: &Tensor, w: &Tensor) -> Result<Tensor> {
    let _span = cx.op("feature_distance");
    refuse(cx, "feature distance", &[w])?;
    if x.dims() != y.dims() {
        return Err(Error::argument("feature distance", format!("the shape {}", x.shape()), y.shape()));
    }
    let [samples, height, width, channels] = x.dims_of::<4>("features")?;
    let pixels = samples * height * width;
    if pixels == 0 || channels == 0 {
        return Err(Error::argument("features", "at least one", x.shape()));
    }
    if w.elements() != channels {
        return Err(Error::argument("weights of features", format!("{channels} elements"), w.shape()));
    }
    let out = match cx.cuda()? {
        Some(stream) => cuda::mean(cx, stream, [x, y], w)?,
        None => mean(cx, [x, y], w)?,
    };
    record(cx, out, &[Some(x), Some(y)], || {
        let (x, y, w) = (x.clone(), y.clone(), w.clone());
        move |cx, flow| {
            flow.give(cx, x.tracked(), |g| gradient(cx, g, [&x, &y], &w))?;
            flow.give(cx, y.tracked(), |g| gradient(cx, g, [&y, &x], &w))
        }
    })
}

/// [`feature_distance`] on the CPU, without recording.
fn mean(cx: &Context, [x, y]: [&Tensor; 2], w: &Tensor) -> Result<Tensor> {
    let channels = w.elements();
    let pixels = x.elements() / channels;
    let weights = kernels::widened(cx, "weights of features", w)?;
    let (a, b, w) = (x.slice::<f32>()?, y.slice::<f32>()?, weights.slice::<f32>()?);
    let rows = kernels::rows_per_task(channels);
    let mut sums = Doubles::new(cx.device(), "feature distances", pixels.div_ceil(rows))?;
    kernels::parallel_chunks(cx, sums.values_mut(), 1, |i, sum| {
        let range = i * rows * channels..a.len().min((i + 1) * rows * channels);
        sum[0] = distances(&a[range.clone()], &b[range], w);
    })?;
    Tensor::from_slice(&[1], &[(sums.values().iter().sum::<f64>() / pixels as f64) as f32])
}

/// The gradient of the first of two maps; the distance is the same both ways.
fn gradient(cx: &Context, g: &Tensor, [x, y]: [&Tensor; 2], weights: &Tensor) -> Result<Tensor> {
    if let Some(stream) = cx.cuda()? {
        return cuda::gradient(cx, stream, g, [x, y], weights);
    }
    let channels = weights.elements();
    let weights = kernels::widened(cx, "weights of features", weights)?;
    let scale = (2.0 * f64::from(g.slice::<f32>()?[0]) * channels as f64 / x.elements() as f64) as f32;
    let (a, b, w) = (x.slice::<f32>()?, y.slice::<f32>()?, weights.slice::<f32>()?);
    let mut out = Tensor::new(cx, "feature distance gradient", x.dims(), DType::F32)?;
    let chunk = kernels::rows_per_task(channels) * channels;
    kernels::parallel_chunks(cx, out.slice_mut::<f32>()?, chunk, |i, part| {
        let range = i * chunk..i * chunk + part.len();
        gradients(&a[range.clone()], &b[range], w, scale, part);
    })?;
    Ok(out)
}

#[inline(always)]
fn length<const FMA: bool>(x: &[f32]) -> f32 {
    kernels::dot::<FMA>(x, x).sqrt()
}

/// The sum over the pixels of the slices.
#[inline(always)]
fn distances_body<const FMA: bool>(x: &[f32], y: &[f32], w: &[f32]) -> f64 {
    let pixels = x.chunks_exact(w.len()).zip(y.chunks_exact(w.len()));
    let mut sum = 0.0;
    for (x, y) in pixels {
        let [to_x, to_y] = [x, y].map(|v| 1.0 / (length::<FMA>(v) + NORM_EPS));
        let mut lanes = [0f32; LANES];
        for ((x, y), w) in x.chunks(LANES).zip(y.chunks(LANES)).zip(w.chunks(LANES)) {
            for (lane, ((x, y), w)) in lanes.iter_mut().zip(x.iter().zip(y).zip(w)) {
                let difference = x * to_x - y * to_y;
                *lane = mul_add::<FMA>(w * difference, difference, *lane);
            }
        }
        sum += f64::from(lanes.iter().sum::<f32>());
    }
    sum
}

per_cpu! {
    fn distances(x: &[f32], y: &[f32], w: &[f32]) -> f64 = distances_body
}

simd_dispatch! {
    /// With n = |x|, e = 1e-10 and h = scale w (x / (n + e) - y / (|y| + e)):
    /// out = h / (n + e) - (h . x) / (n (n + e)^2) x.
    fn gradients<const FMA: bool>(x: &[f32], y: &[f32], w: &[f32], scale: f32, out: &mut [f32]) {
        let pixels = x.chunks_exact(w.len()).zip(y.chunks_exact(w.len()));
        for ((x, y), out) in pixels.zip(out.chunks_exact_mut(w.len())) {
            let norm = length::<FMA>(x);
            if norm == 0.0 {
                out.fill(0.0);
                continue;
            }
            let [to_x, to_y] = [norm, length::<FMA>(y)].map(|norm| 1.0 / (norm + NORM_EPS));
            for ((out, w), (x, y)) in out.iter_mut().zip(w).zip(x.iter().zip(y)) {
                *out = scale * w * (x * to_x - y * to_y);
            }
            let along = kernels::dot::<FMA>(out, x) * to_x / norm;
            for (out, x) in out.iter_mut().zip(x) {
                *out = (*out - along * x) * to_x;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cuda::Precision;
    use crate::ops::check;

    fn definition(x: &[f64], y: &[f64], w: &[f64]) -> Vec<f64> {
        let unit = |v: &[f64]| {
            let norm = v.iter().map(|v| v * v).sum::<f64>().sqrt();
            v.iter().map(|v| v / (norm + 1e-10)).collect::<Vec<_>>()
        };
        let pixels = x.chunks(w.len()).zip(y.chunks(w.len()));
        let sum: f64 = pixels
            .map(|(x, y)| {
                unit(x).iter().zip(unit(y)).zip(w).map(|((x, y), w)| w * (x - y).powi(2)).sum::<f64>()
            })
            .sum();
        vec![sum * w.len() as f64 / x.len() as f64]
    }

    #[test]
    fn agrees_with_the_definition() {
        for (dims, dtype) in [
            ([1usize, 1, 1, 1], DType::F32),
            ([3, 5, 7, 33], DType::F16),
            ([2, 40, 30, 5], DType::BF16),
            ([1, 2, 2, 600], DType::F32),
        ] {
            let (x, y) = (check::random(&dims, 1), check::random(&dims, 2));
            let w = check::cast(&check::random(&[dims[3]], 3), dtype);
            let expected = definition(&check::wide(&x), &check::wide(&y), &check::wide(&w));
            let found = check::on_threads(|cx| feature_distance(cx, &x, &y, &w));
            check::close(&found, &[1], &expected, 1e-6);
            let tolerances = [(Precision::F32, 1e-6), (Precision::BF16, 2e-2), (Precision::F16, 4e-3)];
            check::on_device(&[&x, &y, &w], &tolerances, |cx, t| feature_distance(cx, &t[0], &t[1], &t[2]));
        }
        let (cx, x) = (check::cx(), check::random(&[1, 2, 2, 3], 1));
        let w = check::random(&[3], 2);
        assert!(feature_distance(&cx, &x, &check::random(&[1, 2, 3, 2], 1), &w).is_err());
        assert!(feature_distance(&cx, &x, &x, &check::random(&[2], 1)).is_err());
        let empty = check::random(&[0, 2, 2, 3], 1);
        assert!(feature_distance(&cx, &empty, &empty, &w).is_err());
    }

    #[test]
    fn gradients_are_those_of_the_definition() {
        for dims in [[1usize, 1, 1, 2], [2, 3, 2, 5], [1, 2, 1, 19]] {
            let w = check::random(&[dims[3]], 3);
            check::gradients_on_device(&[check::random(&dims, 1), check::random(&dims, 2)], |cx, x| {
                feature_distance(cx, &x[0], &x[1], &check::moved(cx, &w))
            });
            check::gradients(
                &[check::random(&dims, 1), check::random(&dims, 2)],
                |cx, x| feature_distance(cx, &x[0], &x[1], &w),
                |x| definition(&x[0], &x[1], &check::wide(&w)),
            );
        }
    }

    #[test]
    fn a_pixel_without_features_has_no_gradient() {
        use crate::tensor::autograd::{Gradients, Tape, leaf};
        for cx in [Some(check::cx()), check::cuda(Precision::F32)].into_iter().flatten() {
            let tape = Tape::new();
            let x = leaf(&Tensor::from_slice(&[1, 1, 2, 2], &[0f32, 0.0, 1.0, 2.0]).unwrap(), 0);
            let y = check::random(&[1, 1, 2, 2], 1);
            let loss = feature_distance(&tape.attach(&cx), &x, &y, &check::random(&[2], 2)).unwrap();
            let mut found = Gradients::default();
            tape.backward_from(&cx, &loss, 1.0, &mut found).unwrap();
            let gradient = found.get(0).unwrap().slice::<f32>().unwrap();
            assert!(gradient[..2] == [0.0; 2] && gradient.iter().all(|g| g.is_finite()));
        }
    }
}
