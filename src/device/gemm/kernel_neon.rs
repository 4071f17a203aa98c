//! The NEON kernel: 6 x 16 sums in 24 registers, six of A, two of B: all there are.
//!
//! A register of A holds four steps of the depth in one row, and each multiply-add takes one of its lanes. So nothing
//! is broadcast, which on many cores would take turns with the multiply-adds.

use std::arch::aarch64::*;

use half::{bf16, f16};

use crate::device::simd::prefetch;

use super::{A_STRIDE, Kernel, Layout, MatrixB, Part, Tile, Values, copy_rows, transpose_plain};

pub(super) struct Neon;

const COLUMNS: usize = 16;

/// Floats of a register.
const WIDTH: usize = 4;

/// A row of sums.
type Row = [float32x4_t; COLUMNS / WIDTH];

impl Kernel for Neon {
    const ROWS: usize = 6;
    const COLUMNS: usize = COLUMNS;
    const PER_WORD: usize = 1;

    unsafe fn multiply(tile: &Tile) {
        let multiply = match tile.rows {
            1 => multiply::<1>,
            2 => multiply::<2>,
            3 => multiply::<3>,
            4 => multiply::<4>,
            5 => multiply::<5>,
            _ => multiply::<6>,
        };
        // SAFETY: the caller's contract.
        unsafe { multiply(tile) }
    }

    unsafe fn pack(b: &MatrixB, part: Part, panel: &mut [f32]) {
        assert!(panel.len() >= part.depth * COLUMNS && part.columns <= COLUMNS);
        let first = b.index(part.k, part.n);
        // SAFETY: the caller promises that the part is inside the slice.
        unsafe {
            match b.values {
                Values::F32(v) => pack(b, v.as_ptr().add(first), part, panel),
                Values::F16(v) => pack(b, v.as_ptr().add(first), part, panel),
                Values::BF16(v) => pack(b, v.as_ptr().add(first), part, panel),
            }
        }
    }

    unsafe fn copy(from: &[f32], stride: usize, rows: usize, depth: usize, to: &mut [f32]) {
        copy_rows(from, stride, rows, depth, to);
    }

    unsafe fn transpose(from: &[f32], stride: usize, rows: usize, depth: usize, to: &mut [f32]) {
        assert!(to.len() >= rows * A_STRIDE && depth <= A_STRIDE);
        let (whole_rows, whole_depth) = (whole(rows), whole(depth));
        // SAFETY: the caller's contract, and room for whole rows.
        unsafe { transpose_squares(from, stride, whole_rows, whole_depth, to) };
        transpose_plain(from, stride, whole_rows..rows, 0..whole_depth, to);
        transpose_plain(from, stride, 0..rows, whole_depth..depth, to);
    }
}

/// As many of `count` as fill registers.
fn whole(count: usize) -> usize {
    count / WIDTH * WIDTH
}

/// # Safety
/// As [`Kernel::multiply`], with `R == tile.rows`.
#[target_feature(enable = "neon")]
unsafe fn multiply<const R: usize>(tile: &Tile) {
    let mut sums: [Row; R] = [[vdupq_n_f32(0.0); COLUMNS / WIDTH]; R];
    tile.ahead.into_iter().for_each(|mut ahead| ahead.ask_until(0));
    let (mut a, mut b) = (tile.a.as_ptr(), tile.panel.as_ptr());
    // SAFETY: `depth` steps of one float in each row of A and of one row of the panel.
    unsafe {
        for _ in 0..tile.words / WIDTH {
            let mut rows = [vdupq_n_f32(0.0); R];
            for (r, row) in rows.iter_mut().enumerate() {
                *row = vld1q_f32(a.add(r * A_STRIDE));
            }
            step::<0, R>(&mut sums, &rows, b);
            step::<1, R>(&mut sums, &rows, b.add(COLUMNS));
            step::<2, R>(&mut sums, &rows, b.add(2 * COLUMNS));
            step::<3, R>(&mut sums, &rows, b.add(3 * COLUMNS));
            a = a.add(WIDTH);
            b = b.add(WIDTH * COLUMNS);
        }
        for _ in 0..tile.words % WIDTH {
            let mut rows = [vdupq_n_f32(0.0); R];
            for (r, row) in rows.iter_mut().enumerate() {
                *row = vld1q_dup_f32(a.add(r * A_STRIDE));
            }
            step::<0, R>(&mut sums, &rows, b);
            a = a.add(1);
            b = b.add(COLUMNS);
        }
    }
    for (r, sums) in sums.iter().enumerate() {
        // SAFETY: row r of C has `columns` floats.
        unsafe { store(sums, tile.c.add(r * tile.ldc), tile.columns, tile.accumulate) };
    }
}

/// One step of the depth: lane `L` of every row of A, times a row of the panel.
///
/// # Safety
/// NEON; 16 floats at `b`.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn step<const L: i32, const R: usize>(sums: &mut [Row; R], rows: &[float32x4_t; R], b: *const f32) {
    for i in 0..COLUMNS / WIDTH {
        // SAFETY: the caller's contract.
        let b = unsafe { vld1q_f32(b.add(WIDTH * i)) };
        for (sums, &row) in sums.iter_mut().zip(rows) {
            sums[i] = vfmaq_laneq_f32::<L>(sums[i], b, row);
        }
    }
}

