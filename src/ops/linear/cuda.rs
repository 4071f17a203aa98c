//! Linear layers on a GPU: matrix products, of which the last does what follows.

use std::sync::Arc;

use super::gradient::Place;
use super::{Epilogue, Layout, ResultType, Term, modulation_by_sample};
use crate::device::Context;
use crate::device::cuda::{Matrix, Precision, Product, Stream, Tail, Taken};
use crate::error::{Error, Result};
use crate::tensor::{DType, Tensor};

/// Rows of a result, and what an epilogue has to know of them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rows {
    /// All of them.
    pub count: usize,
    /// Those that belong to one sample of the batch.
    pub per_sample: usize,
    /// Numbers per row.
    pub outputs: usize,
    /// Their type.
    pub precision: Precision,
}

/// An epilogue whose tensors lie on the device.
pub(crate) struct Held {
    tail: Tail,
    rows: Rows,
    _taken: Vec<Taken>,
}

impl Held {
    /// # Errors
    /// `InvalidArgument` if a vector has another length; `OutOfMemory`; `Device`.
    pub fn new(cx: &Context, stream: &Arc<Stream>, e: &Epilogue, rows: &Rows) -> Result<Self> {
        let mut taken = Vec::new();
        let mut take = |what: &'static str, tensor: Option<&Tensor>, precision: Precision| {
            let Some(tensor) = tensor else { return Ok(0) };
            let at = tensor.on_as(cx, stream, what, precision)?;
            taken.push(at.clone());
            Ok::<_, Error>(at.address())
        };
        let vector = |what: &'static str, tensor: Option<&Tensor>| match tensor {
            Some(tensor) if tensor.elements() != rows.outputs => {
                Err(Error::argument(what, format!("{} elements", rows.outputs), tensor.shape()))
            }
            _ => Ok(()),
        };
        vector("linear channel scale", e.channel_scale)?;
        vector("linear bias", e.bias)?;
        let samples = rows.count.div_ceil(rows.per_sample.max(1));
        let by_sample = e.modulation.map(|m| modulation_by_sample(m, samples, rows.outputs)).transpose()?;
        // A library's product adds a bias of the result's type; with a scale, both are left to a pass of our own.
        let of_bias = if e.channel_scale.is_some() { Precision::F32 } else { rows.precision };
        let bias = take("linear bias", e.bias, of_bias)?;
        let tail = Tail {
            scale: take("linear channel scale", e.channel_scale, Precision::F32)?,
            bias: e.bias.is_some().then_some((bias, of_bias)),
            activation: e.activation.code(),
            gain: e.gain,
            residual: take("linear residual", e.residual, rows.precision)?,
            modulation: take("linear modulation", e.modulation, Precision::F32)?,
            rows_per_sample: if by_sample == Some(true) { rows.per_sample } else { 0 },
        };
        Ok(Held { tail, rows: *rows, _taken: taken })
    }

    /// For a product, while this lives.
    pub fn tail(&self) -> Tail {
        self.tail
    }

    /// That of a product of the rows from number `first` on. Where samples have modulations of their own, all of them
    /// lie in one sample, or `first` is the first of one.
    pub fn tail_from(&self, first: usize) -> Tail {
        let Rows { per_sample, outputs, precision, .. } = self.rows;
        let skipped = |address, bytes: usize| if address == 0 { 0 } else { address + bytes as u64 };
        let sample = if self.is_by_sample() { first / per_sample.max(1) } else { 0 };
        Tail {
            residual: skipped(self.tail.residual, first * outputs * precision.size()),
            modulation: skipped(self.tail.modulation, sample * 2 * outputs * size_of::<f32>()),
            ..self.tail
        }
    }

    /// Whether each sample has a modulation of its own.
    pub fn is_by_sample(&self) -> bool {
        self.tail.rows_per_sample > 0
    }
}

/// The part of a weight that meets an input: where it begins, in elements, and how it lies.
#[derive(Debug, Clone, Copy)]
pub(super) struct Part {
    pub first: usize,
    pub leading: usize,
    pub layout: Layout,
}

impl Part {
    fn matrix(&self, weight: &Taken, precision: Precision) -> Matrix {
        Matrix {
            address: weight.address() + (self.first * precision.size()) as u64,
            precision,
            leading: self.leading,
            transposed: self.layout == Layout::RowsAreOutputs,
        }
    }
}

/// The type of the factors of a product.
pub(crate) fn factors(cx: &Context) -> Precision {
    cx.device().accelerator().map_or(Precision::F32, |accelerator| accelerator.factors())
}

