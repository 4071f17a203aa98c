//! The AVX-512 kernel: 12 x 32 sums in 24 registers, two of B, one of A.

use std::arch::x86_64::*;

use half::{bf16, f16};

use crate::device::simd::{prefetch, prefetch_to_write};

use super::{A_STRIDE, Ahead, Kernel, Layout, MatrixB, Part, Tile, Values, copy_rows};

pub(super) struct Avx512;

pub(super) const COLUMNS: usize = 32;

/// Steps of k between two cache lines that are asked for.
pub(super) const STEPS_PER_LINE: usize = 4;

impl Kernel for Avx512 {
    const ROWS: usize = 12;
    const COLUMNS: usize = COLUMNS;
    const PER_WORD: usize = 1;

    unsafe fn multiply(tile: &Tile) {
        // SAFETY: the caller's contract.
        unsafe { multiply(tile) }
    }

    unsafe fn pack(b: &MatrixB, part: Part, panel: &mut [f32]) {
        assert!(panel.len() >= part.depth * COLUMNS && part.columns <= COLUMNS);
        let first = b.index(part.k, part.n);
        // SAFETY: the caller promises that the part is inside the slice.
        unsafe {
            match b.values {
                Values::F32(v) => pack(b, v.as_ptr().add(first), part, panel.as_mut_ptr()),
                Values::F16(v) => pack(b, v.as_ptr().add(first), part, panel.as_mut_ptr()),
                Values::BF16(v) => pack(b, v.as_ptr().add(first), part, panel.as_mut_ptr()),
            }
        }
    }

    unsafe fn copy(from: &[f32], stride: usize, rows: usize, depth: usize, to: &mut [f32]) {
        copy_rows(from, stride, rows, depth, to);
    }

    unsafe fn transpose(from: &[f32], stride: usize, rows: usize, depth: usize, to: &mut [f32]) {
        assert!(to.len() >= rows * A_STRIDE && depth.next_multiple_of(16) <= A_STRIDE);
        // SAFETY: the caller's contract, and room for whole vectors.
        unsafe { transpose_block(from.as_ptr(), stride, rows, depth, to.as_mut_ptr()) };
    }
}

/// The low `count` lanes of 16; all beyond 16.
pub(super) fn lanes(count: usize) -> __mmask16 {
    if count >= 16 { u16::MAX } else { (1u16 << count) - 1 }
}

/// Defines [`Kernel::multiply`] as `$name`, with 12 x 32 sums. `$add(a, b, sums)` adds the products of a word of A, which is
/// in every lane, and 16 words of a panel; `$features` are what it takes.
macro_rules! multiply_in_tiles {
    ($name:ident, $add:expr, $features:literal) => {
        /// # Safety
        /// As [`Kernel::multiply`].
        pub(super) unsafe fn $name(tile: &Tile) {
            /// # Safety
            /// As [`Kernel::multiply`], with `R == tile.rows`.
            #[target_feature(enable = $features)]
            unsafe fn rows<const R: usize>(tile: &Tile) {
                let mut sums = [[_mm512_setzero_ps(); 2]; R];
                let (mut a, mut b) = (tile.a.as_ptr(), tile.panel.as_ptr());
                for r in 0..R {
                    // On their way while the sums are made.
                    let c = tile.c.wrapping_add(r * tile.ldc);
                    prefetch_to_write(c);
                    prefetch_to_write(c.wrapping_add(tile.columns - 1));
                }
                // One line every few steps: more at once would have to wait for each other.
                let mut ahead = tile.ahead;
                ahead.iter_mut().for_each(|ahead| ahead.ask_until(tile.words / STEPS_PER_LINE));
                // SAFETY: `words` steps of one word in each row of A and of one row of the panel.
                unsafe {
                    for k in 0..tile.words {
                        if k % STEPS_PER_LINE == 0 {
                            ahead.iter_mut().for_each(Ahead::ask);
                        }
                        let low = _mm512_loadu_ps(b);
                        let high = _mm512_loadu_ps(b.add(16));
                        for (r, sums) in sums.iter_mut().enumerate() {
                            let a = _mm512_set1_ps(*a.add(r * A_STRIDE));
                            sums[0] = $add(a, low, sums[0]);
                            sums[1] = $add(a, high, sums[1]);
                        }
                        a = a.add(1);
                        b = b.add(COLUMNS);
                    }
                }
                let (low, high) = (lanes(tile.columns), lanes(tile.columns.saturating_sub(16)));
                for (r, sums) in sums.iter_mut().enumerate() {
                    // SAFETY: row r of C; lanes outside its columns are masked off and not touched.
                    unsafe {
                        let c = tile.c.add(r * tile.ldc);
                        let next = c.wrapping_add(16);
                        if tile.accumulate {
                            sums[0] = _mm512_add_ps(_mm512_maskz_loadu_ps(low, c), sums[0]);
                            sums[1] = _mm512_add_ps(_mm512_maskz_loadu_ps(high, next), sums[1]);
                        }
                        _mm512_mask_storeu_ps(c, low, sums[0]);
                        _mm512_mask_storeu_ps(next, high, sums[1]);
                    }
                }
            }
            let rows = match tile.rows {
                1 => rows::<1>,
                2 => rows::<2>,
                3 => rows::<3>,
                4 => rows::<4>,
                5 => rows::<5>,
                6 => rows::<6>,
                7 => rows::<7>,
                8 => rows::<8>,
                9 => rows::<9>,
                10 => rows::<10>,
                11 => rows::<11>,
                _ => rows::<12>,
            };
            // SAFETY: the caller's contract.
            unsafe { rows(tile) }
        }
    };
}
pub(super) use multiply_in_tiles;

