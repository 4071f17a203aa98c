//! The largest number of each 2 x 2 pixels.

mod cuda;

use crate::device::Context;
use crate::error::{Error, Result};
use crate::ops::kernels;
use crate::simd_dispatch;
use crate::tensor::autograd::record;
use crate::tensor::{DType, Tensor};

/// Pixels per side that become one.
const SIDE: usize = 2;

/// `y[n, i, j, c] = max over u, v < 2 of x[n, 2i + u, 2j + v, c]`; a last odd row or column is left out. The gradient
/// goes to the first of equally large pixels, row by row.
///
/// # Shapes
/// `x` `[N, H, W, C]`, `F32`, on a GPU of any float type; the result `[N, H / 2, W / 2, C]`.
///
/// # Errors
/// `InvalidArgument` for another shape or a side of less than 2; `OutOfMemory`; `Cancelled`.
pub fn max_pool(cx: &Context, x: &Tensor) -> Result<Tensor> {
    let _span = cx.op("max_pool");
    let [samples, height, width, channels] = x.dims_of::<4>("max pool input")?;
    if height < SIDE || width < SIDE {
        return Err(Error::argument("max pool input", "sides of at least 2 pixels", x.shape()));
    }
    let dims = [samples, height / SIDE, width / SIDE, channels];
    let out = match cx.cuda()? {
        Some(stream) => cuda::pool(cx, stream, x, dims)?,
        None => pool(cx, x, dims)?,
    };
    record(cx, out, &[Some(x)], || {
        let x = x.clone();
        move |cx, flow| flow.give(cx, x.tracked(), |g| gradient(cx, g, &x, dims))
    })
}

/// [`max_pool`] on the CPU, without recording.
fn pool(cx: &Context, x: &Tensor, dims: [usize; 4]) -> Result<Tensor> {
    let [_, height, width, channels] = x.dims_of::<4>("max pool input")?;
    let input = x.slice::<f32>()?;
    let mut out = Tensor::new(cx, "max pool", &dims, DType::F32)?;
    let row = dims[2] * channels;
    kernels::parallel_chunks(cx, out.slice_mut::<f32>()?, row, |i, out| {
        let first = (i / dims[1] * height + i % dims[1] * SIDE) * width * channels;
        let (upper, lower) = input[first..][..SIDE * width * channels].split_at(width * channels);
        largest(upper, lower, channels, out);
    })?;
    Ok(out)
}

fn gradient(
    cx: &Context,
    g: &Tensor,
    x: &Tensor,
    [_, out_height, out_width, channels]: [usize; 4],
) -> Result<Tensor> {
    if let Some(stream) = cx.cuda()? {
        return cuda::gradient(cx, stream, g, x);
    }
    let [_, height, width, _] = x.dims_of::<4>("max pool input")?;
    let (g, input) = (g.slice::<f32>()?, x.slice::<f32>()?);
    let (line, out_line) = (width * channels, out_width * channels);
    let mut out = Tensor::new(cx, "max pool gradient", x.dims(), DType::F32)?;
    kernels::parallel_chunks(cx, out.slice_mut::<f32>()?, line, |i, part| {
        part.fill(0.0);
        let (n, y) = (i / height, i % height);
        if y / SIDE >= out_height {
            return;
        }
        let first = (n * height + y / SIDE * SIDE) * line;
        let (upper, lower) = input[first..][..SIDE * line].split_at(line);
        let g = &g[(n * out_height + y / SIDE) * out_line..][..out_line];
        match y % SIDE {
            0 => to_upper(upper, lower, channels, g, part),
            _ => to_lower(upper, lower, channels, g, part),
        }
    })?;
    Ok(out)
}

simd_dispatch! {
    fn largest<const FMA: bool>(upper: &[f32], lower: &[f32], channels: usize, out: &mut [f32]) {
        let windows = upper.chunks_exact(SIDE * channels).zip(lower.chunks_exact(SIDE * channels));
        for (out, (upper, lower)) in out.chunks_exact_mut(channels).zip(windows) {
            let ((a, b), (c, d)) = (upper.split_at(channels), lower.split_at(channels));
            for (out, ((a, b), (c, d))) in out.iter_mut().zip(a.iter().zip(b).zip(c.iter().zip(d))) {
                *out = greater(greater(*a, *b), greater(*c, *d));
            }
        }
    }
}

/// The larger; a number that is none wins, so that it shows.
#[inline(always)]
fn greater(a: f32, b: f32) -> f32 {
    if a > b || a.is_nan() { a } else { b }
}

