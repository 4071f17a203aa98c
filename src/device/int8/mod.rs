//! Sums of matrix products in eight bits: C = sum over terms of A Bᵀ, for weights B that are quantised beforehand.
//!
//! A weight is q = round(w / s) with s = max |w| / 127 for each output, as i8; an activation the same for each row, with
//! 128 added, as u8: what the processors' instructions take (u8 times i8, four at a time, into i32). The sums of whole
//! numbers are exact, so an element of C = (acc - 128 sum of q_w) s_a s_w has the same bits whatever the order, the
//! threads, the batch and the instructions are; terms are added in their order.
//!
//! A and B lie in the same way for every kernel: `ROWS` rows, and `COLUMNS` outputs, of `GROUP` values of k one
//! after the other. So the instructions may change between two calls and packed weights stay what they are.

mod activations;
mod kernel;
#[cfg(target_arch = "x86_64")]
mod kernel_avx2;
#[cfg(target_arch = "x86_64")]
mod kernel_avx512;
#[cfg(target_arch = "aarch64")]
mod kernel_neon;
#[cfg(test)]
mod tests;
mod weights;

pub use weights::{Packed, QuantisedWeights, Source};

use super::Context;
use super::scratch::SharedMut;
use super::simd::prefetch;
use crate::error::{Error, Result};
use activations::Activations;
use kernel::{Tile, Way};

/// Rows of a tile.
const ROWS: usize = 12;

/// Outputs of a tile, and of a panel of weights.
const COLUMNS: usize = 32;

/// Values of k that one instruction multiplies and sums.
const GROUP: usize = 4;

/// The most terms of a sum.
pub const MAX_TERMS: usize = 8;

/// The longest sum: 255 * 127 times as many still fit into 31 bits.
pub const MAX_DEPTH: usize = 1 << 16;

/// Bytes of A that a task goes through again and again: a share of the L2 cache.
const A_BYTES: usize = 384 << 10;

/// Bytes of B that each tile of rows passes before its epilogue, in the same cache.
const B_BYTES: usize = 256 << 10;

/// Tasks per thread that even out threads of unequal speed.
const TASKS_PER_THREAD: usize = 8;

/// A sum of products.
#[derive(Debug, Clone, Copy)]
pub struct Product<'a> {
    /// Rows of every A and of C.
    pub m: usize,
    /// Columns of C.
    pub n: usize,
    /// What is summed, in this order.
    pub terms: &'a [Factors<'a>],
}

/// One product of a sum.
#[derive(Debug, Clone, Copy)]
pub struct Factors<'a> {
    /// A: rows of `leading` numbers, of which the first are multiplied.
    pub rows: &'a [f32],
    /// Distance between rows.
    pub leading: usize,
    /// B.
    pub weight: &'a Packed,
}

impl Product<'_> {
    /// # Errors
    /// `InvalidArgument` unless all of the product is inside its slices.
    fn check(&self, out: usize) -> Result<()> {
        let Product { m, n, terms } = *self;
        let inside = |len: usize, leading: usize, columns: usize| {
            m == 0
                || (columns <= leading || m == 1)
                    && (m - 1).saturating_mul(leading).saturating_add(columns) <= len
        };
        if !inside(out, n, n) {
            return Err(Error::argument("int8 product: out", format!("{m} rows of {n}"), out));
        }
        if !(1..=MAX_TERMS).contains(&terms.len()) {
            return Err(Error::argument("int8 product", format!("1 to {MAX_TERMS} terms"), terms.len()));
        }
        for term in terms {
            let k = term.weight.k();
            if term.weight.n() != n || !inside(term.rows.len(), term.leading, k) {
                let found = format!("{} outputs, {} numbers", term.weight.n(), term.rows.len());
                return Err(Error::argument("int8 product", format!("{n} outputs, {m} rows of {k}"), found));
            }
        }
        Ok(())
    }
}

/// C = sum over terms of A Bᵀ, then `epilogue` on every element of C, on the device's threads.
///
/// `epilogue(i, j, v)` gets finished runs of row i, from column j on, while they are in cache: each element exactly
/// once. A row of A with a number that is not finite gives a row of C that is not.
///
/// # Errors
/// `InvalidArgument` if a slice is too short for its shape; `OutOfMemory`; `Cancelled`.
pub fn gemm(
    cx: &Context,
    product: &Product,
    out: &mut [f32],
    epilogue: impl Fn(usize, usize, &mut [f32]) + Sync,
) -> Result<()> {
    run(cx, product, Way::best(), out, &epilogue)
}

type EpilogueFn<'a> = dyn Fn(usize, usize, &mut [f32]) + Sync + 'a;

fn run(cx: &Context, product: &Product, way: Way, out: &mut [f32], epilogue: &EpilogueFn) -> Result<()> {
    product.check(out.len())?;
    if product.m == 0 || product.n == 0 {
        return cx.check();
    }
    let activations = Activations::new(cx, product)?;
    let plan = Plan::new(product, cx.device().threads());
    let job = Job { product, activations: &activations, plan, way, out: SharedMut::new(out), epilogue };
    cx.parallel(plan.blocks * plan.groups, |task| job.run(task))
}

