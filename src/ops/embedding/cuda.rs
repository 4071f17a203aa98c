//! Rows of a table on a GPU.

use std::sync::Arc;

use crate::device::Context;
use crate::device::cuda::{Launch, Stream, kernels};
use crate::error::Result;
use crate::tensor::{DType, Tensor};

kernels!(KERNELS, "embedding");

/// As the source has them.
const ROWS_PER_BLOCK: usize = 8;
const THREADS: u32 = 256;
const COLUMNS: usize = 128;

/// [`super::embedding`] without recording, into `out`.
pub fn look_up(
    cx: &Context,
    stream: &Arc<Stream>,
    ids: &Tensor,
    table: &Tensor,
    out: &mut Tensor,
) -> Result<()> {
    if out.elements() == 0 {
        return Ok(());
    }
    let [count, channels] = table.dims_of("embedding table")?;
    let precision = out.precision("an embedding")?;
    let rows = ids.elements();
    let (ids, table) = (ids.on(cx, stream)?, table.on_as(cx, stream, "embedding table", precision)?);
    let to = out.on_mut(stream)?;
    let launch = Launch::blocks(rows.div_ceil(ROWS_PER_BLOCK), THREADS);
    // SAFETY: as the kernel declares; `out` has a row for each id, and the table `count` of them.
    unsafe {
        stream.launch(
            &KERNELS,
            "embedding",
            Some(precision),
            launch,
            &[&ids.address(), &table.address(), &to, &(rows as i64), &(count as i64), &(channels as i32)],
        )
    }
}

/// The gradient of the table, `F32`.
pub fn gradient(
    cx: &Context,
    stream: &Arc<Stream>,
    g: &Tensor,
    ids: &Tensor,
    [count, channels]: [usize; 2],
) -> Result<Tensor> {
    let mut out = Tensor::new(cx, "gradient of an embedding", &[count, channels], DType::F32)?;
    if out.elements() == 0 {
        return Ok(out);
    }
    let places = ids.elements() as i64;
    let (g, ids) = (g.on(cx, stream)?, ids.on(cx, stream)?);
    let to = out.on_mut(stream)?;
    let launch = Launch {
        grid: [count.div_ceil(ROWS_PER_BLOCK) as u32, channels.div_ceil(COLUMNS) as u32, 1],
        block: [THREADS, 1, 1],
        shared_bytes: 0,
    };
    // SAFETY: as the kernel declares; `g` has a row for each id, and `out` is as large as the table.
    unsafe {
        stream.launch(
            &KERNELS,
            "embedding_gradient",
            None,
            launch,
            &[&g.address(), &ids.address(), &to, &places, &(count as i64), &(channels as i32)],
        )?;
    }
    Ok(out)
}
