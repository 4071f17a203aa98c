//! Global response normalisation on the CPU.

use crate::ops::kernels::{self, mul_add, per_cpu};

/// Added to the mean norm.
pub const EPS: f32 = 1e-6;

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

#[inline(always)]
fn gradient_sums_body<const FMA: bool>(rows: &[f32], g: &[f32], sums: &mut [f32]) {
    sums.fill(0.0);
    let channels = sums.len() / 3;
    let (squares, rest) = sums.split_at_mut(channels);
    let (products, plain) = rest.split_at_mut(channels);
    for (row, g) in rows.chunks_exact(channels).zip(g.chunks_exact(channels)) {
        let sums = squares.iter_mut().zip(products.iter_mut().zip(plain.iter_mut()));
        for ((square, (product, plain)), (v, g)) in sums.zip(row.iter().zip(g)) {
            *square = mul_add::<FMA>(*v, *v, *square);
            *product = mul_add::<FMA>(*v, *g, *product);
            *plain += g;
        }
    }
}

per_cpu! {
    /// The sums over rows of `x^2`, `x g` and `g`, `[3, C]`, column by column.
    pub fn gradient_sums(rows: &[f32], g: &[f32], sums: &mut [f32]) = gradient_sums_body
}

#[inline(always)]
fn finish_gradient_body<const FMA: bool>(sums: &mut [f32], gamma: &[f32]) {
    let channels = gamma.len();
    let (norms, rest) = sums.split_at_mut(channels);
    let (products, rest) = rest.split_at_mut(channels);
    let factors = &mut rest[channels..];
    norms.iter_mut().for_each(|v| *v = v.sqrt());
    let inverse = 1.0 / (kernels::sum(norms) / channels as f32 + EPS);
    // Of the mean of the norms: `- mean over c of dN[c] N[c] / m`.
    let mut of_mean = 0f64;
    for ((norm, product), gamma) in norms.iter().zip(products.iter()).zip(gamma) {
        of_mean += f64::from(gamma * product) * f64::from(norm * inverse);
    }
    let of_mean = (of_mean / channels as f64) as f32;
    for ((norm, product), (factor, gamma)) in
        norms.iter_mut().zip(products).zip(factors.iter_mut().zip(gamma))
    {
        let response = *norm * inverse;
        let of_norm = (gamma * *product - of_mean) * inverse;
        let slope = if *norm > 0.0 { of_norm / *norm } else { 0.0 };
        (*norm, *product, *factor) = (slope, *product * response, mul_add::<FMA>(response, *gamma, 1.0));
    }
}

per_cpu! {
    /// `[4, C]`, of which the first three are the [`gradient_sums`] of a sample, becomes `dG / G`, the sample's part
    /// of the gradient of gamma, that of beta, and `gamma * Nx + 1`.
    pub fn finish_gradient(sums: &mut [f32], gamma: &[f32]) = finish_gradient_body
}

#[inline(always)]
fn gradient_body<const FMA: bool>(row: &[f32], g: &[f32], of_sample: &[f32], dx: &mut [f32]) {
    let (slope, factor) = (&of_sample[..row.len()], &of_sample[3 * row.len()..]);
    for ((dx, (x, g)), (factor, slope)) in dx.iter_mut().zip(row.iter().zip(g)).zip(factor.iter().zip(slope))
    {
        *dx = mul_add::<FMA>(*g, *factor, x * slope);
    }
}

per_cpu! {
    /// `g * factor + x * slope`, with what [`finish_gradient`] left of the sample.
    pub fn gradient(row: &[f32], g: &[f32], of_sample: &[f32], dx: &mut [f32]) = gradient_body
}
