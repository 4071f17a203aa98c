//! An [`Epilogue`] as products of a GPU take it.

use std::sync::Arc;

use crate::device::Context;
use crate::device::cuda::{Precision, Stream, Tail, Taken};
use crate::error::{Error, Result};
use crate::ops::linear::Epilogue;
use crate::tensor::{DType, Tensor};

/// What follows a product, on the device.
pub(crate) struct Follow {
    /// Channel scale, bias, residual, modulation.
    held: [Option<Taken>; 4],
    activation: (i32, f32),
    gain: f32,
    /// Numbers of a row of the result, and bytes of each.
    outputs: usize,
    size: usize,
    by_sample: bool,
}

impl Follow {
    /// For a result of `samples` samples with `outputs` channels, of the type of activations.
    ///
    /// # Errors
    /// `InvalidArgument` if a vector or a modulation has another length; `OutOfMemory`; `Device`.
    pub fn new(
        cx: &Context,
        stream: &Arc<Stream>,
        e: &Epilogue,
        samples: usize,
        outputs: usize,
    ) -> Result<Self> {
        let vector = |what: &str, v: Option<&Tensor>| {
            let Some(v) = v else { return Ok(None) };
            if v.elements() != outputs {
                return Err(Error::argument(what, format!("{outputs} elements"), v.shape()));
            }
            v.on_as(cx, stream, what, Precision::F32).map(Some)
        };
        let precision = DType::of_activations(cx).precision().unwrap_or(Precision::F32);
        let by_sample = e.modulation.is_some_and(|m| m.shape().rows() > 1);
        if let Some(m) = e.modulation {
            let rows = m.shape().rows();
            if m.dims().last() != Some(&(2 * outputs)) || (rows != 1 && rows < samples) {
                let expected = format!("[{samples} or 1, {}]", 2 * outputs);
                return Err(Error::argument("linear modulation", expected, m.shape()));
            }
        }
        let on =
            |what, t: Option<&Tensor>, precision| t.map(|t| t.on_as(cx, stream, what, precision)).transpose();
        Ok(Follow {
            held: [
                vector("linear channel scale", e.channel_scale)?,
                vector("linear bias", e.bias)?,
                on("linear residual", e.residual, precision)?,
                on("linear modulation", e.modulation, Precision::F32)?,
            ],
            activation: e.activation.code(),
            gain: e.gain,
            outputs,
            size: precision.size(),
            by_sample,
        })
    }

    /// Whether each sample has a modulation of its own.
    pub fn is_by_sample(&self) -> bool {
        self.by_sample
    }

    /// That of rows from number `first` on, of which `per_sample` make a sample: then the first of one, or all of one.
    pub fn tail(&self, first: usize, per_sample: usize) -> Tail {
        let [scale, bias, residual, modulation] =
            self.held.each_ref().map(|held| held.as_ref().map_or(0, Taken::address));
        let skipped = |address, bytes: usize| if address == 0 { 0 } else { address + bytes as u64 };
        let sample = if self.by_sample { first / per_sample.max(1) } else { 0 };
        Tail {
            scale,
            bias: (bias != 0).then_some((bias, Precision::F32)),
            activation: self.activation,
            gain: self.gain,
            residual: skipped(residual, first * self.outputs * self.size),
            modulation: skipped(modulation, sample * 2 * self.outputs * size_of::<f32>()),
            rows_per_sample: if self.by_sample { per_sample } else { 0 },
        }
    }
}
