//! The order of axes at the boundary. The library computes with channels last; the boundary speaks [N, C, H, W].

use half::{bf16, f16};

use super::tensor::{host, wst_tensor};
use crate::error::{Error, Result};
use crate::tensor::{DType, Element, Tensor};

/// Reads a tensor whose rank is checked against the letters of `layout`, "[N, C, H, W]": widened to F32, and with
/// channels last if it is an image.
pub(super) fn floats(name: &str, tensor: &Tensor, layout: &str) -> Result<Tensor> {
    check_rank(name, tensor, layout)?;
    let dims = tensor.dims();
    match tensor.dtype() {
        DType::F32 => arrange::<f32>(dims, tensor, |v| v, to_channels_last),
        DType::F16 => arrange::<f16>(dims, tensor, f16::to_f32, to_channels_last),
        DType::BF16 => arrange::<bf16>(dims, tensor, bf16::to_f32, to_channels_last),
        other => Err(Error::argument(name, "elements of type F32, F16 or BF16", other)),
    }
}

/// Reads token numbers.
fn tokens(name: &str, tensor: &Tensor, layout: &str) -> Result<Tensor> {
    check_rank(name, tensor, layout)?;
    match tensor.dtype() {
        DType::I64 => Ok(tensor.clone()),
        other => Err(Error::argument(name, "elements of type I64", other)),
    }
}

fn check_rank(name: &str, tensor: &Tensor, layout: &str) -> Result<()> {
    let rank = layout.split(',').count();
    if tensor.dims().len() == rank {
        return Ok(());
    }
    Err(Error::argument(name, format!("{rank} dimensions {layout}"), tensor.shape()))
}

/// Tokens [N, h, w] stay; latents [N, C, h, w] become channels last.
pub(super) fn tokens_or_floats(name: &str, tensor: &Tensor) -> Result<Tensor> {
    if tensor.dtype() == DType::I64 {
        tokens(name, tensor, "[N, h, w]")
    } else {
        floats(name, tensor, "[N, C, h, w]")
    }
}

/// What the library made, as the caller reads it: images as [N, C, H, W], in memory of their own.
pub(super) fn result(tensor: Tensor) -> Result<wst_tensor> {
    if tensor.dims().len() != 4 {
        return Ok(wst_tensor::new(tensor));
    }
    let dims = tensor.dims();
    match tensor.dtype() {
        DType::F32 => arrange::<f32>(dims, &tensor, |v| v, to_channels_first),
        DType::F16 => arrange::<f16>(dims, &tensor, f16::to_f32, to_channels_first),
        DType::BF16 => arrange::<bf16>(dims, &tensor, bf16::to_f32, to_channels_first),
        other => Err(Error::internal("a stage's output", format!("4 dimensions of {other}"))),
    }
    .map(wst_tensor::new)
}

/// The order of the dimensions afterwards.
type Order = fn([usize; 4]) -> ([usize; 4], [usize; 4]);

/// [N, C, H, W] to [N, H, W, C]: the new dimensions, and how far apart their neighbours lay before.
fn to_channels_last([n, c, h, w]: [usize; 4]) -> ([usize; 4], [usize; 4]) {
    ([n, h, w, c], [c * h * w, w, 1, h * w])
}

/// [N, H, W, C] to [N, C, H, W].
fn to_channels_first([n, h, w, c]: [usize; 4]) -> ([usize; 4], [usize; 4]) {
    ([n, c, h, w], [h * w * c, 1, w * c, c])
}

/// Copies to F32, and changes the order of four dimensions; other ranks keep theirs.
fn arrange<T: Element>(dims: &[usize], from: &Tensor, widen: fn(T) -> f32, order: Order) -> Result<Tensor> {
    let values = from.slice::<T>()?;
    let Ok(four) = <[usize; 4]>::try_from(dims) else {
        let mut to = Tensor::new(&host()?, "a tensor", dims, DType::F32)?;
        to.slice_mut::<f32>()?.iter_mut().zip(values).for_each(|(to, &from)| *to = widen(from));
        return Ok(to);
    };
    let ([a, b, c, d], [sa, sb, sc, sd]) = order(four);
    let mut to = Tensor::new(&host()?, "a tensor", &[a, b, c, d], DType::F32)?;
    let mut slots = to.slice_mut::<f32>()?.iter_mut();
    for i in 0..a {
        for j in 0..b {
            for k in 0..c {
                let start = i * sa + j * sb + k * sc;
                for (l, slot) in slots.by_ref().take(d).enumerate() {
                    *slot = widen(values[start + l * sd]);
                }
            }
        }
    }
    Ok(to)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_change_at_the_boundary_and_back() {
        // [N, C, H, W] = [2, 3, 2, 5], value = its own index.
        let values: Vec<f32> = (0..60).map(|v| v as f32).collect();
        let first = Tensor::from_slice(&[2, 3, 2, 5], &values).unwrap();
        let last = floats("x", &first, "[N, C, h, w]").unwrap();
        assert_eq!(last.dims(), [2, 2, 5, 3]);
        let seen = last.slice::<f32>().unwrap();
        for (n, c, h, w) in [(0, 0, 0, 0), (1, 2, 1, 4), (1, 0, 1, 3), (0, 2, 0, 1)] {
            assert_eq!(seen[((n * 2 + h) * 5 + w) * 3 + c], (((n * 3 + c) * 2 + h) * 5 + w) as f32);
        }
        let back = result(last).unwrap();
        assert_eq!(back.tensor.dims(), [2, 3, 2, 5]);
        assert_eq!(back.tensor.slice::<f32>().unwrap(), values);
    }

    #[test]
    fn narrow_floats_are_widened_and_others_refused() {
        let halves: Vec<f16> = [0.5, -2.0, 65504.0].map(f16::from_f32).to_vec();
        let wide = floats("t", &Tensor::from_slice(&[3], &halves).unwrap(), "[N]").unwrap();
        assert_eq!(wide.slice::<f32>().unwrap(), [0.5, -2.0, 65504.0]);
        let bytes = Tensor::from_slice(&[3], &[1u8, 2, 3]).unwrap();
        let message = floats("t", &bytes, "[N]").unwrap_err().to_string();
        assert!(message.starts_with("t: expected elements of type F32"), "{message}");
        let message = floats("x", &bytes, "[N, C, h, w]").unwrap_err().to_string();
        assert!(message.starts_with("x: expected 4 dimensions [N, C, h, w], found [3]"), "{message}");
    }
}
