//! Matrix products with f32 accumulation, and sums of them: C = sum over terms of op(A) op(B). The library's only one.
//!
//! C is `[M, N]`, f32; the A of a term holds M x K numbers in f32, its B K x N numbers in f32, f16 or bf16, each in
//! either order. B is widened while it is packed into panels; on a device that rounds the factors of products
//! ([`Device::cpu_in_bf16`](super::Device::cpu_in_bf16)) both become bf16 instead, two of them to a word of four bytes.
//! Each term's K is cut into blocks of `WORDS` words, the last of which may be shorter; no block reaches into the next
//! term. Within a block every element of C sums its products in ascending k, and blocks are added in ascending order,
//! term after term. So the bits of an element depend on its own rows of the A, its own columns of the B, the terms'
//! order and depths, and the processor's instructions: never on M, N, its place, the threads, its neighbours or the
//! orders in which factors lie.
//!
//! A block of A is copied to rows of a fixed odd number of cache lines, so that no leading dimension makes its
//! rows collide in the L1 cache, and the kernel broadcasts from it; a panel of B stays in L1 while all
//! rows of the block pass by; the tile of C lives in registers.

mod few_rows;
#[cfg(target_arch = "x86_64")]
mod kernel_avx2;
#[cfg(target_arch = "x86_64")]
mod kernel_avx512;
#[cfg(target_arch = "x86_64")]
mod kernel_avx512_bf16;
mod kernel_baseline;
#[cfg(target_arch = "aarch64")]
mod kernel_neon;
mod many_rows;
mod matrix;
mod plan;
mod serial;
#[cfg(test)]
mod tests;

use matrix::Ahead;
pub use matrix::{Layout, MatrixA, MatrixB, Order, Values};
pub use serial::{Packed, Serial};

use std::ops::Range;

use super::scratch::SharedMut;
use super::simd::{self, Level};
use super::{Context, Device};
use crate::error::{Error, Result};
use plan::{Plan, Split};

/// Words of a block of K: the same for every product, since it decides the order of sums. A word is four bytes of a row of
/// A or a column of B: one value of k in f32, or two in bf16.
const WORDS: usize = 256;

/// Distance between the rows of a copied block of A, in words: 17 cache lines.
const A_STRIDE: usize = WORDS + 16;

/// The most rows of a block of A: with it, half the L2 cache stays free for C and B.
const BLOCK_ROWS: usize = 288;

/// A sum of products: C = sum over terms of op(A) op(B).
#[derive(Debug, Clone, Copy)]
pub struct Gemm<'a> {
    /// Rows of every A and of C.
    pub m: usize,
    /// Columns of C.
    pub n: usize,
    /// What is summed, in this order. Without any, C is zero.
    pub terms: &'a [Factors<'a>],
    /// Whether to add to C rather than overwrite it.
    pub accumulate: bool,
}

/// One product of a sum.
#[derive(Debug, Clone, Copy)]
pub struct Factors<'a> {
    /// Columns of A: the summed dimension.
    pub k: usize,
    /// A.
    pub a: MatrixA<'a>,
    /// B.
    pub b: MatrixB<'a>,
}

/// A register-blocked inner kernel and its packing.
trait Kernel: Send + Sync {
    /// The most rows of a tile.
    const ROWS: usize;
    /// Columns of a tile and of a panel of B.
    const COLUMNS: usize;
    /// Values of k in a word: 1 in f32, whose words are these numbers; 2 in bf16, the first in the low half.
    const PER_WORD: usize;
    /// Values of k in a block.
    const DEPTH: usize = WORDS * Self::PER_WORD;

