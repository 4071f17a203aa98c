//! Dense convolution: patches gathered into rows, then a matrix product, some rows at a time.

mod cpu;
mod cuda;
pub(crate) mod gradient;

use crate::device::Context;
use crate::device::gemm::Layout;
use crate::error::{Error, Result};
use crate::ops::kernels;
pub use crate::ops::linear::Epilogue;
use crate::ops::linear::{Rows, gradient as products, product};
use crate::ops::work;
use crate::tensor::{DType, Tensor};
pub(crate) use cuda::order;

/// Numbers of gathered patches that are held at a time: 4 MiB.
const SCRATCH_ELEMENTS: usize = 1 << 20;

/// The parameters of [`conv2d`].
#[derive(Debug, Clone, Copy)]
pub struct Conv2d<'a> {
    /// `[O, I, kh, kw]`, of any float type.
    pub weight: &'a Tensor,
    /// Distance between the pixels that are computed.
    pub stride: usize,
    /// Zeros around the image, in pixels.
    pub padding: usize,
    /// Bias and what else follows; its residual has the shape of the result.
    pub epilogue: Epilogue<'a>,
}

/// `y[n,i,j,o] = sum over c,u,v of weight[o,c,u,v] * x[n, i*s+u-p, j*s+v-p, c]`, then the epilogue; x is zero
/// outside the image.
///
/// # Shapes
/// `x` `[N, H, W, I]`; the result `[N, (H+2p-kh)/s + 1, (W+2p-kw)/s + 1, O]`, on a GPU of the type of activations.
///
/// # Errors
/// `InvalidArgument` if shapes do not fit together, the kernel is larger than the padded image or the stride is 0.
pub fn conv2d(cx: &Context, x: &Tensor, p: &Conv2d) -> Result<Tensor> {
    let span = cx.op("conv2d");
    let (input, weight) = (x.dims_of("conv2d input")?, p.weight.dims_of("conv2d weight")?);
    let sizes = Sizes::new(input, weight, p.stride, p.padding)?;
    let dims = [x.dims()[0], sizes.out_height, sizes.out_width, sizes.outputs];
    let _span = span.working(|| work::convolving(x, p.weight, dims));
    if let Some(residual) = p.epilogue.residual.filter(|r| r.dims() != dims) {
        return Err(Error::argument("conv2d residual", format!("{dims:?}"), residual.shape()));
    }
    if products::records(cx, &[Some(x), Some(p.weight)], &p.epilogue) {
        return gradient::recorded(cx, x, p, sizes);
    }
    compute(cx, x, p.weight, &p.epilogue, &sizes)
}

/// [`conv2d`] without a tape.
fn compute(cx: &Context, x: &Tensor, weight: &Tensor, epilogue: &Epilogue, sizes: &Sizes) -> Result<Tensor> {
    if let Some(stream) = cx.cuda()? {
        return cuda::compute(cx, stream, [x, weight], epilogue, sizes);
    }
    let dims = [x.dims()[0], sizes.out_height, sizes.out_width, sizes.outputs];
    let per_sample = sizes.out_height * sizes.out_width;
    let input = x.slice::<f32>()?;
    let mut out = Tensor::new(cx, "convolution", &dims, DType::F32)?;
    if sizes.is_pointwise() {
        let rows = Rows { values: input, channels: sizes.inputs, per_sample };
        product(cx, &rows, weight, Layout::RowsAreOutputs, epilogue, 0, out.slice_mut()?)?;
        return Ok(out);
    }
    let weight = reorder(cx, weight)?;
    let inner = sizes.patch();
    let pixels = dims[..3].iter().product::<usize>();
    let chunk = (SCRATCH_ELEMENTS / inner.max(1)).clamp(1, pixels.max(1));
    let mut patches = Tensor::new(cx, "convolution patches", &[chunk, inner], DType::F32)?;
    for (i, out) in out.slice_mut::<f32>()?.chunks_mut((chunk * dims[3]).max(1)).enumerate() {
        let (first, count) = (i * chunk, out.len() / dims[3]);
        let patches = &mut patches.slice_mut::<f32>()?[..count * inner];
        fill_patches(cx, sizes, input, first, patches)?;
        let rows = Rows { values: patches, channels: inner, per_sample };
        product(cx, &rows, &weight, Layout::RowsAreOutputs, epilogue, first, out)?;
    }
    Ok(out)
}

