//! What an optimiser does, on a GPU.

use std::sync::Arc;

use super::AdamWStep;
use crate::device::Context;
use crate::device::cuda::{Launch, Parameter, Stream, kernels};
use crate::error::Result;
use crate::tensor::{DType, Tensor};

kernels!(KERNELS, "adamw");

/// Blocks of 256 threads that fill a GPU, each thread with several numbers.
const MOST_BLOCKS: usize = 2048;
const THREADS: u32 = 256;

/// Numbers of one partial sum, at the least.
const PART: usize = 16 << 10;

/// [`AdamWStep`] as the kernel takes it.
#[repr(C)]
#[derive(Clone, Copy)]
struct Step([f32; 7]);
// SAFETY: seven floats in the kernel, too.
unsafe impl Parameter for Step {}

fn spread(count: usize) -> Launch {
    Launch::blocks(count.div_ceil(THREADS as usize).clamp(1, MOST_BLOCKS), THREADS)
}

/// [`super::adamw`]; all have as many numbers.
pub fn adamw(
    cx: &Context,
    stream: &Arc<Stream>,
    step: &AdamWStep,
    [weights, first, second]: [&mut Tensor; 3],
    gradient: &Tensor,
) -> Result<()> {
    let AdamWStep { scale, betas: [b1, b2], decay, size, root, eps } = *step;
    let step = Step([scale, b1, b2, decay, size, root, eps]);
    let count = weights.elements();
    let gradient = gradient.on(cx, stream)?;
    let (weights, first, second) = (weights.on_mut(stream)?, first.on_mut(stream)?, second.on_mut(stream)?);
    let parameters: [&dyn Parameter; 6] =
        [&step, &weights, &first, &second, &gradient.address(), &(count as i64)];
    // SAFETY: as the kernel declares; all have this many numbers of F32.
    unsafe { stream.launch(&KERNELS, "adamw", None, spread(count), &parameters) }
}

/// [`super::moving_average`].
pub fn moving_average(
    cx: &Context,
    stream: &Arc<Stream>,
    average: &mut Tensor,
    x: &Tensor,
    decay: f32,
) -> Result<()> {
    let count = x.elements();
    let (x, average) = (x.on(cx, stream)?, average.on_mut(stream)?);
    let parameters: [&dyn Parameter; 4] = [&average, &x.address(), &decay, &(count as i64)];
    // SAFETY: as the kernel declares; both have this many numbers of F32.
    unsafe { stream.launch(&KERNELS, "moving_average", None, spread(count), &parameters) }
}

/// [`super::approach`].
pub fn approach(
    cx: &Context,
    stream: &Arc<Stream>,
    running: &mut Tensor,
    x: &Tensor,
    [factor, momentum]: [f32; 2],
) -> Result<()> {
    let count = x.elements();
    let (x, running) = (x.on(cx, stream)?, running.on_mut(stream)?);
    let parameters: [&dyn Parameter; 5] = [&running, &x.address(), &factor, &momentum, &(count as i64)];
    // SAFETY: as the kernel declares; both have this many numbers of F32.
    unsafe { stream.launch(&KERNELS, "approach", None, spread(count), &parameters) }
}

/// [`super::sum_of_squares`]: the host waits for one number.
pub fn sum_of_squares(cx: &Context, stream: &Arc<Stream>, tensors: &[&Tensor]) -> Result<f64> {
    let parts = |x: &Tensor| x.elements().div_ceil(PART).min(MOST_BLOCKS);
    let count: usize = tensors.iter().map(|&x| parts(x)).sum();
    // Integers of the size of doubles: what they hold are the bits of those.
    let mut sums = Tensor::new(cx, "sums of squares", &[count], DType::I64)?;
    let mut total = Tensor::new(cx, "a sum of squares", &[1], DType::I64)?;
    let (sums_at, total_at) = (sums.on_mut(stream)?, total.on_mut(stream)?);
    let mut to = sums_at;
    for &x in tensors.iter().filter(|x| x.elements() > 0) {
        let launch = Launch::blocks(parts(x), THREADS);
        let from = x.on(cx, stream)?;
        let parameters: [&dyn Parameter; 3] = [&from.address(), &to, &(x.elements() as i64)];
        // SAFETY: as the kernel declares; there is a sum for each block.
        unsafe { stream.launch(&KERNELS, "squares_of_parts", None, launch, &parameters)? };
        to += (parts(x) * size_of::<f64>()) as u64;
    }
    let parameters: [&dyn Parameter; 3] = [&sums_at, &total_at, &(count as i64)];
    // SAFETY: as the kernel declares; one number is written.
    unsafe { stream.launch(&KERNELS, "squares_total", None, Launch::blocks(1, THREADS), &parameters)? };
    let bits = total.slice::<i64>()?;
    Ok(bits.iter().map(|&bits| f64::from_bits(bits as u64)).sum())
}
