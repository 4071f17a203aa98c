//! Losses of regression on a GPU.

use std::sync::Arc;

use super::{Differences, Kind};
use crate::device::Context;
use crate::device::cuda::{Launch, Parameter, Precision, Stream, Taken, kernels};
use crate::error::Result;
use crate::tensor::{DType, Tensor};

kernels!(KERNELS, "regression");

const THREADS: u32 = 256;

/// Numbers of one partial sum, at the least, and how many partial sums there are at the most.
const PART: usize = 4 << 10;
const MOST_PARTS: usize = 1024;

/// As the source has them.
const TERMS: usize = 16;

/// A few factors on the device. None if all are 1: then none is read.
pub(in crate::ops) fn factors(stream: &Stream, values: &[f32]) -> Result<Option<Taken>> {
    if values.iter().all(|&v| v == 1.0) {
        return Ok(None);
    }
    let bits: Vec<u32> = values.iter().map(|v| v.to_bits()).collect();
    stream.constant(&bits).map(Some)
}

fn address(taken: &Option<Taken>) -> u64 {
    taken.as_ref().map_or(0, Taken::address)
}

/// The mean over all elements of what `kind` makes of x - target, times the weight of the sample.
pub fn loss(
    cx: &Context,
    stream: &Arc<Stream>,
    [x, target]: [&Tensor; 2],
    kind: Kind,
    weights: &[f32],
) -> Result<Tensor> {
    let (count, sample) = (x.elements(), x.elements() / weights.len().max(1));
    let (precision, weights) = (x.precision("input of a loss")?, factors(stream, weights)?);
    let (from, of_target) = (x.on(cx, stream)?, target.on_as(cx, stream, "target of a loss", precision)?);
    let parts = count.div_ceil(PART).min(MOST_PARTS);
    // Integers of the size of doubles, which they hold.
    let mut sums = Tensor::new(cx, "partial losses", &[parts], DType::I64)?;
    let mut loss = Tensor::new(cx, "a loss", &[1], DType::F32)?;
    let (sums_at, loss_at) = (sums.on_mut(stream)?, loss.on_mut(stream)?);
    // SAFETY: as the kernels declare; x and target have `count` numbers, and there is a sum for each block.
    unsafe {
        stream.launch(
            &KERNELS,
            "sum_differences",
            Some(precision),
            Launch::blocks(parts, THREADS),
            &[
                &from.address(),
                &of_target.address(),
                &address(&weights),
                &sums_at,
                &(count as i64),
                &(sample as i64),
                &i32::from(kind == Kind::Absolute),
            ],
        )?;
        stream.launch(
            &KERNELS,
            "mean_of_sums",
            None,
            Launch::blocks(1, THREADS),
            &[&sums_at, &loss_at, &(parts as i32), &(count as f64)],
        )?;
    }
    Ok(loss)
}

/// The gradient by x under that of the loss, `[1]`, times `sign`.
pub fn gradient(
    cx: &Context,
    stream: &Arc<Stream>,
    of: &Differences,
    g: &Tensor,
    sign: f32,
) -> Result<Tensor> {
    let mut out = Tensor::new(cx, "gradient of a loss", of.x.dims(), DType::F32)?;
    let bits: Vec<u32> = of.factors.iter().map(|factor| (factor * sign).to_bits()).collect();
    let factors = stream.constant(&bits)?;
    let wide = |x: &Tensor| x.on_as(cx, stream, "input of a loss", Precision::F32);
    let (x, target, g) = (wide(&of.x)?, wide(&of.target)?, g.on(cx, stream)?);
    let to = out.on_mut(stream)?;
    let (count, sample) = (of.x.elements() as i64, of.sample as i64);
    // SAFETY: as the kernel declares; all have `count` numbers, of samples of `sample`, with a factor for each.
    unsafe {
        stream.launch(
            &KERNELS,
            "differences_gradient",
            None,
            Launch::elements(of.x.elements()),
            &[
                &x.address(),
                &target.address(),
                &factors.address(),
                &g.address(),
                &to,
                &count,
                &sample,
                &i32::from(of.kind == Kind::Absolute),
            ],
        )?;
    }
    Ok(out)
}

/// As the kernel takes it.
#[repr(C)]
#[derive(Clone, Copy)]
struct Terms {
    addresses: [u64; TERMS],
    factors: [f32; TERMS],
    count: i32,
    adds: i32,
}
// SAFETY: laid out as in the source.
unsafe impl Parameter for Terms {}

/// The sum of scalars times their factors.
pub fn weighted_sum(cx: &Context, stream: &Arc<Stream>, terms: &[(&Tensor, f32)]) -> Result<Tensor> {
    let mut sum = Tensor::zeros(cx, "a sum of losses", &[1], DType::F32)?;
    let to = sum.on_mut(stream)?;
    for (i, terms) in terms.chunks(TERMS).enumerate() {
        let held: Vec<Taken> = terms.iter().map(|(term, _)| term.on(cx, stream)).collect::<Result<_>>()?;
        let mut parameter = Terms {
            addresses: [0; TERMS],
            factors: [0.0; TERMS],
            count: terms.len() as i32,
            adds: i32::from(i > 0),
        };
        for (n, (taken, (_, factor))) in held.iter().zip(terms).enumerate() {
            (parameter.addresses[n], parameter.factors[n]) = (taken.address(), *factor);
        }
        // SAFETY: as the kernel declares; each address holds one number.
        unsafe { stream.launch(&KERNELS, "weighted_sum", None, Launch::blocks(1, 32), &[&parameter, &to])? };
    }
    Ok(sum)
}
