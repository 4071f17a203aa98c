//! The symmetric InfoNCE loss of CLIP (Radford et al. 2021, figure 3).

mod cuda;
#[cfg(test)]
mod tests;

use crate::device::Context;
use crate::device::gemm::Layout;
use crate::error::{Error, Result};
use crate::ops::kernels;
use crate::ops::linear::{Epilogue, linear, linear_transposed};
use crate::tensor::autograd::{Flow, Tracked, record};
use crate::tensor::{DType, Tensor};

/// Below it a length counts as it: a vector of zeros keeps its direction, none.
const LEAST_LENGTH: f64 = 1e-12;

/// What [`contrastive_loss`] computes.
#[derive(Debug, Clone)]
pub struct ContrastiveLoss {
    /// `[1]`.
    pub loss: Tensor,
    /// `[1]`: the share of images whose own text has the largest logit. Not tracked.
    pub accuracy: Tensor,
}

/// `(CE(L) + CE(L^T)) / 2` with `L = exp(log_temperature) I T^T`, where the rows of I and T have length 1, and CE is the
/// mean over rows n of `-log softmax(row)[n]`.
///
/// # Shapes
/// `images` and `texts` `[N, D]`, `F32`, with at least one element; `log_temperature` `[1]`, `F32`.
///
/// # Errors
/// `InvalidArgument` for other shapes; `OutOfMemory`; `Cancelled`.
pub fn contrastive_loss(
    cx: &Context,
    images: &Tensor,
    texts: &Tensor,
    log_temperature: &Tensor,
) -> Result<ContrastiveLoss> {
    let _span = cx.op("contrast");
    let [count, width] = images.dims_of::<2>("contrasted images")?;
    if texts.dims() != images.dims() || count * width == 0 {
        let expected = format!("{} with an element", images.shape());
        return Err(Error::argument("contrasted texts", expected, texts.shape()));
    }
    if log_temperature.elements() != 1 {
        return Err(Error::argument("log temperature", "one element", log_temperature.shape()));
    }
    let inputs = [images, texts, log_temperature];
    if let Some(stream) = cx.cuda()? {
        let ([loss, accuracy], kept) = cuda::loss(cx, stream, [images, texts], log_temperature)?;
        let loss = record(cx, loss, &inputs.map(Some), || {
            let to = inputs.map(Tensor::tracked);
            move |cx, flow| backward_on_device(cx, flow, to, &kept)
        })?;
        return Ok(ContrastiveLoss { loss, accuracy });
    }
    let (images_1, texts_1) = (Directions::of(cx, images)?, Directions::of(cx, texts)?);
    let temperature = f64::from(log_temperature.slice::<f32>()?[0]).exp();
    let mut logits = product(cx, &images_1.rows, &texts_1.rows, Layout::RowsAreOutputs)?;
    logits.slice_mut::<f32>()?.iter_mut().for_each(|v| *v = (f64::from(*v) * temperature) as f32);
    let (entropy, by_logits) = cross_entropy(cx, &logits)?;
    let loss = Tensor::from_slice(&[1], &[entropy as f32])?;
    let accuracy = Tensor::from_slice(&[1], &[accuracy(logits.slice()?, count)])?;
    let loss = record(cx, loss, &inputs.map(Some), || {
        let to = inputs.map(Tensor::tracked);
        Gradient { to, images: images_1, texts: texts_1, temperature, logits, by_logits }.backward()
    })?;
    Ok(ContrastiveLoss { loss, accuracy })
}

/// The backward pass on a GPU.
fn backward_on_device(
    cx: &Context,
    flow: &mut Flow,
    [to_images, to_texts, to_temperature]: [Option<Tracked>; 3],
    kept: &cuda::Kept,
) -> Result<()> {
    let Some(stream) = cx.cuda()? else { return Err(Error::internal("backward", "on another device")) };
    let [by_products, by_temperature] = kept.by_products(cx, stream, flow.gradient())?;
    flow.give(cx, to_images, |_| kept.by_images(cx, stream, &by_products))?;
    flow.give(cx, to_texts, |_| kept.by_texts(cx, stream, &by_products))?;
    flow.give(cx, to_temperature, |_| Ok(by_temperature))
}

/// Rows of length 1, and what divided them.
struct Directions {
    rows: Tensor,
    lengths: Vec<f64>,
}

impl Directions {
    fn of(cx: &Context, x: &Tensor) -> Result<Self> {
        let width = x.shape().channels();
        let input = x.slice::<f32>()?;
        let length =
            |row: &[f32]| row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt().max(LEAST_LENGTH);
        let lengths: Vec<f64> = input.chunks_exact(width).map(length).collect();
        let mut rows = Tensor::new(cx, "directions", x.dims(), DType::F32)?;
        kernels::parallel_chunks(cx, rows.slice_mut()?, width, |n, part| {
            let values = &input[n * width..][..width];
            part.iter_mut().zip(values).for_each(|(out, v)| *out = (f64::from(*v) / lengths[n]) as f32);
        })?;
        Ok(Directions { rows, lengths })
    }

