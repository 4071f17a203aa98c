//! Pixels to channels and back (Shi et al. 2016), in PyTorch's order of channels.

mod cuda;

use crate::device::Context;
use crate::error::{Error, Result};
use crate::ops::kernels;
use crate::ops::work;
use crate::simd_dispatch;
use crate::tensor::autograd::record;
use crate::tensor::{DType, Tensor};

/// `y[n, i, j, c*r*r + u*r + v] = x[n, i*r+u, j*r+v, c]`.
///
/// # Shapes
/// `x` `[N, H, W, C]`, H and W multiples of `r`; the result `[N, H/r, W/r, C*r*r]`. `F32`, on a GPU of any float type.
///
/// # Errors
/// `InvalidArgument` if `r` is 0 or does not divide the size.
pub fn pixel_unshuffle(cx: &Context, x: &Tensor, r: usize) -> Result<Tensor> {
    let _span = cx.op("pixel_shuffle").working(|| work::moving(&[x, x]));
    let [n, height, width, channels] = x.dims_of::<4>("pixel_unshuffle input")?;
    if r == 0 || height % r != 0 || width % r != 0 {
        return Err(Error::argument("pixel_unshuffle input", format!("a multiple of {r} pixels"), x.shape()));
    }
    let dims = [n, height / r, width / r, channels * r * r];
    let out = match cx.cuda()? {
        Some(stream) => {
            let p = cuda::Shuffle { kernel: "pixel_unshuffle", dims, r, width: dims[2], channels };
            cuda::shuffle(cx, stream, x, &p)?
        }
        None => unshuffle_on_host(cx, x, dims, r)?,
    };
    record(cx, out, &[Some(x)], || {
        let to = x.tracked();
        move |cx, flow| flow.give(cx, to, |g| pixel_shuffle(cx, g, r))
    })
}

fn unshuffle_on_host(cx: &Context, x: &Tensor, dims: [usize; 4], r: usize) -> Result<Tensor> {
    let [_, _, width, channels] = x.dims_of::<4>("pixel_unshuffle input")?;
    let input = x.slice::<f32>()?;
    let mut out = Tensor::new(cx, "pixel_unshuffle", &dims, DType::F32)?;
    let row = dims[2] * dims[3];
    kernels::parallel_chunks(cx, out.slice_mut()?, row, |line, part| {
        if r == 2 {
            let (top, bottom) =
                input[2 * line * width * channels..][..2 * width * channels].split_at(width * channels);
            let pairs = top.chunks_exact(2 * channels).zip(bottom.chunks_exact(2 * channels));
            part.chunks_exact_mut(dims[3])
                .zip(pairs)
                .for_each(|(pixel, (top, bottom))| interleave(top, bottom, pixel));
            return;
        }
        for (j, pixel) in part.chunks_exact_mut(dims[3]).enumerate() {
            for (u, v) in (0..r).flat_map(|u| (0..r).map(move |v| (u, v))) {
                let source = &input[((line * r + u) * width + j * r + v) * channels..][..channels];
                for (c, value) in source.iter().enumerate() {
                    pixel[(c * r + u) * r + v] = *value;
                }
            }
        }
    })?;
    Ok(out)
}

/// The inverse of [`pixel_unshuffle`].
///
/// # Shapes
/// `x` `[N, H, W, C*r*r]`; the result `[N, H*r, W*r, C]`.
///
/// # Errors
/// `InvalidArgument` if `r` is 0 or `r*r` does not divide the channels.
pub fn pixel_shuffle(cx: &Context, x: &Tensor, r: usize) -> Result<Tensor> {
    let _span = cx.op("pixel_shuffle").working(|| work::moving(&[x, x]));
    let [n, height, width, channels] = x.dims_of::<4>("pixel_shuffle input")?;
    if r == 0 || channels % (r * r) != 0 {
        return Err(Error::argument(
            "pixel_shuffle input",
            format!("a multiple of {r}^2 channels"),
            x.shape(),
        ));
    }
    let dims = [n, height * r, width * r, channels / (r * r)];
    let out = match cx.cuda()? {
        Some(stream) => {
            let p = cuda::Shuffle { kernel: "pixel_shuffle", dims, r, width, channels: dims[3] };
            cuda::shuffle(cx, stream, x, &p)?
        }
        None => shuffle_on_host(cx, x, dims, r)?,
    };
    record(cx, out, &[Some(x)], || {
        let to = x.tracked();
        move |cx, flow| flow.give(cx, to, |g| pixel_unshuffle(cx, g, r))
    })
}

