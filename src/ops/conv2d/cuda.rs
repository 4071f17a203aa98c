//! Dense convolution on a GPU: patches gathered into rows, then a matrix product, some rows at a time.

use std::sync::Arc;

use super::{Epilogue, Sizes};
use crate::device::Context;
use crate::device::cuda::{
    Batch, Launch, Matrix, Parameter, Precision, Product, Stream, Tail, Taken, kernels,
};
use crate::error::Result;
use crate::ops::linear::cuda::{Held, Rows};
use crate::ops::sums;
use crate::tensor::{DType, Tensor};

kernels!(KERNELS, "conv2d");

/// Gathered patches that are held at a time. They are read again at once, so more would only leave the cache.
const WORKSPACE_BYTES: usize = if cfg!(test) { 64 << 10 } else { 32 << 20 };

/// Rows of patches and filters are filled up to whole multiples of this, for the loads of tensor cores.
const GRAIN: usize = 8;

/// As the source has them.
const ROWS_PER_BLOCK: usize = 8;
const THREADS: u32 = 256;

/// About the side of the part of a result that a block of a product has, and how many blocks fill a GPU.
const TILE: usize = 128;
const BLOCKS: usize = 128;
/// A product is summed in at most so many parts, of at least so many rows each.
const MOST_PARTS: usize = 32;
const LEAST_ROWS: usize = 512;

/// As the source has it.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Pictures {
    sample: i32,
    first: i32,
    rows: i32,
    height: i32,
    width: i32,
    inputs: i32,
    out_height: i32,
    out_width: i32,
    kernel: [i32; 2],
    stride: i32,
    padding: i32,
    leading: i32,
}
// SAFETY: thirteen `int`, in this order.
unsafe impl Parameter for Pictures {}

/// Patches of an input, some rows at a time.
struct Patches<'a> {
    stream: &'a Arc<Stream>,
    sizes: &'a Sizes,
    input: Taken,
    precision: Precision,
    /// Numbers from row to row.
    leading: usize,
    /// Rows at a time.
    most: usize,
    held: Tensor,
}

impl<'a> Patches<'a> {
    /// Of `x` as `precision`, for `rows` pixels of the result.
    fn new(
        cx: &Context,
        stream: &'a Arc<Stream>,
        sizes: &'a Sizes,
        x: &Tensor,
        dtype: DType,
        rows: usize,
    ) -> Result<Self> {
        let precision = dtype.precision().unwrap_or(Precision::F32);
        let input = x.on_as(cx, stream, "conv2d input", precision)?;
        let leading = sizes.patch().next_multiple_of(GRAIN);
        let most = (WORKSPACE_BYTES / precision.size() / leading.max(1)).clamp(1, rows.max(1));
        // All about as many.
        let most = rows.div_ceil(rows.div_ceil(most).max(1)).max(1);
        let held = Tensor::new(cx, "convolution patches", &[most, leading], dtype)?;
        Ok(Patches { stream, sizes, input, precision, leading, most, held })
    }

    /// The patches of `count` pixels from number `first` on, as a matrix.
    fn gather(&mut self, first: usize, count: usize) -> Result<Matrix> {
        let (sizes, address) = (self.sizes, self.held.on_mut(self.stream)?);
        let per_sample = sizes.out_height * sizes.out_width;
        let per_load = 16 / self.precision.size();
        let wide = sizes.inputs.is_multiple_of(per_load) && self.input.address().is_multiple_of(16);
        let pictures = Pictures {
            sample: (first / per_sample) as i32,
            first: (first % per_sample) as i32,
            rows: count as i32,
            height: sizes.height as i32,
            width: sizes.width as i32,
            inputs: sizes.inputs as i32,
            out_height: sizes.out_height as i32,
            out_width: sizes.out_width as i32,
            kernel: sizes.kernel.map(|side| side as i32),
            stride: sizes.stride as i32,
            padding: sizes.padding as i32,
            leading: self.leading as i32,
        };
        let launch = Launch::blocks(count.div_ceil(ROWS_PER_BLOCK), THREADS);
        let parameters: [&dyn Parameter; 4] = [&self.input.address(), &address, &pictures, &i32::from(wide)];
        // SAFETY: as the kernel declares; the input has the pictures of these pixels, and there is room for as many
        // rows.
        unsafe {
            let precision = Some(self.precision);
            self.stream.launch(&KERNELS, "gather_patches", precision, launch, &parameters)?;
        }
        Ok(Matrix { address, precision: self.precision, leading: self.leading, transposed: false })
    }
}