    /// C tile (+)= A tile x panel.
    ///
    /// # Safety
    /// The processor has the kernel's instructions; slices and pointers of `tile` reach what [`Tile`] says.
    unsafe fn multiply(tile: &Tile<'_>);

    /// Writes rows of [`Kernel::COLUMNS`] words to `panel`, as many as `depth` values of k take: B from (k, n) on;
    /// columns beyond `columns`, and half a word beyond `depth`, are zero.
    ///
    /// # Safety
    /// The processor has the kernel's instructions; the part of B is inside its slice; `panel` has room.
    unsafe fn pack(b: &MatrixB, part: Part, panel: &mut [f32]);

    /// Copies `rows` rows of `depth` floats, `stride` apart, to rows of words, [`A_STRIDE`] apart. Half a word beyond
    /// `depth` is zero.
    ///
    /// # Safety
    /// The processor has the kernel's instructions; both slices reach that far.
    unsafe fn copy(from: &[f32], stride: usize, rows: usize, depth: usize, to: &mut [f32]);

    /// As [`Kernel::copy`], from `depth` rows of `rows` floats.
    ///
    /// # Safety
    /// The processor has the kernel's instructions; both slices reach that far.
    unsafe fn transpose(from: &[f32], stride: usize, rows: usize, depth: usize, to: &mut [f32]);
}

/// A part of B: `depth` values of k from `k`, `columns` outputs from `n`.
#[derive(Debug, Clone, Copy)]
struct Part {
    k: usize,
    depth: usize,
    n: usize,
    columns: usize,
}

/// What one call of a kernel computes.
struct Tile<'a> {
    /// At most [`Kernel::ROWS`].
    rows: usize,
    /// At most [`Kernel::COLUMNS`].
    columns: usize,
    /// Length of the sums.
    words: usize,
    /// `rows` rows, [`A_STRIDE`] apart, of `words` words.
    a: &'a [f32],
    /// `words` rows of [`Kernel::COLUMNS`] words.
    panel: &'a [f32],
    /// `rows` rows, `ldc` apart, of `columns` floats.
    c: *mut f32,
    ldc: usize,
    /// Whether to add to C rather than overwrite it.
    accumulate: bool,
    /// What will be packed, copied or multiplied next.
    ahead: [Ahead; 2],
}

impl Tile<'_> {
    /// # Safety
    /// `c` reaches what its comment says, and no other thread touches that; the processor has `K`'s instructions.
    unsafe fn run<K: Kernel>(&self) {
        assert!((1..=K::ROWS).contains(&self.rows) && (1..=K::COLUMNS).contains(&self.columns));
        assert!(self.a.len() >= (self.rows - 1) * A_STRIDE + self.words);
        assert!(self.panel.len() >= self.words * K::COLUMNS);
        // SAFETY: the slices were just measured; the rest is this function's contract.
        unsafe { K::multiply(self) };
    }
}

/// A kernel that this processor has.
#[derive(Debug, Clone, Copy)]
enum Choice {
    Baseline,
    #[cfg(target_arch = "aarch64")]
    Neon,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16,
}

impl Choice {
    /// That of the products of a device, at [`simd::level`].
    fn of(device: &Device) -> Self {
        match (simd::level(), Self::bf16()) {
            (_, Some(choice)) if device.rounds_factors() => choice,
            #[cfg(target_arch = "x86_64")]
            (Level::Avx512, _) => Choice::Avx512,
            #[cfg(target_arch = "x86_64")]
            (Level::Avx2, _) => Choice::Avx2,
            #[cfg(target_arch = "aarch64")]
            (Level::Neon, _) => Choice::Neon,
            _ => Choice::Baseline,
        }
    }

    /// One for factors in bf16, at [`simd::level`], if it is faster than that for f32.
    #[cfg(target_arch = "x86_64")]
    fn bf16() -> Option<Self> {
        (simd::level() == Level::Avx512 && simd::fast_bf16()).then_some(Choice::Avx512Bf16)
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn bf16() -> Option<Self> {
        None
    }
}

/// Runs `$body` with `$kernel` naming the kernel of `$choice`.
macro_rules! with_kernel {
    ($choice:expr, $kernel:ident => $body:expr) => {
        match $choice {
            $crate::device::gemm::Choice::Baseline => {
                type $kernel = $crate::device::gemm::kernel_baseline::Baseline;
                $body
            }
            #[cfg(target_arch = "aarch64")]
            $crate::device::gemm::Choice::Neon => {
                type $kernel = $crate::device::gemm::kernel_neon::Neon;
                $body
            }
            #[cfg(target_arch = "x86_64")]
            $crate::device::gemm::Choice::Avx2 => {
                type $kernel = $crate::device::gemm::kernel_avx2::Avx2;
                $body
            }
            #[cfg(target_arch = "x86_64")]
            $crate::device::gemm::Choice::Avx512 => {
                type $kernel = $crate::device::gemm::kernel_avx512::Avx512;
                $body
            }
            #[cfg(target_arch = "x86_64")]
            $crate::device::gemm::Choice::Avx512Bf16 => {
                type $kernel = $crate::device::gemm::kernel_avx512_bf16::Avx512Bf16;
                $body
            }
        }
    };
}
use with_kernel;

/// C = sum over terms of op(A) op(B), then `epilogue` on every element of C, on the device's threads.
///
/// `out[i * ldc + j]` becomes element (i, j) of C; what lies between rows is left alone. `epilogue(i, j, v)`
/// gets finished runs of row i, from column j on, while they are in cache: each element exactly once.
///
/// # Errors
/// `InvalidArgument` if a slice is too short for its shape; `OutOfMemory`; `Cancelled`.
pub fn gemm(
    cx: &Context,
    product: &Gemm,
    out: &mut [f32],
    ldc: usize,
    epilogue: impl Fn(usize, usize, &mut [f32]) + Sync,
) -> Result<()> {
    product.check(out.len(), ldc)?;
    if product.m == 0 || product.n == 0 {
        return cx.check();
    }
    let out = SharedMut::new(out);
    with_kernel!(Choice::of(cx.device()), K => run::<K>(cx, product, out, ldc, &epilogue))
}

/// Whether this processor has fast instructions for factors in bf16, at [`simd::level`]. Without them products are
/// computed in f32.
pub fn multiplies_bf16() -> bool {
    Choice::bf16().is_some()
}

impl<'a> Gemm<'a> {
    /// # Errors
    /// `InvalidArgument` unless every element that the product reaches is inside its slice.
    fn check(&self, out: usize, ldc: usize) -> Result<()> {
        fits("gemm: out", self.m, self.n, ldc, out)?;
        self.terms.iter().try_for_each(|term| {
            term.a.check(self.m, term.k)?;
            term.b.check(self.n, term.k)
        })
    }

