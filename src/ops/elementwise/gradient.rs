//! Gradients of the pointwise ops. Sums over rows are those of `ops::reduce`.

use super::{CHUNK, Rows, cuda};
use crate::device::Context;
use crate::error::Result;
use crate::ops::activation::Activation;
use crate::ops::reduce::{Columns, Terms};
use crate::ops::{kernels, sums};
use crate::tensor::autograd::{Flow, Tracked};
use crate::tensor::{DType, Tensor};

/// Of `activate`: `input` is x, or the result where that is enough.
pub(super) fn activate(
    to: Option<Tracked>,
    input: Tensor,
    activation: Activation,
) -> impl FnOnce(&Context, &mut Flow) -> Result<()> {
    move |cx, flow| {
        flow.give(cx, to, |g| {
            if let Some(stream) = cx.cuda()? {
                return cuda::activate_gradient(cx, stream, (&input, g), activation);
            }
            let input = input.slice::<f32>()?;
            kernels::in_place(cx, "gradient of an activation", g.clone(), CHUNK, |i, part| {
                activation.gradient(&input[i * CHUNK..][..part.len()], part);
            })
        })
    }
}

/// Of `add_rows`.
pub(super) fn add_rows(x: &Tensor, rows: &Tensor) -> impl FnOnce(&Context, &mut Flow) -> Result<()> + use<> {
    let (to_x, to_rows) = (x.tracked(), rows.tracked());
    let columns = Columns { groups: 1, rows: x.dims()[0], channels: rows.elements() };
    move |cx, flow| {
        flow.give(cx, to_x, |g| Ok(g.clone()))?;
        flow.give(cx, to_rows, |g| {
            if let Some(stream) = cx.cuda()? {
                let g = g.reshape(&[columns.rows, columns.channels])?;
                return sums::columns_on(cx, stream, "gradient of rows", &g);
            }
            columns.sums(cx, Terms::Values(g))?.tensor(cx, "gradient of rows", &[0])
        })
    }
}

/// x * scale + shift over channels, of each sample or of all alike.
pub(super) struct Affine {
    pub rows: Rows,
    pub to_x: Option<Tracked>,
    /// `F32`; on a GPU of any float type.
    pub scale: Tensor,
    pub to_scale: Option<Tracked>,
    pub to_shift: Option<Tracked>,
    /// x, where the scale is tracked.
    pub input: Option<Tensor>,
}

impl Affine {
    pub fn backward(self) -> impl FnOnce(&Context, &mut Flow) -> Result<()> {
        move |cx, flow| {
            flow.give(cx, self.to_x, |g| self.rows.scale(cx, g.clone(), &self.scale))?;
            if self.to_scale.is_none() && self.to_shift.is_none() {
                return Ok(());
            }
            if cx.cuda()?.is_some() {
                return self.of_parameters_on(cx, flow);
            }
            let g = flow.gradient();
            let terms = match &self.input {
                Some(x) if self.to_shift.is_some() => Terms::ValuesAndProducts(g, x),
                Some(x) => Terms::Products(g, x),
                None => Terms::Values(g),
            };
            let sums = self.rows.columns(self.scale.elements()).sums(cx, terms)?;
            let products = usize::from(self.to_shift.is_some());
            flow.give(cx, self.to_scale, |_| sums.tensor(cx, "gradient of a scale", &[products]))?;
            flow.give(cx, self.to_shift, |_| sums.tensor(cx, "gradient of a shift", &[0]))
        }
    }

    /// The gradients of scale and shift on a GPU.
    fn of_parameters_on(&self, cx: &Context, flow: &mut Flow) -> Result<()> {
        let Some(stream) = cx.cuda()? else { return Ok(()) };
        let columns = self.rows.columns(self.scale.elements());
        let wanted = match &self.input {
            Some(x) if self.to_shift.is_some() => cuda::Wanted::ProductsThenValues(x),
            Some(x) => cuda::Wanted::Products(x),
            None => cuda::Wanted::Values,
        };
        let groups = columns.groups;
        let g = flow.gradient().reshape(&[groups * columns.rows, columns.channels])?;
        let sums = cuda::sums(cx, stream, &g, (groups, columns.rows), wanted)?;
        let values = if self.input.is_some() { groups } else { 0 };
        flow.give(cx, self.to_scale, |_| sums.narrow(0, groups))?;
        flow.give(cx, self.to_shift, |_| sums.narrow(values, groups))
    }
}

/// Of `modulate`: `input` is x, where the modulation is tracked.
pub(super) fn modulate(
    rows: Rows,
    to: Option<Tracked>,
    modulation: Tensor,
    input: Option<Tensor>,
) -> impl FnOnce(&Context, &mut Flow) -> Result<()> {
    move |cx, flow| {
        if let Some(stream) = cx.cuda()? {
            flow.give(cx, to, |g| {
                let parameters = cuda::Parameters::Modulation { values: &modulation, shifted: false };
                cuda::affine(cx, stream, rows, g.clone(), parameters)
            })?;
            let Some(input) = input else { return Ok(()) };
            return flow.give(cx, modulation.tracked(), |g| {
                let columns = rows.columns(modulation.elements() / 2);
                let shape = (columns.groups, columns.rows);
                cuda::sums(cx, stream, g, shape, cuda::Wanted::Pairs(&input))
            });
        }
        flow.give(cx, to, |g| rows.scale(cx, g.clone(), &factors(cx, &modulation)?))?;
        let Some(input) = input else { return Ok(()) };
        flow.give(cx, modulation.tracked(), |g| {
            let columns = rows.columns(modulation.elements() / 2);
            let sums = columns.sums(cx, Terms::ValuesAndProducts(g, &input))?;
            sums.tensor(cx, "gradient of a modulation", &[1, 0])
        })
    }
}

/// 1 + a of each entry of a modulation.
fn factors(cx: &Context, modulation: &Tensor) -> Result<Tensor> {
    let channels = modulation.shape().channels() / 2;
    let values = modulation.slice::<f32>()?;
    let dims = [modulation.shape().rows(), channels];
    let mut factors = Tensor::new(cx, "factors of a modulation", &dims, DType::F32)?;
    kernels::parallel_chunks(cx, factors.slice_mut()?, channels, |n, part| {
        part.iter_mut().zip(&values[2 * n * channels..]).for_each(|(factor, a)| *factor = 1.0 + a);
    })?;
    Ok(factors)
}

impl Rows {
    /// For the sums that `sums` numbers take part in: C for all samples, or as many for each.
    fn columns(&self, sums: usize) -> Columns {
        let groups = if sums == self.channels { 1 } else { self.samples };
        Columns { groups, rows: self.samples / groups.max(1) * self.per_sample, channels: self.channels }
    }
}
