//! Antialiased resizing, as `torch.nn.functional.interpolate(antialias=True)` does it: one pass per axis.
//!
//! An output pixel i is the mean of the input around `scale * (i + 0.5)`, weighted by the filter stretched by
//! `max(scale, 1)`, with `scale = in / out` (ATen/native/UpSample.h).

mod cuda;

use std::sync::Mutex;

use crate::device::Context;
use crate::error::{Error, Result};
use crate::tensor::autograd::refuse;
use crate::tensor::{DType, Tensor};

/// Tasks per thread: enough to even out, few enough to cost nothing.
const TASKS_PER_THREAD: usize = 4;

/// The shape of the weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filter {
    /// A triangle.
    Bilinear,
    /// Keys' cubic with a = -0.5.
    Bicubic,
}

impl Filter {
    /// Half of the filter's width, in pixels of the coarser picture.
    fn radius(self) -> f64 {
        match self {
            Filter::Bilinear => 1.0,
            Filter::Bicubic => 2.0,
        }
    }

    fn weight(self, distance: f64) -> f64 {
        let x = distance.abs();
        match self {
            Filter::Bilinear => (1.0 - x).max(0.0),
            Filter::Bicubic if x < 1.0 => (1.5 * x - 2.5) * x * x + 1.0,
            Filter::Bicubic if x < 2.0 => ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0,
            Filter::Bicubic => 0.0,
        }
    }
}

/// What is kept in place when the grid is stretched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Corners {
    /// The outer edges: torch's `align_corners=False`.
    Edges,
    /// The centres of the corner pixels: `align_corners=True`.
    Centres,
}

/// How one axis is resized: `output` pixels of a grid of `grid`, from the `start`-th on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Axis {
    pub(crate) input: usize,
    pub(crate) grid: usize,
    pub(crate) start: usize,
    pub(crate) output: usize,
}

impl Axis {
    /// An axis that is resized as a whole.
    pub(crate) fn whole(input: usize, output: usize) -> Self {
        Axis { input, grid: output, start: 0, output }
    }

    /// Input pixels per output pixel.
    fn scale(&self, corners: Corners) -> f64 {
        match corners {
            Corners::Edges => self.input as f64 / self.grid as f64,
            Corners::Centres if self.grid == 1 => 0.0,
            Corners::Centres => (self.input - 1) as f64 / (self.grid - 1) as f64,
        }
    }

    /// The taps of a pixel: at most the support on either side, rounded up, and at most all.
    fn most_taps(&self, support: f64) -> usize {
        ((2.0 * support).ceil() as usize + 2).min(self.input)
    }
}

/// For each output pixel the first input pixel and the weights from there on.
struct Taps {
    first: Vec<usize>,
    /// Where the weights of each output pixel begin; one more than there are pixels.
    begin: Vec<usize>,
    weights: Vec<f32>,
}

impl Taps {
    fn new(axis: Axis, filter: Filter, corners: Corners) -> Result<Self> {
        let scale = axis.scale(corners);
        let stretch = scale.max(1.0);
        let support = filter.radius() * stretch;
        let most = axis.most_taps(support);
        let mut taps = Taps { first: Vec::new(), begin: Vec::new(), weights: Vec::new() };
        let bytes = axis.output.saturating_mul(most).saturating_mul(size_of::<f32>());
        let out_of_memory = |_| Error::out_of_memory("the weights of a resize", bytes);
        taps.first.try_reserve_exact(axis.output).map_err(out_of_memory)?;
        taps.begin.try_reserve_exact(axis.output + 1).map_err(out_of_memory)?;
        taps.weights.try_reserve_exact(axis.output.saturating_mul(most)).map_err(out_of_memory)?;
        taps.begin.push(0);
        for i in axis.start..axis.start + axis.output {
            let centre = scale * (i as f64 + 0.5);
            // Rust's conversion goes towards zero and stops at 0, as the reference's max(int(x), 0) does.
            let first = ((centre - support + 0.5) as usize).min(axis.input - 1);
            let end = ((centre + support + 0.5) as usize).clamp(first + 1, axis.input);
            let weight = |j: usize| filter.weight((j as f64 - centre + 0.5) / stretch);
            let sum: f64 = (first..end).map(weight).sum();
            let norm = if sum == 0.0 { 1.0 } else { sum };
            taps.weights.extend((first..end).map(|j| (weight(j) / norm) as f32));
            taps.first.push(first);
            taps.begin.push(taps.weights.len());
        }
        Ok(taps)
    }

    fn of(&self, output: usize) -> (usize, &[f32]) {
        (self.first[output], &self.weights[self.begin[output]..self.begin[output + 1]])
    }
}

