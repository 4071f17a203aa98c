//! Spectral normalisation (Miyato et al. 2018, arXiv:1802.05957): a weight over its largest singular value, which a
//! power iteration follows while training changes the weight.

use crate::device::Context;
use crate::device::scratch::Doubles;
use crate::error::{Error, Result};
use crate::ops::kernels::{self, mul_add, per_cpu};
use crate::simd_dispatch;
use crate::tensor::autograd::record;
use crate::tensor::{DType, Tensor};

/// Keeps the length of a vector from 0.
const NORM_EPS: f32 = 1e-12;

/// Columns of one task: their sums stay in the L1 cache.
const COLUMNS: usize = 512;

/// What a power iteration knows of the largest singular value of W: about its left and right singular vectors.
#[derive(Debug, Clone)]
pub struct Directions {
    /// `F32 [O]`, of length 1.
    pub u: Tensor,
    /// `F32 [I]`, of length 1.
    pub v: Tensor,
}

/// One step of the power iteration: `v = Wᵀu / |Wᵀu|`, then `u = Wv / |Wv|`. No tape knows of it.
///
/// # Shapes
/// `weight` `[O, ..]` of any float type, as the matrix W `[O, I]`.
///
/// # Errors
/// `InvalidArgument` if the vector does not fit; `OutOfMemory`; `Cancelled`.
pub fn power_iteration(cx: &Context, weight: &Tensor, directions: &Directions) -> Result<Directions> {
    let matrix = Matrix::new(cx, weight, directions)?;
    let v = unit(matrix.transposed_times(cx, directions.u.slice()?)?)?;
    let u = unit(matrix.times(cx, v.slice()?)?)?;
    Ok(Directions { u, v })
}

/// `weight / sigma`, `sigma = uᵀ W v`. The gradient takes u and v as constant:
/// `dW = (g - (g . W) / sigma * u vᵀ) / sigma`.
///
/// # Shapes
/// `weight` `[O, ..]` of any float type, as the matrix W `[O, I]`; the result of its shape, `F32`.
///
/// # Errors
/// `InvalidArgument` if the vectors do not fit; `OutOfMemory`; `Cancelled`.
pub fn spectral_norm(cx: &Context, weight: &Tensor, directions: &Directions) -> Result<Tensor> {
    let matrix = Matrix::new(cx, weight, directions)?;
    let image = matrix.times(cx, directions.v.slice()?)?;
    let sigma: f64 = dot64(directions.u.slice()?, image.slice()?);
    let scale = (1.0 / sigma) as f32;
    let values = matrix.values.slice::<f32>()?;
    let mut out = Tensor::new(cx, "spectral norm", weight.dims(), DType::F32)?;
    let chunk = kernels::rows_per_task(1);
    kernels::parallel_chunks(cx, out.slice_mut()?, chunk, |i, part| {
        scaled(&values[i * chunk..][..part.len()], scale, part);
    })?;
    let wide = matrix.values.clone();
    record(cx, out, &[Some(&wide)], || {
        let directions = directions.clone();
        move |cx, flow| flow.give(cx, matrix.values.tracked(), |g| matrix.gradient(cx, g, &directions, sigma))
    })
}

/// A weight as a matrix.
struct Matrix {
    /// `F32`.
    values: Tensor,
    rows: usize,
    columns: usize,
}

