//! Transposed convolution on a GPU: the product of all pixels and all filters, then each pixel of the result gathers
//! what pixels of the input give it. Unlike the phases of the CPU that takes no patches, which would be twice as many
//! numbers as the product.

use std::sync::Arc;

use super::Sizes;
use crate::device::Context;
use crate::device::cuda::{Launch, Matrix, Parameter, Precision, Product, Stream, Tail, Taken, kernels};
use crate::error::{Error, Result};
use crate::ops::conv2d::order;
use crate::tensor::{DType, Tensor};

kernels!(KERNELS, "conv_transpose2d");

/// Numbers of a product that are held at a time. Some lines at its ends are computed twice, so it is not small.
const WORKSPACE_BYTES: usize = if cfg!(test) { 32 << 10 } else { 128 << 20 };

/// Rows of a product are filled up to whole multiples of this, for the loads of tensor cores.
const GRAIN: usize = 8;

/// Channels that a thread owns where they divide.
const WIDE: usize = 4;

const THREADS: u32 = 256;

/// As the source has it.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Lines {
    sample: i32,
    first: i32,
    held: i32,
    height: i32,
    width: i32,
    out_height: i32,
    out_width: i32,
    outputs: i32,
    kernel: [i32; 2],
    stride: i32,
    padding: i32,
    leading: i32,
    blocks: i32,
}
// SAFETY: fourteen `int`, in this order.
unsafe impl Parameter for Lines {}

/// Lines of the result, and those of the input that they are made of, counted over the batch.
#[derive(Debug, Clone, Copy)]
struct Band {
    first: usize,
    count: usize,
    held_first: usize,
    held: usize,
}

impl Band {
    fn new(sizes: &Sizes, first: usize, count: usize) -> Self {
        let at = |line: usize| (line / sizes.out_height, line % sizes.out_height + sizes.padding);
        // Input line a gives to lines a s - p .. a s - p + kh.
        let last_giver = |below: usize| (below / sizes.stride).min(sizes.height - 1);
        let first_giver = |below: usize| (below + 1).saturating_sub(sizes.kernel[0]).div_ceil(sizes.stride);
        let ((sample, below), (last_sample, last_below)) = (at(first), at(first + count - 1));
        let held_first = sample * sizes.height + first_giver(below).min(last_giver(below));
        let held_last = last_sample * sizes.height + last_giver(last_below);
        Band { first, count, held_first, held: held_last + 1 - held_first }
    }

    /// All lines of the result, in bands whose product fits `lines` lines of the input if it can.
    fn all(sizes: &Sizes, samples: usize, lines: usize) -> impl Iterator<Item = Band> + Clone {
        let total = samples * sizes.out_height;
        let shared = sizes.kernel[0].div_ceil(sizes.stride) + 1;
        let count = (lines.saturating_sub(shared).max(1) * sizes.stride).min(total).max(1);
        (0..total).step_by(count).map(move |first| Band::new(sizes, first, count.min(total - first)))
    }
}

/// [`super::compute`] on a GPU.
pub fn compute(
    cx: &Context,
    stream: &Arc<Stream>,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    sizes: &Sizes,
) -> Result<Tensor> {
    let samples = x.dims()[0];
    let Sizes { width, inputs, outputs, kernel: [kh, kw], .. } = *sizes;
    let dtype = DType::of_activations(cx);
    let precision = dtype.precision().unwrap_or(Precision::F32);
    if let Some(bias) = bias.filter(|bias| bias.elements() != outputs) {
        let expected = format!("{outputs} elements");
        return Err(Error::argument("conv_transpose2d bias", expected, bias.shape()));
    }
    let bias = bias.map(|b| b.on_as(cx, stream, "conv_transpose2d bias", Precision::F32)).transpose()?;
    let dims = [samples, sizes.out_height, sizes.out_width, outputs];
    let mut out = Tensor::new(cx, "transposed convolution", &dims, dtype)?;
    let to = out.on_mut(stream)?;
    if out.elements() == 0 {
        return Ok(out);
    }
    let leading = (kh * kw * outputs).next_multiple_of(GRAIN);
    let input = x.on_as(cx, stream, "conv_transpose2d input", precision)?;
    let filters = order(cx, stream, weight, dtype, leading)?;
    let b = Matrix { address: filters.on(cx, stream)?.address(), precision, leading, transposed: false };
    let bands = Band::all(sizes, samples, WORKSPACE_BYTES / size_of::<f32>() / (width * leading).max(1));
    let most = bands.clone().map(|band| band.held).max().unwrap_or(0);
    let mut given = Tensor::new(cx, "transposed convolution product", &[most * width, leading], DType::F32)?;
    let given_at = given.on_mut(stream)?;
    let bias_at = bias.as_ref().map_or(0, Taken::address);
    for band in bands {
        let skipped = band.held_first * width * inputs * precision.size();
        let product = Product {
            m: band.held * width,
            n: leading,
            k: inputs,
            a: Matrix {
                address: input.address() + skipped as u64,
                precision,
                leading: inputs,
                transposed: false,
            },
            b,
            out: Matrix { address: given_at, precision: Precision::F32, leading, transposed: false },
            alpha: 1.0,
            accumulate: false,
            batch: None,
            tail: Tail::default(),
        };
        // SAFETY: the input has these lines, the weight a row for each of its channels, and there is room for the
        // product of as many lines.
        unsafe { stream.multiply(&product)? };
        // SAFETY: the product holds the lines of the input that give to these of the result.
        unsafe { collect(stream, sizes, band, [given_at, bias_at, to], precision)? };
    }
    Ok(out)
}

/// The second half of a band, from the product and the bias to the result.
///
/// # Safety
/// There the product of the band's lines lies, at the second address nothing or a number for each output, and at the
/// third the result.
unsafe fn collect(
    stream: &Stream,
    sizes: &Sizes,
    band: Band,
    [given, bias, to]: [u64; 3],
    precision: Precision,
) -> Result<()> {
    let Sizes { outputs, kernel: [kh, kw], .. } = *sizes;
    let wide = outputs.is_multiple_of(WIDE);
    let packs = outputs / if wide { WIDE } else { 1 };
    let blocks = (sizes.out_width * packs).div_ceil(THREADS as usize);
    let sample = band.first / sizes.out_height;
    let lines = Lines {
        sample: sample as i32,
        first: (band.first % sizes.out_height) as i32,
        held: (band.held_first - sample * sizes.height) as i32,
        height: sizes.height as i32,
        width: sizes.width as i32,
        out_height: sizes.out_height as i32,
        out_width: sizes.out_width as i32,
        outputs: outputs as i32,
        kernel: sizes.kernel.map(|side| side as i32),
        stride: sizes.stride as i32,
        padding: sizes.padding as i32,
        leading: (kh * kw * outputs).next_multiple_of(GRAIN) as i32,
        blocks: blocks as i32,
    };
    let launch = Launch::blocks(band.count * blocks, THREADS);
    let parameters: [&dyn Parameter; 5] = [&given, &bias, &to, &lines, &i32::from(wide)];
    // SAFETY: as the kernel declares, by this function's contract.
    unsafe { stream.launch(&KERNELS, "collect_pixels", Some(precision), launch, &parameters) }
}
