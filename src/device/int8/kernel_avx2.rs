//! The AVX2 kernels, a half of a tile's columns at a time: with VNNI, 6 x 16 sums in 12 registers; without it, 4 x 16
//! in 8, from products of 16 bits, since those of 8 would saturate.

use std::arch::x86_64::*;

use super::kernel::{Sums, Tile};
use super::{COLUMNS, GROUP, ROWS};

/// Sums that a register holds.
const LANES: usize = 8;

/// Defines a function that runs `$rows::<R>` over blocks of at most `$most` rows and both halves of the columns.
macro_rules! blocks {
    ($name:ident, $rows:ident, $most:literal, $($count:literal)*) => {
        /// # Safety
        /// The processor has the instructions; the tile's slices reach what [`Tile`] says.
        pub(super) unsafe fn $name(tile: &Tile, sums: &mut Sums) {
            for first in (0..tile.rows).step_by($most) {
                for half in [0, COLUMNS / 2] {
                    let rows = match tile.rows - first {
                        $($count => $rows::<$count>,)*
                        _ => $rows::<$most>,
                    };
                    // SAFETY: the caller's contract; the rows lie within the tile.
                    unsafe { rows(tile, first, half, sums) };
                }
            }
        }
    };
}

blocks!(multiply_vnni, rows_vnni, 6, 1 2 3 4 5);
blocks!(multiply_avx2, rows_avx2, 4, 1 2 3);

/// The groups of A from row `first` on, and of B from column `half` on: at each step of `groups`.
#[inline(always)]
fn starts(tile: &Tile, first: usize, half: usize) -> (*const u8, *const u8) {
    (tile.a.as_ptr().wrapping_add(first * GROUP), tile.b.as_ptr().wrapping_add(half * GROUP))
}

/// Writes the sums of `R` rows and two registers of columns.
#[inline(always)]
fn store<const R: usize>(found: &[[__m256i; 2]; R], first: usize, half: usize, sums: &mut Sums) {
    for (found, sums) in found.iter().zip(&mut sums[first..]) {
        for (found, sums) in found.iter().zip(sums[half..].chunks_exact_mut(LANES)) {
            // SAFETY: the chunk has eight numbers; AVX2 by the caller.
            unsafe { _mm256_storeu_si256(sums.as_mut_ptr().cast(), *found) };
        }
    }
}

/// # Safety
/// AVX2 and AVX-VNNI; `R` rows from `first` on, and 16 columns from `half` on, are in the tile.
#[target_feature(enable = "avx2,avxvnni")]
unsafe fn rows_vnni<const R: usize>(tile: &Tile, first: usize, half: usize, sums: &mut Sums) {
    let mut found = [[_mm256_setzero_si256(); 2]; R];
    let (mut a, mut b) = starts(tile, first, half);
    // SAFETY: `groups` steps of a group of each row of A and of each column of B.
    unsafe {
        for _ in 0..tile.groups {
            let (low, high) = (_mm256_loadu_si256(b.cast()), _mm256_loadu_si256(b.add(LANES * GROUP).cast()));
            for (r, found) in found.iter_mut().enumerate() {
                let a = _mm256_set1_epi32(a.add(r * GROUP).cast::<i32>().read_unaligned());
                found[0] = _mm256_dpbusd_avx_epi32(found[0], a, low);
                found[1] = _mm256_dpbusd_avx_epi32(found[1], a, high);
            }
            a = a.wrapping_add(ROWS * GROUP);
            b = b.wrapping_add(COLUMNS * GROUP);
        }
    }
    store(&found, first, half, sums);
}

/// The bytes of even and of odd places, with their signs, as numbers of 16 bits.
#[inline(always)]
unsafe fn split_signed(x: __m256i) -> [__m256i; 2] {
    // SAFETY: AVX2 by the caller.
    unsafe { [_mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(x)), _mm256_srai_epi16::<8>(x)] }
}

/// # Safety
/// AVX2; `R` rows from `first` on, and 16 columns from `half` on, are in the tile.
#[target_feature(enable = "avx2")]
unsafe fn rows_avx2<const R: usize>(tile: &Tile, first: usize, half: usize, sums: &mut Sums) {
    let mut found = [[_mm256_setzero_si256(); 2]; R];
    let (mut a, mut b) = starts(tile, first, half);
    let even = _mm256_set1_epi16(0xFF);
    // SAFETY: `groups` steps of a group of each row of A and of each column of B.
    unsafe {
        for _ in 0..tile.groups {
            let low = split_signed(_mm256_loadu_si256(b.cast()));
            let high = split_signed(_mm256_loadu_si256(b.add(LANES * GROUP).cast()));
            for (r, found) in found.iter_mut().enumerate() {
                let a = _mm256_set1_epi32(a.add(r * GROUP).cast::<i32>().read_unaligned());
                let a = [_mm256_and_si256(a, even), _mm256_srli_epi16::<8>(a)];
                for (found, b) in found.iter_mut().zip([low, high]) {
                    let products = [_mm256_madd_epi16(a[0], b[0]), _mm256_madd_epi16(a[1], b[1])];
                    *found = _mm256_add_epi32(*found, _mm256_add_epi32(products[0], products[1]));
                }
            }
            a = a.wrapping_add(ROWS * GROUP);
            b = b.wrapping_add(COLUMNS * GROUP);
        }
    }
    store(&found, first, half, sums);
}
