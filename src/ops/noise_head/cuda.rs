//! The noise prediction on a GPU.

use std::sync::Arc;

use super::Divisor;
use crate::device::Context;
use crate::device::cuda::{Launch, Stream, kernels};
use crate::error::Result;
use crate::tensor::{DType, Tensor};

kernels!(KERNELS, "noise_head");

impl Divisor {
    /// As the kernels tell them apart.
    fn bounded(self) -> i32 {
        i32::from(self == Divisor::Bounded)
    }
}

/// `(x - a) / divisor(b)`, of the type of `x`.
pub fn quotient(
    cx: &Context,
    stream: &Arc<Stream>,
    x: &Tensor,
    head: &Tensor,
    divisor: Divisor,
) -> Result<Tensor> {
    let precision = x.precision("noise input")?;
    let mut noise = Tensor::new(cx, "predicted noise", x.dims(), x.dtype())?;
    let (count, channels) = (x.elements(), x.shape().channels());
    if count == 0 {
        return Ok(noise);
    }
    let (input, head) = (x.on(cx, stream)?, head.on_as(cx, stream, "noise head", precision)?);
    let to = noise.on_mut(stream)?;
    // SAFETY: as the kernel declares; the head has twice the numbers of x, row by row.
    unsafe {
        stream.launch(
            &KERNELS,
            "noise_from_head",
            Some(precision),
            Launch::elements(count),
            &[
                &input.address(),
                &head.address(),
                &to,
                &(count as i64),
                &(channels as i32),
                &divisor.bounded(),
            ],
        )?;
    }
    Ok(noise)
}

/// The gradients of x and of the head from `g`. The head's is found where there is the predicted `noise`.
pub fn gradients(
    cx: &Context,
    stream: &Arc<Stream>,
    (g, head, noise): (&Tensor, &Tensor, Option<&Tensor>),
    of_x: bool,
    divisor: Divisor,
) -> Result<[Option<Tensor>; 2]> {
    let (count, channels) = (g.elements(), g.shape().channels());
    let new = |dims: &[usize]| Tensor::new(cx, "gradient of the noise", dims, DType::F32);
    let mut dx = of_x.then(|| new(g.dims())).transpose()?;
    let mut dhead = noise.map(|_| new(head.dims())).transpose()?;
    if count == 0 {
        return Ok([dx, dhead]);
    }
    let (gradient, values) = (g.on(cx, stream)?, head.on(cx, stream)?);
    let noise = noise.map(|noise| noise.on(cx, stream)).transpose()?;
    let at = |out: &mut Option<Tensor>| out.as_mut().map_or(Ok(0), |out| out.on_mut(stream));
    let (dx_at, dhead_at) = (at(&mut dx)?, at(&mut dhead)?);
    // SAFETY: as the kernel declares; noise and dx have the numbers of g, head and its gradient twice as many. A
    // gradient that is not asked for is 0, and the noise is read for that of the head alone.
    unsafe {
        stream.launch(
            &KERNELS,
            "noise_from_head_gradient",
            None,
            Launch::elements(count),
            &[
                &gradient.address(),
                &values.address(),
                &noise.as_ref().map_or(0, |noise| noise.address()),
                &dx_at,
                &dhead_at,
                &(count as i64),
                &(channels as i32),
                &divisor.bounded(),
            ],
        )?;
    }
    Ok([dx, dhead])
}
