//! Spectral normalisation (Miyato et al. 2018, arXiv:1802.05957): a weight over its largest singular value, which a
//! power iteration follows while training changes the weight.

mod cpu;
mod cuda;

use crate::device::Context;
use crate::error::{Error, Result};
use crate::ops::reduce::Numbers;
use crate::tensor::Tensor;
use crate::tensor::autograd::record;

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
    let _span = cx.op("spectral_norm");
    let sides = sides(weight, directions)?;
    match cx.cuda()? {
        Some(stream) => cuda::iterate(cx, stream, weight, sides, directions),
        None => cpu::Matrix::new(cx, weight, sides)?.iterate(cx, directions),
    }
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
    let _span = cx.op("spectral_norm");
    let sides = sides(weight, directions)?;
    let (out, sigma) = match cx.cuda()? {
        Some(stream) => {
            let (out, sigma) = cuda::normalize(cx, stream, weight, sides, directions)?;
            (out, Sigma::Device(sigma))
        }
        None => {
            let (out, sigma) = cpu::Matrix::new(cx, weight, sides)?.normalize(cx, directions)?;
            (out, Sigma::Host(sigma))
        }
    };
    record(cx, out, &[Some(weight)], || {
        let (weight, directions) = (weight.clone(), directions.clone());
        move |cx, flow| {
            flow.give(cx, weight.tracked(), |g| match (&sigma, cx.cuda()?) {
                (Sigma::Device(sigma), Some(stream)) => {
                    cuda::gradient(cx, stream, [g, &weight], sides, (&directions, sigma))
                }
                (Sigma::Host(sigma), None) => {
                    cpu::Matrix::new(cx, &weight, sides)?.gradient(cx, g, &directions, *sigma)
                }
                _ => Err(Error::internal("spectral norm", "its gradient is on another device")),
            })
        }
    })
}

/// The largest singular value, where it was computed.
enum Sigma {
    Host(f64),
    Device(Numbers),
}

/// Rows and columns of the matrix, which the vectors fit.
fn sides(weight: &Tensor, directions: &Directions) -> Result<[usize; 2]> {
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
    Ok([rows, columns])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cuda::Precision;
    use crate::ops::check;
    use crate::tensor::DType;

    fn directions(rows: usize, columns: usize) -> Directions {
        let [u, v] =
            [(rows, 11), (columns, 12)].map(|(n, seed)| cpu::unit(check::random(&[n], seed)).unwrap());
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
            for start in [&start, &settled] {
                on_device(&weight, start);
            }
        }
    }

    /// Weight and directions are `F32` there even where activations are not.
    fn on_device(weight: &Tensor, start: &Directions) {
        let op = |cx: &Context, weight: &Tensor, start: &Directions| {
            let found = power_iteration(cx, weight, start).unwrap();
            let normal = spectral_norm(cx, weight, &found).unwrap();
            [found.u, found.v, normal]
        };
        let expected = op(&check::cx(), weight, start);
        for precision in [Precision::F32, Precision::BF16] {
            let Some(cx) = check::cuda(precision) else { return };
            let [weight, u, v] = [weight, &start.u, &start.v].map(|x| check::moved(&cx, x));
            let stream = cx.cuda().unwrap().unwrap().clone();
            let before = stream.downloads();
            let found = op(&cx, &weight, &Directions { u, v });
            assert_eq!(stream.downloads(), before, "the host read from the device");
            for (found, expected) in found.iter().zip(&expected) {
                check::close(found, expected.dims(), &check::wide(expected), 2e-6);
            }
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
            check::gradients_on_device(std::slice::from_ref(&weight), |cx, x| {
                let [u, v] = [&settled.u, &settled.v].map(|x| check::moved(cx, x));
                spectral_norm(cx, &x[0], &Directions { u, v })
            });
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
