//! Scaled and mixed samples on a GPU. The factors are parameters of the kernel: nothing is copied.

use std::sync::Arc;

use crate::device::Context;
use crate::device::cuda::{Launch, Parameter, Stream, kernels};
use crate::error::Result;
use crate::tensor::Tensor;

kernels!(KERNELS, "mix");

/// The most samples of one launch, as the source has it.
const SAMPLES: usize = 64;

/// Bytes that a thread owns.
const PACK: usize = 16;

#[repr(C)]
#[derive(Clone, Copy)]
struct Factors {
    a: [f32; SAMPLES],
    b: [f32; SAMPLES],
}

// SAFETY: as `MixFactors` in the source.
unsafe impl Parameter for Factors {}

impl Factors {
    fn new(a: &[f32], b: Option<&[f32]>) -> Self {
        let mut factors = Factors { a: [0.0; SAMPLES], b: [0.0; SAMPLES] };
        factors.a[..a.len()].copy_from_slice(a);
        if let Some(b) = b {
            factors.b[..b.len()].copy_from_slice(b);
        }
        factors
    }
}

/// `a[n] * x[n, ..]`, plus `b[n] * y[n, ..]` if there is a y, of the type of x. The factors fit.
pub fn mix(
    cx: &Context,
    stream: &Arc<Stream>,
    (x, a): (&Tensor, &[f32]),
    other: Option<(&Tensor, &[f32])>,
) -> Result<Tensor> {
    let precision = x.precision("mix")?;
    let mut out = Tensor::new(cx, "a mixture", x.dims(), x.dtype())?;
    if x.elements() == 0 {
        return Ok(out);
    }
    let sample = x.elements() / a.len();
    let input = x.on(cx, stream)?;
    let second = other.map(|(y, _)| y.on_as(cx, stream, "mix", precision)).transpose()?;
    let to = out.on_mut(stream)?;
    let mut launch = Launch::elements(sample.div_ceil(PACK / precision.size()));
    for (i, of_x) in a.chunks(SAMPLES).enumerate() {
        let first = i * SAMPLES;
        let of_y = other.map(|(_, b)| &b[first..first + of_x.len()]);
        let offset = (first * sample * precision.size()) as u64;
        let second = second.as_ref().map_or(0, |y| y.address() + offset);
        launch.grid[1] = of_x.len() as u32;
        // SAFETY: as the kernel declares; from these addresses on all have as many samples as there are factors.
        unsafe {
            stream.launch(
                &KERNELS,
                "mix_samples",
                Some(precision),
                launch,
                &[
                    &(input.address() + offset),
                    &second,
                    &Factors::new(of_x, of_y),
                    &(to + offset),
                    &(sample as i64),
                ],
            )?;
        }
    }
    Ok(out)
}