/// [`super::compute`] on a GPU.
pub fn compute(
    cx: &Context,
    stream: &Arc<Stream>,
    x: &Tensor,
    weight: &Tensor,
    epilogue: &Epilogue,
    sizes: &Sizes,
) -> Result<Tensor> {
    let dims = [x.dims()[0], sizes.out_height, sizes.out_width, sizes.outputs];
    let (per_sample, outputs) = (dims[1] * dims[2], dims[3]);
    let rows = dims[0] * per_sample;
    let dtype = DType::of_activations(cx);
    let precision = dtype.precision().unwrap_or(Precision::F32);
    let of_result = Rows { count: rows, per_sample, outputs, precision };
    let follows = Held::new(cx, stream, epilogue, &of_result)?;
    let mut out = Tensor::new(cx, "convolution", &dims, dtype)?;
    let to = out.on_mut(stream)?;
    if rows * outputs == 0 {
        return Ok(out);
    }
    let result = |first: usize| Matrix {
        address: to + (first * outputs * precision.size()) as u64,
        precision,
        leading: outputs,
        transposed: false,
    };
    if sizes.is_pointwise() {
        let (x, weight) = (
            x.on_as(cx, stream, "conv2d input", precision)?,
            weight.on_as(cx, stream, "conv2d weight", precision)?,
        );
        let matrix = |taken: &Taken, transposed| Matrix {
            address: taken.address(),
            precision,
            leading: sizes.inputs,
            transposed,
        };
        let (a, b) = (matrix(&x, false), matrix(&weight, true));
        let tail = follows.tail();
        // SAFETY: x and the result have so many rows, the weight a row for each output; the tail's are of the result.
        unsafe { stream.multiply(&product([rows, outputs, sizes.inputs], a, b, result(0), tail))? };
        return Ok(out);
    }
    let mut patches = Patches::new(cx, stream, sizes, x, dtype, rows)?;
    let filters = order(cx, stream, weight, dtype, patches.leading)?;
    let filters = Matrix {
        address: filters.on(cx, stream)?.address(),
        precision,
        leading: patches.leading,
        transposed: true,
    };
    // Products may begin within a sample, but then end in it, if samples have modulations of their own.
    let group = if follows.is_by_sample() { (patches.most / per_sample).max(1) * per_sample } else { rows };
    for start in (0..rows).step_by(group) {
        let end = rows.min(start + group);
        for first in (start..end).step_by(patches.most) {
            let count = patches.most.min(end - first);
            let a = patches.gather(first, count)?;
            let tail = follows.tail_from(first);
            let sides = [count, outputs, patches.leading];
            // SAFETY: there are so many patches and filters, both filled up with zeros; the result has these rows, and
            // the tail's are of it.
            unsafe { stream.multiply(&product(sides, a, filters, result(first), tail))? };
        }
    }
    Ok(out)
}

fn product([m, n, k]: [usize; 3], a: Matrix, b: Matrix, out: Matrix, tail: Tail) -> Product {
    Product { m, n, k, a, b, out, alpha: 1.0, accumulate: false, batch: None, tail }
}

/// A weight `[A, B, kh, kw]` as rows `[A, kh, kw, B]` of `leading` numbers, with zeros at their ends.
///
/// # Errors
/// `InvalidArgument` if the weight holds no floats; `OutOfMemory`; `Device`.
pub(crate) fn order(
    cx: &Context,
    stream: &Arc<Stream>,
    weight: &Tensor,
    dtype: DType,
    leading: usize,
) -> Result<Tensor> {
    let [filters, channels, kh, kw] = weight.dims_of("a convolution's weight")?;
    let precision = dtype.precision().unwrap_or(Precision::F32);
    let from = weight.on_as(cx, stream, "a convolution's weight", precision)?;
    let mut out = Tensor::new(cx, "convolution weight", &[filters, leading], dtype)?;
    let (count, to) = (out.elements(), out.on_mut(stream)?);
    if count == 0 {
        return Ok(out);
    }
    let [of_channels, of_taps, of_rows] = [channels, kh * kw, leading].map(|n| n as i32);
    // SAFETY: as the kernel declares; the weight has so many numbers, and so has the result.
    unsafe {
        stream.launch(
            &KERNELS,
            "order_filters",
            Some(precision),
            Launch::elements(count),
            &[&from.address(), &to, &(count as i64), &of_channels, &of_taps, &of_rows],
        )?;
    }
    Ok(out)
}