/// The patches of the output pixels from number `first` on, as many as fit.
fn fill_patches(cx: &Context, sizes: &Sizes, input: &[f32], first: usize, patches: &mut [f32]) -> Result<()> {
    let inner = sizes.patch();
    let rows = kernels::rows_per_task(inner);
    kernels::parallel_chunks(cx, patches, rows * inner, |task, part| {
        cpu::gather(sizes, input, first + task * rows, part);
    })
}

/// Sizes that are known to fit together.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sizes {
    height: usize,
    width: usize,
    inputs: usize,
    out_height: usize,
    out_width: usize,
    outputs: usize,
    kernel: [usize; 2],
    stride: usize,
    padding: usize,
}

impl Sizes {
    /// For an input `[N, H, W, I]` and a weight `[O, I, kh, kw]`.
    ///
    /// # Errors
    /// As [`conv2d`].
    pub(crate) fn new(input: [usize; 4], weight: [usize; 4], stride: usize, padding: usize) -> Result<Self> {
        let [_, height, width, inputs] = input;
        let [outputs, weight_inputs, kh, kw] = weight;
        if weight_inputs != inputs {
            let expected = format!("[O, {inputs}, kh, kw]");
            return Err(Error::argument("conv2d weight", expected, format!("{weight:?}")));
        }
        let (padded_height, padded_width) = (height + 2 * padding, width + 2 * padding);
        if stride == 0 || kh == 0 || kw == 0 || kh > padded_height || kw > padded_width {
            let expected = format!("a stride and a kernel within 1 .. {padded_height} x {padded_width}");
            return Err(Error::argument("conv2d", expected, format!("{kh} x {kw}, stride {stride}")));
        }
        Ok(Sizes {
            height,
            width,
            inputs,
            out_height: (padded_height - kh) / stride + 1,
            out_width: (padded_width - kw) / stride + 1,
            outputs,
            kernel: [kh, kw],
            stride,
            padding,
        })
    }

    fn is_pointwise(&self) -> bool {
        self.kernel == [1, 1] && self.stride == 1 && self.padding == 0
    }

    /// Numbers in the patch of one output pixel.
    fn patch(&self) -> usize {
        self.kernel[0] * self.kernel[1] * self.inputs
    }
}