/// A picture of another size.
///
/// # Shapes
/// `[N, H, W, C]` to `[N, height, width, C]`, F32, on a GPU of any float type.
///
/// # Errors
/// `InvalidArgument` for another shape or type, or a side of 0; `OutOfMemory`; `Cancelled`.
pub fn resize(
    cx: &Context,
    input: &Tensor,
    size: [usize; 2],
    filter: Filter,
    corners: Corners,
) -> Result<Tensor> {
    let _span = cx.op("resize");
    let [_, h, w, _] = input.dims_of("the input of a resize")?;
    resize_axes(cx, input, [Axis::whole(h, size[0]), Axis::whole(w, size[1])], filter, corners)
}

/// The same, of a part of the resized picture: `axes` are height and width.
pub(crate) fn resize_axes(
    cx: &Context,
    input: &Tensor,
    [vertical, horizontal]: [Axis; 2],
    filter: Filter,
    corners: Corners,
) -> Result<Tensor> {
    refuse(cx, "resize", &[input])?;
    let [n, h, w, c] = input.dims_of("the input of a resize")?;
    if n * h * w * c == 0 || vertical.output * horizontal.output == 0 {
        let found = format!("{} to {} x {}", input.shape(), vertical.output, horizontal.output);
        return Err(Error::argument("the size of a resize", "no side of 0", found));
    }
    if let Some(stream) = cx.cuda()? {
        return cuda::resize(cx, stream, input, [vertical, horizontal], (filter, corners));
    }
    let (out_h, out_w) = (vertical.output, horizontal.output);
    let values = input.slice::<f32>()?;

    let taps = Taps::new(horizontal, filter, corners)?;
    let mut wide = Tensor::new(cx, "a resized picture", &[n, h, out_w, c], DType::F32)?;
    over_rows(cx, wide.slice_mut()?, out_w * c, &|row, out| {
        let line = &values[row * w * c..][..w * c];
        for (x, pixel) in out.chunks_exact_mut(c).enumerate() {
            let (first, weights) = taps.of(x);
            weighted_sum(pixel, line[first * c..].chunks_exact(c), weights);
        }
    })?;

    let values = wide.slice::<f32>()?;
    let taps = Taps::new(vertical, filter, corners)?;
    let mut resized = Tensor::new(cx, "a resized picture", &[n, out_h, out_w, c], DType::F32)?;
    over_rows(cx, resized.slice_mut()?, out_w * c, &|row, out| {
        let picture = &values[row / out_h * h * out_w * c..];
        let (first, weights) = taps.of(row % out_h);
        weighted_sum(out, picture[first * out_w * c..].chunks_exact(out_w * c), weights);
    })?;
    Ok(resized)
}

fn weighted_sum<'a>(out: &mut [f32], inputs: impl Iterator<Item = &'a [f32]>, weights: &[f32]) {
    out.fill(0.0);
    for (input, weight) in inputs.zip(weights) {
        for (sum, value) in out.iter_mut().zip(input) {
            *sum += value * weight;
        }
    }
}

/// Calls `body` with the number and the elements of every row, spread over the device's threads.
pub(crate) fn over_rows(
    cx: &Context,
    out: &mut [f32],
    row: usize,
    body: &(dyn Fn(usize, &mut [f32]) + Sync),
) -> Result<()> {
    let rows = out.len() / row;
    let rows_per_task = rows.div_ceil(cx.device().threads() * TASKS_PER_THREAD).max(1);
    // Each part is locked once, by its own task: the lock only hands it over.
    let parts: Vec<Mutex<&mut [f32]>> = out.chunks_mut(rows_per_task * row).map(Mutex::new).collect();
    cx.parallel(parts.len(), |task| {
        if let Ok(mut part) = parts[task].lock() {
            for (i, out) in part.chunks_exact_mut(row).enumerate() {
                body(task * rows_per_task + i, out);
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cuda::Precision;
    use crate::ops::check;

    #[test]
    fn a_gpu_agrees() {
        let halves = [(Precision::F32, 1e-6), (Precision::BF16, 2e-2), (Precision::F16, 2e-3)];
        for (dims, size) in [
            ([1usize, 1, 1, 1], [3usize, 2]),
            ([2, 5, 3, 1], [9, 1]),
            ([1, 7, 12, 5], [7, 40]),
            ([2, 40, 33, 3], [11, 7]),
        ] {
            let x = check::random(&dims, 1);
            for (filter, corners) in [
                (Filter::Bicubic, Corners::Edges),
                (Filter::Bicubic, Corners::Centres),
                (Filter::Bilinear, Corners::Edges),
                (Filter::Bilinear, Corners::Centres),
            ] {
                check::on_device(&[&x], &halves, |cx, t| resize(cx, &t[0], size, filter, corners));
            }
            let part = Axis { input: dims[1], grid: 2 * size[0], start: size[0], output: size[0] };
            let axes = [part, Axis::whole(dims[2], size[1])];
            check::on_device(&[&x], &halves, |cx, t| {
                resize_axes(cx, &t[0], axes, Filter::Bicubic, Corners::Edges)
            });
        }
    }
}
