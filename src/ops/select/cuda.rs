//! Selected tokens on a GPU.

use std::sync::Arc;

use crate::device::Context;
use crate::device::cuda::{Launch, Stream, Taken, kernels};
use crate::error::Result;
use crate::tensor::{DType, Tensor};

kernels!(KERNELS, "select");

fn on_device(stream: &Stream, positions: &[usize]) -> Result<Taken> {
    let positions: Vec<u32> = positions.iter().map(|&position| position as u32).collect();
    stream.constant(&positions)
}

/// [`super::select_tokens`] without recording, of the type of x. The positions were checked.
pub fn select(cx: &Context, stream: &Arc<Stream>, x: &Tensor, positions: &[usize]) -> Result<Tensor> {
    let [samples, tokens, channels] = x.dims_of::<3>("selected tokens")?;
    let precision = x.precision("selected tokens")?;
    let mut out = Tensor::new(cx, "selected tokens", &[samples, channels], x.dtype())?;
    let count = out.elements();
    if count == 0 {
        return Ok(out);
    }
    let (input, positions, to) = (x.on(cx, stream)?, on_device(stream, positions)?, out.on_mut(stream)?);
    // SAFETY: as the kernel declares; there is a position below `tokens` for each sample.
    unsafe {
        stream.launch(
            &KERNELS,
            "select_tokens",
            Some(precision),
            Launch::elements(count),
            &[
                &input.address(),
                &positions.address(),
                &to,
                &(count as i64),
                &(tokens as i64),
                &(channels as i32),
            ],
        )?;
    }
    Ok(out)
}

/// The gradient of all tokens.
pub fn gradient(
    cx: &Context,
    stream: &Arc<Stream>,
    g: &Tensor,
    tokens: usize,
    positions: &[usize],
) -> Result<Tensor> {
    let channels = g.shape().channels();
    let dims = [positions.len(), tokens, channels];
    let mut dx = Tensor::new(cx, "gradient of tokens", &dims, DType::F32)?;
    let count = dx.elements();
    if count == 0 {
        return Ok(dx);
    }
    let (from, positions, to) = (g.on(cx, stream)?, on_device(stream, positions)?, dx.on_mut(stream)?);
    // SAFETY: as the kernel declares; g has a row and a position for each sample.
    unsafe {
        stream.launch(
            &KERNELS,
            "select_tokens_gradient",
            None,
            Launch::elements(count),
            &[
                &from.address(),
                &positions.address(),
                &to,
                &(count as i64),
                &(tokens as i32),
                &(channels as i32),
            ],
        )?;
    }
    Ok(dx)
}
