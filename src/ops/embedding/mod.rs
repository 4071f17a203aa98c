//! Rows of a table, by number.

mod cuda;
#[cfg(test)]
mod tests;

use crate::device::Context;
use crate::device::profile::Work;
use crate::error::{Error, Result};
use crate::ops::kernels;
use crate::tensor::autograd::record;
use crate::tensor::{DType, MAX_RANK, Tensor};

/// `y[.., c] = table[ids[..], c]`.
///
/// # Shapes
/// `ids` `[..]`, `I64`; `table` `[V, C]`, of any float type; the result `[.., C]`, `F32`, or the type of activations.
///
/// # Errors
/// `InvalidArgument` for an id outside `0 .. V`, which it names, or other shapes. Ids that only a GPU knows are not
/// looked at: one that is outside gives a row of NaN.
pub fn embedding(cx: &Context, ids: &Tensor, table: &Tensor) -> Result<Tensor> {
    let _span = cx.op("embedding").working(|| {
        let row = (table.shape().channels() * table.dtype().size()) as u64;
        Work { flops: 0, bytes: 2 * ids.elements() as u64 * row }
    });
    let [count, channels] = table.dims_of::<2>("embedding table")?;
    if !table.dtype().is_float() {
        return Err(Error::argument("embedding table", "a float type", table.dtype()));
    }
    let rank = ids.dims().len();
    if rank >= MAX_RANK {
        return Err(Error::argument("embedding ids", format!("less than {MAX_RANK} dimensions"), rank));
    }
    check_ids(ids, count)?;
    let mut dims = [channels; MAX_RANK];
    dims[..rank].copy_from_slice(ids.dims());
    let mut out = Tensor::new(cx, "embedding", &dims[..=rank], DType::of_activations(cx))?;
    match cx.cuda()? {
        Some(stream) => cuda::look_up(cx, stream, ids, table, &mut out)?,
        None => look_up(cx, ids.slice()?, table, &mut out)?,
    }
    record(cx, out, &[Some(table)], || {
        let (ids, to) = (ids.clone(), table.tracked());
        move |cx, flow| flow.give(cx, to, |g| table_gradient(cx, g, &ids, [count, channels]))
    })
}

/// # Errors
/// `InvalidArgument` for an id that is none of `0 .. count`, as far as the host can tell.
fn check_ids(ids: &Tensor, count: usize) -> Result<()> {
    if ids.dtype() == DType::I64 && !ids.is_on_host() {
        return Ok(());
    }
    match ids.slice::<i64>()?.iter().find(|&&id| !usize::try_from(id).is_ok_and(|id| id < count)) {
        Some(id) => Err(Error::argument("embedding ids", format!("ids within 0 .. {count}"), id)),
        None => Ok(()),
    }
}

fn look_up(cx: &Context, ids: &[i64], table: &Tensor, out: &mut Tensor) -> Result<()> {
    let channels = table.shape().channels();
    let rows = kernels::rows_per_task(channels);
    kernels::parallel_chunks(cx, out.slice_mut()?, rows * channels, |i, part| {
        for (row, part) in (i * rows..).zip(part.chunks_exact_mut(channels)) {
            // The type was checked: widening cannot fail.
            let _ = kernels::widen(table, ids[row] as usize * channels, part);
        }
    })
}

/// Row v is the sum of the rows of `g` whose id is v, in their order. Tasks share the table between them.
fn table_gradient(cx: &Context, g: &Tensor, ids: &Tensor, [count, channels]: [usize; 2]) -> Result<Tensor> {
    if let Some(stream) = cx.cuda()? {
        return cuda::gradient(cx, stream, g, ids, [count, channels]);
    }
    let (g, ids) = (g.slice::<f32>()?, ids.slice::<i64>()?);
    let mut places = Tensor::new(cx, "places of ids", &[ids.len()], DType::I64)?;
    let mut ends = Tensor::zeros(cx, "ends of ids", &[count + 1], DType::I64)?;
    sort(ids, ends.slice_mut()?, places.slice_mut()?);
    let (ends, places) = (ends.slice::<i64>()?, places.slice::<i64>()?);
    let mut out = Tensor::new(cx, "gradient of an embedding", &[count, channels], DType::F32)?;
    let rows = kernels::rows_per_task(channels);
    kernels::parallel_chunks(cx, out.slice_mut()?, rows * channels, |i, part| {
        for (v, sum) in (i * rows..).zip(part.chunks_exact_mut(channels)) {
            sum.fill(0.0);
            for &place in &places[ends[v] as usize..ends[v + 1] as usize] {
                let of_place = &g[place as usize * channels..];
                sum.iter_mut().zip(of_place).for_each(|(sum, g)| *sum += g);
            }
        }
    })?;
    Ok(out)
}

/// Counts: `places` becomes the places of id 0, then of id 1, and so on; those of id v lie from `ends[v]` to
/// `ends[v + 1]`. `ends` begins as zeros.
fn sort(ids: &[i64], ends: &mut [i64], places: &mut [i64]) {
    for &id in ids {
        ends[id as usize] += 1;
    }
    let mut begin = 0;
    for end in ends.iter_mut() {
        begin += std::mem::replace(end, begin);
    }
    // Where the next place of an id goes: at the end, where its places end and the next id's begin.
    for (place, &id) in ids.iter().enumerate() {
        let next = &mut ends[id as usize];
        places[*next as usize] = place as i64;
        *next += 1;
    }
    ends.rotate_right(1);
    ends[0] = 0;
}
