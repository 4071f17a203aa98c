//! Rows of a table, by number.

use crate::device::Context;
use crate::error::{Error, Result};
use crate::ops::kernels;
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
    Ok(out)
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