/// How a product is cut into tasks. No choice made here changes a bit of the result.
#[derive(Debug, Clone, Copy)]
struct Plan {
    /// Tiles of rows in a block, and blocks.
    tiles: usize,
    blocks: usize,
    /// Panels in a group, and groups.
    panels: usize,
    groups: usize,
    /// Panels that a tile of rows passes before its epilogue.
    at_once: usize,
}

impl Plan {
    fn new(product: &Product, threads: usize) -> Self {
        let depth: usize = product.terms.iter().map(|term| term.weight.k()).sum();
        let all = product.m.div_ceil(ROWS);
        let blocks = all.div_ceil((A_BYTES / (depth.max(1) * ROWS)).max(1));
        let tiles = all.div_ceil(blocks);
        let blocks = all.div_ceil(tiles);
        let all = product.n.div_ceil(COLUMNS);
        let groups = (TASKS_PER_THREAD * threads).div_ceil(blocks).min(all);
        let panels = all.div_ceil(groups);
        let at_once = (B_BYTES / (depth.max(1) * COLUMNS)).clamp(1, panels);
        Plan { tiles, blocks, panels, groups: all.div_ceil(panels), at_once }
    }
}

struct Job<'a> {
    product: &'a Product<'a>,
    activations: &'a Activations,
    plan: Plan,
    way: Way,
    out: SharedMut<f32>,
    epilogue: &'a EpilogueFn<'a>,
}

impl Job<'_> {
    /// A block of rows times a group of panels. Tasks that follow each other share the panels.
    fn run(&self, task: usize) {
        let (plan, product) = (&self.plan, self.product);
        let tiles = (task % plan.blocks) * plan.tiles;
        let tiles = tiles..(tiles + plan.tiles).min(product.m.div_ceil(ROWS));
        let first = (task / plan.blocks) * plan.panels;
        let end = (first + plan.panels).min(product.n.div_ceil(COLUMNS));
        for panel in (first..end).step_by(plan.at_once) {
            let panels = panel..(panel + plan.at_once).min(end);
            let next = panels.end..(panels.end + plan.at_once).min(end);
            for (i, tile) in tiles.clone().enumerate() {
                self.prefetch(next.clone(), i, tiles.len());
                panels.clone().for_each(|panel| self.tile(tile, panel));
                let column = panels.start * COLUMNS;
                let columns = (panels.end * COLUMNS).min(product.n) - column;
                for row in tile * ROWS..((tile + 1) * ROWS).min(product.m) {
                    // SAFETY: this task alone owns its rows of its panels' columns.
                    let run = unsafe { self.out.part(row * product.n + column, columns) };
                    (self.epilogue)(row, column, run);
                }
            }
        }
    }

    /// Asks for share `i` of `count` of the panels that come next.
    fn prefetch(&self, panels: std::ops::Range<usize>, i: usize, count: usize) {
        for term in self.product.terms {
            for panel in panels.clone() {
                let bytes = term.weight.panel(panel);
                let lines = bytes.len().div_ceil(LINE);
                for line in lines * i / count..lines * (i + 1) / count {
                    prefetch(bytes.as_ptr().wrapping_add(line * LINE));
                }
            }
        }
    }

    /// All terms of one tile.
    fn tile(&self, tile: usize, panel: usize) {
        let Product { m, n, terms } = *self.product;
        let (row, column) = (tile * ROWS, panel * COLUMNS);
        let (rows, columns) = (ROWS.min(m - row), COLUMNS.min(n - column));
        let c = self.out.pointer(row * n + column, (rows - 1) * n + columns);
        for (i, term) in terms.iter().enumerate() {
            let (a, b) = (self.activations.tile(i, tile), term.weight.panel(panel));
            let groups = term.weight.groups();
            let tile = Tile { rows, columns, groups, a, b, c, ldc: n, add: i > 0 };
            // SAFETY: `pointer` checked the bounds of C, this task alone owns the area; `best` found the instructions.
            unsafe { tile.run(self.way) };
        }
    }
}

/// Bytes of a cache line.
const LINE: usize = 64;

/// The factor that a row or an output was divided by, and its inverse.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Scale {
    /// Not a number for numbers that are not all finite.
    scale: f32,
    inverse: f32,
}

/// The largest number that i8 and its negative hold.
const LARGEST: f32 = 127.0;

/// Below this, all numbers of a row become zero: their inverse would overflow.
const NEGLIGIBLE: f32 = 1e-35;

impl Scale {
    /// Of numbers of this largest [`magnitude`](kernel::magnitude).
    fn of(magnitude: u32) -> Self {
        let largest = f32::from_bits(magnitude);
        if !largest.is_finite() {
            Scale { scale: f32::NAN, inverse: 0.0 }
        } else if largest < NEGLIGIBLE {
            Scale { scale: 0.0, inverse: 0.0 }
        } else {
            Scale { scale: largest / LARGEST, inverse: LARGEST / largest }
        }
    }
}