/// [`super::gradient::weight_gradient`] on a GPU, of a kernel of more than one pixel.
pub fn weight_gradient(
    cx: &Context,
    stream: &Arc<Stream>,
    x: &Tensor,
    dy: &Tensor,
    sizes: &Sizes,
) -> Result<Tensor> {
    let (Sizes { inputs, outputs, kernel: [kh, kw], .. }, dtype) = (*sizes, DType::F32);
    let rows = dy.elements().checked_div(outputs).unwrap_or(0);
    let mut patches = Patches::new(cx, stream, sizes, x, dtype, rows)?;
    let leading = patches.leading;
    let dy = dy.on_as(cx, stream, "a convolution's gradient", Precision::F32)?;
    let parts = parts(outputs, leading, patches.most);
    let mut sums = Tensor::zeros(cx, "a weight's gradient", &[parts, outputs * leading], dtype)?;
    let to = sums.on_mut(stream)?;
    let of_outputs = |row: usize, transposed| Matrix {
        address: dy.address() + (row * outputs * size_of::<f32>()) as u64,
        precision: Precision::F32,
        leading: outputs,
        transposed,
    };
    let out = Matrix { address: to, leading, ..of_outputs(0, false) };
    for first in (0..rows).step_by(patches.most) {
        let count = patches.most.min(rows - first);
        let gathered = patches.gather(first, count)?;
        let each = count / parts;
        let done = each * parts;
        let strides = [each * outputs, each * leading, outputs * leading];
        let all = Product {
            accumulate: true,
            batch: Some(Batch { count: parts, strides }),
            ..product([outputs, leading, each], of_outputs(first, true), gathered, out, Tail::default())
        };
        let skipped = (done * leading * size_of::<f32>()) as u64;
        let rest = Product {
            k: count - done,
            a: of_outputs(first + done, true),
            b: Matrix { address: gathered.address + skipped, ..gathered },
            batch: None,
            ..all
        };
        for product in [all, rest].iter().filter(|product| product.k > 0) {
            // SAFETY: dy and the patches have these rows, the sums as many numbers for each part.
            unsafe { stream.multiply(product)? };
        }
    }
    let sums = sums::add_parts(cx, "a weight's gradient", &sums)?;
    restore(cx, stream, &sums, [outputs, inputs, kh, kw], leading)
}

/// Into how many parts the rows of a gradient of a weight are cut: the result alone may be too small for a GPU.
fn parts(outputs: usize, leading: usize, rows: usize) -> usize {
    let blocks = outputs.div_ceil(TILE) * leading.div_ceil(TILE);
    (BLOCKS / blocks.max(1)).min(rows / LEAST_ROWS).clamp(1, MOST_PARTS)
}

/// The way back from [`order`], `F32`.
fn restore(
    cx: &Context,
    stream: &Arc<Stream>,
    ordered: &Tensor,
    dims: [usize; 4],
    leading: usize,
) -> Result<Tensor> {
    let mut out = Tensor::new(cx, "a weight's gradient", &dims, DType::F32)?;
    let (count, from, to) = (out.elements(), ordered.on(cx, stream)?, out.on_mut(stream)?);
    if count == 0 {
        return Ok(out);
    }
    let [channels, taps, of_rows] = [dims[1], dims[2] * dims[3], leading].map(|n| n as i32);
    // SAFETY: as the kernel declares; there are rows of so many numbers, and in the result as many.
    unsafe {
        stream.launch(
            &KERNELS,
            "restore_filters",
            None,
            Launch::elements(count),
            &[&from.address(), &to, &(count as i64), &channels, &taps, &of_rows],
        )?;
    }
    Ok(out)
}
