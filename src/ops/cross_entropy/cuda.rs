//! The loss of a token predictor on a GPU, in parts whose logits fit into memory.

use std::sync::Arc;

use super::{CrossEntropy, Sizes};
use crate::device::Context;
use crate::device::cuda::{Launch, Matrix, Parameter, Precision, Product, Stream, Tail, kernels};
use crate::error::{Error, Result};
use crate::tensor::{DType, Tensor};

kernels!(KERNELS, "cross_entropy");

/// Logits that are held at a time: 64 MiB. The whole gradient of the weight is read and written for each. Tests need
/// fewer rows than that for a second part.
const SCRATCH_ELEMENTS: usize = if cfg!(test) { 1 << 20 } else { 16 << 20 };

const THREADS: u32 = 256;

/// Blocks that scale gradients.
const MOST_BLOCKS: usize = 2048;

/// The most classes whose logits lie in shared memory, beside what else is there.
const IN_SHARED: usize = 11 << 10;

/// As the kernel takes it.
#[repr(C)]
#[derive(Clone, Copy)]
struct Rows {
    logits: u64,
    targets: u64,
    coefficients: u64,
    losses: u64,
    hits: u64,
    classes: i32,
    in_shared: i32,
    gradients: i32,
    smoothing: f32,
}
// SAFETY: laid out as in the source.
unsafe impl Parameter for Rows {}

/// What the loss is computed of, and where gradients go that are wanted.
pub struct Input<'a> {
    pub features: &'a Tensor,
    pub weight: &'a Tensor,
    pub sizes: Sizes,
    pub of_features: Option<&'a mut Tensor>,
    pub of_weight: Option<&'a mut Tensor>,
}

/// Loss, losses of tokens, and which tokens are right.
pub struct Found {
    pub loss: Tensor,
    pub of_tokens: Tensor,
    pub hits: Tensor,
}

/// [`super::cross_entropy`] without recording.
pub fn losses(cx: &Context, stream: &Arc<Stream>, input: Input, p: &CrossEntropy) -> Result<Found> {
    let Sizes { rows, channels, classes } = input.sizes;
    let width = i32::try_from(classes)
        .map_err(|_| Error::argument("cross_entropy weight", "fewer than 2^31 classes", classes))?;
    let wanted = input.of_features.is_some() || input.of_weight.is_some();
    let own = input.features.precision("cross_entropy features")?;
    let precision = if wanted { Precision::F32 } else { own };
    let x = input.features.on_as(cx, stream, "cross_entropy features", precision)?;
    let weight = input.weight.on_as(cx, stream, "cross_entropy weight", precision)?;
    let targets = p.targets.on(cx, stream)?;
    let coefficients = Tensor::from_slice(&[rows], p.coefficients)?.on(cx, stream)?;
    let chunk = (SCRATCH_ELEMENTS / classes).clamp(1, rows.max(1));
    let mut logits = Tensor::new(cx, "logits", &[chunk, classes], DType::F32)?;
    let mut of_tokens = Tensor::new(cx, "losses of tokens", &[rows], DType::F32)?;
    let mut hits = Tensor::new(cx, "whether tokens are right", &[rows], DType::U8)?;
    let mut loss = Tensor::zeros(cx, "a loss", &[1], DType::F32)?;
    let (logits_at, losses_at) = (logits.on_mut(stream)?, of_tokens.on_mut(stream)?);
    let (hits_at, loss_at) = (hits.on_mut(stream)?, loss.on_mut(stream)?);
    let dx_at = input.of_features.map(|dx| dx.on_mut(stream)).transpose()?;
    let dw_at = input.of_weight.map(|dw| dw.on_mut(stream)).transpose()?;
    let in_shared = classes <= IN_SHARED;
    let shared_bytes = if in_shared { (classes * size_of::<f32>()) as u32 } else { 0 };
    let matrix = |address, precision, leading| Matrix { address, precision, leading, transposed: false };
    let of_logits = matrix(logits_at, Precision::F32, classes);
    let of_weight = matrix(weight.address(), precision, channels);
    for first in (0..rows).step_by(chunk) {
        let count = chunk.min(rows - first);
        let of_x = matrix(x.address() + (first * channels * precision.size()) as u64, precision, channels);
        let at = |base: u64, size: usize| base + (first * size) as u64;
        let to_logits = Product {
            m: count,
            n: classes,
            k: channels,
            a: of_x,
            b: Matrix { transposed: true, ..of_weight },
            out: of_logits,
            alpha: 1.0,
            accumulate: false,
            batch: None,
            tail: Tail::default(),
        };
        let rows = Rows {
            logits: logits_at,
            targets: at(targets.address(), size_of::<i64>()),
            coefficients: at(coefficients.address(), size_of::<f32>()),
            losses: at(losses_at, size_of::<f32>()),
            hits: at(hits_at, 1),
            classes: width,
            in_shared: i32::from(in_shared),
            gradients: i32::from(wanted),
            smoothing: p.smoothing,
        };
        let launch = Launch { shared_bytes, ..Launch::blocks(count, THREADS) };
        // SAFETY: `count` rows of features, of logits and of whatever belongs to rows, as the kernel declares.
        unsafe {
            stream.multiply(&to_logits)?;
            stream.launch(&KERNELS, "cross_entropy_rows", None, launch, &[&rows])?;
        }
        if let Some(dx_at) = dx_at {
            let out = matrix(at(dx_at, channels * size_of::<f32>()), Precision::F32, channels);
            let product = Product { n: channels, k: classes, a: of_logits, b: of_weight, out, ..to_logits };
            // SAFETY: the gradient of the features has as many rows as they have.
            unsafe { stream.multiply(&product)? };
        }
        if let Some(dw_at) = dw_at {
            let product = Product {
                m: classes,
                n: channels,
                k: count,
                a: Matrix { transposed: true, ..of_logits },
                b: of_x,
                out: matrix(dw_at, Precision::F32, channels),
                accumulate: first > 0,
                ..to_logits
            };
            // SAFETY: the gradient of the weight is as large as that.
            unsafe { stream.multiply(&product)? };
        }
    }
    if rows > 0 {
        let parameters: [&dyn Parameter; 4] = [&losses_at, &coefficients.address(), &loss_at, &(rows as i64)];
        // SAFETY: as the kernel declares; a loss and a coefficient for each row.
        unsafe {
            stream.launch(&KERNELS, "cross_entropy_loss", None, Launch::blocks(1, 1024), &parameters)?;
        }
    }
    Ok(Found { loss, of_tokens, hits })
}

/// `x` times a number that lies on the device, in place if nobody else owns it.
pub fn scaled_by(cx: &Context, stream: &Arc<Stream>, mut x: Tensor, by: &Tensor) -> Result<Tensor> {
    if !x.is_own() {
        x = Tensor::from_parts(cx, "a scaled gradient", x.dims(), &[&x])?;
    }
    let count = x.elements();
    if count == 0 {
        return Ok(x);
    }
    let (by, to) = (by.on(cx, stream)?, x.on_mut(stream)?);
    let launch = Launch::blocks(count.div_ceil(THREADS as usize).min(MOST_BLOCKS), THREADS);
    let parameters: [&dyn Parameter; 3] = [&to, &by.address(), &(count as i64)];
    // SAFETY: as the kernel declares; x has `count` numbers of F32.
    unsafe { stream.launch(&KERNELS, "scale_by_scalar", None, launch, &parameters)? };
    Ok(x)
}
