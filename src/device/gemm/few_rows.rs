//! Products of few rows, of which a weight's columns are used once or twice: A is copied once, and every task packs the
//! panels of B just before it uses them.

use super::plan::Plan;
use super::{A_STRIDE, Ahead, Area, Block, Job, Kernel, WORDS, steps};
use crate::device::scratch::{Scratch, floats, floats_mut};
use crate::device::simd::prefetch;
use crate::device::{Buffer, Context};
use crate::error::Result;

/// How many tiles ahead of its use a tile of A is asked for.
const TILES_AHEAD: usize = 2;

/// Floats of a cache line.
const LINE: usize = 16;

impl<K: Kernel> Job<'_, K> {
    /// Every task owns `per_task` columns of a block of rows.
    pub(super) fn split_columns(&self, cx: &Context, plan: &Plan, per_task: usize) -> Result<()> {
        let n = self.product.n;
        let columns = n.div_ceil(per_task);
        let copies = self.copies(cx, plan)?;
        let floats_of_rows = self.product.blocks::<K>().count() * plan.rows * A_STRIDE;
        let scratch =
            Scratch::new(cx.device(), "a matrix product", plan.blocks * columns, WORDS * K::COLUMNS)?;
        cx.parallel(plan.blocks * columns, |task| {
            let (rows, column) = (task / columns, task % columns * per_task);
            let copies = &floats(&copies)[rows * floats_of_rows..];
            let area = plan.area(rows, column, per_task, n);
            scratch.with(|panel| self.fresh_panels(area, copies, plan.rows * A_STRIDE, panel));
        })
    }

    /// A as [`Job::copy_a`] leaves it: for each block of rows its blocks of K, one behind the other.
    fn copies(&self, cx: &Context, plan: &Plan) -> Result<Buffer> {
        let (blocks, each) = (self.product.blocks::<K>().count(), plan.rows * A_STRIDE);
        let bytes = (plan.blocks * blocks * each).saturating_mul(size_of::<f32>());
        let mut copies = cx.device().take("a copied matrix", bytes)?;
        let all = &mut floats_mut(&mut copies)[..plan.blocks * blocks * each];
        cx.parallel_chunks(all, each, |i, to| {
            if let Some(block) = self.product.blocks::<K>().nth(i % blocks) {
                self.copy_a(plan.area(i / blocks, 0, 0, 0), &block, to);
            }
        })?;
        Ok(copies)
    }

    /// `copies` holds the blocks of K of the area's rows, `distance` floats apart.
    fn fresh_panels(&self, area: Area, copies: &[f32], distance: usize, panel: &mut [f32]) {
        let end = area.column + area.columns;
        let mut blocks = self.product.blocks::<K>().zip(copies.chunks(distance)).peekable();
        while let Some((block, a)) = blocks.next() {
            for (n, columns) in steps(area.column, area.columns, K::COLUMNS) {
                // SAFETY: `check` saw all of every B inside its slice; this level was detected.
                unsafe { K::pack(&block.term.b, block.part(n, columns), panel) };
                // What is packed after this part: nothing after the last.
                let after = n + columns;
                let (next, n_next) = if after < end {
                    (Some(&block), after)
                } else {
                    (blocks.peek().map(|(block, _)| block), area.column)
                };
                let next = next.map(|b| (b.term.b, b.part(n_next, K::COLUMNS.min(end - n_next))));
                self.tiles(Area { column: n, columns, ..area }, &block, a, panel, |share, shares| {
                    if n == area.column {
                        ask_for_rows::<K>(&block, a, share + TILES_AHEAD);
                    }
                    [next.map_or(Ahead::NONE, |(b, part)| b.ahead(part, share, shares)), Ahead::NONE]
                });
            }
        }
        self.finish(area);
    }
}

/// Asks for the rows of tile `i` of a copied block.
fn ask_for_rows<K: Kernel>(block: &Block, a: &[f32], i: usize) {
    for at in (0..block.words).step_by(LINE) {
        for row in i * K::ROWS..(i + 1) * K::ROWS {
            prefetch(a.as_ptr().wrapping_add(row * A_STRIDE + at));
        }
    }
}