    /// All that is summed: the K of every term, in words.
    fn words<K: Kernel>(&self) -> usize {
        self.terms.iter().map(|term| term.k.div_ceil(K::PER_WORD)).sum()
    }

    /// The blocks in their order.
    fn blocks<K: Kernel>(&self) -> impl Iterator<Item = Block<'a>> {
        let words = |k: usize| k.div_ceil(K::PER_WORD);
        let offsets =
            self.terms.iter().scan(0, move |at, term| Some(std::mem::replace(at, *at + words(term.k))));
        self.terms.iter().zip(offsets).flat_map(move |(term, offset)| {
            blocks::<K>(term.k).map(move |(k, depth)| {
                let at = offset + k / K::PER_WORD;
                Block { term, k, depth, words: words(depth), at }
            })
        })
    }
}

/// A block of K: all of one term, or [`Kernel::DEPTH`] of it.
#[derive(Debug, Clone, Copy)]
struct Block<'a> {
    term: &'a Factors<'a>,
    /// The first k within the term.
    k: usize,
    depth: usize,
    /// As many words.
    words: usize,
    /// The first word counted through all terms: where a packed panel holds the block.
    at: usize,
}

impl Block<'_> {
    /// The part of the term's B that `columns` outputs from `n` on take.
    fn part(&self, n: usize, columns: usize) -> Part {
        Part { k: self.k, depth: self.depth, n, columns }
    }
}

/// # Errors
/// `InvalidArgument` unless `rows` rows of `columns` elements, `stride` apart, fit into `len` elements.
fn fits(name: &str, rows: usize, columns: usize, stride: usize, len: usize) -> Result<()> {
    if rows == 0 || columns == 0 {
        return Ok(());
    }
    let needed = (rows - 1).checked_mul(stride).and_then(|n| n.checked_add(columns));
    if (columns <= stride || rows == 1) && needed.is_some_and(|needed| needed <= len) {
        return Ok(());
    }
    let expected = format!("{rows} rows of {columns} elements, {stride} apart");
    Err(Error::argument(name, expected, format!("{len} elements")))
}

type EpilogueFn<'a> = dyn Fn(usize, usize, &mut [f32]) + Sync + 'a;

fn run<K: Kernel>(
    cx: &Context,
    product: &Gemm,
    out: SharedMut<f32>,
    ldc: usize,
    epilogue: &EpilogueFn,
) -> Result<()> {
    let transposed = product.terms.iter().any(|term| term.a.order == Order::Columns);
    let order = if transposed { Order::Columns } else { Order::Rows };
    let plan = Plan::new::<K>([product.m, product.n, product.words::<K>()], order, cx.device().threads());
    let job = Job::<K> { product, out, ldc, epilogue, kernel: std::marker::PhantomData };
    match plan.split {
        Split::Columns { per_task } => job.split_columns(cx, &plan, per_task),
        Split::Rows { columns_at_once, words_at_once } => {
            job.split_rows(cx, &plan, columns_at_once, words_at_once)
        }
    }
}

