//! The AVX2 kernel: 6 x 16 sums in 12 registers, two of B, one of A.

use std::arch::x86_64::*;

use half::{bf16, f16};

use crate::device::simd::prefetch;

use super::{A_STRIDE, Kernel, Layout, MatrixB, Part, Tile, Values, copy_rows, transpose_plain};

pub(super) struct Avx2;

const COLUMNS: usize = 16;

impl Kernel for Avx2 {
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
        // SAFETY: the caller's contract, and room for whole rows.
        unsafe { transpose_squares(from, stride, rows / 8 * 8, depth / 8 * 8, to) };
        transpose_plain(from, stride, rows / 8 * 8..rows, 0..depth / 8 * 8, to);
        transpose_plain(from, stride, 0..rows, depth / 8 * 8..depth, to);
    }
}

/// # Safety
/// As [`Kernel::multiply`], with `R == tile.rows`.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn multiply<const R: usize>(tile: &Tile) {
    let mut sums = [[_mm256_setzero_ps(); 2]; R];
    let (mut a, mut b) = (tile.a.as_ptr(), tile.panel.as_ptr());
    tile.ahead.into_iter().for_each(|mut ahead| ahead.ask_until(0));
    // SAFETY: `depth` steps of one float in each row of A and of one row of the panel.
    unsafe {
        for _ in 0..tile.words {
            let low = _mm256_loadu_ps(b);
            let high = _mm256_loadu_ps(b.add(8));
            for (r, sums) in sums.iter_mut().enumerate() {
                let a = _mm256_broadcast_ss(&*a.add(r * A_STRIDE));
                sums[0] = _mm256_fmadd_ps(a, low, sums[0]);
                sums[1] = _mm256_fmadd_ps(a, high, sums[1]);
            }
            a = a.add(1);
            b = b.add(COLUMNS);
        }
    }
    for (r, sums) in sums.iter().enumerate() {
        // SAFETY: row r of C has `columns` floats.
        unsafe { store(sums, tile.c.add(r * tile.ldc), tile.columns, tile.accumulate) };
    }
}

/// # Safety
/// AVX2; `columns` floats, at most 16, at `c`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn store(sums: &[__m256; 2], c: *mut f32, columns: usize, accumulate: bool) {
    // SAFETY: whole vectors only where all 16 columns exist, else `columns` floats through a copy.
    unsafe {
        if columns == COLUMNS {
            for (i, &sum) in sums.iter().enumerate() {
                let c = c.add(8 * i);
                let sum = if accumulate { _mm256_add_ps(_mm256_loadu_ps(c), sum) } else { sum };
                _mm256_storeu_ps(c, sum);
            }
            return;
        }
        let mut copy = [0f32; COLUMNS];
        _mm256_storeu_ps(copy.as_mut_ptr(), sums[0]);
        _mm256_storeu_ps(copy.as_mut_ptr().add(8), sums[1]);
        for (c, sum) in std::slice::from_raw_parts_mut(c, columns).iter_mut().zip(copy) {
            *c = if accumulate { *c + sum } else { sum };
        }
    }
}

/// A number that 8 of can be loaded and widened.
trait Load: Copy {
    /// # Safety
    /// AVX2 and F16C; 8 numbers at `from`.
    unsafe fn load(from: *const Self) -> __m256;
}

impl Load for f32 {
    #[inline(always)]
    unsafe fn load(from: *const Self) -> __m256 {
        // SAFETY: 8 floats are there.
        unsafe { _mm256_loadu_ps(from) }
    }
}

impl Load for f16 {
    #[inline(always)]
    unsafe fn load(from: *const Self) -> __m256 {
        // SAFETY: 8 numbers are there.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) }
    }
}

impl Load for bf16 {
    #[inline(always)]
    unsafe fn load(from: *const Self) -> __m256 {
        // SAFETY: 8 numbers are there.
        unsafe {
            let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
        }
    }
}

