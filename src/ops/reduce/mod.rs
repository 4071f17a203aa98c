//! Sums over the rows of a tensor, channel by channel: in f64, and in an order that only the shape decides.

mod cpu;
mod cuda;

use std::sync::Arc;

use crate::device::scratch::Doubles;
use crate::device::{Context, Reduce};
use crate::error::Result;
use crate::tensor::{DType, Tensor};
pub(crate) use cuda::Numbers;

/// Rows of channels, in groups that are summed apart: samples, or the whole batch as one.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Columns {
    pub groups: usize,
    /// Rows of each group.
    pub rows: usize,
    pub channels: usize,
}

/// What is summed. Each tensor holds the elements of all groups: `F32`, on a GPU of any float type, but both of one.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Terms<'a> {
    /// x.
    Values(&'a Tensor),
    /// x y.
    Products(&'a Tensor, &'a Tensor),
    /// x, and x y beside it.
    ValuesAndProducts(&'a Tensor, &'a Tensor),
}

/// Sums of [`Columns`]: `[groups, kinds, C]`.
#[derive(Debug)]
pub(crate) struct Sums {
    dims: [usize; 3],
    pub values: Values,
}

/// Where they were computed.
#[derive(Debug)]
pub(crate) enum Values {
    Host(Doubles),
    Device(Numbers),
}

impl Columns {
    /// The sums of `terms` over the rows of each group.
    ///
    /// # Errors
    /// `InvalidArgument` for other tensors; `OutOfMemory`; `Cancelled`.
    pub fn sums(&self, cx: &Context, terms: Terms) -> Result<Sums> {
        let kinds = if matches!(terms, Terms::ValuesAndProducts(..)) { 2 } else { 1 };
        let values = match cx.cuda()? {
            Some(stream) => Values::Device(cuda::sums(cx, stream, self, terms)?),
            None => Values::Host(cpu::sums(cx, self, terms)?),
        };
        Ok(Sums { dims: [self.groups, kinds, self.channels], values })
    }
}

impl Sums {
    /// These kinds of sums, one or two, one after the other for each group.
    ///
    /// # Shapes
    /// `F32 [groups, wanted kinds, C]`
    ///
    /// # Errors
    /// `OutOfMemory`; `Cancelled`.
    pub fn tensor(&self, cx: &Context, what: &'static str, wanted: &[usize]) -> Result<Tensor> {
        let [groups, _, channels] = self.dims;
        let mut out = Tensor::new(cx, what, &[groups, wanted.len(), channels], DType::F32)?;
        match &self.values {
            Values::Host(sums) => cpu::round(cx, sums.values(), self.dims, wanted, &mut out)?,
            Values::Device(sums) => cuda::round(cx, sums, self.dims, wanted, &mut out)?,
        }
        Ok(out)
    }

    /// Puts in the place of each sum that over all processes, if there are several; gives that of `count`. Only then
    /// does the host read what lies on a GPU.
    ///
    /// # Errors
    /// Those of `reduce`; `OutOfMemory`; `Device`.
    pub fn over_processes(
        &mut self,
        cx: &Context,
        reduce: Option<&Arc<dyn Reduce>>,
        count: f64,
    ) -> Result<f64> {
        let Some(reduce) = reduce else { return Ok(count) };
        match &mut self.values {
            Values::Host(sums) => sum_with(cx, reduce, sums.values_mut(), count),
            Values::Device(_) if reduce.ranks() == 1 => Ok(count),
            Values::Device(sums) => sums.change(cx, |values| sum_with(cx, reduce, values, count)),
        }
    }
}

/// One call for all, since each is a round through the network.
fn sum_with(cx: &Context, reduce: &Arc<dyn Reduce>, values: &mut [f64], count: f64) -> Result<f64> {
    let mut all = Doubles::new(cx.device(), "sums over processes", values.len() + 1)?;
    let (of_values, of_count) = all.values_mut().split_at_mut(values.len());
    of_values.copy_from_slice(values);
    of_count[0] = count;
    reduce.sum_f64(all.values_mut())?;
    let (of_values, of_count) = all.values().split_at(values.len());
    values.copy_from_slice(of_values);
    Ok(of_count[0])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cuda::Precision;
    use crate::ops::check;

    #[test]
    fn agrees_with_the_definition() {
        for [groups, rows, channels] in
            [[1usize, 1usize, 1usize], [3, 70, 33], [2, 5, 1025], [1, 200, 513], [4, 0, 3], [1, 40_000, 2]]
        {
            let columns = Columns { groups, rows, channels };
            let (x, y) =
                (check::random(&[groups, rows, channels], 1), check::random(&[groups, rows, channels], 2));
            let (wide_x, wide_y) = (check::wide(&x), check::wide(&y));
            let expected: Vec<f64> = (0..groups * 2 * channels)
                .map(|i| {
                    let (c, kind, group) = (i % channels, i / channels % 2, i / channels / 2);
                    let element = |row: usize| (group * rows + row) * channels + c;
                    let term = |e: usize| wide_x[e] * if kind == 0 { wide_y[e] } else { 1.0 };
                    (0..rows).map(|row| term(element(row))).sum()
                })
                .collect();
            let both = |cx: &Context, x: &Tensor, y: &Tensor| {
                columns.sums(cx, Terms::ValuesAndProducts(x, y))?.tensor(cx, "sums", &[1, 0])
            };
            let found = check::on_threads(|cx| both(cx, &x, &y));
            check::close(&found, &[groups, 2, channels], &expected, 1e-7);
            if rows > 0 {
                let tolerances = [(Precision::F32, 1e-7), (Precision::BF16, 1e-2), (Precision::F16, 2e-3)];
                check::on_device(&[&x, &y], &tolerances, |cx, t| both(cx, &t[0], &t[1]));
            }
            for cx in [Some(check::cx()), check::cuda(Precision::F32)].into_iter().flatten() {
                let values = columns.sums(&cx, Terms::Values(&x)).unwrap();
                let products = columns.sums(&cx, Terms::Products(&x, &y)).unwrap();
                let mut of_kind = [1, 0].map(|kind| {
                    let of_group = |g: usize| expected[(2 * g + kind) * channels..][..channels].to_vec();
                    (0..groups).flat_map(of_group).collect::<Vec<f64>>()
                });
                for (sums, expected) in [values, products].into_iter().zip(&mut of_kind) {
                    let rounded = sums.tensor(&cx, "sums", &[0]).unwrap();
                    check::close(&rounded, &[groups, 1, channels], expected, 1e-7);
                    let mut here = vec![0.0; expected.len()];
                    match sums.values {
                        Values::Host(sums) => here.copy_from_slice(sums.values()),
                        Values::Device(mut sums) => {
                            sums.change(&cx, |values| {
                                here.copy_from_slice(values);
                                Ok(())
                            })
                            .unwrap();
                        }
                    }
                    assert!(here.iter().zip(expected).all(|(a, e)| (a - *e).abs() < 1e-9));
                }
            }
        }
    }
}
