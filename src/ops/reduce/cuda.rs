//! Sums over rows on a GPU.

use std::sync::Arc;

use super::{Columns, Terms};
use crate::device::Context;
use crate::device::cuda::{Launch, Memory, Parameter, Stream, Taken, kernels};
use crate::device::scratch::Doubles;
use crate::error::{Error, Result};
use crate::ops::sums::parts;
use crate::tensor::Tensor;

kernels!(KERNELS, "reduce");

/// As the source has them.
const COLUMNS: usize = 32;
const LINES: u32 = 8;

/// Numbers in f64 in memory of a stream.
#[derive(Debug)]
pub(crate) struct Numbers {
    memory: Arc<Memory>,
    taken: Taken,
    count: usize,
}

impl Numbers {
    /// `count` numbers of arbitrary content.
    ///
    /// # Errors
    /// `OutOfMemory`, naming `what`; `Device`.
    pub fn new(stream: &Stream, what: &str, count: usize) -> Result<Self> {
        let memory = Arc::new(stream.take(what, count.saturating_mul(size_of::<f64>()))?);
        let taken = stream.using_memory(memory.clone());
        Ok(Numbers { memory, taken, count })
    }

    /// Where they lie on the device.
    pub fn address(&self) -> u64 {
        self.taken.address()
    }

    /// Lets the host change them: it waits for the device.
    ///
    /// # Errors
    /// Those of `change`; `OutOfMemory`; `Device`.
    pub fn change<T>(&mut self, cx: &Context, change: impl FnOnce(&mut [f64]) -> Result<T>) -> Result<T> {
        let Some(stream) = cx.cuda()? else {
            return Err(Error::internal("sums of a GPU", "used without it"));
        };
        let mut here = Doubles::new(cx.device(), "sums of a GPU", self.count)?;
        stream.download(&self.memory, here.bytes_mut())?;
        let result = change(here.values_mut())?;
        stream.upload(here.bytes_mut(), &self.memory, 0)?;
        Ok(result)
    }
}

/// As the source has it.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Shape {
    rows: i64,
    rows_per_part: i64,
    parts: i32,
    channels: i32,
}
// SAFETY: two `long long` and two `int`, in this order, without gaps.
unsafe impl Parameter for Shape {}

/// The sums of `terms`, `[groups, kinds, C]`.
pub fn sums(cx: &Context, stream: &Arc<Stream>, columns: &Columns, terms: Terms) -> Result<Numbers> {
    let (x, y, code) = match terms {
        Terms::Values(x) => (x, x, 0),
        Terms::Products(x, y) => (x, y, 1),
        Terms::ValuesAndProducts(x, y) => (x, y, 2),
    };
    let precision = x.precision("sums of rows")?;
    let Columns { groups, rows, channels } = *columns;
    if y.dtype() != x.dtype() || [x, y].iter().any(|t| t.elements() != groups * rows * channels) {
        let expected = format!("{} elements of type {}", groups * rows * channels, x.dtype());
        return Err(Error::argument("sums of rows", expected, y.shape()));
    }
    let kinds = if code == 2 { 2 } else { 1 };
    let (cut, width) = (parts(rows), kinds * channels);
    let parts = cut.count.max(1);
    let partial = Numbers::new(stream, "partial sums", groups * parts * width)?;
    if groups * width == 0 {
        return Ok(partial);
    }
    let (from, other) = (x.on(cx, stream)?, y.on(cx, stream)?);
    let shape = Shape {
        rows: rows as i64,
        rows_per_part: cut.rows as i64,
        parts: parts as i32,
        channels: channels as i32,
    };
    let launch = Launch {
        block: [COLUMNS as u32, LINES, 1],
        ..Launch::blocks(channels.div_ceil(COLUMNS) * parts * groups, 1)
    };
    let addresses = [from.address(), other.address(), partial.address()];
    // SAFETY: as the kernel declares; x and y have the elements, as was checked, the sums a number for each group,
    // part, kind and channel.
    unsafe {
        let parameters: [&dyn Parameter; 5] = [&addresses[0], &addresses[1], &addresses[2], &shape, &code];
        stream.launch(&KERNELS, "column_terms", Some(precision), launch, &parameters)?;
    }
    if parts == 1 {
        return Ok(partial);
    }
    let totals = Numbers::new(stream, "sums", groups * width)?;
    let count = totals.count;
    // SAFETY: as the kernel declares; a total for each group, kind and channel.
    unsafe {
        stream.launch(
            &KERNELS,
            "column_totals",
            None,
            Launch::elements(count),
            &[&partial.address(), &totals.address(), &(count as i64), &(parts as i32), &(width as i32)],
        )?;
    }
    Ok(totals)
}

/// Rounds the kinds `wanted`, one or two, of sums `[groups, kinds, C]`.
pub fn round(
    cx: &Context,
    sums: &Numbers,
    [_, kinds, channels]: [usize; 3],
    wanted: &[usize],
    out: &mut Tensor,
) -> Result<()> {
    let (Some(stream), Some(&first), Some(&second)) = (cx.cuda()?, wanted.first(), wanted.last()) else {
        return Err(Error::internal("sums of a GPU", "none of them wanted, or on no GPU"));
    };
    let (count, to) = (out.elements(), out.on_mut(stream)?);
    if count == 0 {
        return Ok(());
    }
    let [of_all, of_wanted, first, second] = [kinds, wanted.len(), first, second].map(|n| n as i32);
    let (launch, count, channels) = (Launch::elements(count), count as i64, channels as i32);
    // SAFETY: as the kernel declares; there are so many sums, and `out` has those of the kinds wanted.
    unsafe {
        stream.launch(
            &KERNELS,
            "column_totals_rounded",
            None,
            launch,
            &[&sums.address(), &to, &count, &channels, &of_all, &of_wanted, &first, &second],
        )
    }
}
