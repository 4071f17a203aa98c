//! Rows of a table, by number.

use crate::device::Context;
use crate::error::{Error, Result};
use crate::ops::kernels;
use crate::tensor::autograd::record;
use crate::tensor::{DType, MAX_RANK, Tensor};

/// `y[.., c] = table[ids[..], c]`.
///
/// # Shapes
/// `ids` `[..]`, `I64`; `table` `[V, C]`, of any float type; the result `[.., C]`, `F32`.
///
/// # Errors
/// `InvalidArgument` for an id outside `0 .. V`, which it names, or other shapes.
pub fn embedding(cx: &Context, ids: &Tensor, table: &Tensor) -> Result<Tensor> {
    let [count, channels] = table.dims_of::<2>("embedding table")?;
    if !table.dtype().is_float() {
        return Err(Error::argument("embedding table", "a float type", table.dtype()));
    }
    let rank = ids.dims().len();
    if rank >= MAX_RANK {
        return Err(Error::argument("embedding ids", format!("less than {MAX_RANK} dimensions"), rank));
    }
    let numbers = ids.slice::<i64>()?;
    if let Some(id) = numbers.iter().find(|&&id| !usize::try_from(id).is_ok_and(|id| id < count)) {
        return Err(Error::argument("embedding ids", format!("ids within 0 .. {count}"), id));
    }
    let mut dims = [channels; MAX_RANK];
    dims[..rank].copy_from_slice(ids.dims());
    let mut out = Tensor::new(cx, "embedding", &dims[..=rank], DType::F32)?;
    let rows = kernels::rows_per_task(channels);
    kernels::parallel_chunks(cx, out.slice_mut()?, rows * channels, |i, part| {
        for (row, part) in (i * rows..).zip(part.chunks_exact_mut(channels)) {
            // The type was checked above: widening cannot fail.
            let _ = kernels::widen(table, numbers[row] as usize * channels, part);
        }
    })?;
    record(cx, out, &[Some(table)], || {
        let (ids, to) = (ids.clone(), table.tracked());
        move |cx, flow| flow.give(cx, to, |g| table_gradient(cx, g, &ids, [count, channels]))
    })
}

/// Row v is the sum of the rows of `g` whose id is v, in their order. Tasks share the table between them.
fn table_gradient(cx: &Context, g: &Tensor, ids: &Tensor, [count, channels]: [usize; 2]) -> Result<Tensor> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check;

    #[test]
    fn agrees_with_the_definition() {
        for (dims, [v, c], dtype) in [
            (&[1usize][..], [1usize, 1], DType::F32),
            (&[3, 7, 5], [11, 33], DType::F16),
            (&[2, 300], [9, 257], DType::BF16),
        ] {
            let table = check::cast(&check::random(&[v, c], 1), dtype);
            let numbers: Vec<i64> = (0..dims.iter().product::<usize>()).map(|i| (i * 7 % v) as i64).collect();
            let ids = Tensor::from_slice(dims, &numbers).unwrap();
            let wide = check::wide(&table);
            let expected: Vec<f64> =
                numbers.iter().flat_map(|&id| wide[id as usize * c..][..c].to_vec()).collect();
            let out = [dims, &[c]].concat();
            check::close(
                &check::on_batch(&ids, |cx, ids, _, _| embedding(cx, ids, &table)),
                &out,
                &expected,
                0.0,
            );
        }
    }

    #[test]
    fn gradients_are_those_of_the_definition() {
        for (dims, [v, c], dtype) in [
            (&[1usize][..], [1usize, 1], DType::F32),
            (&[3, 5], [11, 3], DType::F16),
            (&[40], [7, 2], DType::BF16),
        ] {
            let numbers: Vec<i64> =
                (0..dims.iter().product::<usize>()).map(|i| (i * i * 3 % v) as i64).collect();
            let ids = Tensor::from_slice(dims, &numbers).unwrap();
            check::gradients(
                &[check::cast(&check::random(&[v, c], 1), dtype)],
                |cx, x| embedding(cx, &ids, &x[0]),
                |x| numbers.iter().flat_map(|&id| x[0][id as usize * c..][..c].to_vec()).collect(),
            );
        }
        let ids: Vec<i64> = (0..5000).map(|i| i * i % 999).collect();
        let ids = Tensor::from_slice(&[5000], &ids).unwrap();
        let g = check::random(&[5000, 65], 1);
        check::on_threads(|cx| table_gradient(cx, &g, &ids, [999, 65]));
    }

    #[test]
    fn an_id_outside_the_table_is_named() {
        let table = check::random(&[5, 2], 1);
        for id in [5i64, -1, i64::MIN] {
            let ids = Tensor::from_slice(&[2], &[0, id]).unwrap();
            let error = embedding(&check::cx(), &ids, &table).unwrap_err();
            assert!(matches!(error, Error::InvalidArgument { .. }));
            let text = error.to_string();
            assert!(text.contains(&id.to_string()) && text.contains("0 .. 5"), "{text}");
        }
    }
}
