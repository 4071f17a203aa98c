//! Layer normalisation on a GPU: a warp for each row.

use std::sync::Arc;

use super::LayerNorm;
use crate::device::Context;
use crate::device::cuda::{Launch, Precision, Stream, Taken, kernels};
use crate::error::{Error, Result};
use crate::ops::sums;
use crate::tensor::{DType, Tensor};

kernels!(KERNELS, "layer_norm");

/// As the source has them.
const ROWS_PER_BLOCK: usize = 8;
const THREADS: u32 = 256;
const COLUMNS: usize = 32;
const LINES: u32 = 8;

/// The parameters on the device, in F32; 0 where there are none.
struct Parameters {
    held: [Option<Taken>; 4],
}

impl Parameters {
    fn new(cx: &Context, stream: &Arc<Stream>, p: &LayerNorm, channels: usize) -> Result<Self> {
        let (weight, bias) = p.affine.unzip();
        let of = |what: &'static str, tensor: Option<&Tensor>, count: usize| {
            let Some(tensor) = tensor else { return Ok(None) };
            if tensor.elements() != count {
                let unit = if count == 1 { "element" } else { "elements" };
                return Err(Error::argument(what, format!("{count} {unit}"), tensor.shape()));
            }
            tensor.on_as(cx, stream, what, Precision::F32).map(Some)
        };
        Ok(Parameters {
            held: [
                of("layer norm weight", weight, channels)?,
                of("layer norm bias", bias, channels)?,
                of("layer norm scale", p.scale, 1)?,
                of("layer norm shift", p.shift, 1)?,
            ],
        })
    }

    /// Weight, bias, scale, shift.
    fn addresses(&self) -> [u64; 4] {
        self.held.each_ref().map(|taken| taken.as_ref().map_or(0, Taken::address))
    }
}

/// [`super::layer_norm`] without recording.
pub fn normalize(cx: &Context, stream: &Arc<Stream>, x: &Tensor, p: &LayerNorm) -> Result<Tensor> {
    let (rows, channels) = (x.shape().rows(), x.shape().channels());
    let precision = x.precision("layer norm input")?;
    let parameters = Parameters::new(cx, stream, p, channels)?;
    let [weight, bias, scale, shift] = parameters.addresses();
    let mut y = Tensor::new(cx, "layer norm", x.dims(), x.dtype())?;
    if x.elements() == 0 {
        return Ok(y);
    }
    let (input, output) = (x.on(cx, stream)?, y.on_mut(stream)?);
    let launch = Launch::blocks(rows.div_ceil(ROWS_PER_BLOCK), THREADS);
    // SAFETY: as the kernel declares; x and y have rows of so many channels, the parameters were checked.
    unsafe {
        stream.launch(
            &KERNELS,
            "layer_norm",
            Some(precision),
            launch,
            &[
                &input.address(),
                &weight,
                &bias,
                &scale,
                &shift,
                &output,
                &(rows as i64),
                &(channels as i32),
                &p.eps,
            ],
        )?;
    }
    Ok(y)
}

/// What a backward pass finds.
pub struct Gradients {
    /// Of x, if it was asked for.
    pub dx: Option<Tensor>,
    /// Of weight and bias, `[2, C]`.
    pub of_affine: Tensor,
    /// Of scale and shift, `[2]`.
    pub of_scalars: Tensor,
}

/// The gradients from that of the result, `F32` as x is. Those that all rows share are computed if `shared`.
pub fn gradients(
    cx: &Context,
    stream: &Arc<Stream>,
    (x, g): (&Tensor, &Tensor),
    p: &LayerNorm,
    (of_x, shared): (bool, bool),
) -> Result<Gradients> {
    let (rows, channels) = (x.shape().rows(), x.shape().channels());
    let parameters = Parameters::new(cx, stream, p, channels)?;
    let [weight, bias, scale, _] = parameters.addresses();
    let mut dx = of_x.then(|| Tensor::new(cx, "layer norm gradient", x.dims(), DType::F32)).transpose()?;
    let mut of_scalars = Tensor::zeros(cx, "layer norm gradient", &[2], DType::F32)?;
    if x.elements() == 0 {
        let of_affine = Tensor::zeros(cx, "layer norm sums", &[2, channels], DType::F32)?;
        return Ok(Gradients { dx, of_affine, of_scalars });
    }
    let mut kept = Tensor::new(cx, "layer norm moments", &[rows, 2], DType::F32)?;
    let (input, gradient, kept_at) = (x.on(cx, stream)?, g.on(cx, stream)?, kept.on_mut(stream)?);
    let dx_at = dx.as_mut().map_or(Ok(0), |dx| dx.on_mut(stream))?;
    let (count, width) = (rows as i64, channels as i32);
    let launch = Launch::blocks(rows.div_ceil(ROWS_PER_BLOCK), THREADS);
    // SAFETY: as the kernel declares; x, g and dx have rows of so many channels, `kept` two numbers for each row.
    unsafe {
        stream.launch(
            &KERNELS,
            "layer_norm_gradient",
            None,
            launch,
            &[
                &input.address(),
                &gradient.address(),
                &weight,
                &scale,
                &dx_at,
                &kept_at,
                &count,
                &width,
                &p.eps,
            ],
        )?;
    }
    let parts = if shared { sums::parts(rows) } else { sums::Parts { count: 0, rows: 0 } };
    let mut partial = Tensor::new(cx, "layer norm sums", &[parts.count, 2 * channels], DType::F32)?;
    if shared {
        let sums_at = partial.on_mut(stream)?;
        let launch = Launch {
            grid: [channels.div_ceil(COLUMNS) as u32, parts.count as u32, 1],
            block: [COLUMNS as u32, LINES, 1],
            shared_bytes: 0,
        };
        // SAFETY: as the kernel declares; the sums have a row of 2 C numbers for each part.
        unsafe {
            stream.launch(
                &KERNELS,
                "layer_norm_sums",
                None,
                launch,
                &[
                    &input.address(),
                    &gradient.address(),
                    &kept_at,
                    &sums_at,
                    &count,
                    &width,
                    &(parts.rows as i32),
                ],
            )?;
        }
    }
    let mut of_affine = sums::add_parts(cx, "layer norm sums", &partial)?;
    let (affine_at, scalars_at) = (of_affine.on_mut(stream)?, of_scalars.on_mut(stream)?);
    // SAFETY: as the kernel declares; 2 C sums, two scalars.
    unsafe {
        stream.launch(
            &KERNELS,
            "layer_norm_finish",
            None,
            Launch::blocks(1, THREADS),
            &[&affine_at, &weight, &bias, &scale, &scalars_at, &width],
        )?;
    }
    Ok(Gradients { dx, of_affine: of_affine.reshape(&[2, channels])?, of_scalars })
}
