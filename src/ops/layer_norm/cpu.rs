//! Layer normalisation on the CPU: two passes over a row that lies in the first cache, and four for its gradient.

use crate::ops::kernels::{self, mul_add};

/// What every row shares.
pub struct Rows<'a> {
    /// Length of a row.
    pub channels: usize,
    /// Added to the variance.
    pub eps: f32,
    /// Weight and bias.
    pub affine: Option<(&'a [f32], &'a [f32])>,
    /// Extra factor.
    pub scale: f32,
    /// Extra summand.
    pub shift: f32,
}

/// Mean and 1 / sqrt(var + eps) of one row.
#[inline(always)]
pub fn moments<const FMA: bool>(x: &[f32], eps: f32) -> (f32, f32) {
    let count = x.len() as f32;
    let mean = kernels::sum(x) / count;
    let var = kernels::sum_squares::<FMA>(x, mean) / count;
    (mean, 1.0 / (var + eps).sqrt())
}

/// One row, of which each number comes with the place of its result.
#[inline(always)]
fn write<'a, const FMA: bool>(
    p: &Rows,
    (mean, inverse): (f32, f32),
    row: impl Iterator<Item = (f32, &'a mut f32)>,
) {
    match p.affine {
        None => {
            let factor = inverse * p.scale;
            for (x, y) in row {
                *y = mul_add::<FMA>(x - mean, factor, p.shift);
            }
        }
        Some((weight, bias)) => {
            for ((x, y), (w, b)) in row.zip(weight.iter().zip(bias)) {
                let normal = mul_add::<FMA>((x - mean) * inverse, *w, *b);
                *y = mul_add::<FMA>(normal, p.scale, p.shift);
            }
        }
    }
}

#[inline(always)]
fn body<const FMA: bool>(p: &Rows, x: &[f32], out: &mut [f32]) {
    for (x, out) in x.chunks_exact(p.channels).zip(out.chunks_exact_mut(p.channels)) {
        write::<FMA>(p, moments::<FMA>(x, p.eps), x.iter().copied().zip(out));
    }
}

kernels::per_cpu! {
    /// Normalises whole rows.
    pub fn normalize_rows(p: &Rows, x: &[f32], out: &mut [f32]) = body
}

#[inline(always)]
fn body_in_place<const FMA: bool>(p: &Rows, x: &mut [f32]) {
    for row in x.chunks_exact_mut(p.channels) {
        write::<FMA>(p, moments::<FMA>(row, p.eps), row.iter_mut().map(|y| (*y, y)));
    }
}

kernels::per_cpu! {
    /// As [`normalize_rows`], where they lie.
    pub fn normalize_rows_in_place(p: &Rows, x: &mut [f32]) = body_in_place
}

/// `dx = f (dn - mean(dn) - n mean(dn n))` with `n = (x - mean) inverse`, `dn = g w` and `f = inverse * scale`.
#[inline(always)]
fn row_gradient<const FMA: bool>(
    p: &Rows,
    x: &[f32],
    (mean, inverse): (f32, f32),
    g: &[f32],
    dx: &mut [f32],
) {
    match p.affine {
        None => dx.copy_from_slice(g),
        Some((weight, _)) => dx.iter_mut().zip(g.iter().zip(weight)).for_each(|(dn, (g, w))| *dn = g * w),
    }
    let count = x.len() as f32;
    let mean_gradient = kernels::sum(dx) / count;
    let slope = kernels::centred_dot::<FMA>(dx, x, mean) / count * (inverse * inverse);
    let factor = inverse * p.scale;
    for (dx, x) in dx.iter_mut().zip(x) {
        *dx = mul_add::<FMA>(x - mean, -slope, *dx - mean_gradient) * factor;
    }
}

#[inline(always)]
fn gradient_body<const FMA: bool>(p: &Rows, x: &[f32], g: &[f32], dx: &mut [f32], sums: &mut [f32]) {
    sums.fill(0.0);
    for (i, (x, g)) in x.chunks_exact(p.channels).zip(g.chunks_exact(p.channels)).enumerate() {
        let (mean, inverse) = moments::<FMA>(x, p.eps);
        if !sums.is_empty() {
            let (of_weight, of_bias) = sums.split_at_mut(p.channels);
            for ((w, b), (x, g)) in of_weight.iter_mut().zip(of_bias).zip(x.iter().zip(g)) {
                *w = mul_add::<FMA>((x - mean) * inverse, *g, *w);
                *b += g;
            }
        }
        if !dx.is_empty() {
            let dx = &mut dx[i * p.channels..][..p.channels];
            row_gradient::<FMA>(p, x, (mean, inverse), g, dx);
        }
    }
}

kernels::per_cpu! {
    /// The gradient `g` of whole rows becomes that of their `x`, and in `sums` `[2, C]` the sums over the rows of
    /// `g * n`, n the normalised x, and of `g`. An empty output is left out.
    pub fn gradient_rows(p: &Rows, x: &[f32], g: &[f32], dx: &mut [f32], sums: &mut [f32]) = gradient_body
}
