//! Rows are summed in blocks, and then the blocks; tasks share blocks and runs of channels between them.

use super::{Columns, Terms};
use crate::device::Context;
use crate::device::scratch::Doubles;
use crate::error::Result;
use crate::ops::kernels;
use crate::simd_dispatch;
use crate::tensor::Tensor;

/// The fewest rows of a block.
const BLOCK_ROWS: usize = 64;

/// The most channels of one task: their sums stay in the L1 cache.
const TILE: usize = 512;

/// What is summed.
#[derive(Clone, Copy)]
enum Slices<'a> {
    Values(&'a [f32]),
    Products(&'a [f32], &'a [f32]),
    Both(&'a [f32], &'a [f32]),
}

impl Slices<'_> {
    /// How many sums there are of each channel.
    fn kinds(self) -> usize {
        if matches!(self, Slices::Both(..)) { 2 } else { 1 }
    }
}

/// The sums of `terms`, `[groups, kinds, C]`.
pub fn sums(cx: &Context, columns: &Columns, terms: Terms) -> Result<Doubles> {
    let terms = match terms {
        Terms::Values(x) => Slices::Values(x.slice()?),
        Terms::Products(x, y) => Slices::Products(x.slice()?, y.slice()?),
        Terms::ValuesAndProducts(x, y) => Slices::Both(x.slice()?, y.slice()?),
    };
    let Columns { groups, channels, .. } = *columns;
    let (tiled, kinds) = (columns.tiled_sums(cx, terms)?, terms.kinds());
    let (tile, tiles) = (columns.tile(), columns.tiles());
    let mut out = Doubles::new(cx.device(), "sums", groups * kinds * channels)?;
    for (i, out) in out.values_mut().chunks_exact_mut(channels.max(1)).enumerate() {
        let of_group = &tiled.values()[i / kinds * tiles * kinds * tile..];
        let of_kind = of_group.chunks_exact(tile).skip(i % kinds).step_by(kinds).flatten();
        out.iter_mut().zip(of_kind).for_each(|(out, sum)| *out = *sum);
    }
    Ok(out)
}

/// Rounds the `wanted` kinds of sums `[groups, kinds, C]`.
pub fn round(
    cx: &Context,
    sums: &[f64],
    [_, kinds, channels]: [usize; 3],
    wanted: &[usize],
    out: &mut Tensor,
) -> Result<()> {
    kernels::parallel_chunks(cx, out.slice_mut::<f32>()?, channels, |i, part| {
        let row = i / wanted.len() * kinds + wanted[i % wanted.len()];
        part.iter_mut().zip(&sums[row * channels..]).for_each(|(out, sum)| *out = *sum as f32);
    })
}

impl Columns {
    fn tiles(&self) -> usize {
        self.channels.div_ceil(TILE).max(1)
    }

    /// Channels of a tile; the last may have fewer.
    fn tile(&self) -> usize {
        self.channels.div_ceil(self.tiles()).max(1)
    }

    /// `[groups, tiles, kinds, tile]`: of the last tile only so many count as there are channels.
    fn tiled_sums(&self, cx: &Context, terms: Slices) -> Result<Doubles> {
        let (tile, tiles, kinds) = (self.tile(), self.tiles(), terms.kinds());
        let block = BLOCK_ROWS.max(kernels::rows_per_task(tile));
        let blocks = self.rows.div_ceil(block).max(1);
        let (chunk, totals) = (kinds * tile, self.groups * tiles * kinds * tile);
        let mut partial = Doubles::new(cx.device(), "partial sums", blocks * totals)?;
        kernels::parallel_chunks(cx, partial.values_mut(), chunk, |i, sums| {
            let (column, first) = (i / blocks % tiles * tile, i % blocks * block);
            let part = Part {
                start: (i / blocks / tiles * self.rows + first) * self.channels + column,
                rows: block.min(self.rows - first),
                width: tile.min(self.channels - column),
                stride: self.channels,
            };
            part.sum(terms, sums);
        })?;
        if blocks == 1 {
            return Ok(partial);
        }
        let mut values = Doubles::new(cx.device(), "sums", totals)?;
        kernels::parallel_chunks(cx, values.values_mut(), chunk, |i, sums| {
            sums.fill(0.0);
            for partial in partial.values()[i * blocks * chunk..][..blocks * chunk].chunks_exact(chunk) {
                sums.iter_mut().zip(partial).for_each(|(sum, partial)| *sum += partial);
            }
        })?;
        Ok(values)
    }
}

