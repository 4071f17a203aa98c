//! Spectral normalisation on the CPU.

use super::Directions;
use crate::device::Context;
use crate::device::scratch::Doubles;
use crate::error::Result;
use crate::ops::kernels::{self, mul_add, per_cpu};
use crate::simd_dispatch;
use crate::tensor::{DType, Tensor};

/// Keeps the length of a vector from 0.
const NORM_EPS: f32 = 1e-12;

/// Columns of one task: their sums stay in the L1 cache.
const COLUMNS: usize = 512;

/// A weight as a matrix.
pub struct Matrix {
    /// `F32`.
    values: Tensor,
    rows: usize,
    columns: usize,
}

impl Matrix {
    pub fn new(cx: &Context, weight: &Tensor, [rows, columns]: [usize; 2]) -> Result<Self> {
        Ok(Matrix { values: kernels::widened(cx, "spectral norm weight", weight)?, rows, columns })
    }

    /// A step of the power iteration.
    pub fn iterate(&self, cx: &Context, directions: &Directions) -> Result<Directions> {
        let v = unit(self.transposed_times(cx, directions.u.slice()?)?)?;
        let u = unit(self.times(cx, v.slice()?)?)?;
        Ok(Directions { u, v })
    }

    /// W / sigma, and sigma.
    pub fn normalize(&self, cx: &Context, directions: &Directions) -> Result<(Tensor, f64)> {
        let image = self.times(cx, directions.v.slice()?)?;
        let sigma: f64 = dot64(directions.u.slice()?, image.slice()?);
        let scale = (1.0 / sigma) as f32;
        let values = self.values.slice::<f32>()?;
        let mut out = Tensor::new(cx, "spectral norm", self.values.dims(), DType::F32)?;
        let chunk = kernels::rows_per_task(1);
        kernels::parallel_chunks(cx, out.slice_mut()?, chunk, |i, part| {
            scaled(&values[i * chunk..][..part.len()], scale, part);
        })?;
        Ok((out, sigma))
    }

    /// W v.
    fn times(&self, cx: &Context, v: &[f32]) -> Result<Tensor> {
        let values = self.values.slice::<f32>()?;
        let mut out = Tensor::new(cx, "power iteration", &[self.rows], DType::F32)?;
        let chunk = kernels::rows_per_task(self.columns);
        kernels::parallel_chunks(cx, out.slice_mut::<f32>()?, chunk, |i, part| {
            let rows = values[i * chunk * self.columns..].chunks_exact(self.columns);
            part.iter_mut().zip(rows).for_each(|(out, row)| *out = dot(row, v));
        })?;
        Ok(out)
    }

    /// Wᵀ u, each element summed from the first row to the last.
    fn transposed_times(&self, cx: &Context, u: &[f32]) -> Result<Tensor> {
        let values = self.values.slice::<f32>()?;
        let mut out = Tensor::new(cx, "power iteration", &[self.columns], DType::F32)?;
        kernels::parallel_chunks(cx, out.slice_mut::<f32>()?, COLUMNS, |i, part| {
            part.fill(0.0);
            for (row, factor) in values.chunks_exact(self.columns).zip(u) {
                add_scaled(&row[i * COLUMNS..][..part.len()], *factor, part);
            }
        })?;
        Ok(out)
    }

    /// `(g - (g . W) / sigma * u vᵀ) / sigma`.
    pub fn gradient(&self, cx: &Context, g: &Tensor, directions: &Directions, sigma: f64) -> Result<Tensor> {
        let (g, w) = (g.slice::<f32>()?, self.values.slice::<f32>()?);
        let (u, v) = (directions.u.slice::<f32>()?, directions.v.slice::<f32>()?);
        let columns = self.columns;
        let mut products = Doubles::new(cx.device(), "spectral norm gradient", self.rows)?;
        let chunk = kernels::rows_per_task(columns);
        kernels::parallel_chunks(cx, products.values_mut(), chunk, |i, part| {
            for (row, out) in (i * chunk..).zip(part) {
                let range = row * columns..(row + 1) * columns;
                *out = f64::from(dot(&g[range.clone()], &w[range]));
            }
        })?;
        let along: f64 = products.values().iter().sum::<f64>() / sigma;
        let mut out = Tensor::new(cx, "spectral norm gradient", self.values.dims(), DType::F32)?;
        kernels::parallel_chunks(cx, out.slice_mut::<f32>()?, chunk * columns, |i, part| {
            for (row, out) in (i * chunk..).zip(part.chunks_exact_mut(columns)) {
                let factor = -(along * f64::from(u[row]) / sigma) as f32;
                scaled(&g[row * columns..][..columns], (1.0 / sigma) as f32, out);
                add_scaled(v, factor, out);
            }
        })?;
        Ok(out)
    }
}

/// x / max(|x|, eps), for a vector that nobody shares.
pub fn unit(mut x: Tensor) -> Result<Tensor> {
    let values = x.slice_mut::<f32>()?;
    let norm = dot64(values, values).sqrt() as f32;
    values.iter_mut().for_each(|value| *value /= norm.max(NORM_EPS));
    Ok(x)
}

/// The inner product of short vectors, in f64.
fn dot64(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

#[inline(always)]
fn dot_body<const FMA: bool>(a: &[f32], b: &[f32]) -> f32 {
    kernels::dot::<FMA>(a, b)
}

per_cpu! {
    fn dot(a: &[f32], b: &[f32]) -> f32 = dot_body
}

simd_dispatch! {
    /// sums += factor x.
    fn add_scaled<const FMA: bool>(x: &[f32], factor: f32, sums: &mut [f32]) {
        sums.iter_mut().zip(x).for_each(|(sum, x)| *sum = mul_add::<FMA>(factor, *x, *sum));
    }
}

simd_dispatch! {
    /// out = factor x.
    fn scaled<const FMA: bool>(x: &[f32], factor: f32, out: &mut [f32]) {
        out.iter_mut().zip(x).for_each(|(out, x)| *out = factor * x);
    }
}
