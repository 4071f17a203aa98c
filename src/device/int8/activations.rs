//! Activations in eight bits: quantised anew for every product, each row by its own largest number.

use super::kernel::{magnitude, quantise};
use super::{Factors, GROUP, MAX_TERMS, Product, ROWS, Scale};
use crate::device::scratch::SharedMut;
use crate::device::{Buffer, Context};
use crate::error::Result;

/// Numbers of a row that are quantised in one go, on the stack.
const RUN: usize = 256;

/// What makes four i8 the u8 that instructions take: 128 more in each.
const BIAS: u8 = 0x80;

/// The A of every term of a product. Tile after tile of [`ROWS`] rows; in it, term after term: group after group of
/// [`GROUP`] values of each row, then the rows' scales.
#[derive(Debug)]
pub(super) struct Activations {
    buffer: Buffer,
    /// Where the terms begin within a tile, and where the last ends.
    terms: [usize; MAX_TERMS + 1],
    /// Bytes of a tile.
    stride: usize,
}

impl Activations {
    /// # Errors
    /// `OutOfMemory`; `Cancelled`.
    pub fn new(cx: &Context, product: &Product) -> Result<Self> {
        let mut terms = [0; MAX_TERMS + 1];
        for (i, term) in product.terms.iter().enumerate() {
            terms[i + 1] = terms[i] + term.weight.groups() * ROWS * GROUP + ROWS * size_of::<f32>();
        }
        let stride = terms[product.terms.len()];
        let tiles = product.m.div_ceil(ROWS);
        let mut buffer = cx.device().take("activations in eight bits", tiles.saturating_mul(stride))?;
        let shared = SharedMut::new(buffer.bytes_mut());
        cx.parallel(tiles, |tile| {
            // SAFETY: each task has its own tile of the buffer, which outlives the loop.
            let bytes = unsafe { shared.part(tile * stride, stride) };
            let first = tile * ROWS;
            for (i, term) in product.terms.iter().enumerate() {
                fill(term, first..product.m.min(first + ROWS), &mut bytes[terms[i]..terms[i + 1]]);
            }
        })?;
        Ok(Activations { buffer, terms, stride })
    }

    /// One tile of a term's A.
    pub fn tile(&self, term: usize, tile: usize) -> &[u8] {
        &self.buffer.bytes()[tile * self.stride..][self.terms[term]..self.terms[term + 1]]
    }
}

/// Quantises the rows of one tile. Those that it has not are left as they are: nobody reads them.
fn fill(term: &Factors, rows: std::ops::Range<usize>, tile: &mut [u8]) {
    let (k, first) = (term.weight.k(), rows.start);
    let (groups, scales) = tile.split_at_mut(tile.len() - ROWS * size_of::<f32>());
    for row in rows {
        let values = &term.rows[row * term.leading..][..k];
        let scale = Scale::of(magnitude(values));
        let r = row - first;
        scales[r * size_of::<f32>()..][..size_of::<f32>()].copy_from_slice(&scale.scale.to_ne_bytes());
        let mut quantised = [BIAS; RUN];
        for (values, groups) in values.chunks(RUN).zip(groups.chunks_mut(RUN * ROWS)) {
            let filled = values.len().next_multiple_of(GROUP);
            quantise(values, scale.inverse, BIAS, &mut quantised[..values.len()]);
            quantised[values.len()..filled].fill(BIAS);
            let groups = groups.chunks_exact_mut(ROWS * GROUP);
            for (group, four) in groups.zip(quantised[..filled].chunks_exact(GROUP)) {
                group[r * GROUP..][..GROUP].copy_from_slice(four);
            }
        }
    }
}