/// Some channels of a block of rows.
struct Part {
    /// The first element.
    start: usize,
    rows: usize,
    width: usize,
    /// Elements from one row to the next.
    stride: usize,
}

impl Part {
    /// Overwrites `sums`: as many for each kind, of which the first `width` count.
    fn sum(&self, terms: Slices, sums: &mut [f64]) {
        sums.fill(0.0);
        let (first, second) = sums.split_at_mut(sums.len() / terms.kinds());
        match terms {
            Slices::Values(x) => add_values(self, x, first),
            Slices::Products(x, y) => add_products(self, x, y, first),
            Slices::Both(x, y) => add_both(self, x, y, first, second),
        }
    }

    #[inline(always)]
    fn row<'a>(&self, x: &'a [f32], row: usize) -> &'a [f32] {
        &x[self.start + row * self.stride..][..self.width]
    }

    /// Four rows: added to each other before they are added to a sum, which is then loaded and stored less often.
    #[inline(always)]
    fn quad<'a>(&self, x: &'a [f32], row: usize) -> [&'a [f32]; 4] {
        [self.row(x, row), self.row(x, row + 1), self.row(x, row + 2), self.row(x, row + 3)]
    }

    fn quads(&self) -> impl Iterator<Item = usize> + use<> {
        (0..self.rows / 4 * 4).step_by(4)
    }

    /// The rows after the last quad.
    fn rest(&self) -> std::ops::Range<usize> {
        self.rows / 4 * 4..self.rows
    }
}

// Products of two f32 are exact in f64: a fused multiply-add would not change a bit.
#[inline(always)]
fn product(x: f32, y: f32) -> f64 {
    f64::from(x) * f64::from(y)
}

simd_dispatch! {
    fn add_values<const FMA: bool>(part: &Part, x: &[f32], sums: &mut [f64]) {
        let sums = &mut sums[..part.width];
        for row in part.quads() {
            let [a, b, c, d] = part.quad(x, row);
            for i in 0..sums.len() {
                sums[i] += (f64::from(a[i]) + f64::from(b[i])) + (f64::from(c[i]) + f64::from(d[i]));
            }
        }
        for row in part.rest() {
            sums.iter_mut().zip(part.row(x, row)).for_each(|(sum, x)| *sum += f64::from(*x));
        }
    }
}

simd_dispatch! {
    fn add_products<const FMA: bool>(part: &Part, x: &[f32], y: &[f32], sums: &mut [f64]) {
        let sums = &mut sums[..part.width];
        for row in part.quads() {
            let ([a, b, c, d], [p, q, r, s]) = (part.quad(x, row), part.quad(y, row));
            for i in 0..sums.len() {
                sums[i] += (product(a[i], p[i]) + product(b[i], q[i])) + (product(c[i], r[i]) + product(d[i], s[i]));
            }
        }
        for row in part.rest() {
            let terms = part.row(x, row).iter().zip(part.row(y, row));
            sums.iter_mut().zip(terms).for_each(|(sum, (x, y))| *sum += product(*x, *y));
        }
    }
}

simd_dispatch! {
    fn add_both<const FMA: bool>(part: &Part, x: &[f32], y: &[f32], values: &mut [f64], products: &mut [f64]) {
        let (values, products) = (&mut values[..part.width], &mut products[..part.width]);
        for row in part.quads() {
            let ([a, b, c, d], [p, q, r, s]) = (part.quad(x, row), part.quad(y, row));
            for i in 0..values.len() {
                values[i] += (f64::from(a[i]) + f64::from(b[i])) + (f64::from(c[i]) + f64::from(d[i]));
                products[i] += (product(a[i], p[i]) + product(b[i], q[i])) + (product(c[i], r[i]) + product(d[i], s[i]));
            }
        }
        for row in part.rest() {
            let terms = part.row(x, row).iter().zip(part.row(y, row));
            for ((value, product_sum), (x, y)) in values.iter_mut().zip(products.iter_mut()).zip(terms) {
                *value += f64::from(*x);
                *product_sum += product(*x, *y);
            }
        }
    }
}
