//! Gradients of the transposed convolution: that of its input is a convolution, that of its weight the one of this
//! convolution's weight. Also what gives a convolution the gradient of its input.

use super::{ConvTranspose2d, Sizes, compute};
use crate::device::Context;
use crate::error::Result;
use crate::ops::conv2d::gradient::weight_gradient;
use crate::ops::conv2d::{self, Conv2d, conv2d};
use crate::ops::linear::Epilogue;
use crate::ops::linear::gradient::column_sums;
use crate::tensor::Tensor;
use crate::tensor::autograd::record;

/// [`super::conv_transpose2d`] on a tape.
pub(super) fn recorded(cx: &Context, x: &Tensor, p: &ConvTranspose2d, sizes: &Sizes) -> Result<Tensor> {
    let out = compute(cx, x, p.weight, p.bias, sizes)?;
    let (stride, padding) = (p.stride, p.padding);
    // The convolution that leads from the result back to x.
    let (from, weight) = (out.dims_of("a result")?, p.weight.dims_of("conv_transpose2d weight")?);
    let back = conv2d::Sizes::new(from, weight, stride, padding)?;
    record(cx, out, &[Some(x), Some(p.weight), p.bias], || {
        let toward_x = x.tracked().map(|to| (to, p.weight.clone()));
        let toward_weight = p.weight.tracked().map(|to| (to, x.clone()));
        let to_bias = p.bias.and_then(Tensor::tracked);
        move |cx, flow| {
            flow.give(cx, to_bias, |dy| column_sums(cx, dy))?;
            if let Some((to, weight)) = toward_x {
                let plain = Conv2d { weight: &weight, stride, padding, epilogue: Epilogue::default() };
                flow.give(cx, Some(to), |dy| conv2d(cx, dy, &plain))?;
            }
            if let Some((to, x)) = toward_weight {
                flow.give(cx, Some(to), |dy| weight_gradient(cx, dy, &x, &back))?;
            }
            Ok(())
        }
    })
}

/// The gradient of the input, of `height` x `width` pixels, of a convolution with this `[stride, padding]`: its
/// transpose. Pixels that no patch reached get zeros, and the stride may exceed the kernel.
///
/// # Shapes
/// `dy` `[N, H', W', O]`, `weight` `[O, I, kh, kw]` of any float type; the result `[N, height, width, I]`.
///
/// # Errors
/// `InvalidArgument` if shapes do not fit together; `OutOfMemory`; `Cancelled`.
pub(crate) fn of_convolution(
    cx: &Context,
    dy: &Tensor,
    weight: &Tensor,
    [stride, padding]: [usize; 2],
    [out_height, out_width]: [usize; 2],
) -> Result<Tensor> {
    let [_, height, width, inputs] = dy.dims_of("a convolution's gradient")?;
    let [_, outputs, kh, kw] = weight.dims_of("conv2d weight")?;
    let kernel = [kh, kw];
    let sizes = Sizes { height, width, inputs, out_height, out_width, outputs, kernel, stride, padding };
    compute(cx, dy, weight, None, &sizes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check;
    use crate::ops::conv_transpose2d::conv_transpose2d;
    use crate::tensor::DType;

    /// The definition, of values in f64.
    fn naive(sizes: &Sizes, x: &[f64], w: &[f64], bias: &[f64]) -> Vec<f64> {
        let Sizes { height, width, inputs, out_height, out_width, outputs, kernel: [kh, kw], .. } = *sizes;
        let mut out = bias.repeat(x.len() / inputs / height / width * out_height * out_width);
        for (i, value) in x.iter().enumerate() {
            let (c, b, a, n) =
                (i % inputs, i / inputs % width, i / inputs / width % height, i / inputs / width / height);
            for j in 0..outputs * kh * kw {
                let (v, u, o) = (j % kw, j / kw % kh, j / kw / kh);
                let y = (a * sizes.stride + u).wrapping_sub(sizes.padding);
                let z = (b * sizes.stride + v).wrapping_sub(sizes.padding);
                if y < out_height && z < out_width {
                    let at = ((n * out_height + y) * out_width + z) * outputs + o;
                    out[at] += value * w[c * outputs * kh * kw + j];
                }
            }
        }
        out
    }

    #[test]
    fn every_input_has_its_gradient() {
        for (dims, [o, kh, kw], stride, padding, dtype) in [
            ([1usize, 1, 1, 1], [1usize, 1, 1], 1, 0, DType::F32),
            ([2, 2, 3, 3], [2, 4, 4], 2, 1, DType::F16),
            ([1, 3, 2, 4], [3, 2, 2], 2, 0, DType::BF16),
            ([2, 3, 2, 2], [3, 3, 3], 2, 1, DType::F32),
            ([1, 2, 3, 2], [2, 5, 4], 3, 2, DType::F32),
            ([1, 4, 2, 3], [2, 3, 3], 1, 1, DType::F32),
        ] {
            let weight = check::cast(&check::random(&[dims[3], o, kh, kw], 2), dtype);
            let inputs = [check::random(&dims, 1), weight, check::random(&[o], 3)];
            let plain = ConvTranspose2d { weight: &inputs[1], bias: None, stride, padding };
            let sizes = Sizes::new(&inputs[0], &plain).unwrap();
            let op = |cx: &Context, t: &[Tensor]| {
                let p = ConvTranspose2d { weight: &t[1], bias: Some(&t[2]), stride, padding };
                conv_transpose2d(cx, &t[0], &p)
            };
            check::backward_on_device(&inputs.each_ref(), op);
            check::gradients(&inputs, op, |v| naive(&sizes, &v[0], &v[1], &v[2]));
            let op = |cx: &Context, t: &[Tensor]| {
                conv_transpose2d(cx, &t[0], &ConvTranspose2d { weight: &t[1], bias: None, stride, padding })
            };
            check::gradients(&inputs[..2], op, |v| naive(&sizes, &v[0], &v[1], &vec![0.0; o]));
        }
    }
}