    /// The gradient by x from `g`, that by the direction: what of it is across the direction, divided by the length.
    fn gradient(&self, cx: &Context, mut g: Tensor) -> Result<Tensor> {
        let width = self.rows.shape().channels();
        let rows = self.rows.slice::<f32>()?;
        kernels::parallel_chunks(cx, g.slice_mut::<f32>()?, width, |n, g| {
            let row = &rows[n * width..][..width];
            let along: f64 = g.iter().zip(row).map(|(g, v)| f64::from(*g) * f64::from(*v)).sum();
            for (g, v) in g.iter_mut().zip(row) {
                *g = ((f64::from(*g) - along * f64::from(*v)) / self.lengths[n]) as f32;
            }
        })?;
        Ok(g)
    }
}

/// A B, or A B^T if rows of B are outputs: a part of the op, which the tape does not see.
fn product(cx: &Context, a: &Tensor, b: &Tensor, layout: Layout) -> Result<Tensor> {
    let (a, b) = (a.constant(), b.constant());
    match layout {
        Layout::RowsAreOutputs => linear(cx, &a, &b, &Epilogue::default()),
        Layout::RowsAreInputs => linear_transposed(cx, &a, &b, &Epilogue::default()),
    }
}

/// The transpose of a square matrix.
fn transposed(cx: &Context, x: &Tensor) -> Result<Tensor> {
    let count = x.dims()[0];
    let values = x.slice::<f32>()?;
    let mut out = Tensor::new(cx, "a transpose", x.dims(), DType::F32)?;
    kernels::parallel_chunks(cx, out.slice_mut()?, count, |n, row| {
        row.iter_mut().zip(values.iter().skip(n).step_by(count)).for_each(|(out, v)| *out = *v);
    })?;
    Ok(out)
}

/// The loss from its logits, and its gradient by them: (softmax of rows + softmax of columns - 2) / 2N, where 2 stands on
/// the diagonal alone.
fn cross_entropy(cx: &Context, logits: &Tensor) -> Result<(f64, Tensor)> {
    let count = logits.dims()[0];
    let across = transposed(cx, logits)?;
    let mut gradient = Tensor::new(cx, "gradient of logits", logits.dims(), DType::F32)?;
    let values = gradient.slice_mut::<f32>()?;
    let share = 0.5 / count as f64;
    let mut sum = 0.0;
    values.fill(0.0);
    for (matrix, [row, column]) in [(logits, [count, 1]), (&across, [1, count])] {
        for (n, logits) in matrix.slice::<f32>()?.chunks_exact(count).enumerate() {
            let most = logits.iter().fold(f32::NEG_INFINITY, |most, v| most.max(*v));
            let exp = |v: &f32| f64::from(v - most).exp();
            let total: f64 = logits.iter().map(exp).sum();
            sum += f64::from(most - logits[n]) + total.ln();
            for (i, v) in logits.iter().enumerate() {
                values[n * row + i * column] += (exp(v) / total * share) as f32;
            }
            values[n * (count + 1)] -= share as f32;
        }
    }
    Ok((sum * share, gradient))
}

/// The share of rows whose largest number, the first of equal ones, is on the diagonal.
fn accuracy(logits: &[f32], count: usize) -> f32 {
    let right = |(n, row): (usize, &[f32])| {
        row[..n].iter().all(|v| *v < row[n]) && row[n..].iter().all(|v| *v <= row[n])
    };
    let rows = logits.chunks_exact(count).enumerate();
    rows.filter(|row| right(*row)).count() as f32 / count as f32
}

/// What the backward pass needs.
struct Gradient {
    /// Images, texts, temperature.
    to: [Option<Tracked>; 3],
    images: Directions,
    texts: Directions,
    temperature: f64,
    logits: Tensor,
    by_logits: Tensor,
}

impl Gradient {
    fn backward(self) -> impl FnOnce(&Context, &mut Flow) -> Result<()> {
        move |cx, flow| {
            let scale = |g: &Tensor| -> Result<f64> { Ok(f64::from(g.slice::<f32>()?[0])) };
            let [to_images, to_texts, to_temperature] = self.to;
            flow.give(cx, to_images, |g| {
                let g = self.by_products(cx, scale(g)?)?;
                self.images.gradient(cx, product(cx, &g, &self.texts.rows, Layout::RowsAreInputs)?)
            })?;
            flow.give(cx, to_texts, |g| {
                let g = transposed(cx, &self.by_products(cx, scale(g)?)?)?;
                self.texts.gradient(cx, product(cx, &g, &self.images.rows, Layout::RowsAreInputs)?)
            })?;
            flow.give(cx, to_temperature, |g| {
                let terms = self.by_logits.slice::<f32>()?.iter().zip(self.logits.slice::<f32>()?);
                let sum: f64 = terms.map(|(g, v)| f64::from(*g) * f64::from(*v)).sum();
                Tensor::from_slice(&[1], &[(sum * scale(g)?) as f32])
            })
        }
    }

    /// The gradient by I T^T.
    fn by_products(&self, cx: &Context, scale: f64) -> Result<Tensor> {
        let factor = scale * self.temperature;
        let values = self.by_logits.slice::<f32>()?;
        let mut out = Tensor::new(cx, "gradient of products", self.by_logits.dims(), DType::F32)?;
        for (out, v) in out.slice_mut::<f32>()?.iter_mut().zip(values) {
            *out = (f64::from(*v) * factor) as f32;
        }
        Ok(out)
    }
}