/// Rows of `leading` numbers.
fn matrix(address: u64, precision: Precision, leading: usize) -> Matrix {
    Matrix { address, precision, leading, transposed: false }
}

/// The sum of `terms`, each with its part of its weight, then the epilogue, into a tensor of the dimensions `dims`.
pub(super) fn compute(
    cx: &Context,
    stream: &Arc<Stream>,
    terms: &[(&Term, Part)],
    epilogue: &Epilogue,
    (dims, per_sample): (&[usize], usize),
) -> Result<Tensor> {
    let activations = DType::of_activations(cx);
    let dtype = match epilogue.result {
        ResultType::Activations => activations,
        ResultType::F32 => DType::F32,
    };
    let mut out = Tensor::new(cx, "linear output", dims, dtype)?;
    let precision = factors(cx);
    let of_result = out.precision("linear output")?;
    let rows =
        Rows { count: out.shape().rows(), per_sample, outputs: out.shape().channels(), precision: of_result };
    let held = Held::new(cx, stream, epilogue, &rows)?;
    let to = matrix(out.on_mut(stream)?, of_result, rows.outputs);
    for (i, (term, part)) in terms.iter().enumerate() {
        let x = term.x.on_as(cx, stream, "linear input", precision)?;
        let weight = term.weight.on_as(cx, stream, "linear weight", precision)?;
        let k = term.x.shape().channels();
        let product = Product {
            m: rows.count,
            n: rows.outputs,
            k,
            a: matrix(x.address(), precision, k),
            b: part.matrix(&weight, precision),
            out: to,
            alpha: 1.0,
            accumulate: i > 0,
            batch: None,
            tail: if i + 1 == terms.len() { held.tail() } else { Tail::default() },
        };
        // SAFETY: the shapes were checked against each other; x, weight and result are held until the launch.
        unsafe { stream.multiply(&product)? };
    }
    Ok(out)
}

/// `dx = dy W`, over the part of the weight that x met, into `dx`.
pub(super) fn input_gradient(
    cx: &Context,
    stream: &Arc<Stream>,
    dy: &Tensor,
    (weight, part): (&Tensor, Part),
    dx: &mut Tensor,
) -> Result<()> {
    let (precision, outputs) = (factors(cx), dy.shape().channels());
    let from = dy.on_as(cx, stream, "a gradient", precision)?;
    let weight = weight.on_as(cx, stream, "linear weight", precision)?;
    let inputs = dx.shape().channels();
    let b = part.matrix(&weight, precision);
    let product = Product {
        m: dy.shape().rows(),
        n: inputs,
        k: outputs,
        a: matrix(from.address(), precision, outputs),
        b: Matrix { transposed: !b.transposed, ..b },
        out: matrix(dx.on_mut(stream)?, Precision::F32, inputs),
        alpha: 1.0,
        accumulate: false,
        batch: None,
        tail: Tail::default(),
    };
    // SAFETY: as in `compute`.
    unsafe { stream.multiply(&product) }
}

/// `out[i, j] (+)= sum over r of a[r, i] b[r, j]`, F32, from element `first` of `out` on.
///
/// # Errors
/// `InvalidArgument` if the rows are not as many; `Internal` if `out` is too short; `OutOfMemory`; `Device`.
pub(crate) fn transposed_product(
    cx: &Context,
    stream: &Arc<Stream>,
    [a, b]: [&Tensor; 2],
    place: Place,
    (out, first): (&mut Tensor, usize),
) -> Result<()> {
    let (m, n, k) = (a.shape().channels(), b.shape().channels(), a.shape().rows());
    if b.shape().rows() != k {
        return Err(Error::argument("a gradient", format!("{k} rows"), b.shape()));
    }
    if m == 0 || n == 0 {
        return Ok(());
    }
    if first + (m - 1) * place.leading + n > out.elements() {
        return Err(Error::internal("a weight's gradient", "too short"));
    }
    let precision = factors(cx);
    let [left, right] =
        [a.on_as(cx, stream, "an input", precision)?, b.on_as(cx, stream, "a gradient", precision)?];
    let to = out.on_mut(stream)? + (first * Precision::F32.size()) as u64;
    let product = Product {
        m,
        n,
        k,
        a: Matrix { transposed: true, ..matrix(left.address(), precision, m) },
        b: matrix(right.address(), precision, n),
        out: matrix(to, Precision::F32, place.leading),
        alpha: 1.0,
        accumulate: place.accumulate,
        batch: None,
        tail: Tail::default(),
    };
    // SAFETY: both factors have k rows, and there is room for the result, as was checked.
    unsafe { stream.multiply(&product) }
}