/// Whole squares of 8 x 8 numbers by vectors, the rest one by one.
///
/// # Safety
/// AVX2 and F16C; the part lies at `from`; `panel` has room for it.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn pack<T: Load>(b: &MatrixB, from: *const T, part: Part, panel: &mut [f32]) {
    let to = panel.as_mut_ptr();
    let columns = part.columns / 8 * 8;
    let depth = match b.layout {
        Layout::RowsAreInputs => part.depth,
        Layout::RowsAreOutputs => part.depth / 8 * 8,
    };
    for n in (0..columns).step_by(8) {
        match b.layout {
            Layout::RowsAreInputs => {
                for k in 0..depth {
                    // SAFETY: 8 numbers of row k, inside the part.
                    unsafe {
                        _mm256_storeu_ps(to.add(k * COLUMNS + n), T::load(from.add(k * b.leading + n)))
                    };
                }
            }
            Layout::RowsAreOutputs => {
                for k in (0..depth).step_by(8) {
                    // SAFETY: 8 rows of 8 numbers, inside the part.
                    unsafe {
                        let mut rows = [_mm256_setzero_ps(); 8];
                        for (r, row) in rows.iter_mut().enumerate() {
                            *row = T::load(from.add((n + r) * b.leading + k));
                        }
                        for (i, row) in transpose(rows).into_iter().enumerate() {
                            _mm256_storeu_ps(to.add((k + i) * COLUMNS + n), row);
                        }
                    }
                }
            }
        }
    }
    b.pack_plain(part, 0..depth, columns..COLUMNS, COLUMNS, panel);
    b.pack_plain(part, depth..part.depth, 0..COLUMNS, COLUMNS, panel);
}

/// [`Kernel::transpose`] of multiples of 8; of rows so far apart the processor foresees none.
///
/// # Safety
/// AVX2; `depth` rows of `rows` floats, `stride` apart, in `from`; `rows` rows [`A_STRIDE`] apart in `to`.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn transpose_squares(from: &[f32], stride: usize, rows: usize, depth: usize, to: &mut [f32]) {
    let (from, to) = (from.as_ptr(), to.as_mut_ptr());
    for k in (0..depth).step_by(8) {
        for i in (0..rows).step_by(8) {
            for next in k + 8..depth.min(k + 16) {
                prefetch(from.wrapping_add(next * stride + i));
            }
            // SAFETY: 8 rows of 8 floats, inside both.
            unsafe {
                let mut square = [_mm256_setzero_ps(); 8];
                for (r, row) in square.iter_mut().enumerate() {
                    *row = _mm256_loadu_ps(from.add((k + r) * stride + i));
                }
                for (r, row) in transpose(square).into_iter().enumerate() {
                    _mm256_storeu_ps(to.add((i + r) * A_STRIDE + k), row);
                }
            }
        }
    }
}

/// Columns as rows. Three rounds of pairwise exchanges: 1, 2 and 4 lanes apart.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn transpose(x: [__m256; 8]) -> [__m256; 8] {
    let mut y = x;
    for i in 0..4 {
        y[2 * i] = _mm256_unpacklo_ps(x[2 * i], x[2 * i + 1]);
        y[2 * i + 1] = _mm256_unpackhi_ps(x[2 * i], x[2 * i + 1]);
    }
    let mut z = y;
    for i in 0..2 {
        let at = 4 * i;
        z[at] = _mm256_shuffle_ps::<0x44>(y[at], y[at + 2]);
        z[at + 1] = _mm256_shuffle_ps::<0xEE>(y[at], y[at + 2]);
        z[at + 2] = _mm256_shuffle_ps::<0x44>(y[at + 1], y[at + 3]);
        z[at + 3] = _mm256_shuffle_ps::<0xEE>(y[at + 1], y[at + 3]);
    }
    let mut t = z;
    for i in 0..4 {
        t[i] = _mm256_permute2f128_ps::<0x20>(z[i], z[i + 4]);
        t[i + 4] = _mm256_permute2f128_ps::<0x31>(z[i], z[i + 4]);
    }
    t
}
