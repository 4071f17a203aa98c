//! The contrastive loss on a GPU.

use std::sync::Arc;

use super::LEAST_LENGTH;
use crate::device::Context;
use crate::device::cuda::{Launch, Matrix, Parameter, Precision, Product, Stream, Tail, kernels};
use crate::error::Result;
use crate::ops::sums;
use crate::tensor::{DType, Tensor};

kernels!(KERNELS, "contrast");

const THREADS: u32 = 256;

/// Numbers of a row's record in the source.
const ROW: usize = 4;

/// Rows of length 1, and what divided them.
struct Directions {
    rows: Tensor,
    lengths: Tensor,
}

impl Directions {
    fn of(cx: &Context, stream: &Arc<Stream>, x: &Tensor) -> Result<Self> {
        let [count, width] = x.dims_of("contrasted rows")?;
        let precision = x.precision("contrasted rows")?;
        let mut rows = Tensor::new(cx, "directions", x.dims(), DType::F32)?;
        let mut lengths = Tensor::new(cx, "lengths", &[count], DType::F32)?;
        let (from, rows_at, lengths_at) = (x.on(cx, stream)?, rows.on_mut(stream)?, lengths.on_mut(stream)?);
        let parameters: [&dyn Parameter; 5] =
            [&from.address(), &rows_at, &lengths_at, &(width as i32), &(LEAST_LENGTH as f32)];
        let launch = Launch::blocks(count, THREADS);
        // SAFETY: as the kernel declares; a length and `width` numbers for each row.
        unsafe { stream.launch(&KERNELS, "contrast_directions", Some(precision), launch, &parameters)? };
        Ok(Directions { rows, lengths })
    }

    /// The gradient by x from `g`, that by the direction.
    fn gradient(&self, cx: &Context, stream: &Arc<Stream>, mut g: Tensor) -> Result<Tensor> {
        let [count, width] = g.dims_of("contrasted rows")?;
        let (rows, lengths) = (self.rows.on(cx, stream)?, self.lengths.on(cx, stream)?);
        let to = g.on_mut(stream)?;
        let parameters: [&dyn Parameter; 4] = [&to, &rows.address(), &lengths.address(), &(width as i32)];
        // SAFETY: as the kernel declares; g has as many rows, of as many numbers.
        unsafe {
            stream.launch(&KERNELS, "contrast_across", None, Launch::blocks(count, THREADS), &parameters)?;
        }
        Ok(g)
    }
}

/// `op(a) b` or `op(a) b^T` of matrices of F32, to `out`; each matrix with whether it is transposed.
fn product(
    cx: &Context,
    stream: &Arc<Stream>,
    [(a, a_transposed), (b, b_transposed)]: [(&Tensor, bool); 2],
    out: (u64, [usize; 2]),
) -> Result<()> {
    let (a_held, b_held) = (a.on(cx, stream)?, b.on(cx, stream)?);
    let matrix = |address: u64, x: &Tensor, transposed: bool| Matrix {
        address,
        precision: Precision::F32,
        leading: x.shape().channels(),
        transposed,
    };
    let (address, [m, n]) = out;
    let product = Product {
        m,
        n,
        k: a.dims()[usize::from(!a_transposed)],
        a: matrix(a_held.address(), a, a_transposed),
        b: matrix(b_held.address(), b, b_transposed),
        out: Matrix { address, precision: Precision::F32, leading: n, transposed: false },
        alpha: 1.0,
        accumulate: false,
        batch: None,
        tail: Tail::default(),
    };
    // SAFETY: the matrices are F32 and of these sizes, as the callers made them.
    unsafe { stream.multiply(&product) }
}

/// What the backward pass needs.
pub struct Kept {
    images: Directions,
    texts: Directions,
    log_temperature: Tensor,
    /// Products of the directions, and their transpose: `[2, N, N]`.
    products: Tensor,
    /// What the rows of both are.
    rows: Tensor,
}

