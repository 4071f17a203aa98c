//! The largest of 2 x 2 pixels on a GPU.

use std::sync::Arc;

use super::SIDE;
use crate::device::Context;
use crate::device::cuda::{Launch, Parameter, Precision, Stream, kernels};
use crate::error::Result;
use crate::tensor::{DType, Tensor};

kernels!(KERNELS, "max_pool");

/// Channels that a thread owns where they divide.
const WIDE: usize = 4;

/// As the source has it.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Pictures {
    windows: i64,
    height: i32,
    width: i32,
    channels: i32,
}
// SAFETY: a `long long` and three `int`, in this order; the compiler adds the same gap at the end.
unsafe impl Parameter for Pictures {}

impl Pictures {
    fn new(x: &Tensor) -> Result<Self> {
        let [samples, height, width, channels] = x.dims_of::<4>("max pool input")?;
        let windows = (samples * (height / SIDE) * (width / SIDE)) as i64;
        let [height, width, channels] = [height, width, channels].map(|side| side as i32);
        Ok(Pictures { windows, height, width, channels })
    }

    /// The launch, and whether threads own several channels of numbers of `size` bytes at these addresses.
    fn launch(&self, size: usize, addresses: &[u64]) -> (Launch, i32) {
        let aligned = addresses.iter().all(|address| address.is_multiple_of((WIDE * size) as u64));
        let (elements, wide) = (
            self.windows as usize * self.channels as usize,
            aligned && (self.channels as usize).is_multiple_of(WIDE),
        );
        (Launch::elements(if wide { elements / WIDE } else { elements }), wide.into())
    }
}

/// [`super::max_pool`] without recording.
pub fn pool(cx: &Context, stream: &Arc<Stream>, x: &Tensor, dims: [usize; 4]) -> Result<Tensor> {
    let (precision, pictures) = (x.precision("max pool input")?, Pictures::new(x)?);
    let mut y = Tensor::new(cx, "max pool", &dims, x.dtype())?;
    if y.elements() == 0 {
        return Ok(y);
    }
    let (from, to) = (x.on(cx, stream)?, y.on_mut(stream)?);
    let (launch, wide) = pictures.launch(precision.size(), &[from.address(), to]);
    let parameters: [&dyn Parameter; 4] = [&from.address(), &to, &pictures, &wide];
    // SAFETY: as the kernel declares; x has these pictures, y a pixel for each of their windows.
    unsafe { stream.launch(&KERNELS, "max_pool", Some(precision), launch, &parameters)? };
    Ok(y)
}

/// The gradient by x from that of the result, both `F32`.
pub fn gradient(cx: &Context, stream: &Arc<Stream>, g: &Tensor, x: &Tensor) -> Result<Tensor> {
    let [_, height, width, _] = x.dims_of::<4>("max pool input")?;
    let whole = height.is_multiple_of(SIDE) && width.is_multiple_of(SIDE);
    let allocate = if whole { Tensor::new } else { Tensor::zeros };
    let mut dx = allocate(cx, "max pool gradient", x.dims(), DType::F32)?;
    if x.elements() == 0 {
        return Ok(dx);
    }
    let (g, from) = (
        g.on_as(cx, stream, "a gradient", Precision::F32)?,
        x.on_as(cx, stream, "an input", Precision::F32)?,
    );
    let addresses = [g.address(), from.address(), dx.on_mut(stream)?];
    let pictures = Pictures::new(x)?;
    let (launch, wide) = pictures.launch(size_of::<f32>(), &addresses);
    let [g_at, x_at, dx_at] = addresses;
    // SAFETY: as the kernel declares; x and dx have these pictures, g a pixel for each of their windows.
    unsafe {
        stream.launch(
            &KERNELS,
            "max_pool_gradient",
            None,
            launch,
            &[&g_at, &x_at, &dx_at, &pictures, &wide],
        )?;
    }
    Ok(dx)
}