/// A rectangle of C.
#[derive(Debug, Clone, Copy)]
struct Area {
    row: usize,
    rows: usize,
    column: usize,
    columns: usize,
}

struct Job<'a, K> {
    product: &'a Gemm<'a>,
    out: SharedMut<f32>,
    ldc: usize,
    epilogue: &'a EpilogueFn<'a>,
    kernel: std::marker::PhantomData<K>,
}

impl<K: Kernel> Job<'_, K> {
    /// Copies a block of its term's A to rows [`A_STRIDE`] apart.
    fn copy_a(&self, area: Area, block: &Block, to: &mut [f32]) {
        let a = &block.term.a;
        let from = &a.values[a.index(area.row, block.k)..];
        // SAFETY: `check` saw all of A inside its slice, the scratch holds the block; this level was detected.
        unsafe {
            match a.order {
                Order::Rows => K::copy(from, a.leading, area.rows, block.depth, to),
                Order::Columns => K::transpose(from, a.leading, area.rows, block.depth, to),
            }
        }
    }

    /// One panel's tiles. `ahead` tells what tile i of so many shall ask for.
    fn tiles(
        &self,
        area: Area,
        block: &Block,
        a: &[f32],
        panel: &[f32],
        ahead: impl Fn(usize, usize) -> [Ahead; 2],
    ) {
        let count = area.rows.div_ceil(K::ROWS);
        for i in 0..count {
            let ahead = ahead(i, count);
            let first = i * K::ROWS;
            let rows = K::ROWS.min(area.rows - first);
            let at = (area.row + first) * self.ldc + area.column;
            let c = self.out.pointer(at, (rows - 1) * self.ldc + area.columns);
            let (ldc, accumulate) = (self.ldc, block.at > 0 || self.product.accumulate);
            let a = &a[first * A_STRIDE..];
            let (columns, words) = (area.columns, block.words);
            let tile = Tile { rows, columns, words, a, panel, c, ldc, accumulate, ahead };
            // SAFETY: `pointer` checked the bounds of C, this task alone owns the area; the level was detected.
            unsafe { tile.run::<K>() };
        }
    }

    /// The epilogue over finished rows.
    fn finish(&self, area: Area) {
        let untouched = self.product.words::<K>() == 0 && !self.product.accumulate;
        for row in area.row..area.row + area.rows {
            // SAFETY: this task alone owns the area of `out`.
            let values = unsafe { self.out.part(row * self.ldc + area.column, area.columns) };
            if untouched {
                values.fill(0.0);
            }
            (self.epilogue)(row, area.column, values);
        }
    }
}

/// A whole column panel of B: all blocks of K, one below the other.
fn pack_panel<K: Kernel>(b: &MatrixB, k: usize, n: usize, columns: usize, panel: &mut [f32]) {
    for (k, depth) in blocks::<K>(k) {
        let part = Part { k, depth, n, columns };
        let (first, words) = (k / K::PER_WORD, depth.div_ceil(K::PER_WORD));
        // SAFETY: callers checked that B's slice holds n + columns outputs of k inputs; the level was detected.
        unsafe { K::pack(b, part, &mut panel[first * K::COLUMNS..][..words * K::COLUMNS]) };
    }
}

/// [`Kernel::copy`] where words are f32.
fn copy_rows(from: &[f32], stride: usize, rows: usize, depth: usize, to: &mut [f32]) {
    for (i, to) in to.chunks_mut(A_STRIDE).take(rows).enumerate() {
        to[..depth].copy_from_slice(&from[i * stride..][..depth]);
    }
}

/// The plain definition of [`Kernel::transpose`], for the depths and rows that its vector code leaves over.
#[inline(always)]
fn transpose_plain(from: &[f32], stride: usize, rows: Range<usize>, depths: Range<usize>, to: &mut [f32]) {
    for k in depths {
        for i in rows.clone() {
            to[i * A_STRIDE + k] = from[k * stride + i];
        }
    }
}

/// The blocks of K: (first, length).
fn blocks<K: Kernel>(k: usize) -> impl Iterator<Item = (usize, usize)> {
    steps(0, k, K::DEPTH)
}

/// `count` numbers from `start` on, cut into runs of at most `step`: (first, length).
fn steps(start: usize, count: usize, step: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..count).step_by(step.max(1)).map(move |i| (start + i, step.min(count - i)))
}
