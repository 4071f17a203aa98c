//! The nearest row of a codebook (van den Oord et al. 2017).

pub(crate) mod cpu;
pub(crate) mod cuda;

use crate::device::Context;
use crate::error::{Error, Result};
use crate::ops::kernels;
use crate::ops::work;
use crate::tensor::autograd::refuse;
use crate::tensor::{DType, Tensor};

/// A codebook laid out for the kernel: `[D, V]`, V filled up to whole blocks with codes at infinity.
pub(crate) struct Codes {
    values: Tensor,
    count: usize,
}

impl Codes {
    /// Lays out `codebook`, `[V, D]` of any float type.
    pub fn new(cx: &Context, codebook: &Tensor) -> Result<Self> {
        let [count, dim] = check(cx, codebook)?;
        let wide = kernels::widened(cx, "codebook", codebook)?;
        let source = wide.slice::<f32>()?;
        let padded = count.next_multiple_of(cpu::BLOCK);
        let mut values = Tensor::new(cx, "codebook", &[dim, padded], DType::F32)?;
        kernels::parallel_chunks(cx, values.slice_mut()?, padded, |d, part| {
            part.fill(f32::INFINITY);
            for (value, code) in part.iter_mut().zip(source.chunks_exact(dim)) {
                *value = code[d];
            }
        })?;
        Ok(Codes { values, count })
    }

    /// How many codes there are.
    pub fn count(&self) -> usize {
        self.count
    }

    /// The length of a code.
    pub fn dim(&self) -> usize {
        self.values.dims()[0]
    }

    /// The codes as the kernel reads them, and the length of each of the D rows.
    pub fn table(&self) -> Result<(&[f32], usize)> {
        Ok((self.values.slice()?, self.values.dims()[1]))
    }
}

/// The number and the length of codes.
pub(crate) fn check(cx: &Context, codebook: &Tensor) -> Result<[usize; 2]> {
    refuse(cx, "codebook", &[codebook])?;
    let [count, dim] = codebook.dims_of::<2>("codebook")?;
    if count == 0 || dim == 0 {
        return Err(Error::argument("codebook", "at least one code", codebook.shape()));
    }
    Ok([count, dim])
}

/// `argmin over v of sum over d of (x[.., d] - codebook[v, d])^2`; the lowest v of equally near ones.
///
/// # Shapes
/// `x` `[.., D]`; `codebook` `[V, D]`, of any float type; the result `[..]`, `I64`.
///
/// # Errors
/// `InvalidArgument` if shapes do not fit or the codebook is empty.
pub fn nearest(cx: &Context, x: &Tensor, codebook: &Tensor) -> Result<Tensor> {
    let _span = cx.op("vector_quantize").working(|| work::multiplying(x.shape().rows(), &[codebook], &[x]));
    refuse(cx, "nearest code", &[x])?;
    let [_, dim] = check(cx, codebook)?;
    let Some((&last, outer)) = x.dims().split_last().filter(|(last, _)| **last == dim) else {
        return Err(Error::argument("vector to quantize", format!("[.., {dim}]"), x.shape()));
    };
    let mut out = Tensor::new(cx, "codes", outer, DType::I64)?;
    if let Some(stream) = cx.cuda()? {
        let codes = cuda::DeviceCodes::new(cx, stream, codebook)?;
        cuda::nearest(cx, stream, (x, &codes), 0, &mut out)?;
        return Ok(out);
    }
    let codes = Codes::new(cx, codebook)?;
    let input = x.slice::<f32>()?;
    let (table, row) = codes.table()?;
    let chunk = kernels::rows_per_task(codes.count());
    kernels::parallel_chunks(cx, out.slice_mut::<i64>()?, chunk, |i, part| {
        for (code, vector) in part.iter_mut().zip(input[i * chunk * last..].chunks_exact(last)) {
            *code = cpu::nearest(vector, table, row);
        }
    })?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cuda::Precision;
    use crate::ops::check;
    use crate::tensor::autograd::{Tape, leaf};

    #[test]
    fn agrees_with_the_definition() {
        for (dims, v, dtype) in [
            (&[1usize, 1][..], 1usize, DType::F32),
            (&[3, 5, 7, 4], 130, DType::F32),
            (&[2, 65, 3], 64, DType::F16),
            (&[2, 3, 33], 1000, DType::BF16),
        ] {
            let d = dims[dims.len() - 1];
            let x = check::random(dims, 1);
            let codebook = check::cast(&check::random(&[v, d], 2), dtype);
            let found = check::on_batch(&x, |cx, x, _, _| nearest(cx, x, &codebook));
            assert_eq!(found.dims(), &dims[..dims.len() - 1]);
            let (wide, codes) = (check::wide(&x), check::wide(&codebook));
            for (x, &id) in wide.chunks(d).zip(found.slice::<i64>().unwrap()) {
                let distance = |v: usize| -> f64 {
                    x.iter().zip(&codes[v * d..][..d]).map(|(a, b)| (a - b).powi(2)).sum()
                };
                let best = (0..v).map(distance).fold(f64::MAX, f64::min);
                assert!(distance(id as usize) <= best + 1e-5 * best.max(1e-3));
            }
        }
    }

    #[test]
    fn a_gpu_finds_the_same() {
        for (dims, v) in
            [(&[1usize, 1][..], 1usize), (&[3, 5, 7, 4], 1300), (&[2, 65, 11], 64), (&[3, 2500], 9)]
        {
            let d = dims[dims.len() - 1];
            let inputs = [&check::random(dims, 1), &check::random(&[v, d], 2)];
            check::on_device(&inputs, &[(Precision::F32, 0.0)], |cx, t| nearest(cx, &t[0], &t[1]));
        }
        let Some(cx) = check::cuda(Precision::BF16) else { return };
        let x = check::cast(&check::random(&[40, 4], 1), DType::BF16);
        let codebook = check::random(&[300, 4], 2);
        let expected =
            nearest(&check::cx(), &kernels::widened(&check::cx(), "x", &x).unwrap(), &codebook).unwrap();
        let found = nearest(&cx, &check::moved(&cx, &x), &codebook).unwrap();
        assert!(found.bytes().unwrap() == expected.bytes().unwrap());
    }

    #[test]
    fn tracked_inputs_are_refused() {
        let (cx, x) = (check::cx(), check::random(&[3, 2], 1));
        let (recording, tracked) = (Tape::new().attach(&cx), leaf(&x, 0));
        assert!(nearest(&recording, &x, &tracked).is_err());
        assert!(nearest(&recording, &tracked, &x).is_err());
        assert!(nearest(&recording, &tracked.constant(), &x).is_ok());
        assert!(nearest(&cx, &tracked, &tracked).is_ok());
    }

    #[test]
    fn the_first_of_equal_codes_wins() {
        let v = 200;
        let mut values = vec![3f32; v];
        for i in [77, 78, 141, 199] {
            values[i] = 1.0;
        }
        let codebook = Tensor::from_slice(&[v, 1], &values).unwrap();
        let x = Tensor::from_slice(&[3, 1], &[1f32, 2.0, f32::NAN]).unwrap();
        let found = check::on_threads(|cx| nearest(cx, &x, &codebook));
        assert_eq!(found.slice::<i64>().unwrap(), [77, 0, 0]);
        assert!(nearest(&check::cx(), &check::random(&[3, 2], 1), &codebook).is_err());
    }
}
