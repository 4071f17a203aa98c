//! Layer normalisation on the CPU: two passes over a row that lies in the first cache.

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

#[inline(always)]
fn body<const FMA: bool>(p: &Rows, x: &[f32], out: &mut [f32]) {
    for (x, out) in x.chunks_exact(p.channels).zip(out.chunks_exact_mut(p.channels)) {
        let (mean, inverse) = moments::<FMA>(x, p.eps);
        match p.affine {
            None => {
                let factor = inverse * p.scale;
                for (y, x) in out.iter_mut().zip(x) {
                    *y = mul_add::<FMA>(x - mean, factor, p.shift);
                }
            }
            Some((weight, bias)) => {
                for ((y, x), (w, b)) in out.iter_mut().zip(x).zip(weight.iter().zip(bias)) {
                    let normal = mul_add::<FMA>((x - mean) * inverse, *w, *b);
                    *y = mul_add::<FMA>(normal, p.scale, p.shift);
                }
            }
        }
    }
}

kernels::per_cpu! {
    /// Normalises whole rows.
    pub fn normalize_rows(p: &Rows, x: &[f32], out: &mut [f32]) = body
}