impl Matrix {
    fn new(cx: &Context, weight: &Tensor, directions: &Directions) -> Result<Self> {
        let rows = weight.dims().first().copied().unwrap_or(0);
        if rows == 0 || weight.elements() == 0 {
            return Err(Error::argument("spectral norm weight", "[O, ..] with elements", weight.shape()));
        }
        let columns = weight.elements() / rows;
        for (what, vector, count) in [("u", &directions.u, rows), ("v", &directions.v, columns)] {
            if vector.elements() != count {
                let expected = format!("{count} elements of {what}");
                return Err(Error::argument("spectral norm", expected, vector.shape()));
            }
        }
        Ok(Matrix { values: kernels::widened(cx, "spectral norm weight", weight)?, rows, columns })
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

    fn gradient(&self, cx: &Context, g: &Tensor, directions: &Directions, sigma: f64) -> Result<Tensor> {
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
fn unit(mut x: Tensor) -> Result<Tensor> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check;

    fn directions(rows: usize, columns: usize) -> Directions {
        let [u, v] = [(rows, 11), (columns, 12)].map(|(n, seed)| unit(check::random(&[n], seed)).unwrap());
        Directions { u, v }
    }

    /// W v and Wᵀ u.
    fn products(w: &[f64], u: &[f64], v: &[f64]) -> [Vec<f64>; 2] {
        let (rows, columns) = (u.len(), v.len());
        let times = (0..rows).map(|r| (0..columns).map(|c| w[r * columns + c] * v[c]).sum()).collect();
        let transposed = (0..columns).map(|c| (0..rows).map(|r| w[r * columns + c] * u[r]).sum()).collect();
        [times, transposed]
    }

    fn unit_vector(x: &[f64]) -> Vec<f64> {
        let norm = x.iter().map(|x| x * x).sum::<f64>().sqrt();
        x.iter().map(|x| x / norm).collect()
    }

    fn normalised(w: &[f64], directions: &Directions) -> Vec<f64> {
        let (u, v) = (check::wide(&directions.u), check::wide(&directions.v));
        let sigma: f64 = products(w, &u, &v)[0].iter().zip(&u).map(|(a, b)| a * b).sum();
        w.iter().map(|w| w / sigma).collect()
    }

    #[test]
    fn agrees_with_the_definition() {
        for (dims, dtype) in [
            (&[1usize, 1][..], DType::F32),
            (&[5, 3, 3, 3], DType::F16),
            (&[33, 700], DType::BF16),
            (&[70, 130, 3, 3], DType::F32),
        ] {
            let weight = check::cast(&check::random(dims, 1), dtype);
            let columns = weight.elements() / dims[0];
            let start = directions(dims[0], columns);
            let (w, u) = (check::wide(&weight), check::wide(&start.u));
            let v = unit_vector(&products(&w, &u, &check::wide(&start.v))[1]);
            let found = check::on_threads(|cx| Ok(power_iteration(cx, &weight, &start)?.v));
            check::close(&found, &[columns], &v, 1e-6);
            let u = unit_vector(&products(&w, &u, &v)[0]);
            let found = check::on_threads(|cx| Ok(power_iteration(cx, &weight, &start)?.u));
            check::close(&found, &[dims[0]], &u, 1e-6);
            // After a step sigma is no small difference of large numbers.
            let settled = power_iteration(&check::cx(), &weight, &start).unwrap();
            let found = check::on_threads(|cx| spectral_norm(cx, &weight, &settled));
            check::close(&found, dims, &normalised(&w, &settled), 2e-6);
        }
    }

    #[test]
    fn iterations_find_the_largest_singular_value() {
        let cx = check::cx();
        let weight = Tensor::from_slice(&[2, 3], &[3f32, 0.0, 0.0, 0.0, 2.0, 0.0]).unwrap();
        let mut found = directions(2, 3);
        for _ in 0..40 {
            found = power_iteration(&cx, &weight, &found).unwrap();
        }
        check::close(
            &spectral_norm(&cx, &weight, &found).unwrap(),
            &[2, 3],
            &[1.0, 0.0, 0.0, 0.0, 2.0 / 3.0, 0.0],
            1e-6,
        );
    }

    #[test]
    fn gradients_are_those_of_the_definition() {
        for (dims, dtype) in
            [(&[1usize, 1][..], DType::F32), (&[3, 2, 3, 3], DType::F32), (&[4, 5], DType::BF16)]
        {
            let weight = check::cast(&check::random(dims, 1), dtype);
            let start = directions(dims[0], weight.elements() / dims[0]);
            let settled = power_iteration(&check::cx(), &weight, &start).unwrap();
            check::gradients(
                &[weight],
                |cx, x| spectral_norm(cx, &x[0], &settled),
                |x| normalised(&x[0], &settled),
            );
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let (cx, weight) = (check::cx(), check::random(&[2, 3], 1));
        assert!(spectral_norm(&cx, &weight, &directions(3, 2)).is_err());
        assert!(power_iteration(&cx, &weight, &directions(2, 2)).is_err());
        assert!(spectral_norm(&cx, &check::random(&[0, 3], 1), &directions(1, 3)).is_err());
    }
}
