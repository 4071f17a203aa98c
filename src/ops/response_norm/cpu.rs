//! Global response normalisation on the CPU.

use crate::ops::kernels::{self, mul_add, per_cpu};

/// Added to the mean norm.
const EPS: f32 = 1e-6;

#[inline(always)]
fn sum_squares_body<const FMA: bool>(rows: &[f32], sums: &mut [f32]) {
    sums.fill(0.0);
    for row in rows.chunks_exact(sums.len()) {
        for (sum, v) in sums.iter_mut().zip(row) {
            *sum = mul_add::<FMA>(*v, *v, *sum);
        }
    }
}

per_cpu! {
    /// The sum over rows of the squares, column by column.
    pub fn sum_squares(rows: &[f32], sums: &mut [f32]) = sum_squares_body
}

#[inline(always)]
fn finish_body<const FMA: bool>(factors: &mut [f32], gamma: &[f32]) {
    factors.iter_mut().for_each(|v| *v = v.sqrt());
    let inverse = 1.0 / (kernels::sum(factors) / factors.len() as f32 + EPS);
    for (v, gamma) in factors.iter_mut().zip(gamma) {
        *v = mul_add::<FMA>(*v * inverse, *gamma, 1.0);
    }
}

per_cpu! {
    /// Sums of squares become `gamma * Nx + 1`.
    pub fn finish(factors: &mut [f32], gamma: &[f32]) = finish_body
}

#[inline(always)]
fn scale_body<const FMA: bool>(row: &mut [f32], factor: &[f32], beta: &[f32]) {
    for (v, (factor, beta)) in row.iter_mut().zip(factor.iter().zip(beta)) {
        *v = mul_add::<FMA>(*v, *factor, *beta);
    }
}

per_cpu! {
    /// `x * factor + beta` in place.
    pub fn scale(row: &mut [f32], factor: &[f32], beta: &[f32]) = scale_body
}
