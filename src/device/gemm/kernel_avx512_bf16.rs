//! The AVX-512 kernel for factors in bf16: that of f32 with words of two values, hence up to twice as fast.
//!
//! The processor takes the smallest numbers (below 2^-126) for zero, in factors and in sums.

use std::arch::x86_64::*;

use half::{bf16, f16};

use crate::device::simd::{prefetch, prefetch_to_write};

use super::kernel_avx512::{COLUMNS, Load, STEPS_PER_LINE, lanes, load_rows, multiply_in_tiles, transpose};
use super::{A_STRIDE, Ahead, Kernel, Layout, MatrixB, Part, Tile, Values};

pub(super) struct Avx512Bf16;

/// Words of a vector.
const LANES: usize = 16;

/// Values of k in a vector.
const VALUES: usize = 2 * LANES;

impl Kernel for Avx512Bf16 {
    const ROWS: usize = 12;
    const COLUMNS: usize = COLUMNS;
    const PER_WORD: usize = 2;

    unsafe fn multiply(tile: &Tile) {
        // SAFETY: the caller's contract.
        unsafe { multiply(tile) }
    }

    unsafe fn pack(b: &MatrixB, part: Part, panel: &mut [f32]) {
        assert!(panel.len() >= part.depth.div_ceil(2) * COLUMNS && part.columns <= COLUMNS);
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
        assert!(to.len() >= rows * A_STRIDE && depth.next_multiple_of(VALUES) <= 2 * A_STRIDE);
        // SAFETY: the caller's contract, and room for whole vectors.
        unsafe { copy_rows(from.as_ptr(), stride, rows, depth, to.as_mut_ptr()) };
    }

    unsafe fn transpose(from: &[f32], stride: usize, rows: usize, depth: usize, to: &mut [f32]) {
        assert!(to.len() >= rows * A_STRIDE && depth.next_multiple_of(VALUES) <= 2 * A_STRIDE);
        // SAFETY: the caller's contract, and room for whole vectors.
        unsafe { transpose_block(from.as_ptr(), stride, rows, depth, to.as_mut_ptr()) };
    }
}

/// `sums` + the products of two values of k in each lane.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn add_products(a: __m512, b: __m512, sums: __m512) -> __m512 {
    // SAFETY: both are 512 bits, of which any are numbers in bf16.
    let [a, b]: [__m512bh; 2] = unsafe { std::mem::transmute([a, b]) };
    _mm512_dpbf16_ps(sums, a, b)
}

multiply_in_tiles!(multiply, add_products, "avx512f,avx512vl,avx512bw,avx512dq,avx512bf16,avx2,fma,f16c");

/// A vector of words of 32 values in bf16, the earlier in the lower half.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn words(low: __m512, high: __m512) -> __m512 {
    // SAFETY: both are 512 bits, of which any are 16 numbers in f32.
    unsafe { std::mem::transmute(_mm512_cvtne2ps_pbh(high, low)) }
}

/// As [`words`] of 16 values.
#[inline]
#[target_feature(enable = "avx512f,avx512vl,avx512bf16")]
fn half_words(values: __m512) -> __m256i {
    // SAFETY: both are 256 bits, of which any are a whole number.
    unsafe { std::mem::transmute(_mm512_cvtneps_pbh(values)) }
}

/// A number that 32 of can be loaded as words.
trait LoadWords: Load {
    /// The first `count` of the 32 numbers at `from`, zero for the others.
    ///
    /// # Safety
    /// AVX-512 with BF16; `count` numbers are there.
    #[inline]
    #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx512bf16,avx2,fma,f16c")]
    unsafe fn load_words(from: *const Self, count: usize) -> __m512 {
        // SAFETY: masked lanes are not read.
        unsafe {
            let low = Self::load(from, lanes(count));
            words(low, Self::load(from.wrapping_add(LANES), lanes(count.saturating_sub(LANES))))
        }
    }
}

impl LoadWords for f32 {}
impl LoadWords for f16 {}

impl LoadWords for bf16 {
    #[inline]
    #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx512bf16,avx2,fma,f16c")]
    unsafe fn load_words(from: *const Self, count: usize) -> __m512 {
        let mask = if count >= VALUES { u32::MAX } else { (1 << count) - 1 };
        // SAFETY: masked lanes are not read. They are words already.
        _mm512_castsi512_ps(unsafe { _mm512_maskz_loadu_epi16(mask, from.cast()) })
    }
}

