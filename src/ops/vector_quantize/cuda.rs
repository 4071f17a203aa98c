//! The nearest code on a GPU.

use std::sync::Arc;

use crate::device::Context;
use crate::device::cuda::{Launch, Precision, Stream, Taken, kernels};
use crate::error::{Error, Result};
use crate::tensor::Tensor;

kernels!(KERNELS, "vector_quantize");

/// As the source has them.
const ROWS: usize = 32;
const PARTS: u32 = 8;

/// A codebook on the device, `F32 [count, dim]`.
pub struct DeviceCodes {
    values: Taken,
    /// How many codes there are.
    pub count: usize,
    /// The length of a code.
    pub dim: usize,
}

impl DeviceCodes {
    /// Those of `codebook`, `[V, D]` of any float type.
    pub fn new(cx: &Context, stream: &Arc<Stream>, codebook: &Tensor) -> Result<Self> {
        let [count, dim] = codebook.dims_of("codebook")?;
        let values = codebook.on_as(cx, stream, "codebook", Precision::F32)?;
        Ok(DeviceCodes { values, count, dim })
    }

    /// Of the first number.
    pub fn address(&self) -> u64 {
        self.values.address()
    }
}

/// The number of the code nearest to each row of `x`, into `out`. `otherwise` if a row has no finite distance to any.
pub fn nearest(
    cx: &Context,
    stream: &Arc<Stream>,
    (x, codes): (&Tensor, &DeviceCodes),
    otherwise: i64,
    out: &mut Tensor,
) -> Result<()> {
    let rows = out.elements();
    if rows == 0 {
        return Ok(());
    }
    let precision = x.precision("vector to quantize")?;
    let (count, dim) = (index(codes.count)?, index(codes.dim)?);
    let (from, to) = (x.on(cx, stream)?, out.on_mut(stream)?);
    let launch =
        Launch { grid: [rows.div_ceil(ROWS) as u32, 1, 1], block: [ROWS as u32, PARTS, 1], shared_bytes: 0 };
    // SAFETY: as the kernel declares; x has a vector of `dim` numbers for each element of `out`.
    unsafe {
        stream.launch(
            &KERNELS,
            "nearest_code",
            Some(precision),
            launch,
            &[&from.address(), &codes.address(), &to, &(rows as i64), &count, &dim, &otherwise],
        )
    }
}

fn index(count: usize) -> Result<i32> {
    i32::try_from(count).map_err(|_| Error::argument("codebook", "fewer than 2^31 codes and numbers", count))
}
