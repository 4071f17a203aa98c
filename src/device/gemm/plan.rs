//! How a product is cut into tasks. No choice made here changes a bit of the result.

use super::{Area, BLOCK_ROWS, Kernel, Order, WORDS};

/// Above this many rows, B is packed once for all of them.
const FEW_ROWS: usize = 2 * BLOCK_ROWS;

/// Below this many rows, packing B costs more than a block of A ever could.
const LITTLE_ROWS: usize = 96;

/// The most floats of B that lie packed at once: a share of the L3 cache.
const PACKED_FLOATS: usize = 2 << 20;

/// How much of K is copied and packed at once: whole blocks. If A is transposed K is the rows of a batch, often very
/// many: all of it would leave room for few columns, and A is copied anew for each round of columns.
const WORDS_AT_ONCE: usize = 16 * WORDS;
const WORDS_AT_ONCE_TRANSPOSED: usize = 8 * WORDS;

/// The fewest rows of a task if A is transposed: whole tiles of each kernel, and whole cache lines of A.
const TRANSPOSED_ROWS: usize = 48;

/// Tasks per thread that even out threads of unequal speed.
const TASKS_PER_THREAD: usize = 4;

/// The fewest panels of a task that goes through all of A, when rows are many enough to matter.
const PANELS_PER_TASK: usize = 8;

/// The most floats of C of a task that owns columns: each block of K goes through them, so they and a block of A should
/// stay in the L2 cache.
const HOT_FLOATS: usize = 112 << 10;

/// Who owns what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Split {
    /// Tasks own `per_task` columns (of one block of rows) and pack B for themselves.
    Columns { per_task: usize },
    /// Tasks own a block of rows; B is packed beforehand, `columns_at_once` columns of `words_at_once` inputs at
    /// a time.
    Rows { columns_at_once: usize, words_at_once: usize },
}

/// The cut of one product.
#[derive(Debug, Clone, Copy)]
pub(super) struct Plan {
    /// Rows of a block; the last may have fewer.
    pub rows: usize,
    /// Blocks of rows.
    pub blocks: usize,
    pub split: Split,
    m: usize,
}

impl Plan {
    /// For a product of these dimensions, none but `k` zero, and an A in this order.
    pub fn new<K: Kernel>([m, n, k]: [usize; 3], order: Order, threads: usize) -> Self {
        let panels = n.div_ceil(K::COLUMNS);
        let wide = panels >= PANELS_PER_TASK * threads;
        let (least_rows, words_at_once) = match order {
            Order::Rows => (2 * K::ROWS, WORDS_AT_ONCE),
            Order::Columns => (TRANSPOSED_ROWS, WORDS_AT_ONCE_TRANSPOSED),
        };
        // A transposed A costs too much to be copied for a few panels.
        let costly = order == Order::Columns && panels < PANELS_PER_TASK;
        if !costly && (m <= LITTLE_ROWS || (m <= FEW_ROWS && wide) || threads == 1 && m <= BLOCK_ROWS) {
            let (rows, blocks) = cut::<K>(m, m.div_ceil(BLOCK_ROWS));
            let tasks = (TASKS_PER_THREAD * threads).div_ceil(blocks);
            let least = if m <= LITTLE_ROWS { 1 } else { PANELS_PER_TASK };
            let hot = HOT_FLOATS / (rows * K::COLUMNS);
            let each = panels.div_ceil(tasks).min(hot).max(least.min(panels));
            return Plan { rows, blocks, m, split: Split::Columns { per_task: each * K::COLUMNS } };
        }
        let least = (TASKS_PER_THREAD * threads).min(m.div_ceil(least_rows));
        let blocks = m.div_ceil(BLOCK_ROWS).max(least).next_multiple_of(threads);
        let (rows, blocks) = cut::<K>(m, blocks);
        let most = PACKED_FLOATS / (k.clamp(WORDS, words_at_once) * K::COLUMNS);
        let chunks = panels.div_ceil(most.max(1));
        let columns_at_once = panels.div_ceil(chunks) * K::COLUMNS;
        Plan { rows, blocks, m, split: Split::Rows { columns_at_once, words_at_once } }
    }

    /// The area of a block of rows, and of at most `columns` columns of `n` from `column` on.
    pub fn area(&self, block: usize, column: usize, columns: usize, n: usize) -> Area {
        let row = block * self.rows;
        Area { row, rows: self.rows.min(self.m - row), column, columns: columns.min(n - column) }
    }
}

/// About `blocks` equal blocks of whole tiles: (rows of each, how many).
fn cut<K: Kernel>(m: usize, blocks: usize) -> (usize, usize) {
    let rows = m.div_ceil(blocks).next_multiple_of(K::ROWS);
    (rows, m.div_ceil(rows))
}