multiply_in_tiles!(multiply, _mm512_fmadd_ps, "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c");

/// A number that 16 lanes of can be loaded and widened.
pub(super) trait Load: Copy {
    /// The numbers at `from` in the lanes of `mask`, zero elsewhere.
    ///
    /// # Safety
    /// AVX-512; the numbers in the mask are there.
    unsafe fn load(from: *const Self, mask: __mmask16) -> __m512;
}

impl Load for f32 {
    #[inline(always)]
    unsafe fn load(from: *const Self, mask: __mmask16) -> __m512 {
        // SAFETY: masked lanes are not read.
        unsafe { _mm512_maskz_loadu_ps(mask, from) }
    }
}

impl Load for f16 {
    #[inline(always)]
    unsafe fn load(from: *const Self, mask: __mmask16) -> __m512 {
        // SAFETY: masked lanes are not read.
        unsafe { _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, from.cast())) }
    }
}

impl Load for bf16 {
    #[inline(always)]
    unsafe fn load(from: *const Self, mask: __mmask16) -> __m512 {
        // SAFETY: masked lanes are not read.
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        }
    }
}

/// # Safety
/// AVX-512; the part lies at `from`; `to` has room for `depth` rows of [`COLUMNS`] floats.
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c")]
unsafe fn pack<T: Load>(b: &MatrixB, from: *const T, part: Part, to: *mut f32) {
    let Part { depth, columns, .. } = part;
    let halves = [
        (0, lanes(columns), columns.min(16)),
        (16, lanes(columns.saturating_sub(16)), columns.saturating_sub(16)),
    ];
    for (offset, mask, columns) in halves {
        match b.layout {
            Layout::RowsAreInputs => {
                for k in 0..depth {
                    // SAFETY: row k of the part; lanes beyond its columns are masked off.
                    unsafe {
                        let row = T::load(from.wrapping_add(k * b.leading + offset), mask);
                        _mm512_storeu_ps(to.add(k * COLUMNS + offset), row);
                    }
                }
            }
            Layout::RowsAreOutputs => {
                let from = from.wrapping_add(offset * b.leading);
                for k in (0..depth).step_by(16) {
                    let count = (depth - k).min(16);
                    // SAFETY: `columns` rows of `count` numbers from k on.
                    let rows = unsafe { load_rows(from.wrapping_add(k), b.leading, columns, count) };
                    for (i, row) in transpose(rows).into_iter().enumerate().take(count) {
                        // SAFETY: row k + i of the panel.
                        unsafe { _mm512_storeu_ps(to.add((k + i) * COLUMNS + offset), row) };
                    }
                }
            }
        }
    }
}