/// Loss and accuracy, `[1]` each, and what the backward pass needs.
pub fn loss(
    cx: &Context,
    stream: &Arc<Stream>,
    [images, texts]: [&Tensor; 2],
    log_temperature: &Tensor,
) -> Result<([Tensor; 2], Kept)> {
    let count = images.dims()[0];
    let [images, texts] = [Directions::of(cx, stream, images)?, Directions::of(cx, stream, texts)?];
    let mut products = Tensor::new(cx, "logits", &[2, count, count], DType::F32)?;
    let mut rows = Tensor::new(cx, "rows of logits", &[2, count, ROW], DType::F32)?;
    let mut found = Tensor::new(cx, "a contrastive loss", &[2], DType::F32)?;
    let products_at = products.on_mut(stream)?;
    let across_at = products_at + (count * count * size_of::<f32>()) as u64;
    for (a, b, to) in [(&images, &texts, products_at), (&texts, &images, across_at)] {
        product(cx, stream, [(&a.rows, false), (&b.rows, true)], (to, [count, count]))?;
    }
    let log = log_temperature.on_as(cx, stream, "log temperature", Precision::F32)?;
    let (rows_at, found_at, width) = (rows.on_mut(stream)?, found.on_mut(stream)?, count as i32);
    let of_rows = Launch { grid: [count as u32, 2, 1], ..Launch::blocks(1, THREADS) };
    // SAFETY: as the kernels declare; two matrices of so many rows and columns, a record for each row, two numbers.
    unsafe {
        let parameters: [&dyn Parameter; 4] = [&products_at, &log.address(), &rows_at, &width];
        stream.launch(&KERNELS, "contrast_rows", None, of_rows, &parameters)?;
        let parameters: [&dyn Parameter; 3] = [&rows_at, &found_at, &width];
        stream.launch(&KERNELS, "contrast_loss", None, Launch::blocks(1, THREADS), &parameters)?;
    }
    let kept = Kept { images, texts, log_temperature: log_temperature.constant(), products, rows };
    Ok(([found.narrow(0, 1)?, found.narrow(1, 1)?], kept))
}

impl Kept {
    /// The gradients by the products of the directions, `[N, N]`, and by the logarithm of the temperature, `[1]`, under
    /// that of the loss.
    pub fn by_products(&self, cx: &Context, stream: &Arc<Stream>, g: &Tensor) -> Result<[Tensor; 2]> {
        let count = self.products.dims()[1];
        let mut out = Tensor::new(cx, "gradient of products", &[count, count], DType::F32)?;
        let mut parts = Tensor::new(cx, "gradient of a temperature", &[count, 1], DType::F32)?;
        let (products, rows) = (self.products.on(cx, stream)?, self.rows.on(cx, stream)?);
        let log = self.log_temperature.on_as(cx, stream, "log temperature", Precision::F32)?;
        let (g, to, parts_at) = (g.on(cx, stream)?, out.on_mut(stream)?, parts.on_mut(stream)?);
        // SAFETY: as the kernel declares; so many rows and columns, a record for each row of both matrices.
        unsafe {
            stream.launch(
                &KERNELS,
                "contrast_gradient",
                None,
                Launch::blocks(count, THREADS),
                &[
                    &products.address(),
                    &log.address(),
                    &rows.address(),
                    &g.address(),
                    &to,
                    &parts_at,
                    &(count as i32),
                ],
            )?;
        }
        Ok([out, sums::columns_on(cx, stream, "gradient of a temperature", &parts)?])
    }

    /// The gradient by the images from that by the products.
    pub fn by_images(&self, cx: &Context, stream: &Arc<Stream>, by_products: &Tensor) -> Result<Tensor> {
        let mut g = Tensor::new(cx, "gradient of directions", self.images.rows.dims(), DType::F32)?;
        let (to, sizes) = (g.on_mut(stream)?, g.dims_of("directions")?);
        product(cx, stream, [(by_products, false), (&self.texts.rows, false)], (to, sizes))?;
        self.images.gradient(cx, stream, g)
    }

    /// The gradient by the texts from that by the products.
    pub fn by_texts(&self, cx: &Context, stream: &Arc<Stream>, by_products: &Tensor) -> Result<Tensor> {
        let mut g = Tensor::new(cx, "gradient of directions", self.texts.rows.dims(), DType::F32)?;
        let (to, sizes) = (g.on_mut(stream)?, g.dims_of("directions")?);
        product(cx, stream, [(by_products, true), (&self.images.rows, false)], (to, sizes))?;
        self.texts.gradient(cx, stream, g)
    }
}
