//! Layer normalisation over channels (Ba et al. 2016).

pub(crate) mod cpu;

use crate::device::Context;
use crate::error::Result;
use crate::ops::kernels;
use crate::tensor::{DType, Tensor};

/// The parameters of [`layer_norm`].
#[derive(Debug, Clone, Copy)]
pub struct LayerNorm<'a> {
    /// Added to the variance.
    pub eps: f32,
    /// Weight and bias, `[C]` each, of any float type.
    pub affine: Option<(&'a Tensor, &'a Tensor)>,
    /// One more factor, for all channels alike.
    pub scale: f32,
    /// One more summand, for all channels alike.
    pub shift: f32,
}

impl Default for LayerNorm<'_> {
    fn default() -> Self {
        LayerNorm { eps: 1e-6, affine: None, scale: 1.0, shift: 0.0 }
    }
}

/// `y = ((x - mean) / sqrt(var + eps) * w + b) * scale + shift` over the last axis; the variance is the biased one.
///
/// # Shapes
/// `x` and the result: `[.., C]`, `F32`.
///
/// # Errors
/// `InvalidArgument` if `x` is not `F32` or the affine parameters do not have `C` elements.
pub fn layer_norm(cx: &Context, x: &Tensor, p: &LayerNorm) -> Result<Tensor> {
    let input = x.slice::<f32>()?;
    let mut out = Tensor::new(cx, "layer norm", x.dims(), DType::F32)?;
    normalize(cx, input, x.shape().channels(), p, out.slice_mut()?)?;
    Ok(out)
}

/// [`layer_norm`] of rows of `channels` numbers, into `out`.
///
/// # Errors
/// As [`layer_norm`].
pub(crate) fn normalize(
    cx: &Context,
    input: &[f32],
    channels: usize,
    p: &LayerNorm,
    out: &mut [f32],
) -> Result<()> {
    let affine = match p.affine {
        Some((weight, bias)) => Some((
            kernels::channel_vector(cx, "layer norm weight", weight, channels)?,
            kernels::channel_vector(cx, "layer norm bias", bias, channels)?,
        )),
        None => None,
    };
    let affine = match &affine {
        Some((weight, bias)) => Some((weight.slice::<f32>()?, bias.slice::<f32>()?)),
        None => None,
    };
    let rows = cpu::Rows { channels, eps: p.eps, affine, scale: p.scale, shift: p.shift };
    let chunk = kernels::rows_per_task(channels) * channels;
    kernels::parallel_chunks(cx, out, chunk, |i, part| {
        cpu::normalize_rows(&rows, &input[i * chunk..][..part.len()], part);
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check;

    fn naive(x: &[f64], c: usize, p: &LayerNorm) -> Vec<f64> {
        let affine = p.affine.map(|(w, b)| (check::wide(w), check::wide(b)));
        let (eps, scale, shift) = (f64::from(p.eps), f64::from(p.scale), f64::from(p.shift));
        x.chunks(c)
            .flat_map(|row| {
                let mean = row.iter().sum::<f64>() / c as f64;
                let var = row.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / c as f64;
                let normal = move |v: &f64| (v - mean) / (var + eps).sqrt();
                let affine = &affine;
                row.iter()
                    .enumerate()
                    .map(move |(i, v)| {
                        let (w, b) = affine.as_ref().map_or((1.0, 0.0), |(w, b)| (w[i], b[i]));
                        (normal(v) * w + b) * scale + shift
                    })
                    .collect::<Vec<_>>()
            })
            .collect()
    }

    #[test]
    fn agrees_with_the_definition() {
        for (dims, dtype) in [
            (&[1usize, 1, 1, 1][..], DType::F32),
            (&[3, 5, 7, 33], DType::F16),
            (&[2, 9, 1, 640], DType::BF16),
            (&[3, 40, 100], DType::F32),
        ] {
            let c = dims[dims.len() - 1];
            let x = check::random(dims, 1);
            let w = check::cast(&check::random(&[c], 2), dtype);
            let b = check::cast(&check::random(&[c], 3), dtype);
            for affine in [None, Some((&w, &b))] {
                let p = LayerNorm { eps: 1e-5, affine, scale: 1.5, shift: -0.25 };
                let y = check::on_batch(&x, |cx, x, _, _| layer_norm(cx, x, &p));
                check::close(&y, dims, &naive(&check::wide(&x), c, &p), 2e-6);
            }
        }
    }

    #[test]
    fn a_large_mean_does_not_drown_the_variance() {
        let values: Vec<f32> = (0..100).map(|i| 1000.0 + i as f32 / 64.0).collect();
        let x = Tensor::from_slice(&[1, 100], &values).unwrap();
        let p = LayerNorm::default();
        let y = layer_norm(&check::cx(), &x, &p).unwrap();
        check::close(&y, &[1, 100], &naive(&check::wide(&x), 100, &p), 1e-3);
    }

    #[test]
    fn a_wrong_weight_is_named() {
        let (x, w) = (check::random(&[2, 4], 1), check::random(&[3], 2));
        let p = LayerNorm { affine: Some((&w, &w)), ..LayerNorm::default() };
        let error = layer_norm(&check::cx(), &x, &p).unwrap_err().to_string();
        assert!(error.contains("layer norm weight") && error.contains('4'), "{error}");
    }
}
