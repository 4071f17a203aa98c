//! Sums over rows: the gradients of what all rows share. The order of a sum follows from its size alone.

use std::sync::Arc;

use crate::device::Context;
use crate::device::cuda::{Launch, Stream, kernels as cuda_kernels};
use crate::error::Result;
use crate::ops::kernels::{self, per_cpu};
use crate::tensor::{DType, Tensor};

cuda_kernels!(KERNELS, "sums");

/// The fewest rows that are summed in one go.
const LEAST_ROWS: usize = 32;

/// The most parts that rows are cut into.
const MOST_PARTS: usize = 256;

/// Columns of one task that adds parts up.
const COLUMNS: usize = 256;

/// How many of `rows` rows make one part of a sum over them.
pub(crate) fn rows_per_part(rows: usize) -> usize {
    rows.div_ceil(MOST_PARTS).max(LEAST_ROWS)
}

/// How a GPU cuts rows into parts: enough blocks to fill it, few enough that adding them up is little work.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Parts {
    /// How many.
    pub count: usize,
    /// Rows of each; the last may have fewer.
    pub rows: usize,
}

/// The parts of `rows` rows.
pub(crate) fn parts(rows: usize) -> Parts {
    let of_each = rows_per_part(rows);
    Parts { count: rows.div_ceil(of_each), rows: of_each }
}

/// The sum of the rows of `x`, a float tensor of any type, on a GPU: `F32 [C]`.
pub(crate) fn columns_on(
    cx: &Context,
    stream: &Arc<Stream>,
    what: &'static str,
    x: &Tensor,
) -> Result<Tensor> {
    let (mut x, mut rows, width) = (x.clone(), x.shape().rows(), x.shape().channels());
    loop {
        let parts = parts(rows);
        let mut sums = Tensor::zeros(cx, what, &[parts.count.max(1), width], DType::F32)?;
        if rows > 0 && width > 0 {
            let (from, to) = (x.on(cx, stream)?, sums.on_mut(stream)?);
            let launch = Launch {
                grid: [width.div_ceil(CUDA_COLUMNS) as u32, parts.count as u32, 1],
                block: [CUDA_COLUMNS as u32, CUDA_LINES, 1],
                shared_bytes: 0,
            };
            let (count, of_each) = (rows as i64, parts.rows as i32);
            let precision = x.precision(what)?;
            // SAFETY: as the kernel declares; x has so many rows of `width` numbers, the sums one for each part.
            unsafe {
                stream.launch(
                    &KERNELS,
                    "sum_columns",
                    Some(precision),
                    launch,
                    &[&from.address(), &to, &count, &(width as i32), &of_each],
                )?;
            }
        }
        if parts.count <= 1 {
            return sums.reshape(&[width]);
        }
        (x, rows) = (sums, parts.count);
    }
}

/// The sums over R of `x` `F32 [G, R, C]` on a GPU, for R of at most a few hundred: `[G, C]`.
pub(crate) fn groups_on(
    cx: &Context,
    stream: &Arc<Stream>,
    what: &'static str,
    x: &Tensor,
) -> Result<Tensor> {
    let [groups, rows, width] = x.dims_of(what)?;
    let mut sums = Tensor::zeros(cx, what, &[groups, width], DType::F32)?;
    if x.elements() == 0 {
        return Ok(sums);
    }
    let (from, to) = (x.on(cx, stream)?, sums.on_mut(stream)?);
    let tiles = width.div_ceil(CUDA_COLUMNS);
    let blocks = Launch::blocks(groups * tiles, CUDA_COLUMNS as u32);
    let launch = Launch { block: [CUDA_COLUMNS as u32, CUDA_LINES, 1], ..blocks };
    let (rows, width, tiles) = (rows as i32, width as i32, tiles as i32);
    // SAFETY: as the kernel declares; x has so many numbers, the sums one for each group and column.
    unsafe {
        stream.launch(
            &KERNELS,
            "sum_groups",
            None,
            launch,
            &[&from.address(), &to, &rows, &width, &tiles],
        )?;
    }
    Ok(sums)
}

/// As `sums.cu` has them.
const CUDA_COLUMNS: usize = 32;
const CUDA_LINES: u32 = 8;

/// The sum over rows of `width` numbers, `[width]`.
pub(crate) fn columns(cx: &Context, what: &'static str, rows: &[f32], width: usize) -> Result<Tensor> {
    let count = rows.len() / width.max(1);
    let per_part = rows_per_part(count);
    let mut parts = Tensor::new(cx, what, &[count.div_ceil(per_part), width], DType::F32)?;
    kernels::parallel_chunks(cx, parts.slice_mut()?, width, |i, sums| {
        let rows = &rows[i * per_part * width..];
        sums.fill(0.0);
        add_rows(&rows[..rows.len().min(per_part * width)], width, sums);
    })?;
    add_parts(cx, what, &parts)
}

/// The sum of `parts` `[P, W]` over P, `[W]`.
pub(crate) fn add_parts(cx: &Context, what: &'static str, parts: &Tensor) -> Result<Tensor> {
    let [_, width] = parts.dims_of(what)?;
    if let Some(stream) = cx.cuda()? {
        return columns_on(cx, stream, what, parts);
    }
    let values = parts.slice::<f32>()?;
    let mut out = Tensor::new(cx, what, &[width], DType::F32)?;
    kernels::parallel_chunks(cx, out.slice_mut()?, COLUMNS, |i, sums| {
        sums.fill(0.0);
        add_rows(values.get(i * COLUMNS..).unwrap_or(&[]), width, sums);
    })?;
    Ok(out)
}

/// The sum of all numbers, one after the other: for as many as parts or channels.
pub(crate) fn total(values: &[f32]) -> f32 {
    values.iter().map(|&v| f64::from(v)).sum::<f64>() as f32
}

#[inline(always)]
fn add_body<const FMA: bool>(rows: &[f32], stride: usize, sums: &mut [f32]) {
    for row in rows.chunks(stride) {
        for (sum, v) in sums.iter_mut().zip(row) {
            *sum += v;
        }
    }
}

per_cpu! {
    /// Adds the start of each of the rows, which are `stride` apart, to `sums`.
    fn add_rows(rows: &[f32], stride: usize, sums: &mut [f32]) = add_body
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check;

    #[test]
    fn agrees_with_the_definition() {
        for (rows, width) in [(1, 1), (33, 7), (300, 300), (9000, 3), (0, 5), (5, 0)] {
            let x = check::random(&[rows, width], 1);
            let wide = check::wide(&x);
            let expected: Vec<f64> = (0..width).map(|c| wide.iter().skip(c).step_by(width).sum()).collect();
            let sums = check::on_threads(|cx| columns(cx, "sums", x.slice()?, width));
            check::close(&sums, &[width], &expected, 1e-6);
        }
        assert_eq!(total(&[1e8, 1.0, -1e8, 2.0]), 3.0);
    }
}
