//! Small products on the calling thread, in memory that the caller brings: what attention is made of.

use super::{
    A_STRIDE, Ahead, BLOCK_ROWS, Choice, Kernel, MatrixB, Tile, blocks, fits, pack_panel, steps, with_kernel,
};
use crate::device::Device;
use crate::error::Result;

/// One kernel, chosen once so that packing and multiplying agree.
#[derive(Debug, Clone, Copy)]
pub struct Serial {
    choice: Choice,
}

/// A product with packed B: C (+)= A B.
#[derive(Debug, Clone, Copy)]
pub struct Packed<'a> {
    /// Rows of A and C.
    pub m: usize,
    /// Columns of C.
    pub n: usize,
    /// Columns of A: the summed dimension.
    pub k: usize,
    /// A, row-major.
    pub a: &'a [f32],
    /// Distance between rows of A.
    pub lda: usize,
    /// B, as [`Serial::pack`] left it.
    pub b: &'a [f32],
    /// Whether to add to C rather than overwrite it.
    pub accumulate: bool,
}

impl Serial {
    /// With the kernel that [`gemm`](super::gemm) has on this device.
    pub fn new(device: &Device) -> Self {
        Serial { choice: Choice::of(device) }
    }

    /// How many floats a packed B takes.
    pub fn packed_len(&self, n: usize, k: usize) -> usize {
        with_kernel!(self.choice, K => n.next_multiple_of(K::COLUMNS) * k.div_ceil(K::PER_WORD))
    }

    /// How many floats of scratch a product with `m` rows takes.
    pub fn scratch_len(&self, m: usize) -> usize {
        m.min(BLOCK_ROWS) * A_STRIDE
    }

    /// Packs B, of `n` outputs and `k` inputs, into the first [`Serial::packed_len`] floats of `to`.
    ///
    /// # Errors
    /// `InvalidArgument` if a slice is too short.
    pub fn pack(&self, b: &MatrixB, n: usize, k: usize, to: &mut [f32]) -> Result<()> {
        b.check(n, k)?;
        fits("gemm: packed", 1, self.packed_len(n, k), usize::MAX, to.len())?;
        with_kernel!(self.choice, K => {
            for (i, (first, columns)) in steps(0, n, K::COLUMNS).enumerate() {
                let words = k.div_ceil(K::PER_WORD) * K::COLUMNS;
                pack_panel::<K>(b, k, first, columns, &mut to[i * words..][..words]);
            }
        });
        Ok(())
    }

    /// C (+)= A B, bit for bit as [`gemm`](super::gemm). Element (i, j) of C is `out[i * ldc + j]`.
    ///
    /// # Errors
    /// `InvalidArgument` if a slice is too short.
    pub fn multiply(&self, x: &Packed, scratch: &mut [f32], out: &mut [f32], ldc: usize) -> Result<()> {
        fits("gemm: a", x.m, x.k, x.lda, x.a.len())?;
        fits("gemm: packed", 1, self.packed_len(x.n, x.k), usize::MAX, x.b.len())?;
        fits("gemm: scratch", 1, self.scratch_len(x.m), usize::MAX, scratch.len())?;
        fits("gemm: out", x.m, x.n, ldc, out.len())?;
        if x.k == 0 && !x.accumulate {
            out.chunks_mut(ldc.max(1)).take(x.m).for_each(|row| row[..x.n].fill(0.0));
        }
        with_kernel!(self.choice, K => multiply::<K>(x, scratch, out, ldc));
        Ok(())
    }
}

fn multiply<K: Kernel>(x: &Packed, scratch: &mut [f32], out: &mut [f32], ldc: usize) {
    for (row, rows) in steps(0, x.m, BLOCK_ROWS) {
        for (k, depth) in blocks::<K>(x.k) {
            let words = depth.div_ceil(K::PER_WORD);
            // SAFETY: A holds the rows and the scratch their copies, as was checked; this kernel was chosen.
            unsafe { K::copy(&x.a[row * x.lda + k..], x.lda, rows, depth, scratch) };
            for (i, (column, columns)) in steps(0, x.n, K::COLUMNS).enumerate() {
                let first_word = i * x.k.div_ceil(K::PER_WORD) + k / K::PER_WORD;
                let panel = &x.b[first_word * K::COLUMNS..][..words * K::COLUMNS];
                for (first, rows) in steps(0, rows, K::ROWS) {
                    let a = &scratch[first * A_STRIDE..];
                    let c = out[(row + first) * ldc + column..][..(rows - 1) * ldc + columns].as_mut_ptr();
                    let accumulate = x.accumulate || k > 0;
                    // SAFETY: the slice of C was just measured and is borrowed exclusively; the level was detected.
                    unsafe {
                        Tile { rows, columns, words, a, panel, c, ldc, accumulate, ahead: [Ahead::NONE; 2] }
                            .run::<K>()
                    };
                }
            }
        }
    }
}
