//! Spectral normalisation on a GPU: in F32 whatever the type of activations, since a weight that trains is.

use std::sync::Arc;

use super::Directions;
use crate::device::Context;
use crate::device::cuda::{Launch, Parameter, Precision, Stream, Taken, kernels};
use crate::error::Result;
use crate::ops::reduce::Numbers;
use crate::ops::sums;
use crate::tensor::{DType, Tensor};

kernels!(KERNELS, "spectral_norm");

/// As the source has them.
const COLUMNS: usize = 32;
const LINES: u32 = 8;
/// Threads of a block that owns a row, and of one that owns a vector.
const OF_ROW: u32 = 256;
const OF_VECTOR: u32 = 1024;
/// Keeps the length of a vector from 0.
const NORM_EPS: f32 = 1e-12;

/// A matrix and vectors on the device.
struct Work<'a> {
    cx: &'a Context,
    stream: &'a Arc<Stream>,
    weight: Taken,
    rows: usize,
    columns: usize,
}

impl<'a> Work<'a> {
    fn new(
        cx: &'a Context,
        stream: &'a Arc<Stream>,
        weight: &Tensor,
        [rows, columns]: [usize; 2],
    ) -> Result<Self> {
        let weight = weight.on_as(cx, stream, "spectral norm weight", Precision::F32)?;
        Ok(Work { cx, stream, weight, rows, columns })
    }

    /// # Safety
    /// As [`Stream::launch`].
    unsafe fn launch(&self, name: &'static str, launch: Launch, parameters: &[&dyn Parameter]) -> Result<()> {
        // SAFETY: by this function's contract.
        unsafe { self.stream.launch(&KERNELS, name, None, launch, parameters) }
    }

    /// A vector on the device.
    fn vector(&self, vector: &Tensor) -> Result<Taken> {
        vector.on_as(self.cx, self.stream, "spectral norm vector", Precision::F32)
    }

    /// For each row of `a` its product with that of `b`, or with b itself if it is one vector: `stride` is 0.
    fn rows(&self, a: &Taken, b: &Taken, stride: usize) -> Result<Tensor> {
        let mut out = Tensor::new(self.cx, "power iteration", &[self.rows], DType::F32)?;
        let to = out.on_mut(self.stream)?;
        let (columns, stride) = (self.columns as i64, stride as i64);
        // SAFETY: as the kernel declares; a has these rows, b too or one, `out` a number for each.
        unsafe {
            let launch = Launch::blocks(self.rows, OF_ROW);
            self.launch("spectral_rows", launch, &[&a.address(), &b.address(), &to, &columns, &stride])?;
        }
        Ok(out)
    }

    /// Wᵀ u.
    fn transposed_times(&self, u: &Tensor) -> Result<Tensor> {
        let (parts, u) = (sums::parts(self.rows), self.vector(u)?);
        let mut partial = Tensor::new(self.cx, "power iteration", &[parts.count, self.columns], DType::F32)?;
        let to = partial.on_mut(self.stream)?;
        let launch = Launch {
            grid: [self.columns.div_ceil(COLUMNS) as u32, parts.count as u32, 1],
            block: [COLUMNS as u32, LINES, 1],
            shared_bytes: 0,
        };
        let (rows, columns, of_part) = (self.rows as i32, self.columns as i64, parts.rows as i32);
        let parameters: [&dyn Parameter; 6] =
            [&self.weight.address(), &u.address(), &to, &rows, &columns, &of_part];
        // SAFETY: as the kernel declares; u has a number for each row, the sums as many for each part as columns.
        unsafe { self.launch("spectral_columns", launch, &parameters)? };
        match parts.count {
            1 => partial.reshape(&[self.columns]),
            _ => sums::add_parts(self.cx, "power iteration", &partial),
        }
    }

    /// x over its length.
    fn unit(&self, mut x: Tensor) -> Result<Tensor> {
        let (at, count) = (x.on_mut(self.stream)?, x.elements() as i64);
        // SAFETY: as the kernel declares; there are so many numbers.
        unsafe { self.launch("spectral_unit", Launch::blocks(1, OF_VECTOR), &[&at, &count, &NORM_EPS])? };
        Ok(x)
    }

    /// The product of two vectors, or the sum of one.
    fn dot(&self, a: &Tensor, b: Option<&Tensor>) -> Result<Numbers> {
        let out = Numbers::new(self.stream, "a product of vectors", 1)?;
        let (of_a, of_b) = (self.vector(a)?, b.map(|b| self.vector(b)).transpose()?);
        let second = of_b.as_ref().map_or(0, Taken::address);
        let (to, count) = (out.address(), a.elements() as i64);
        // SAFETY: as the kernel declares; both vectors have so many numbers.
        unsafe {
            let launch = Launch::blocks(1, OF_VECTOR);
            self.launch("spectral_dot", launch, &[&of_a.address(), &second, &to, &count])?;
        }
        Ok(out)
    }
}

/// A step of the power iteration.
pub fn iterate(
    cx: &Context,
    stream: &Arc<Stream>,
    weight: &Tensor,
    sides: [usize; 2],
    directions: &Directions,
) -> Result<Directions> {
    let work = Work::new(cx, stream, weight, sides)?;
    let v = work.unit(work.transposed_times(&directions.u)?)?;
    let u = work.unit(work.rows(&work.weight, &work.vector(&v)?, 0)?)?;
    Ok(Directions { u, v })
}

/// The weight over sigma, and sigma.
pub fn normalize(
    cx: &Context,
    stream: &Arc<Stream>,
    weight: &Tensor,
    sides: [usize; 2],
    directions: &Directions,
) -> Result<(Tensor, Numbers)> {
    let work = Work::new(cx, stream, weight, sides)?;
    let image = work.rows(&work.weight, &work.vector(&directions.v)?, 0)?;
    let sigma = work.dot(&directions.u, Some(&image))?;
    let mut out = Tensor::new(cx, "spectral norm", weight.dims(), DType::F32)?;
    let (to, by, count) = (out.on_mut(stream)?, sigma.address(), out.elements());
    // SAFETY: as the kernel declares; weight and result have so many elements.
    unsafe {
        let parameters: [&dyn Parameter; 4] = [&work.weight.address(), &by, &to, &(count as i64)];
        work.launch("spectral_scale", Launch::elements(count), &parameters)?;
    }
    Ok((out, sigma))
}

/// The gradient by the weight from g, that of the result.
pub fn gradient(
    cx: &Context,
    stream: &Arc<Stream>,
    [g, weight]: [&Tensor; 2],
    sides: [usize; 2],
    (directions, sigma): (&Directions, &Numbers),
) -> Result<Tensor> {
    let work = Work::new(cx, stream, weight, sides)?;
    let of_g = g.on_as(cx, stream, "a gradient", Precision::F32)?;
    let products = work.rows(&of_g, &work.weight, work.columns)?;
    let along = work.dot(&products, None)?;
    let mut out = Tensor::new(cx, "spectral norm gradient", weight.dims(), DType::F32)?;
    let (u, v, to) = (work.vector(&directions.u)?, work.vector(&directions.v)?, out.on_mut(stream)?);
    let (count, columns) = (out.elements(), work.columns as i64);
    let [g, u, v] = [of_g, u, v].each_ref().map(Taken::address);
    // SAFETY: as the kernel declares; g and `out` have so many elements, u and v a number for each row and column.
    unsafe {
        work.launch(
            "spectral_gradient",
            Launch::elements(count),
            &[&g, &u, &v, &sigma.address(), &along.address(), &to, &(count as i64), &columns],
        )?;
    }
    Ok(out)
}
