//! The kernel of processors about which nothing is known: plain loops, 4 x 8 sums, no fused multiply-add.

use super::{A_STRIDE, Kernel, MatrixB, Part, Tile, copy_rows, transpose_plain};

pub(super) struct Baseline;

const ROWS: usize = 4;
const COLUMNS: usize = 8;

impl Kernel for Baseline {
    const ROWS: usize = ROWS;
    const COLUMNS: usize = COLUMNS;
    const PER_WORD: usize = 1;

    unsafe fn multiply(tile: &Tile) {
        let multiply = match tile.rows {
            1 => multiply::<1>,
            2 => multiply::<2>,
            3 => multiply::<3>,
            _ => multiply::<4>,
        };
        // SAFETY: the caller's contract.
        unsafe { multiply(tile) }
    }

    unsafe fn pack(b: &MatrixB, part: Part, panel: &mut [f32]) {
        b.pack_plain(part, 0..part.depth, 0..COLUMNS, COLUMNS, panel);
    }

    unsafe fn copy(from: &[f32], stride: usize, rows: usize, depth: usize, to: &mut [f32]) {
        copy_rows(from, stride, rows, depth, to);
    }

    unsafe fn transpose(from: &[f32], stride: usize, rows: usize, depth: usize, to: &mut [f32]) {
        transpose_plain(from, stride, 0..rows, 0..depth, to);
    }
}

/// # Safety
/// As [`Kernel::multiply`], with `R == tile.rows`.
unsafe fn multiply<const R: usize>(tile: &Tile) {
    let mut sums = [[0f32; COLUMNS]; R];
    for (k, b) in tile.panel.chunks_exact(COLUMNS).take(tile.words).enumerate() {
        for (r, sums) in sums.iter_mut().enumerate() {
            let a = tile.a[r * A_STRIDE + k];
            for (sum, b) in sums.iter_mut().zip(b) {
                *sum += a * b;
            }
        }
    }
    for (r, sums) in sums.iter().enumerate() {
        // SAFETY: the tile's C has `rows` rows of `columns` floats.
        let c = unsafe { std::slice::from_raw_parts_mut(tile.c.add(r * tile.ldc), tile.columns) };
        for (c, sum) in c.iter_mut().zip(sums) {
            *c = if tile.accumulate { *c + sum } else { *sum };
        }
    }
}
