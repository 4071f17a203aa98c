//! Products by kernels of our own.

use super::{Parameter, Product, Stream, Tail};
use crate::device::cuda::{Launch, Precision, kernels};
use crate::error::Result;

kernels!(KERNELS, "gemm");

const THREADS: u32 = 256;

/// [`Product`] as the kernels take it.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Call {
    a: u64,
    b: u64,
    out: u64,
    m: i64,
    n: i64,
    k: i64,
    leading: [i64; 3],
    stride: [i64; 3],
    batches: i64,
    a_transposed: i32,
    b_transposed: i32,
    out_is_float: i32,
    accumulate: i32,
    alpha: f32,
    tail: Follow,
}

/// [`Tail`] as the kernels take it.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Follow {
    scale: u64,
    bias: u64,
    residual: u64,
    modulation: u64,
    rows_per_sample: i64,
    bias_is_float: i32,
    activation: i32,
    slope: f32,
    gain: f32,
}

// SAFETY: the struct of this name in gemm.cu.
unsafe impl Parameter for Call {}

impl Call {
    fn new(p: &Product) -> Self {
        let strides = p.batch.map_or([0; 3], |batch| batch.strides);
        Call {
            a: p.a.address,
            b: p.b.address,
            out: p.out.address,
            m: p.m as i64,
            n: p.n as i64,
            k: p.k as i64,
            leading: [p.a, p.b, p.out].map(|matrix| matrix.leading as i64),
            stride: strides.map(|stride| stride as i64),
            batches: p.batches() as i64,
            a_transposed: p.a.transposed.into(),
            b_transposed: p.b.transposed.into(),
            out_is_float: (p.out.precision == Precision::F32).into(),
            accumulate: p.accumulate.into(),
            alpha: p.alpha,
            tail: Follow::new(&p.tail),
        }
    }
}

impl Follow {
    fn new(tail: &Tail) -> Self {
        Follow {
            scale: tail.scale,
            bias: tail.bias.map_or(0, |(address, _)| address),
            residual: tail.residual,
            modulation: tail.modulation,
            rows_per_sample: tail.rows_per_sample as i64,
            bias_is_float: tail.bias.is_some_and(|(_, precision)| precision == Precision::F32).into(),
            activation: tail.activation.0,
            slope: tail.activation.1,
            gain: tail.gain,
        }
    }
}

/// A product with its tail.
///
/// # Safety
/// As [`Stream::multiply`].
pub unsafe fn multiply(stream: &Stream, p: &Product) -> Result<()> {
    let tiles = |side: usize| p.m.div_ceil(side) * p.n.div_ceil(side) * p.batches();
    let (name, side) = ("multiply_64", 64);
    let launch = Launch::blocks(tiles(side), THREADS);
    // SAFETY: as the kernel declares; the numbers are there by this function's contract.
    unsafe { stream.launch(&KERNELS, name, Some(p.a.precision), launch, &[&Call::new(p)]) }
}
