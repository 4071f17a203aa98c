//! One tile of a product, in whichever instructions the processor has for it; and how numbers are quantised.

use super::{COLUMNS, GROUP, ROWS};
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
use crate::device::simd::{self, Level};
use crate::simd_dispatch;

/// Instructions for a tile, poorest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// A plain loop.
    Plain,
    /// AVX2: products of 16 bits.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-VNNI.
    #[cfg(target_arch = "x86_64")]
    AvxVnni,
    /// AVX-512 with VNNI.
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni,
    /// NEON with dot products.
    #[cfg(target_arch = "aarch64")]
    NeonDot,
}

impl Way {
    /// All that the processor has at [`simd::level`], poorest first.
    pub fn available() -> impl Iterator<Item = Way> {
        std::iter::once(Way::Plain).chain(Self::beyond_plain().into_iter().flatten())
    }

    /// The best of them.
    pub fn best() -> Way {
        Self::available().last().unwrap_or(Way::Plain)
    }
}

#[cfg(target_arch = "x86_64")]
impl Way {
    fn beyond_plain() -> [Option<Way>; 3] {
        let avx2 = simd::level() >= Level::Avx2;
        let avx512 = simd::level() >= Level::Avx512;
        [
            avx2.then_some(Way::Avx2),
            (avx2 && is_x86_feature_detected!("avxvnni")).then_some(Way::AvxVnni),
            (avx512 && is_x86_feature_detected!("avx512vnni")).then_some(Way::Avx512Vnni),
        ]
    }
}

#[cfg(target_arch = "aarch64")]
impl Way {
    fn beyond_plain() -> [Option<Way>; 1] {
        let dot = simd::level() >= Level::Neon && std::arch::is_aarch64_feature_detected!("dotprod");
        [dot.then_some(Way::NeonDot)]
    }
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
impl Way {
    fn beyond_plain() -> [Option<Way>; 0] {
        []
    }
}

/// What one call of a kernel computes.
pub(super) struct Tile<'a> {
    /// 1 to [`ROWS`].
    pub rows: usize,
    /// 1 to [`COLUMNS`].
    pub columns: usize,
    /// Groups of [`GROUP`] values of k.
    pub groups: usize,
    /// As [`Activations`](super::activations::Activations) lay them.
    pub a: &'a [u8],
    /// As [`Packed`](super::Packed) lays them.
    pub b: &'a [u8],
    /// `rows` rows, `ldc` apart, of `columns` floats.
    pub c: *mut f32,
    pub ldc: usize,
    /// Whether to add to C rather than overwrite it.
    pub add: bool,
}

/// Sums of a tile.
pub(super) type Sums = [[i32; COLUMNS]; ROWS];

impl Tile<'_> {
    /// # Safety
    /// `c` reaches what its comment says, and no other thread touches that; the processor has `way`'s instructions.
    pub unsafe fn run(&self, way: Way) {
        assert!((1..=ROWS).contains(&self.rows) && (1..=COLUMNS).contains(&self.columns));
        assert!(self.a.len() >= self.groups * ROWS * GROUP + ROWS * size_of::<f32>());
        assert!(self.b.len() >= self.groups * COLUMNS * GROUP + 2 * COLUMNS * size_of::<f32>());
        let mut sums = [[0; COLUMNS]; ROWS];
        match way {
            Way::Plain => plain(self, &mut sums),
            // SAFETY: the slices were just measured; the rest is this function's contract.
            #[cfg(target_arch = "x86_64")]
            Way::Avx2 => unsafe { super::kernel_avx2::multiply_avx2(self, &mut sums) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Way::AvxVnni => unsafe { super::kernel_avx2::multiply_vnni(self, &mut sums) },
            // SAFETY: as above. It writes C from its registers.
            #[cfg(target_arch = "x86_64")]
            Way::Avx512Vnni => return unsafe { super::kernel_avx512::multiply(self) },
            // SAFETY: as above; what `Activations` and `Packed` lay are whole tiles.
            #[cfg(target_arch = "aarch64")]
            Way::NeonDot => unsafe { super::kernel_neon::multiply(self, &mut sums) },
        }
        // SAFETY: this function's contract.
        unsafe { self.finish(&sums) };
    }

    /// The bytes behind the last group of B: [`COLUMNS`] scales, then as many offsets.
    pub fn b_tail(&self) -> &[u8] {
        &self.b[self.groups * COLUMNS * GROUP..]
    }

    /// The factor of row `r`.
    #[inline(always)]
    pub fn row_scale(&self, r: usize) -> f32 {
        f32::from_ne_bytes(word(&self.a[self.groups * ROWS * GROUP..], r))
    }

    /// C (+)= (sum - offset) * the row's scale * the output's.
    ///
    /// # Safety
    /// As [`Tile::run`].
    unsafe fn finish(&self, sums: &Sums) {
        let tail = self.b_tail();
        for (r, sums) in sums.iter().enumerate().take(self.rows) {
            let of_row = self.row_scale(r);
            // SAFETY: row r of C, by contract.
            let c = unsafe { std::slice::from_raw_parts_mut(self.c.add(r * self.ldc), self.columns) };
            for (j, (c, sum)) in c.iter_mut().zip(sums).enumerate() {
                let offset = i32::from_ne_bytes(word(tail, COLUMNS + j));
                let value = (sum - offset) as f32 * of_row * f32::from_ne_bytes(word(tail, j));
                *c = if self.add { *c + value } else { value };
            }
        }
    }
}

/// The four bytes of number `i`.
#[inline(always)]
fn word(bytes: &[u8], i: usize) -> [u8; 4] {
    let at = i * 4;
    [bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]
}

/// The sums by their definition.
fn plain(tile: &Tile, sums: &mut Sums) {
    let groups = tile.a.chunks_exact(ROWS * GROUP).zip(tile.b.chunks_exact(COLUMNS * GROUP));
    for (a, b) in groups.take(tile.groups) {
        for (a, sums) in a.chunks_exact(GROUP).zip(sums.iter_mut()).take(tile.rows) {
            for (b, sum) in b.chunks_exact(GROUP).zip(sums) {
                *sum += (0..GROUP).map(|i| i32::from(a[i]) * i32::from(b[i] as i8)).sum::<i32>();
            }
        }
    }
}

/// Adding this to a number of magnitude below 2^22 rounds it to the nearest whole one, of two the even one, which is
/// then in the low bits.
const ROUNDER: f32 = 12_582_912.0;

simd_dispatch! {
    /// The bits of the largest magnitude: at least those of infinity if a number is not finite.
    pub(super) fn magnitude<const FMA: bool>(x: &[f32]) -> u32 {
        let mut lanes = [0u32; 64];
        let bits = |v: &f32| v.to_bits() & !(1 << 31);
        let chunks = x.chunks_exact(64);
        let rest = chunks.remainder().iter().map(bits).fold(0, u32::max);
        for chunk in chunks {
            for i in 0..64 {
                lanes[i] = lanes[i].max(bits(&chunk[i]));
            }
        }
        lanes.into_iter().fold(rest, u32::max)
    }
}

simd_dispatch! {
    /// `round(x * inverse)` as i8, its bits changed where `mask` has any. Never one instruction for the product and the
    /// sum: all levels round alike.
    pub(super) fn quantise<const FMA: bool>(x: &[f32], inverse: f32, mask: u8, to: &mut [u8]) {
        for (to, x) in to.iter_mut().zip(x) {
            *to = (*x * inverse + ROUNDER).to_bits() as u8 ^ mask;
        }
    }
}
