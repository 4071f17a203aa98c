//! The NEON kernel with dot products: 12 x 8 sums in 24 registers, a quarter of a tile's columns at a time.
//!
//! Its instruction multiplies signed bytes, so what made activations unsigned is taken back when they are loaded, and the
//! sums begin with the offsets that [`Tile`] subtracts in the end.

use std::arch::aarch64::*;
use std::arch::asm;

use super::kernel::{Sums, Tile};
use super::{COLUMNS, GROUP, ROWS};

/// Sums that a register holds.
const LANES: usize = 4;

/// Columns whose sums are made at once.
const AT_ONCE: usize = 2 * LANES;

/// What turns u8 activations into i8.
const BIAS: u8 = 0x80;

/// `$sums` += the products of each four bytes of `$b` with four of `$a`: those of row `$row` of the four in it.
macro_rules! dot {
    ($sums:expr, $b:expr, $a:expr, $row:literal) => {
        // SAFETY: arithmetic on registers, by an instruction that the enclosing function's features have. Rust's own
        // function for it is not stable.
        unsafe {
            asm!(
                concat!("sdot {sums:v}.4s, {b:v}.16b, {a:v}.4b[", $row, "]"),
                sums = inout(vreg) $sums,
                b = in(vreg) $b,
                a = in(vreg) $a,
                options(pure, nomem, nostack, preserves_flags)
            )
        }
    };
}

/// # Safety
/// NEON with dot products; the tile's slices reach what [`Tile`] says.
pub(super) unsafe fn multiply(tile: &Tile, sums: &mut Sums) {
    let rows = match tile.rows.div_ceil(4) {
        1 => rows::<1>,
        2 => rows::<2>,
        _ => rows::<3>,
    };
    // SAFETY: the caller's contract.
    unsafe { rows(tile, sums) };
}

/// The sums of `4 * R` rows: memory holds that many of every tile, those beyond its rows with arbitrary numbers.
///
/// # Safety
/// As [`multiply`], with `R` at most a quarter of [`ROWS`].
#[target_feature(enable = "neon,dotprod")]
unsafe fn rows<const R: usize>(tile: &Tile, sums: &mut Sums) {
    let bias = vdupq_n_u8(BIAS);
    for column in (0..COLUMNS).step_by(AT_ONCE) {
        // SAFETY: behind the groups lie the scales and the offsets of all columns.
        let offsets = unsafe {
            let offsets = tile.b_tail().as_ptr().cast::<i32>().add(COLUMNS + column);
            [vld1q_s32(offsets), vld1q_s32(offsets.add(LANES))]
        };
        let mut found = [[offsets; 4]; R];
        let (mut a, mut b) = (tile.a.as_ptr(), tile.b.as_ptr().wrapping_add(column * GROUP));
        for _ in 0..tile.groups {
            // SAFETY: `groups` steps of a group of each row of A and of each column of B.
            let b_now = unsafe { [vld1q_u8(b), vld1q_u8(b.add(LANES * GROUP))] };
            for (i, found) in found.iter_mut().enumerate() {
                // SAFETY: as above; four rows' groups are 16 bytes.
                let a = veorq_u8(unsafe { vld1q_u8(a.add(i * 4 * GROUP)) }, bias);
                for (j, b) in b_now.into_iter().enumerate() {
                    dot!(found[0][j], b, a, 0);
                    dot!(found[1][j], b, a, 1);
                    dot!(found[2][j], b, a, 2);
                    dot!(found[3][j], b, a, 3);
                }
            }
            a = a.wrapping_add(ROWS * GROUP);
            b = b.wrapping_add(COLUMNS * GROUP);
        }
        for (found, sums) in found.as_flattened().iter().zip(sums.iter_mut()) {
            for (found, sums) in found.iter().zip(sums[column..].chunks_exact_mut(LANES)) {
                // SAFETY: the chunk has four numbers.
                unsafe { vst1q_s32(sums.as_mut_ptr(), *found) };
            }
        }
    }
}
