//! Transposed convolution in its sub-pixel form: of the output pixels, those that agree modulo the stride see the
//! same taps, so each of the s x s phases is a small dense convolution (the 4 x 4 stride 2 one: four of 2 x 2).

mod cpu;
mod cuda;
pub(crate) mod gradient;

use crate::device::Context;
use crate::device::gemm::Layout;
use crate::error::{Error, Result};
use crate::ops::kernels;
use crate::ops::linear::{Epilogue, Rows, product};
use crate::ops::work;
use crate::tensor::autograd::records;
use crate::tensor::{DType, Tensor};

/// Numbers that are held at a time: 16 MiB. Each group of lines packs the weight anew, which fewer lines would not pay for.
const SCRATCH_ELEMENTS: usize = 1 << 22;

/// The parameters of [`conv_transpose2d`].
#[derive(Debug, Clone, Copy)]
pub struct ConvTranspose2d<'a> {
    /// `[I, O, kh, kw]`, of any float type.
    pub weight: &'a Tensor,
    /// `[O]`.
    pub bias: Option<&'a Tensor>,
    /// Distance, in the output, between neighbouring pixels of the input. At most the kernel.
    pub stride: usize,
    /// How much is cut from each side of the output.
    pub padding: usize,
}

/// `y[n,i,j,o] = bias[o] + sum of weight[c,o,u,v] * x[n,a,b,c]` over all c,u,v,a,b with `a*s + u - p = i` and
/// `b*s + v - p = j`.
///
/// # Shapes
/// `x` `[N, H, W, I]`; the result `[N, (H-1)s - 2p + kh, (W-1)s - 2p + kw, O]`, on a GPU of the type of
/// activations.
///
/// # Errors
/// `InvalidArgument` if shapes do not fit together, the stride is 0 or larger than the kernel, or nothing is
/// left of the output.
pub fn conv_transpose2d(cx: &Context, x: &Tensor, p: &ConvTranspose2d) -> Result<Tensor> {
    let span = cx.op("conv_transpose2d");
    let sizes = Sizes::new(x, p)?;
    // Each pixel of the input goes through the whole kernel, but for what the padding cuts off.
    let _span = span.working(|| work::multiplying(x.shape().rows(), &[p.weight], &[x]));
    if records(cx, &[Some(x), Some(p.weight), p.bias]) {
        return gradient::recorded(cx, x, p, &sizes);
    }
    compute(cx, x, p.weight, p.bias, &sizes)
}

/// [`conv_transpose2d`] without a tape.
fn compute(
    cx: &Context,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    sizes: &Sizes,
) -> Result<Tensor> {
    if let Some(stream) = cx.cuda()? {
        return cuda::compute(cx, stream, [x, weight], bias, sizes);
    }
    let dims = [x.dims()[0], sizes.out_height, sizes.out_width, sizes.outputs];
    let input = x.slice::<f32>()?;
    let weights = reorder(cx, weight, sizes)?;
    let mut out = Tensor::new(cx, "transposed convolution", &dims, DType::F32)?;
    let line = sizes.out_width * sizes.outputs;
    let taps = sizes.taps(0, 0) * sizes.taps(1, 0);
    let stride = sizes.stride;
    let widest = sizes.out_width.div_ceil(stride) * (sizes.outputs + taps * sizes.inputs);
    let lines = (SCRATCH_ELEMENTS / widest.max(1)).max(1) * stride;
    for (n, image) in out.slice_mut::<f32>()?.chunks_exact_mut((sizes.out_height * line).max(1)).enumerate() {
        let input = &input[n * sizes.height * sizes.width * sizes.inputs..];
        for (i, band) in image.chunks_mut(lines * line).enumerate() {
            for (phase, weight) in weights.iter().enumerate() {
                let at = Phase::new(sizes, phase, i * lines, band.len() / line);
                one_phase(cx, input, sizes, &at, weight, bias, band)?;
            }
        }
    }
    Ok(out)
}