/// # Safety
/// NEON; `columns` floats, at most 16, at `c`.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn store(sums: &Row, c: *mut f32, columns: usize, accumulate: bool) {
    // SAFETY: whole vectors only where all 16 columns exist, else `columns` floats through a copy.
    unsafe {
        if columns == COLUMNS {
            for (i, &sum) in sums.iter().enumerate() {
                let c = c.add(WIDTH * i);
                vst1q_f32(c, if accumulate { vaddq_f32(vld1q_f32(c), sum) } else { sum });
            }
            return;
        }
        let mut copy = [0f32; COLUMNS];
        for (i, &sum) in sums.iter().enumerate() {
            vst1q_f32(copy.as_mut_ptr().add(WIDTH * i), sum);
        }
        for (c, sum) in std::slice::from_raw_parts_mut(c, columns).iter_mut().zip(copy) {
            *c = if accumulate { *c + sum } else { sum };
        }
    }
}

/// A number that 4 of can be loaded and widened.
trait Load: Copy {
    /// # Safety
    /// NEON; 4 numbers at `from`.
    unsafe fn load(from: *const Self) -> float32x4_t;
}

impl Load for f32 {
    #[inline(always)]
    unsafe fn load(from: *const Self) -> float32x4_t {
        // SAFETY: 4 floats are there.
        unsafe { vld1q_f32(from) }
    }
}

impl Load for f16 {
    #[inline(always)]
    unsafe fn load(from: *const Self) -> float32x4_t {
        let wide: float32x4_t;
        // SAFETY: 4 numbers are there; every NEON widens halves. The intrinsic asks for a newer compiler than ours.
        unsafe {
            let narrow = vld1_u16(from.cast());
            std::arch::asm!(
                "fcvtl {wide:v}.4s, {narrow:v}.4h",
                wide = lateout(vreg) wide,
                narrow = in(vreg) narrow,
                options(pure, nomem, nostack, preserves_flags)
            );
        }
        wide
    }
}

impl Load for bf16 {
    #[inline(always)]
    unsafe fn load(from: *const Self) -> float32x4_t {
        // SAFETY: 4 numbers are there.
        unsafe { vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(from.cast()))) }
    }
}

/// Whole squares of 4 x 4 numbers by vectors, the rest one by one.
///
/// # Safety
/// NEON; the part lies at `from`; `panel` has room for it.
#[target_feature(enable = "neon")]
unsafe fn pack<T: Load>(b: &MatrixB, from: *const T, part: Part, panel: &mut [f32]) {
    let to = panel.as_mut_ptr();
    let columns = whole(part.columns);
    let depth = match b.layout {
        Layout::RowsAreInputs => part.depth,
        Layout::RowsAreOutputs => whole(part.depth),
    };
    for n in (0..columns).step_by(WIDTH) {
        match b.layout {
            Layout::RowsAreInputs => {
                for k in 0..depth {
                    // SAFETY: 4 numbers of row k, inside the part.
                    unsafe { vst1q_f32(to.add(k * COLUMNS + n), T::load(from.add(k * b.leading + n))) };
                }
            }
            Layout::RowsAreOutputs => {
                for k in (0..depth).step_by(WIDTH) {
                    // SAFETY: 4 rows of 4 numbers, inside the part.
                    unsafe {
                        let mut rows = [vdupq_n_f32(0.0); WIDTH];
                        for (r, row) in rows.iter_mut().enumerate() {
                            *row = T::load(from.add((n + r) * b.leading + k));
                        }
                        for (i, row) in transpose(rows).into_iter().enumerate() {
                            vst1q_f32(to.add((k + i) * COLUMNS + n), row);
                        }
                    }
                }
            }
        }
    }
    b.pack_plain(part, 0..depth, columns..COLUMNS, COLUMNS, panel);
    b.pack_plain(part, depth..part.depth, 0..COLUMNS, COLUMNS, panel);
}

/// [`Kernel::transpose`] of multiples of 4; of rows so far apart the processor foresees none.
///
/// # Safety
/// NEON; `depth` rows of `rows` floats, `stride` apart, in `from`; `rows` rows [`A_STRIDE`] apart in `to`.
#[target_feature(enable = "neon")]
unsafe fn transpose_squares(from: &[f32], stride: usize, rows: usize, depth: usize, to: &mut [f32]) {
    let (from, to) = (from.as_ptr(), to.as_mut_ptr());
    for k in (0..depth).step_by(WIDTH) {
        for i in (0..rows).step_by(WIDTH) {
            // A line of the cache holds the next rows' numbers for several squares.
            if i % 16 == 0 {
                for next in k + WIDTH..depth.min(k + 2 * WIDTH) {
                    prefetch(from.wrapping_add(next * stride + i));
                }
            }
            // SAFETY: 4 rows of 4 floats, inside both.
            unsafe {
                let mut square = [vdupq_n_f32(0.0); WIDTH];
                for (r, row) in square.iter_mut().enumerate() {
                    *row = vld1q_f32(from.add((k + r) * stride + i));
                }
                for (r, row) in transpose(square).into_iter().enumerate() {
                    vst1q_f32(to.add((i + r) * A_STRIDE + k), row);
                }
            }
        }
    }
}

/// Columns as rows. Two rounds of pairwise exchanges: 1 and 2 lanes apart.
#[inline]
#[target_feature(enable = "neon")]
fn transpose(x: [float32x4_t; WIDTH]) -> [float32x4_t; WIDTH] {
    let pair = |a, b| {
        let (even, odd) = (vtrn1q_f32(a, b), vtrn2q_f32(a, b));
        (vreinterpretq_f64_f32(even), vreinterpretq_f64_f32(odd))
    };
    let ((even, odd), (even_below, odd_below)) = (pair(x[0], x[1]), pair(x[2], x[3]));
    [
        vreinterpretq_f32_f64(vtrn1q_f64(even, even_below)),
        vreinterpretq_f32_f64(vtrn1q_f64(odd, odd_below)),
        vreinterpretq_f32_f64(vtrn2q_f64(even, even_below)),
        vreinterpretq_f32_f64(vtrn2q_f64(odd, odd_below)),
    ]
}