/// # Safety
/// AVX-512 with BF16; the part lies at `from`; `to` has room for its rows of [`COLUMNS`] words.
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx512bf16,avx2,fma,f16c")]
unsafe fn pack<T: LoadWords>(b: &MatrixB, from: *const T, part: Part, to: *mut f32) {
    let Part { depth, columns, .. } = part;
    for offset in [0, LANES] {
        let columns = columns.saturating_sub(offset).min(LANES);
        match b.layout {
            Layout::RowsAreInputs => {
                for k in (0..depth).step_by(2) {
                    let row = from.wrapping_add(k * b.leading + offset);
                    let second = if k + 1 < depth { lanes(columns) } else { 0 };
                    // SAFETY: rows k and k + 1 of the part; lanes beyond its columns, and a row beyond it, are masked off.
                    unsafe {
                        let low = _mm512_cvtepu16_epi32(half_words(T::load(row, lanes(columns))));
                        let high = half_words(T::load(row.wrapping_add(b.leading), second));
                        let high = _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(high));
                        let words = _mm512_castsi512_ps(_mm512_or_si512(low, high));
                        _mm512_storeu_ps(to.add(k / 2 * COLUMNS + offset), words);
                    }
                }
            }
            Layout::RowsAreOutputs => {
                let from = from.wrapping_add(offset * b.leading);
                for k in (0..depth).step_by(VALUES) {
                    let count = (depth - k).min(VALUES);
                    let mut rows = [_mm512_setzero_ps(); LANES];
                    for (r, row) in rows.iter_mut().enumerate().take(columns) {
                        // SAFETY: `count` numbers of row r from k on.
                        *row = unsafe { T::load_words(from.wrapping_add(r * b.leading + k), count) };
                    }
                    for (i, row) in transpose(rows).into_iter().enumerate().take(count.div_ceil(2)) {
                        // SAFETY: row k / 2 + i of the panel.
                        unsafe { _mm512_storeu_ps(to.add((k / 2 + i) * COLUMNS + offset), row) };
                    }
                }
            }
        }
    }
}

/// [`Kernel::copy`]. What lies behind `depth` in a row of `to`, up to a whole vector, becomes zero.
///
/// # Safety
/// AVX-512 with BF16; `rows` rows of `depth` floats, `stride` apart, at `from`; as many rows, [`A_STRIDE`] apart, of whole
/// vectors at `to`.
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx512bf16,avx2,fma,f16c")]
unsafe fn copy_rows(from: *const f32, stride: usize, rows: usize, depth: usize, to: *mut f32) {
    for i in 0..rows {
        for k in (0..depth).step_by(VALUES) {
            // SAFETY: row i from k on, of which `depth - k` numbers are there.
            unsafe {
                let words = f32::load_words(from.add(i * stride + k), depth - k);
                _mm512_storeu_ps(to.add(i * A_STRIDE + k / 2), words);
            }
        }
    }
}

/// [`Kernel::transpose`], in squares of 16 x 16; of rows so far apart the processor foresees none. What lies behind `depth`
/// in a row of `to`, up to half a vector, becomes zero.
///
/// # Safety
/// AVX-512 with BF16; `depth` rows of `rows` floats, `stride` apart, at `from`; `rows` rows, [`A_STRIDE`] apart, of whole
/// vectors at `to`.
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx512bf16,avx2,fma,f16c")]
unsafe fn transpose_block(from: *const f32, stride: usize, rows: usize, depth: usize, to: *mut f32) {
    for k in (0..depth).step_by(LANES) {
        for i in (0..rows).step_by(LANES) {
            let (height, width) = ((depth - k).min(LANES), (rows - i).min(LANES));
            for next in k + LANES..depth.min(k + 2 * LANES) {
                prefetch(from.wrapping_add(next * stride + i));
            }
            // SAFETY: `height` rows of `width` floats from (k, i) on.
            let square = unsafe { load_rows(from.add(k * stride + i), stride, height, width) };
            for (r, row) in transpose(square).into_iter().enumerate().take(width) {
                // SAFETY: row i + r of `to`, from k on: half a vector.
                unsafe { _mm256_storeu_si256(to.add((i + r) * A_STRIDE + k / 2).cast(), half_words(row)) };
            }
        }
    }
}