/// Computes one phase of a band of output lines: gathers, multiplies, and puts the pixels where they belong.
fn one_phase(
    cx: &Context,
    input: &[f32],
    sizes: &Sizes,
    at: &Phase,
    weight: &Tensor,
    bias: Option<&Tensor>,
    band: &mut [f32],
) -> Result<()> {
    let count = at.rows * at.columns;
    if count == 0 {
        return Ok(());
    }
    let inner = at.taps[0] * at.taps[1] * sizes.inputs;
    let mut patches = Tensor::new(cx, "transposed convolution patches", &[count, inner], DType::F32)?;
    let mut pixels = Tensor::new(cx, "transposed convolution phase", &[count, sizes.outputs], DType::F32)?;
    kernels::parallel_chunks(cx, patches.slice_mut()?, at.columns * inner, |row, part| {
        cpu::gather(sizes, at, input, row, part);
    })?;
    let epilogue = Epilogue { bias, ..Epilogue::default() };
    let rows = Rows { values: patches.slice()?, channels: inner, per_sample: count };
    product(cx, &rows, weight, Layout::RowsAreOutputs, &epilogue, 0, pixels.slice_mut()?)?;
    let pixels = pixels.slice::<f32>()?;
    kernels::parallel_chunks(cx, band, sizes.out_width * sizes.outputs, |line, part| {
        if line % sizes.stride == at.first[0] {
            let of_line = at.columns * sizes.outputs;
            let row = &pixels[line / sizes.stride * of_line..][..of_line];
            cpu::scatter(row, sizes.outputs, at.first[1], sizes.stride, part);
        }
    })
}

/// Sizes that are known to fit together.
struct Sizes {
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
    fn new(x: &Tensor, p: &ConvTranspose2d) -> Result<Self> {
        let [_, height, width, inputs] = x.dims_of::<4>("conv_transpose2d input")?;
        let [weight_inputs, outputs, kh, kw] = p.weight.dims_of::<4>("conv_transpose2d weight")?;
        if weight_inputs != inputs {
            let expected = format!("[{inputs}, O, kh, kw]");
            return Err(Error::argument("conv_transpose2d weight", expected, p.weight.shape()));
        }
        if p.stride == 0 || p.stride > kh.min(kw) {
            let expected = format!("within 1 .. {}", kh.min(kw));
            return Err(Error::argument("conv_transpose2d stride", expected, p.stride));
        }
        let size = |size: usize, kernel: usize| {
            let whole = size.checked_sub(1).map(|last| last * p.stride + kernel);
            whole.and_then(|whole| whole.checked_sub(2 * p.padding)).filter(|&size| size > 0)
        };
        let (Some(out_height), Some(out_width)) = (size(height, kh), size(width, kw)) else {
            return Err(Error::argument("conv_transpose2d input", "a size that leaves an output", x.shape()));
        };
        let (kernel, stride, padding) = ([kh, kw], p.stride, p.padding);
        Ok(Sizes { height, width, inputs, out_height, out_width, outputs, kernel, stride, padding })
    }

    /// How many of the kernel's places along `axis` are `residue` modulo the stride.
    fn taps(&self, axis: usize, residue: usize) -> usize {
        self.kernel[axis].saturating_sub(residue).div_ceil(self.stride)
    }
}

/// The output pixels of one phase within a band of lines.
struct Phase {
    /// The first line and column of the phase, counted from the band's corner.
    first: [usize; 2],
    /// Lines of this phase in the band, and columns.
    rows: usize,
    columns: usize,
    /// Taps along each axis.
    taps: [usize; 2],
    /// (output + padding) / stride of the first pixel: the input pixel that its first tap reads.
    source: [usize; 2],
}

impl Phase {
    /// Phase number `phase`: kernel places (`phase / s`, `phase % s`) modulo the stride, in the `lines` lines
    /// from `first_line` (a multiple of the stride) on.
    fn new(sizes: &Sizes, phase: usize, first_line: usize, lines: usize) -> Self {
        let (s, residues) = (sizes.stride, [phase / sizes.stride, phase % sizes.stride]);
        // The output places i with (i + p) % s = residue start here.
        let first = residues.map(|r| (r + s - sizes.padding % s) % s);
        let count = |size: usize, first: usize| size.saturating_sub(first).div_ceil(s);
        Phase {
            first,
            rows: count(lines, first[0]),
            columns: count(sizes.out_width, first[1]),
            taps: [sizes.taps(0, residues[0]), sizes.taps(1, residues[1])],
            source: [(first_line + first[0] + sizes.padding) / s, (first[1] + sizes.padding) / s],
        }
    }
}

