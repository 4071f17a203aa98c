//! The AVX-512 kernel with VNNI: 12 x 32 sums in 24 registers, two of B, one of A.

use std::arch::x86_64::*;

use super::kernel::Tile;
use super::{COLUMNS, GROUP, ROWS};

/// # Safety
/// The processor has the instructions; the tile's pointers and slices reach what [`Tile`] says.
pub(super) unsafe fn multiply(tile: &Tile) {
    let multiply = match tile.rows {
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
    unsafe { multiply(tile) }
}

/// The low `count` lanes of 16; all beyond 16.
fn lanes(count: usize) -> __mmask16 {
    if count >= 16 { u16::MAX } else { (1u16 << count) - 1 }
}

/// # Safety
/// As [`multiply`], with `R <= tile.rows`.
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx512vnni,avx2,fma")]
unsafe fn rows<const R: usize>(tile: &Tile) {
    let mut sums = [[_mm512_setzero_si512(); 2]; R];
    let (mut a, mut b) = (tile.a.as_ptr(), tile.b.as_ptr());
    // SAFETY: `groups` steps of a group of each row of A and of each column of B.
    unsafe {
        for _ in 0..tile.groups {
            let low = _mm512_loadu_si512(b.cast());
            let high = _mm512_loadu_si512(b.add(COLUMNS * GROUP / 2).cast());
            for (r, sums) in sums.iter_mut().enumerate() {
                let a = _mm512_set1_epi32(a.add(r * GROUP).cast::<i32>().read_unaligned());
                sums[0] = _mm512_dpbusd_epi32(sums[0], a, low);
                sums[1] = _mm512_dpbusd_epi32(sums[1], a, high);
            }
            a = a.add(ROWS * GROUP);
            b = b.add(COLUMNS * GROUP);
        }
    }
    // SAFETY: behind the groups lie the scales and the offsets of all columns.
    let (scales, offsets) = unsafe {
        let offsets = b.add(COLUMNS * size_of::<f32>());
        let scales = [_mm512_loadu_ps(b.cast()), _mm512_loadu_ps(b.add(64).cast())];
        (scales, [_mm512_loadu_si512(offsets.cast()), _mm512_loadu_si512(offsets.add(64).cast())])
    };
    let masks = [lanes(tile.columns), lanes(tile.columns.saturating_sub(16))];
    for (r, sums) in sums.iter().enumerate() {
        let of_row = _mm512_set1_ps(tile.row_scale(r));
        for half in 0..2 {
            let value = _mm512_cvtepi32_ps(_mm512_sub_epi32(sums[half], offsets[half]));
            let value = _mm512_mul_ps(_mm512_mul_ps(value, of_row), scales[half]);
            // SAFETY: row r of C; lanes outside its columns are masked off and not touched.
            unsafe {
                let c = tile.c.add(r * tile.ldc).wrapping_add(16 * half);
                let value = match tile.add {
                    true => _mm512_add_ps(_mm512_maskz_loadu_ps(masks[half], c), value),
                    false => value,
                };
                _mm512_mask_storeu_ps(c, masks[half], value);
            }
        }
    }
}