/// [`Kernel::transpose`], in squares of 16 x 16; of rows so far apart the processor foresees none. What lies behind `depth` in a row of `to` is overwritten.
///
/// # Safety
/// AVX-512; `depth` rows of `rows` floats, `stride` apart, at `from`; `rows` rows, [`A_STRIDE`] apart, of `depth`
/// floats and up to 15 more at `to`.
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c")]
unsafe fn transpose_block(from: *const f32, stride: usize, rows: usize, depth: usize, to: *mut f32) {
    for k in (0..depth).step_by(16) {
        for i in (0..rows).step_by(16) {
            let (height, width) = ((depth - k).min(16), (rows - i).min(16));
            for next in k + 16..depth.min(k + 32) {
                prefetch(from.wrapping_add(next * stride + i));
            }
            // SAFETY: `height` rows of `width` floats from (k, i) on.
            let square = unsafe { load_rows(from.add(k * stride + i), stride, height, width) };
            for (r, row) in transpose(square).into_iter().enumerate().take(width) {
                // SAFETY: row i + r of `to`, from k on.
                unsafe { _mm512_storeu_ps(to.add((i + r) * A_STRIDE + k), row) };
            }
        }
    }
}

/// # Safety
/// AVX-512; `rows` rows, `stride` apart, of `count` numbers each lie at `from`; neither is above 16.
#[inline(always)]
pub(super) unsafe fn load_rows<T: Load>(
    from: *const T,
    stride: usize,
    rows: usize,
    count: usize,
) -> [__m512; 16] {
    // SAFETY: AVX-512 by contract.
    let mut loaded = unsafe { [_mm512_setzero_ps(); 16] };
    let mask = lanes(count);
    for (r, row) in loaded.iter_mut().enumerate() {
        if r < rows {
            // SAFETY: row r is there by contract.
            *row = unsafe { T::load(from.add(r * stride), mask) };
        }
    }
    loaded
}

/// Columns as rows. Four rounds of pairwise exchanges: 1, 2, 4 and 8 lanes apart.
#[inline]
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c")]
pub(super) fn transpose(x: [__m512; 16]) -> [__m512; 16] {
    let mut y = x;
    for i in 0..8 {
        y[2 * i] = _mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]);
        y[2 * i + 1] = _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]);
    }
    let mut z = y;
    for i in 0..4 {
        let at = 4 * i;
        z[at] = _mm512_shuffle_ps::<0x44>(y[at], y[at + 2]);
        z[at + 1] = _mm512_shuffle_ps::<0xEE>(y[at], y[at + 2]);
        z[at + 2] = _mm512_shuffle_ps::<0x44>(y[at + 1], y[at + 3]);
        z[at + 3] = _mm512_shuffle_ps::<0xEE>(y[at + 1], y[at + 3]);
    }
    let mut w = z;
    for i in 0..4 {
        // Lane groups 0 and 2, then 1 and 3, of rows i and i + 4, and of i + 8 and i + 12.
        w[i] = _mm512_shuffle_f32x4::<0x88>(z[i], z[i + 4]);
        w[i + 4] = _mm512_shuffle_f32x4::<0xDD>(z[i], z[i + 4]);
        w[i + 8] = _mm512_shuffle_f32x4::<0x88>(z[i + 8], z[i + 12]);
        w[i + 12] = _mm512_shuffle_f32x4::<0xDD>(z[i + 8], z[i + 12]);
    }
    let mut t = w;
    for i in 0..4 {
        t[i] = _mm512_shuffle_f32x4::<0x88>(w[i], w[i + 8]);
        t[i + 8] = _mm512_shuffle_f32x4::<0xDD>(w[i], w[i + 8]);
        t[i + 4] = _mm512_shuffle_f32x4::<0x88>(w[i + 4], w[i + 12]);
        t[i + 12] = _mm512_shuffle_f32x4::<0xDD>(w[i + 4], w[i + 12]);
    }
    t
}