simd_dispatch! {
    /// The gradient of the upper line: a goes before b, and both before c and d.
    fn to_upper<const FMA: bool>(upper: &[f32], lower: &[f32], channels: usize, g: &[f32], out: &mut [f32]) {
        let windows = upper.chunks_exact(SIDE * channels).zip(lower.chunks_exact(SIDE * channels));
        let gradients = g.chunks_exact(channels).zip(out.chunks_exact_mut(SIDE * channels));
        for ((upper, lower), (g, out)) in windows.zip(gradients) {
            let ((a, b), (c, d)) = (upper.split_at(channels), lower.split_at(channels));
            let (to_a, to_b) = out.split_at_mut(channels);
            for i in 0..channels {
                let below = greater(c[i], d[i]);
                to_a[i] = if a[i] >= b[i] && a[i] >= below { g[i] } else { 0.0 };
                to_b[i] = if b[i] > a[i] && b[i] >= below { g[i] } else { 0.0 };
            }
        }
    }
}

simd_dispatch! {
    /// The gradient of the lower line.
    fn to_lower<const FMA: bool>(upper: &[f32], lower: &[f32], channels: usize, g: &[f32], out: &mut [f32]) {
        let windows = upper.chunks_exact(SIDE * channels).zip(lower.chunks_exact(SIDE * channels));
        let gradients = g.chunks_exact(channels).zip(out.chunks_exact_mut(SIDE * channels));
        for ((upper, lower), (g, out)) in windows.zip(gradients) {
            let ((a, b), (c, d)) = (upper.split_at(channels), lower.split_at(channels));
            let (to_c, to_d) = out.split_at_mut(channels);
            for i in 0..channels {
                let above = greater(a[i], b[i]);
                to_c[i] = if c[i] > above && c[i] >= d[i] { g[i] } else { 0.0 };
                to_d[i] = if d[i] > above && d[i] > c[i] { g[i] } else { 0.0 };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cuda::Precision;
    use crate::ops::check;

    fn definition(x: &[f64], [n, h, w, c]: [usize; 4]) -> Vec<f64> {
        let at = |n: usize, y: usize, x_at: usize, k: usize| x[((n * h + y) * w + x_at) * c + k];
        let mut out = Vec::new();
        for i in 0..n * (h / 2) * (w / 2) * c {
            let (k, column, row, sample) =
                (i % c, i / c % (w / 2), i / c / (w / 2) % (h / 2), i / c / (w / 2) / (h / 2));
            let window = (0..4).map(|t| at(sample, 2 * row + t / 2, 2 * column + t % 2, k));
            out.push(window.fold(f64::MIN, f64::max));
        }
        out
    }

    #[test]
    fn agrees_with_the_definition() {
        for dims in [[1usize, 2, 2, 1], [3, 5, 7, 33], [2, 40, 30, 64]] {
            let x = check::random(&dims, 1);
            let y = check::on_batch(&x, |cx, x, _, _| max_pool(cx, x));
            let [n, h, w, c] = dims;
            check::close(&y, &[n, h / 2, w / 2, c], &definition(&check::wide(&x), dims), 1e-7);
            let tolerances = [(Precision::F32, 1e-7), (Precision::BF16, 4e-3), (Precision::F16, 1e-3)];
            check::on_device(&[&x], &tolerances, |cx, x| max_pool(cx, &x[0]));
        }
        assert!(max_pool(&check::cx(), &check::random(&[1, 1, 4, 2], 1)).is_err());
        assert!(max_pool(&check::cx(), &check::random(&[4, 4, 2], 1)).is_err());
    }

    #[test]
    fn gradients_are_those_of_the_definition() {
        for dims in [[1usize, 2, 2, 1], [2, 5, 3, 3], [1, 4, 6, 2], [1, 4, 3, 8]] {
            check::gradients_on_device(&[check::random(&dims, 1)], |cx, x| max_pool(cx, &x[0]));
            check::gradients(
                &[check::random(&dims, 1)],
                |cx, x| max_pool(cx, &x[0]),
                |x| definition(&x[0], dims),
            );
        }
    }

    #[test]
    fn the_first_of_equal_pixels_has_the_gradient() {
        use crate::tensor::autograd::{Gradients, Tape, leaf};
        for (window, expected) in [
            ([1f32, 1.0, 1.0, 1.0], [5f32, 0.0, 0.0, 0.0]),
            ([0.0, 1.0, 1.0, 1.0], [0.0, 5.0, 0.0, 0.0]),
            ([0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 5.0, 0.0]),
            ([0.0, 1.0, 0.0, 2.0], [0.0, 0.0, 0.0, 5.0]),
        ] {
            for cx in [Some(check::cx()), check::cuda(Precision::F32)].into_iter().flatten() {
                let tape = Tape::new();
                let x = leaf(&Tensor::from_slice(&[1, 2, 2, 1], &window).unwrap(), 0);
                let out = max_pool(&tape.attach(&cx), &x).unwrap();
                let mut found = Gradients::default();
                tape.backward_from(&cx, &out.reshape(&[1]).unwrap(), 5.0, &mut found).unwrap();
                assert_eq!(found.get(0).unwrap().slice::<f32>().unwrap(), expected);
            }
        }
    }
}
