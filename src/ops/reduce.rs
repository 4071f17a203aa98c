//! Sums over the rows of a tensor, channel by channel: in f64, and in an order that only the shape decides.
//!
//! Rows are summed in blocks, and then the blocks; tasks share blocks and runs of channels between them.

use crate::device::Context;
use crate::device::scratch::Doubles;
use crate::error::Result;
use crate::ops::kernels;
use crate::simd_dispatch;
use crate::tensor::{DType, Tensor};

/// The fewest rows of a block.
const BLOCK_ROWS: usize = 64;

/// The most channels of one task: their sums stay in the L1 cache.
const TILE: usize = 512;

/// Rows of channels, in groups that are summed apart: samples, or the whole batch as one.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Columns {
    pub groups: usize,
    /// Rows of each group.
    pub rows: usize,
    pub channels: usize,
}

/// What is summed. Each slice holds the elements of all groups.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Terms<'a> {
    /// x.
    Values(&'a [f32]),
    /// x y.
    Products(&'a [f32], &'a [f32]),
    /// x, and x y beside it.
    ValuesAndProducts(&'a [f32], &'a [f32]),
}

impl Terms<'_> {
    /// How many sums there are of each channel.
    fn kinds(&self) -> usize {
        if matches!(self, Terms::ValuesAndProducts(..)) { 2 } else { 1 }
    }
}

/// Sums of [`Columns`], by group, kind and channel.
#[derive(Debug)]
pub(crate) struct Sums {
    columns: Columns,
    kinds: usize,
    /// `[groups, tiles, kinds, tile]`.
    values: Doubles,
}

impl Columns {
    fn tiles(&self) -> usize {
        self.channels.div_ceil(TILE).max(1)
    }

    /// Channels of a tile; the last may have fewer.
    fn tile(&self) -> usize {
        self.channels.div_ceil(self.tiles()).max(1)
    }

    /// The sums of `terms` over the rows of each group.
    ///
    /// # Errors
    /// `OutOfMemory`; `Cancelled`.
    pub fn sums(&self, cx: &Context, terms: Terms) -> Result<Sums> {
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
            return Ok(Sums { columns: *self, kinds, values: partial });
        }
        let mut values = Doubles::new(cx.device(), "sums", totals)?;
        kernels::parallel_chunks(cx, values.values_mut(), chunk, |i, sums| {
            sums.fill(0.0);
            for partial in partial.values()[i * blocks * chunk..][..blocks * chunk].chunks_exact(chunk) {
                sums.iter_mut().zip(partial).for_each(|(sum, partial)| *sum += partial);
            }
        })?;
        Ok(Sums { columns: *self, kinds, values })
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
    fn sum(&self, terms: Terms, sums: &mut [f64]) {
        sums.fill(0.0);
        let (first, second) = sums.split_at_mut(sums.len() / terms.kinds());
        match terms {
            Terms::Values(x) => add_values(self, x, first),
            Terms::Products(x, y) => add_products(self, x, y, first),
            Terms::ValuesAndProducts(x, y) => add_both(self, x, y, first, second),
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

impl Sums {
    /// The sums of one group and kind: as many as there are channels.
    pub fn row(&self, group: usize, kind: usize) -> impl Iterator<Item = f64> {
        let (tile, tiles) = (self.columns.tile(), self.columns.tiles());
        let of_group = &self.values.values()[group * tiles * self.kinds * tile..];
        of_group
            .chunks_exact(tile)
            .skip(kind)
            .step_by(self.kinds)
            .flatten()
            .copied()
            .take(self.columns.channels)
    }

    /// These kinds of sums, one after the other for each group.
    ///
    /// # Shapes
    /// `F32 [groups, kinds, C]`
    ///
    /// # Errors
    /// `OutOfMemory`; `Cancelled`.
    pub fn tensor(&self, cx: &Context, what: &'static str, kinds: &[usize]) -> Result<Tensor> {
        let Columns { groups, channels, .. } = self.columns;
        let mut out = Tensor::new(cx, what, &[groups, kinds.len(), channels], DType::F32)?;
        kernels::parallel_chunks(cx, out.slice_mut::<f32>()?, channels, |i, part| {
            let (group, kind) = (i / kinds.len(), kinds[i % kinds.len()]);
            part.iter_mut().zip(self.row(group, kind)).for_each(|(out, sum)| *out = sum as f32);
        })?;
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check;

    #[test]
    fn agrees_with_the_definition() {
        for [groups, rows, channels] in
            [[1usize, 1usize, 1usize], [3, 70, 33], [2, 5, 1025], [1, 200, 513], [4, 0, 3], [1, 40_000, 2]]
        {
            let columns = Columns { groups, rows, channels };
            let (x, y) =
                (check::random(&[groups, rows, channels], 1), check::random(&[groups, rows, channels], 2));
            let (wide_x, wide_y) = (check::wide(&x), check::wide(&y));
            let expected: Vec<f64> = (0..groups * 2 * channels)
                .map(|i| {
                    let (c, kind, group) = (i % channels, i / channels % 2, i / channels / 2);
                    let element = |row: usize| (group * rows + row) * channels + c;
                    let term = |e: usize| wide_x[e] * if kind == 0 { wide_y[e] } else { 1.0 };
                    (0..rows).map(|row| term(element(row))).sum()
                })
                .collect();
            let terms = |x, y| Terms::ValuesAndProducts(x, y);
            let both = check::on_threads(|cx| {
                columns.sums(cx, terms(x.slice()?, y.slice()?))?.tensor(cx, "sums", &[1, 0])
            });
            check::close(&both, &[groups, 2, channels], &expected, 1e-7);
            let cx = check::cx();
            let values = columns.sums(&cx, Terms::Values(x.slice().unwrap())).unwrap();
            let products =
                columns.sums(&cx, Terms::Products(x.slice().unwrap(), y.slice().unwrap())).unwrap();
            for group in 0..groups {
                let row = |kind: usize| &expected[(2 * group + kind) * channels..][..channels];
                for (sums, expected) in [(&products, row(0)), (&values, row(1))] {
                    assert_eq!(sums.row(group, 0).count(), channels);
                    assert!(sums.row(group, 0).zip(expected).all(|(a, e)| (a - e).abs() < 1e-9));
                }
            }
        }
    }
}