/// The weight `[O, I, kh, kw]` as `[O, kh, kw, I]`: a patch is then made of whole channel vectors.
fn reorder(cx: &Context, weight: &Tensor) -> Result<Tensor> {
    let [outputs, inputs, kh, kw] = weight.dims_of::<4>("conv2d weight")?;
    let wide = kernels::widened(cx, "convolution weight", weight)?;
    let source = wide.slice::<f32>()?;
    let mut out = Tensor::new(cx, "convolution weight", &[outputs, kh, kw, inputs], DType::F32)?;
    let filter = inputs * kh * kw;
    kernels::parallel_chunks(cx, out.slice_mut()?, filter, |o, filter_out| {
        cpu::transpose(&source[o * filter..][..filter], kh * kw, filter_out);
    })?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cuda::Precision;
    use crate::ops::activation::Activation;
    use crate::ops::check;

    fn naive(x: &Tensor, p: &Conv2d, bias: &[f64]) -> (Vec<usize>, Vec<f64>) {
        let [n, h, w, inputs] = x.dims_of::<4>("x").unwrap();
        let [outputs, _, kh, kw] = p.weight.dims_of::<4>("w").unwrap();
        let (oh, ow) = ((h + 2 * p.padding - kh) / p.stride + 1, (w + 2 * p.padding - kw) / p.stride + 1);
        let (x, weight) = (check::wide(x), check::wide(p.weight));
        let mut out = Vec::new();
        for i in 0..n * oh * ow * outputs {
            let (o, ox, oy, b) =
                (i % outputs, i / outputs % ow, i / outputs / ow % oh, i / outputs / ow / oh);
            let mut sum = bias[o];
            for (c, u, v) in (0..inputs).flat_map(|c| (0..kh * kw).map(move |t| (c, t / kw, t % kw))) {
                let (y, x_at) = (
                    (oy * p.stride + u).wrapping_sub(p.padding),
                    (ox * p.stride + v).wrapping_sub(p.padding),
                );
                if y < h && x_at < w {
                    sum += weight[((o * inputs + c) * kh + u) * kw + v]
                        * x[((b * h + y) * w + x_at) * inputs + c];
                }
            }
            out.push(sum);
        }
        (vec![n, oh, ow, outputs], out)
    }

    #[test]
    fn agrees_with_the_definition() {
        for (dims, [o, kh, kw], stride, padding, dtype) in [
            ([1usize, 1, 1, 1], [1usize, 1, 1], 1, 0, DType::F32),
            ([2, 5, 7, 3], [9, 3, 3], 2, 1, DType::F16),
            ([3, 6, 6, 5], [4, 1, 1], 1, 0, DType::BF16),
            ([1, 9, 8, 17], [33, 4, 4], 2, 1, DType::F32),
            ([2, 4, 6, 8], [5, 2, 2], 2, 0, DType::F32),
            ([1, 7, 5, 2], [3, 3, 1], 1, 2, DType::F32),
            ([1, 60, 60, 40], [3, 3, 3], 1, 1, DType::F32),
        ] {
            let x = check::random(&dims, 1);
            let weight = check::cast(&check::random(&[o, dims[3], kh, kw], 2), dtype);
            let bias = check::cast(&check::random(&[o], 3), dtype);
            let p = Conv2d {
                weight: &weight,
                stride,
                padding,
                epilogue: Epilogue { bias: Some(&bias), ..Epilogue::default() },
            };
            let (out_dims, expected) = naive(&x, &p, &check::wide(&bias));
            let y = check::on_batch(&x, |cx, x, _, _| conv2d(cx, x, &p));
            check::close(&y, &out_dims, &expected, 2e-6);
            let residual = check::random(&out_dims, 4);
            let tolerances = [(Precision::F32, 1e-5), (Precision::BF16, 2e-2), (Precision::F16, 4e-3)];
            check::on_device(&[&x, &weight, &bias, &residual], &tolerances, |cx, t| {
                let epilogue = Epilogue {
                    bias: Some(&t[2]),
                    activation: Activation::Silu,
                    gain: 0.5,
                    residual: Some(&t[3]),
                    ..Epilogue::default()
                };
                conv2d(cx, &t[0], &Conv2d { weight: &t[1], epilogue, ..p })
            });
            let epilogue =
                Epilogue { activation: Activation::Silu, gain: 0.5, residual: Some(&residual), ..p.epilogue };
            let y = check::on_threads(|cx| conv2d(cx, &x, &Conv2d { epilogue, ..p }));
            let expected: Vec<f64> = expected
                .iter()
                .zip(check::wide(&residual))
                .map(|(&v, r)| r + 0.5 * check::activation(Activation::Silu, v))
                .collect();
            check::close(&y, &out_dims, &expected, 2e-6);
        }
    }

    #[test]
    fn samples_have_modulations_of_their_own() {
        // More pixels than one product takes on a GPU, and several samples in one.
        for (side, kernel) in [(40, 3), (3, 3), (3, 1)] {
            let (x, weight) =
                (check::random(&[3, side, side, 5], 1), check::random(&[6, 5, kernel, kernel], 2));
            let (scale, modulation) = (check::random(&[6], 3), check::random(&[3, 12], 4));
            let plain =
                Conv2d { weight: &weight, stride: 1, padding: kernel / 2, epilogue: Epilogue::default() };
            let (dims, sums) = naive(&x, &plain, &[0.0; 6]);
            let (s, m) = (check::wide(&scale), check::wide(&modulation));
            let modulated = |(i, v): (usize, &f64)| {
                let (o, n) = (i % 6, i / 6 / side / side);
                v * s[o] * (1.0 + m[n * 12 + o]) + m[n * 12 + 6 + o]
            };
            let expected: Vec<f64> = sums.iter().enumerate().map(modulated).collect();
            let op = |cx: &Context, x: &Tensor, scale: &Tensor, modulation: &Tensor| {
                let epilogue = Epilogue {
                    channel_scale: Some(scale),
                    modulation: Some(modulation),
                    ..Epilogue::default()
                };
                conv2d(cx, x, &Conv2d { epilogue, ..plain })
            };
            let y = check::on_threads(|cx| op(cx, &x, &scale, &modulation));
            check::close(&y, &dims, &expected, 2e-6);
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let (cx, x) = (check::cx(), check::random(&[1, 3, 3, 2], 1));
        let run = |dims: &[usize], stride, padding| {
            let weight = check::random(dims, 2);
            conv2d(&cx, &x, &Conv2d { weight: &weight, stride, padding, epilogue: Epilogue::default() })
        };
        assert!(run(&[1, 3, 1, 1], 1, 0).is_err());
        assert!(run(&[1, 2, 4, 4], 1, 0).is_err());
        assert!(run(&[1, 2, 1, 1], 0, 0).is_err());
        assert!(run(&[1, 2, 4, 4], 1, 1).is_ok());
    }
}
