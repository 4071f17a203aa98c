//! Gradients of the dense convolution: that of its input is a transposed convolution, that of its weight a product of
//! the patches, which are gathered anew.

use super::{Conv2d, Sizes, compute, cpu, cuda, fill_patches};
use crate::device::Context;
use crate::error::Result;
use crate::ops::conv_transpose2d::gradient::of_convolution;
use crate::ops::kernels;
use crate::ops::linear::WeightLayout::RowsAreOutputs;
use crate::ops::linear::gradient as products;
use crate::ops::linear::gradient::{Finish, Matrix, Place};
use crate::tensor::autograd::record;
use crate::tensor::{DType, Tensor};

/// Numbers of gathered patches that are held at a time: 16 MiB. More than forward, because the whole gradient of the
/// weight is read and written for each.
const SCRATCH_ELEMENTS: usize = 4 << 20;

/// [`super::conv2d`] on a tape.
pub(super) fn recorded(cx: &Context, x: &Tensor, p: &Conv2d, sizes: Sizes) -> Result<Tensor> {
    products::composed(cx, &p.epilogue, |fused| {
        let out = compute(cx, x, p.weight, fused, &sizes)?;
        record(cx, out, &[Some(x), Some(p.weight), fused.bias, fused.residual], || {
            let toward_x = x.tracked().map(|to| (to, p.weight.clone()));
            let toward_weight = p.weight.tracked().map(|to| (to, x.clone()));
            let finish = Finish::of(fused);
            move |cx, flow| {
                let dy = finish.give(cx, flow)?;
                if let Some((to, weight)) = toward_x {
                    flow.give(cx, Some(to), |_| input_gradient(cx, &dy, &weight, &sizes))?;
                }
                if let Some((to, x)) = toward_weight {
                    flow.give(cx, Some(to), |_| weight_gradient(cx, &x, &dy, &sizes))?;
                }
                Ok(())
            }
        })
    })
}

/// `dx[n,a,b,c] = sum of weight[o,c,u,v] * dy[n,i,j,o]` over all o,u,v,i,j with `i*s + u - p = a` and
/// `j*s + v - p = b`.
fn input_gradient(cx: &Context, dy: &Tensor, weight: &Tensor, sizes: &Sizes) -> Result<Tensor> {
    if sizes.is_pointwise() {
        let weight = weight.reshape(&[sizes.outputs, sizes.inputs])?;
        return products::input_gradient(cx, dy, &weight, RowsAreOutputs);
    }
    of_convolution(cx, dy, weight, [sizes.stride, sizes.padding], [sizes.height, sizes.width])
}

