//! The factors of a product: their numbers, in which order, and where a part lies.

use half::{bf16, f16};

use super::{Part, fits};
use crate::device::simd::prefetch;
use crate::error::Result;

/// Bytes.
const CACHE_LINE: usize = 64;

/// How A holds its M x K numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// `[M, K]`: row after row.
    Rows,
    /// `[K, M]`: column after column, as the gradient of a weight takes the gradients of outputs.
    Columns,
}

/// A of a product op(A) op(B).
#[derive(Debug, Clone, Copy)]
pub struct MatrixA<'a> {
    /// The numbers.
    pub values: &'a [f32],
    /// Their order.
    pub order: Order,
    /// Distance between rows, or columns.
    pub leading: usize,
}

impl<'a> MatrixA<'a> {
    /// Rows of `leading` numbers.
    pub fn rows(values: &'a [f32], leading: usize) -> Self {
        MatrixA { values, order: Order::Rows, leading }
    }

    /// Columns of `leading` numbers: the transpose of a matrix that lies row after row.
    pub fn columns(values: &'a [f32], leading: usize) -> Self {
        MatrixA { values, order: Order::Columns, leading }
    }

    /// # Errors
    /// `InvalidArgument` unless `m` rows of `k` numbers are all inside the slice.
    pub(super) fn check(&self, m: usize, k: usize) -> Result<()> {
        let (rows, columns) = match self.order {
            Order::Rows => (m, k),
            Order::Columns => (k, m),
        };
        fits("gemm: a", rows, columns, self.leading, self.values.len())
    }

    /// Share `i` of `count` of the cache lines of `rows` rows from `row` on, `depth` values from `k` on.
    pub(super) fn ahead(
        &self,
        [row, rows]: [usize; 2],
        [k, depth]: [usize; 2],
        i: usize,
        count: usize,
    ) -> Ahead {
        let [rows, length] = match self.order {
            Order::Rows => [rows, depth],
            Order::Columns => [depth, rows],
        };
        let first = self.values.as_ptr().wrapping_add(self.index(row, k)).cast();
        let size = size_of::<f32>();
        Ahead::share(first, [rows, length * size], self.leading * size, i, count)
    }

    /// Where A(i, k) lies.
    pub(super) fn index(&self, i: usize, k: usize) -> usize {
        match self.order {
            Order::Rows => i * self.leading + k,
            Order::Columns => k * self.leading + i,
        }
    }
}

/// How B holds its K x N numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// `[N, K]`: row n holds the K weights of output n, as a linear layer stores them.
    RowsAreOutputs,
    /// `[K, N]`: row k holds what input k contributes to each output.
    RowsAreInputs,
}

