//! Products of many rows: B is packed once for all of them.

use super::plan::Plan;
use super::{A_STRIDE, Ahead, Area, Block, Job, Kernel, WORDS, steps};
use crate::device::Context;
use crate::device::scratch::{Scratch, SharedMut, floats, floats_mut};
use crate::error::Result;

/// Panels whose columns of a block of rows fit into the L2 cache, beside a block of A.
const HOT_PANELS: usize = 12;

/// Blocks that are packed together: those whose first word, counted through all terms, is within a range.
#[derive(Debug, Clone, Copy)]
struct Group {
    start: usize,
    end: usize,
    /// Words of a packed panel, of which the group fills the first.
    panel_words: usize,
}

impl Group {
    fn holds(&self, block: &Block) -> bool {
        (self.start..self.end).contains(&block.at)
    }
}

impl<K: Kernel> Job<'_, K> {
    /// Every B is packed once, some columns and some blocks at a time, then every task owns some rows: for many
    /// rows.
    pub(super) fn split_rows(
        &self,
        cx: &Context,
        plan: &Plan,
        columns_at_once: usize,
        words_at_once: usize,
    ) -> Result<()> {
        let (n, words) = (self.product.n, self.product.words::<K>());
        // The last block of a group may reach beyond it.
        let panel_words = words.min(words_at_once.saturating_add(WORDS)) * K::COLUMNS;
        let panels = columns_at_once.div_ceil(K::COLUMNS);
        let bytes = (panels * panel_words).saturating_mul(size_of::<f32>());
        let mut packed = cx.device().take("a packed matrix", bytes)?;
        // Each term may end in a short block.
        let most = (words_at_once / WORDS).saturating_add(1 + self.product.terms.len());
        let copies = self.product.blocks::<K>().count().min(most) * plan.rows * A_STRIDE;
        let scratch = Scratch::new(cx.device(), "a matrix product", plan.blocks, copies)?;
        for (first, columns) in steps(0, n, columns_at_once) {
            // Without any there is still an epilogue.
            for (start, length) in steps(0, words.max(1), words_at_once) {
                let group = Group { start, end: start + length, panel_words };
                let shared = SharedMut::new(floats_mut(&mut packed));
                cx.parallel(columns.div_ceil(K::COLUMNS), |panel| {
                    // SAFETY: each task has its own panel of the buffer, which outlives the loop.
                    let to = unsafe { shared.part(panel * panel_words, panel_words) };
                    let n = first + panel * K::COLUMNS;
                    self.pack_group(group, n, K::COLUMNS.min(first + columns - n), to);
                })?;
                let panels = Panels { column: first, group, packed: floats(&packed) };
                cx.parallel(plan.blocks, |task| {
                    let area = plan.area(task, first, columns, n);
                    scratch.with(|copies| self.packed_panels(area, &panels, copies));
                })?;
            }
        }
        Ok(())
    }

    /// One panel of the blocks of a group.
    fn pack_group(&self, group: Group, n: usize, columns: usize, panel: &mut [f32]) {
        for block in self.product.blocks::<K>().filter(|block| group.holds(block)) {
            let panel = &mut panel[(block.at - group.start) * K::COLUMNS..][..block.words * K::COLUMNS];
            // SAFETY: `check` saw all of every B inside its slice; this level was detected.
            unsafe { K::pack(&block.term.b, block.part(n, columns), panel) };
        }
    }

    /// `copies` has room for those of all blocks of the group.
    fn packed_panels(&self, area: Area, panels: &Panels, copies: &mut [f32]) {
        let of_group = || self.product.blocks::<K>().filter(|block| panels.group.holds(block));
        // All of K for some columns, whose sums stay in the L2 cache meanwhile.
        for (column, columns) in steps(area.column, area.columns, HOT_PANELS * K::COLUMNS) {
            let part = Area { column, columns, ..area };
            let is_first = column == area.column;
            let mut blocks = of_group().zip(copies.chunks_mut(area.rows * A_STRIDE)).peekable();
            while let Some((block, a)) = blocks.next() {
                if is_first {
                    self.copy_a(area, &block, a);
                }
                let after = blocks.peek().map(|(block, _)| *block);
                let turn = Turn { block, after, copies_after: is_first };
                self.packed_block(part, panels, &turn, a);
            }
            if panels.group.end >= self.product.words::<K>() {
                self.finish(part);
            }
        }
    }

    /// One block of K for some columns.
    fn packed_block(&self, part: Area, panels: &Panels, turn: &Turn, a: &[f32]) {
        let Turn { block, after, copies_after } = *turn;
        let count = part.columns.div_ceil(K::COLUMNS);
        for (i, (column, columns)) in steps(part.column, part.columns, K::COLUMNS).enumerate() {
            let next_panel = match after {
                _ if i + 1 < count => Some(panels.of::<K>(&block, column + columns)),
                after => after.map(|after| panels.of::<K>(&after, part.column)),
            };
            let next_copy = after.filter(|_| copies_after);
            let area = Area { column, columns, ..part };
            self.tiles(area, &block, a, panels.of::<K>(&block, column), |tile, tiles| {
                let (share, shares) = (i * tiles + tile, count * tiles);
                let of_a = |next: Block| {
                    next.term.a.ahead([part.row, part.rows], [next.k, next.depth], share, shares)
                };
                [
                    next_panel.map_or(Ahead::NONE, |panel| Ahead::floats(panel, tile, tiles)),
                    next_copy.map_or(Ahead::NONE, of_a),
                ]
            });
        }
    }
}

/// A block of K, and what is on its way to the caches meanwhile.
#[derive(Debug, Clone, Copy)]
struct Turn<'a> {
    block: Block<'a>,
    after: Option<Block<'a>>,
    /// Whether A of the block after will be copied then.
    copies_after: bool,
}

/// The packed panels of a group, from a column on.
struct Panels<'a> {
    column: usize,
    group: Group,
    packed: &'a [f32],
}

impl Panels<'_> {
    /// That of a block whose first column is `column`.
    fn of<K: Kernel>(&self, block: &Block, column: usize) -> &[f32] {
        let panel = (column - self.column) / K::COLUMNS * self.group.panel_words;
        &self.packed[panel + (block.at - self.group.start) * K::COLUMNS..][..block.words * K::COLUMNS]
    }
}