/// For each phase the weight `[I, O, kh, kw]` as `[O, taps, taps, I]`.
fn reorder(cx: &Context, weight: &Tensor, sizes: &Sizes) -> Result<Vec<Tensor>> {
    let wide = kernels::widened(cx, "transposed convolution weight", weight)?;
    let source = wide.slice::<f32>()?;
    let (s, [kh, kw]) = (sizes.stride, sizes.kernel);
    let phase = |phase: usize| {
        let (ru, rv) = (phase / s, phase % s);
        let dims = [sizes.outputs, sizes.taps(0, ru), sizes.taps(1, rv), sizes.inputs];
        let mut out = Tensor::new(cx, "transposed convolution weight", &dims, DType::F32)?;
        kernels::parallel_chunks(cx, out.slice_mut()?, dims[1] * dims[2] * dims[3], |o, filter| {
            for (tap, vector) in filter.chunks_exact_mut(sizes.inputs).enumerate() {
                let (u, v) = (ru + tap / dims[2] * s, rv + tap % dims[2] * s);
                for (c, value) in vector.iter_mut().enumerate() {
                    *value = source[((c * sizes.outputs + o) * kh + u) * kw + v];
                }
            }
        })?;
        Ok(out)
    };
    (0..s * s).map(phase).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cuda::Precision;
    use crate::ops::check;

    fn naive(x: &Tensor, p: &ConvTranspose2d) -> (Vec<usize>, Vec<f64>) {
        let [n, h, w, inputs] = x.dims_of::<4>("x").unwrap();
        let [_, outputs, kh, kw] = p.weight.dims_of::<4>("w").unwrap();
        let (oh, ow) = ((h - 1) * p.stride + kh - 2 * p.padding, (w - 1) * p.stride + kw - 2 * p.padding);
        let (x, weight) = (check::wide(x), check::wide(p.weight));
        let bias = p.bias.map_or(vec![0.0; outputs], check::wide);
        let mut out = bias.repeat(n * oh * ow);
        for (i, value) in x.iter().enumerate() {
            let (c, a_x, a_y, b) = (i % inputs, i / inputs % w, i / inputs / w % h, i / inputs / w / h);
            for j in 0..outputs * kh * kw {
                let (v, u, o) = (j % kw, j / kw % kh, j / kw / kh);
                let y = (a_y * p.stride + u).wrapping_sub(p.padding);
                let x = (a_x * p.stride + v).wrapping_sub(p.padding);
                if y < oh && x < ow {
                    out[((b * oh + y) * ow + x) * outputs + o] += value * weight[c * outputs * kh * kw + j];
                }
            }
        }
        (vec![n, oh, ow, outputs], out)
    }

    #[test]
    fn agrees_with_the_definition() {
        for (dims, [o, kh, kw], stride, padding, dtype) in [
            ([1usize, 1, 1, 1], [1usize, 1, 1], 1, 0, DType::F32),
            ([2, 5, 7, 3], [9, 4, 4], 2, 1, DType::F16),
            ([3, 3, 4, 5], [4, 2, 2], 2, 0, DType::BF16),
            ([2, 4, 3, 17], [33, 3, 3], 2, 1, DType::F32),
            ([1, 3, 3, 2], [3, 5, 4], 3, 2, DType::F32),
            ([1, 6, 2, 4], [2, 3, 3], 1, 1, DType::F32),
            ([1, 40, 33, 60], [7, 4, 4], 2, 1, DType::F32),
        ] {
            let x = check::random(&dims, 1);
            let weight = check::cast(&check::random(&[dims[3], o, kh, kw], 2), dtype);
            let bias = check::random(&[o], 3);
            for bias in [None, Some(&bias)] {
                let p = ConvTranspose2d { weight: &weight, bias, stride, padding };
                let (out_dims, expected) = naive(&x, &p);
                let y = check::on_batch(&x, |cx, x, _, _| conv_transpose2d(cx, x, &p));
                check::close(&y, &out_dims, &expected, 2e-6);
            }
            let tolerances = [(Precision::F32, 1e-5), (Precision::BF16, 2e-2), (Precision::F16, 4e-3)];
            check::on_device(&[&x, &weight, &bias], &tolerances, |cx, t| {
                let p = ConvTranspose2d { weight: &t[1], bias: Some(&t[2]), stride, padding };
                conv_transpose2d(cx, &t[0], &p)
            });
        }
    }

    #[test]
    fn bands_of_lines_do_not_show() {
        let (dims, stride, padding) = ([1usize, 8, 300, 1000], 2, 1);
        assert!(dims.iter().product::<usize>() * 4 > 2 * SCRATCH_ELEMENTS);
        let x = check::random(&dims, 1);
        let weight = check::random(&[1000, 1, 4, 4], 2);
        let p = ConvTranspose2d { weight: &weight, bias: None, stride, padding };
        let (out_dims, expected) = naive(&x, &p);
        check::close(&conv_transpose2d(&check::cx(), &x, &p).unwrap(), &out_dims, &expected, 2e-6);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let (cx, x) = (check::cx(), check::random(&[1, 1, 3, 2], 1));
        let run = |dims: &[usize], stride, padding| {
            let weight = check::random(dims, 2);
            conv_transpose2d(&cx, &x, &ConvTranspose2d { weight: &weight, bias: None, stride, padding })
        };
        assert!(run(&[3, 1, 2, 2], 2, 0).is_err());
        assert!(run(&[2, 1, 2, 2], 3, 0).is_err());
        assert!(run(&[2, 1, 2, 2], 2, 1).is_err());
        assert!(run(&[2, 1, 2, 2], 2, 0).is_ok());
    }
}
