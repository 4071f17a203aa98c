//! The product and its fused epilogue.

use super::{Epilogue, values};
use crate::device::gemm::{Gemm, Values, gemm};
use crate::device::scratch::{floats, floats_mut};
use crate::device::simd::fma;
use crate::device::{Buffer, Context};
use crate::error::{Error, Result};
use crate::simd_dispatch;
use crate::tensor::Tensor;

/// out = epilogue(a op(b)), `out` being `[m, n]` without gaps. The rows belong to `samples` samples, in order.
pub(super) fn run(cx: &Context, product: &Gemm, samples: usize, e: &Epilogue, out: &mut [f32]) -> Result<()> {
    let n = product.n;
    let scale = Wide::new(cx, "linear: channel_scale", e.channel_scale, n)?;
    let bias = Wide::new(cx, "linear: bias", e.bias, n)?;
    let residual = e.residual.map(|t| residual(t, out.len())).transpose()?;
    let modulation = match e.modulation {
        Some(t) if t.dims() != [samples, 2 * n] && t.dims() != [1, 2 * n] => {
            let expected = format!("[{samples} or 1, {}]", 2 * n);
            return Err(Error::argument("linear: modulation", expected, t.shape()));
        }
        other => Wide::new(cx, "linear: modulation", other, other.map_or(0, Tensor::elements))?,
    };
    let shared = e.modulation.is_some_and(|t| t.dims()[0] == 1);
    let rows_per_sample = (product.m / samples.max(1)).max(1);
    let (scale, bias, modulation) = (scale.get(), bias.get(), modulation.get());
    gemm(cx, product, out, n, |row, column, v| {
        let count = v.len();
        affine(v, scale.map(|s| &s[column..][..count]), bias.map(|b| &b[column..][..count]));
        e.activation.apply(v);
        if let Some(residual) = residual {
            add(v, e.gain, &residual[row * n + column..][..count]);
        } else if e.gain != 1.0 {
            multiply_all(v, e.gain);
        }
        if let Some(modulation) = modulation {
            let sample = if shared { 0 } else { row / rows_per_sample };
            let at = sample * 2 * n + column;
            modulate(v, &modulation[at..][..count], &modulation[at + n..][..count]);
        }
    })
}

fn residual(tensor: &Tensor, elements: usize) -> Result<&[f32]> {
    if tensor.elements() != elements {
        let expected = format!("{elements} elements, as the result");
        return Err(Error::argument("linear: residual", expected, tensor.shape()));
    }
    tensor.slice()
}

/// A vector of any float type, as f32.
enum Wide<'a> {
    Absent,
    Stored(&'a [f32]),
    Widened(Buffer),
}

impl<'a> Wide<'a> {
    fn new(cx: &Context, what: &str, tensor: Option<&'a Tensor>, count: usize) -> Result<Self> {
        let Some(tensor) = tensor else { return Ok(Wide::Absent) };
        if tensor.elements() != count {
            return Err(Error::argument(what, format!("[{count}]"), tensor.shape()));
        }
        let stored = values(tensor, what)?;
        if let Values::F32(stored) = stored {
            return Ok(Wide::Stored(stored));
        }
        let mut buffer = cx.device().take(what, count * size_of::<f32>())?;
        for (i, to) in floats_mut(&mut buffer).iter_mut().enumerate() {
            *to = stored.get(i);
        }
        Ok(Wide::Widened(buffer))
    }

    fn get(&self) -> Option<&[f32]> {
        match self {
            Wide::Absent => None,
            Wide::Stored(stored) => Some(stored),
            Wide::Widened(buffer) => Some(floats(buffer)),
        }
    }
}

/// v <- v * scale + bias
fn affine(v: &mut [f32], scale: Option<&[f32]>, bias: Option<&[f32]>) {
    match (scale, bias) {
        (None, None) => {}
        (None, Some(bias)) => add(v, 1.0, bias),
        (Some(scale), None) => multiply(v, scale),
        (Some(scale), Some(bias)) => multiply_add(v, scale, bias),
    }
}

simd_dispatch! {
    fn multiply_all<const _FMA: bool>(v: &mut [f32], factor: f32) {
        for v in v {
            *v *= factor;
        }
    }
}

simd_dispatch! {
    fn multiply<const _FMA: bool>(v: &mut [f32], factor: &[f32]) {
        for (v, f) in v.iter_mut().zip(factor) {
            *v *= f;
        }
    }
}

simd_dispatch! {
    fn add<const FMA: bool>(v: &mut [f32], factor: f32, term: &[f32]) {
        for (v, t) in v.iter_mut().zip(term) {
            *v = fma::<FMA>(*v, factor, *t);
        }
    }
}

simd_dispatch! {
    fn multiply_add<const FMA: bool>(v: &mut [f32], factor: &[f32], term: &[f32]) {
        for ((v, f), t) in v.iter_mut().zip(factor).zip(term) {
            *v = fma::<FMA>(*v, *f, *t);
        }
    }
}

simd_dispatch! {
    fn modulate<const FMA: bool>(v: &mut [f32], a: &[f32], b: &[f32]) {
        for ((v, a), b) in v.iter_mut().zip(a).zip(b) {
            *v = fma::<FMA>(*v, 1.0 + *a, *b);
        }
    }
}