/// `dw[o,c,u,v] = sum over n,i,j of dy[n,i,j,o] * x[n, i*s+u-p, j*s+v-p, c]`; x is zero outside the image.
///
/// # Shapes
/// `x` `[N, H, W, I]`, `dy` `[N, H', W', O]` as [`super::conv2d`] has them; the result `[O, I, kh, kw]`.
///
/// # Errors
/// `OutOfMemory`; `Cancelled`.
pub(crate) fn weight_gradient(cx: &Context, x: &Tensor, dy: &Tensor, sizes: &Sizes) -> Result<Tensor> {
    let (Sizes { inputs, outputs, kernel: [kh, kw], .. }, inner) = (*sizes, sizes.patch());
    if sizes.is_pointwise() {
        return products::weight_gradient(cx, x, dy, RowsAreOutputs)?.reshape(&[outputs, inputs, kh, kw]);
    }
    if let Some(stream) = cx.cuda()? {
        return cuda::weight_gradient(cx, stream, x, dy, sizes);
    }
    let (input, dy) = (x.slice::<f32>()?, dy.slice::<f32>()?);
    let pixels = dy.len().checked_div(outputs).unwrap_or(0);
    let chunk = (SCRATCH_ELEMENTS / inner.max(1)).clamp(1, pixels.max(1));
    let mut patches = Tensor::new(cx, "convolution patches", &[chunk, inner], DType::F32)?;
    let mut sums = Tensor::zeros(cx, "a weight's gradient", &[outputs, inner], DType::F32)?;
    for (i, dy) in dy.chunks((chunk * outputs).max(1)).enumerate() {
        let patches = &mut patches.slice_mut::<f32>()?[..dy.len() / outputs * inner];
        fill_patches(cx, sizes, input, i * chunk, patches)?;
        let (dy, patches) =
            (Matrix { values: dy, columns: outputs }, Matrix { values: patches, columns: inner });
        let place = Place { leading: inner, accumulate: i > 0 };
        products::transposed_product(cx, dy, patches, place, sums.slice_mut()?)?;
    }
    let sums = sums.slice::<f32>()?;
    let mut out = Tensor::new(cx, "a weight's gradient", &[outputs, inputs, kh, kw], DType::F32)?;
    kernels::parallel_chunks(cx, out.slice_mut()?, inner, |o, filter| {
        // Channels change places with taps once more.
        cpu::transpose(&sums[o * inner..][..inner], inputs, filter);
    })?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check;
    use crate::ops::conv2d::{Epilogue, conv2d};

    /// The definition, of values in f64.
    fn naive(sizes: &Sizes, x: &[f64], w: &[f64]) -> Vec<f64> {
        let Sizes { height, width, inputs, out_height, out_width, outputs, kernel: [kh, kw], .. } = *sizes;
        let samples = x.len() / (height * width * inputs);
        let mut out = vec![0.0; samples * out_height * out_width * outputs];
        for (i, sum) in out.iter_mut().enumerate() {
            let (o, pixel) = (i % outputs, i / outputs);
            let (n, oy, ox) =
                (pixel / out_width / out_height, pixel / out_width % out_height, pixel % out_width);
            for j in 0..inputs * kh * kw {
                let (c, u, v) = (j / kw / kh, j / kw % kh, j % kw);
                let y = (oy * sizes.stride + u).wrapping_sub(sizes.padding);
                let z = (ox * sizes.stride + v).wrapping_sub(sizes.padding);
                if y < height && z < width {
                    *sum += w[o * inputs * kh * kw + j] * x[((n * height + y) * width + z) * inputs + c];
                }
            }
        }
        out
    }

    #[test]
    fn every_input_has_its_gradient() {
        for (dims, [o, kh, kw], stride, padding, dtype) in [
            ([1usize, 1, 1, 1], [1usize, 1, 1], 1, 0, DType::F32),
            ([2, 2, 3, 5], [4, 1, 1], 1, 0, DType::BF16),
            ([1, 5, 4, 2], [3, 3, 3], 1, 1, DType::F16),
            ([2, 5, 4, 3], [2, 4, 4], 2, 1, DType::F32),
            ([1, 4, 6, 2], [3, 2, 2], 2, 0, DType::F16),
            // A column and a row that no patch reaches, and a stride beyond the kernel.
            ([1, 5, 7, 2], [2, 2, 3], 2, 0, DType::F32),
            ([2, 6, 4, 3], [2, 1, 2], 3, 0, DType::F32),
            ([1, 3, 4, 2], [2, 3, 1], 1, 2, DType::F32),
            ([1, 4, 3, 2], [2, 1, 1], 1, 1, DType::F32),
        ] {
            let weight = check::cast(&check::random(&[o, dims[3], kh, kw], 2), dtype);
            let sizes = Sizes::new(dims, [o, dims[3], kh, kw], stride, padding).unwrap();
            let residual = check::random(&[dims[0], sizes.out_height, sizes.out_width, o], 4);
            let inputs = [check::random(&dims, 1), weight, check::random(&[o], 3), residual];
            let op = |cx: &Context, t: &[Tensor]| {
                let epilogue =
                    Epilogue { bias: Some(&t[2]), gain: 0.5, residual: Some(&t[3]), ..Epilogue::default() };
                conv2d(cx, &t[0], &Conv2d { weight: &t[1], stride, padding, epilogue })
            };
            check::backward_on_device(&inputs.each_ref(), op);
            check::gradients(&inputs, op, |v| {
                let element = |(i, y): (usize, &f64)| 0.5 * (y + v[2][i % o]) + v[3][i];
                naive(&sizes, &v[0], &v[1]).iter().enumerate().map(element).collect()
            });
        }
    }

    #[test]
    fn large_images_are_summed_in_parts() {
        let (dims, weight) = ([1, 100, 130, 40], check::random(&[3, 40, 3, 3], 2));
        let sizes = Sizes::new(dims, [3, 40, 3, 3], 1, 1).unwrap();
        assert!(100 * 130 * sizes.patch() > SCRATCH_ELEMENTS);
        let (x, dy) = (check::random(&dims, 1), check::random(&[1, 100, 130, 3], 3));
        let (wide_x, wide_dy) = (check::wide(&x), check::wide(&dy));
        let mut expected = vec![0.0; weight.elements()];
        for (i, sum) in expected.iter_mut().enumerate() {
            let (o, c, u, v) = (i / 360, i / 9 % 40, i / 3 % 3, i % 3);
            for (pixel, dy) in wide_dy.chunks(3).enumerate() {
                let (y, z) = ((pixel / 130 + u).wrapping_sub(1), (pixel % 130 + v).wrapping_sub(1));
                if y < 100 && z < 130 {
                    *sum += dy[o] * wide_x[(y * 130 + z) * 40 + c];
                }
            }
        }
        let dw = check::on_threads(|cx| weight_gradient(cx, &x, &dy, &sizes));
        check::close(&dw, &[3, 40, 3, 3], &expected, 2e-6);
        check::on_batch(&dy, |cx, dy, _, _| input_gradient(cx, dy, &weight, &sizes));
    }
}