fn shuffle_on_host(cx: &Context, x: &Tensor, dims: [usize; 4], r: usize) -> Result<Tensor> {
    let [_, _, width, channels] = x.dims_of::<4>("pixel_shuffle input")?;
    let input = x.slice::<f32>()?;
    let mut out = Tensor::new(cx, "pixel_shuffle", &dims, DType::F32)?;
    let row = dims[2] * dims[3];
    if r == 2 {
        kernels::parallel_chunks(cx, out.slice_mut()?, 2 * row, |i, part| {
            let (top, bottom) = part.split_at_mut(row);
            let pairs = top.chunks_exact_mut(2 * dims[3]).zip(bottom.chunks_exact_mut(2 * dims[3]));
            let pixels = input[i * width * channels..].chunks_exact(channels);
            pixels.zip(pairs).for_each(|(pixel, (top, bottom))| separate(pixel, top, bottom));
        })?;
        return Ok(out);
    }
    kernels::parallel_chunks(cx, out.slice_mut()?, row, |line, part| {
        let (i, u) = (line / r, line % r);
        for (column, pixel) in part.chunks_exact_mut(dims[3]).enumerate() {
            let (j, v) = (column / r, column % r);
            let source = &input[(i * width + j) * channels..][..channels];
            for (c, value) in pixel.iter_mut().enumerate() {
                *value = source[(c * r + u) * r + v];
            }
        }
    })?;
    Ok(out)
}

simd_dispatch! {
    /// Of two pixels above two others, C numbers each: the four of channel 0, then those of channel 1, and so on.
    fn interleave<const FMA: bool>(top: &[f32], bottom: &[f32], out: &mut [f32]) {
        let out = out.as_chunks_mut::<4>().0;
        let ((a, b), (c, d)) = (top.split_at(out.len()), bottom.split_at(out.len()));
        for ((out, (a, b)), (c, d)) in out.iter_mut().zip(a.iter().zip(b)).zip(c.iter().zip(d)) {
            *out = [*a, *b, *c, *d];
        }
    }
}

simd_dispatch! {
    /// The inverse of [`interleave`].
    fn separate<const FMA: bool>(x: &[f32], top: &mut [f32], bottom: &mut [f32]) {
        let x = x.as_chunks::<4>().0;
        let ((a, b), (c, d)) = (top.split_at_mut(x.len()), bottom.split_at_mut(x.len()));
        for ((x, (a, b)), (c, d)) in x.iter().zip(a.iter_mut().zip(b)).zip(c.iter_mut().zip(d)) {
            [*a, *b, *c, *d] = *x;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cuda::Precision;
    use crate::ops::check;
    use crate::tensor::autograd::{Gradients, Tape, leaf};

    #[test]
    fn agrees_with_the_definition_and_its_inverse() {
        for (dims, r) in [
            ([1usize, 1, 1, 1], 1),
            ([2, 6, 4, 3], 2),
            ([3, 6, 9, 5], 3),
            ([2, 2, 2, 33], 2),
            ([1, 4, 6, 70], 2),
        ] {
            let x = check::random(&dims, 1);
            let [n, h, w, c] = dims;
            let y = check::on_batch(&x, |cx, x, _, _| pixel_unshuffle(cx, x, r));
            let wide = check::wide(&x);
            let (oh, ow, oc) = (h / r, w / r, c * r * r);
            let expected: Vec<f64> = (0..n * oh * ow * oc)
                .map(|i| {
                    let (k, j, row) = (i % oc, i / oc % ow, i / oc / ow);
                    let (ch, u, v) = (k / r / r, k / r % r, k % r);
                    wide[((row * r + u) * w + j * r + v) * c + ch]
                })
                .collect();
            check::close(&y, &[n, oh, ow, oc], &expected, 0.0);
            let back = check::on_batch(&y, |cx, y, _, _| pixel_shuffle(cx, y, r));
            gradients(&x, &y, r);
            let exact = [(Precision::F32, 0.0), (Precision::BF16, 1e-2), (Precision::F16, 1e-3)];
            check::on_device(&[&x], &exact, |cx, t| pixel_unshuffle(cx, &t[0], r));
            check::on_device(&[&y], &exact, |cx, t| pixel_shuffle(cx, &t[0], r));
            check::gradients_on_device(std::slice::from_ref(&x), |cx, t| pixel_unshuffle(cx, &t[0], r));
            assert_eq!(back.dims(), dims);
            assert!(back.bytes().unwrap() == x.bytes().unwrap());
        }
        let x = check::random(&[1, 3, 2, 2], 1);
        assert!(pixel_unshuffle(&check::cx(), &x, 2).is_err());
        assert!(pixel_unshuffle(&check::cx(), &x, 0).is_err());
        assert!(pixel_shuffle(&check::cx(), &x, 2).is_err());
    }

    /// Both are permutations: the gradient of a result goes back to where the result came from.
    fn gradients(x: &Tensor, y: &Tensor, r: usize) {
        type Op = fn(&crate::device::Context, &Tensor, usize) -> Result<Tensor>;
        for (op, x, y) in [(pixel_unshuffle as Op, x, y), (pixel_shuffle as Op, y, x)] {
            let (cx, tape) = (check::cx(), Tape::new());
            let out = op(&tape.attach(&cx), &leaf(x, 0), r).unwrap();
            let mut found = Gradients::default();
            tape.backward(&cx, &[(&out, y.clone())], &mut found).unwrap();
            assert!(found.get(0).unwrap().bytes().unwrap() == x.bytes().unwrap());
        }
    }
}