/// Numbers of one of the float types, to be widened to f32.
#[derive(Debug, Clone, Copy)]
pub enum Values<'a> {
    /// 32-bit floats.
    F32(&'a [f32]),
    /// 16-bit IEEE floats.
    F16(&'a [f16]),
    /// 16-bit brain floats.
    BF16(&'a [bf16]),
}

impl<'a> Values<'a> {
    /// All but the first `count`: none if there are fewer.
    pub fn skip(self, count: usize) -> Self {
        match self {
            Values::F32(v) => Values::F32(v.get(count..).unwrap_or(&[])),
            Values::F16(v) => Values::F16(v.get(count..).unwrap_or(&[])),
            Values::BF16(v) => Values::BF16(v.get(count..).unwrap_or(&[])),
        }
    }

    /// How many.
    pub fn len(&self) -> usize {
        match self {
            Values::F32(v) => v.len(),
            Values::F16(v) => v.len(),
            Values::BF16(v) => v.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Number `i` as f32.
    #[inline(always)]
    pub fn get(&self, i: usize) -> f32 {
        match self {
            Values::F32(v) => v[i],
            Values::F16(v) => v[i].to_f32(),
            Values::BF16(v) => v[i].to_f32(),
        }
    }

    fn address(&self, i: usize) -> *const u8 {
        match self {
            Values::F32(v) => v.as_ptr().wrapping_add(i).cast(),
            Values::F16(v) => v.as_ptr().wrapping_add(i).cast(),
            Values::BF16(v) => v.as_ptr().wrapping_add(i).cast(),
        }
    }

    fn size(&self) -> usize {
        if matches!(self, Values::F32(_)) { 4 } else { 2 }
    }
}

/// Cache lines to ask for ahead of their use: the first line of each row, then the second. Rows are far apart, and line
/// after line of one would have its page looked up anew each time.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ahead {
    /// The line of the first row.
    at: *const u8,
    /// The row that is next.
    row: usize,
    rows: usize,
    /// Bytes between rows.
    stride: usize,
    /// Lines still to ask for.
    left: usize,
}

impl Ahead {
    /// Nothing.
    pub const NONE: Self = Ahead { at: std::ptr::null(), row: 0, rows: 1, stride: 0, left: 0 };

    /// Share `i` of `count` of the lines of a slice.
    pub fn floats(values: &[f32], i: usize, count: usize) -> Self {
        Self::share(values.as_ptr().cast(), [1, size_of_val(values)], 0, i, count)
    }

    /// Share `i` of `count` of the lines that hold `rows` rows of `bytes` bytes, `stride` bytes apart.
    fn share(first: *const u8, [rows, bytes]: [usize; 2], stride: usize, i: usize, count: usize) -> Self {
        if rows == 0 {
            return Ahead::NONE;
        }
        // Rows that do not begin with a line end in one more.
        let begun = first.addr() % CACHE_LINE;
        let lines = rows * (begun + bytes).div_ceil(CACHE_LINE);
        let (from, to) = (lines * i / count, lines * (i + 1) / count);
        let at = first.wrapping_sub(begun).wrapping_add(from / rows * CACHE_LINE);
        Ahead { at, row: from % rows, rows, stride, left: to - from }
    }

    /// Asks for the next line, if there is one left.
    #[inline(always)]
    pub fn ask(&mut self) {
        if self.left > 0 {
            prefetch(self.at.wrapping_add(self.row * self.stride));
            self.left -= 1;
            self.row += 1;
            if self.row == self.rows {
                (self.row, self.at) = (0, self.at.wrapping_add(CACHE_LINE));
            }
        }
    }

    /// Asks for lines until at most `left` are left.
    pub fn ask_until(&mut self, left: usize) {
        while self.left > left {
            self.ask();
        }
    }
}

/// B of a product op(A) op(B). A range of the inputs of a larger matrix is one too: its slice begins there.
#[derive(Debug, Clone, Copy)]
pub struct MatrixB<'a> {
    /// The numbers.
    pub values: Values<'a>,
    /// Their order.
    pub layout: Layout,
    /// Distance between rows.
    pub leading: usize,
}

impl MatrixB<'_> {
    /// # Errors
    /// `InvalidArgument` unless `n` outputs of `k` inputs are all inside the slice.
    pub(super) fn check(&self, n: usize, k: usize) -> Result<()> {
        let (rows, columns) = match self.layout {
            Layout::RowsAreOutputs => (n, k),
            Layout::RowsAreInputs => (k, n),
        };
        fits("gemm: b", rows, columns, self.leading, self.values.len())
    }

    /// Where B(k, n) lies.
    #[inline(always)]
    pub(super) fn index(&self, k: usize, n: usize) -> usize {
        match self.layout {
            Layout::RowsAreOutputs => n * self.leading + k,
            Layout::RowsAreInputs => k * self.leading + n,
        }
    }

    /// Share `i` of `count` of the cache lines of a part.
    pub(super) fn ahead(&self, part: Part, i: usize, count: usize) -> Ahead {
        let (rows, length) = match self.layout {
            Layout::RowsAreOutputs => (part.columns, part.depth),
            Layout::RowsAreInputs => (part.depth, part.columns),
        };
        let (size, first) = (self.values.size(), self.values.address(self.index(part.k, part.n)));
        Ahead::share(first, [rows, length * size], self.leading * size, i, count)
    }

    /// The plain definition of packing, for what the vector code of a kernel leaves over: the rows of `panel`
    /// in `depths` and its columns in `columns`, `width` floats a row, zero beyond the part's columns.
    #[inline(always)]
    pub(super) fn pack_plain(
        &self,
        part: Part,
        depths: std::ops::Range<usize>,
        columns: std::ops::Range<usize>,
        width: usize,
        panel: &mut [f32],
    ) {
        for (i, row) in panel.chunks_exact_mut(width).enumerate().take(depths.end).skip(depths.start) {
            for (j, to) in row.iter_mut().enumerate().take(columns.end).skip(columns.start) {
                let inside = j < part.columns;
                *to = if inside { self.values.get(self.index(part.k + i, part.n + j)) } else { 0.0 };
            }
        }
    }
}
