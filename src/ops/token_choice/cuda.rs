//! Choice of tokens on a GPU: the logits of some thousand rows at a time, then a block for each row.

use std::sync::Arc;

use super::{Given, NO_TOKEN, TokenChoice};
use crate::device::Context;
use crate::device::cuda::{Launch, Matrix, Parameter, Precision, Product, Stream, Tail, kernels};
use crate::error::{Error, Result};
use crate::ops::vector_quantize::cuda::{DeviceCodes, nearest};
use crate::tensor::{DType, Tensor};

kernels!(KERNELS, "token_choice");

/// Logits that are held at a time, for each of the two branches: 32 MiB, which stay in the cache of a large GPU. Tests
/// need fewer rows than that for a second part.
const SCRATCH_ELEMENTS: usize = if cfg!(test) { 1 << 18 } else { 8 << 20 };

const THREADS: u32 = 256;

/// The most classes whose logits lie in shared memory, beside what else is there.
const IN_SHARED: usize = 11 << 10;

/// As the source numbers the rules.
const ARGMAX: i32 = 0;
const MULTINOMIAL: i32 = 1;
const MEAN: i32 = 2;

/// As the kernel takes it.
#[repr(C)]
#[derive(Clone, Copy)]
struct Choice {
    logits: u64,
    others: u64,
    uniforms: u64,
    codes: u64,
    means: u64,
    tokens: u64,
    classes: i32,
    dim: i32,
    rule: i32,
    in_shared: i32,
    guidance: f32,
    inverse_temperature: f32,
}
// SAFETY: laid out as in the source.
unsafe impl Parameter for Choice {}

/// [`super::choose_tokens`].
pub fn choose(cx: &Context, stream: &Arc<Stream>, given: &Given) -> Result<Tensor> {
    let [rows, classes] = [given.cond.dims()[0], given.weight.dims()[0]];
    let mut tokens = Tensor::new(cx, "tokens", &[rows], DType::I64)?;
    if rows == 0 {
        return Ok(tokens);
    }
    let chunk = (SCRATCH_ELEMENTS / classes).clamp(1, rows);
    let mut logits = Tensor::new(cx, "logits", &[chunk, classes], DType::F32)?;
    let mut others =
        given.uncond.map(|_| Tensor::new(cx, "logits", &[chunk, classes], DType::F32)).transpose()?;
    let codes = match given.choice {
        TokenChoice::Quant { codebook } => Some(DeviceCodes::new(cx, stream, codebook)?),
        _ => None,
    };
    let uniforms = match given.choice {
        TokenChoice::Multinomial { uniforms } => Some(uniforms.on(cx, stream)?),
        _ => None,
    };
    let dim = codes.as_ref().map_or(0, |codes| codes.dim);
    let mut means = Tensor::new(cx, "mean codes", &[rows, dim], DType::F32)?;
    let [logits_at, others_at] =
        [logits.on_mut(stream)?, others.as_mut().map_or(Ok(0), |others| others.on_mut(stream))?];
    let (means_at, tokens_at) = (means.on_mut(stream)?, tokens.on_mut(stream)?);
    let in_shared = classes <= IN_SHARED;
    let shared_bytes = if in_shared { (classes * size_of::<f32>()) as u32 } else { 0 };
    for first in (0..rows).step_by(chunk) {
        let count = chunk.min(rows - first);
        logits_of(cx, stream, given, (given.cond, first, count), logits_at)?;
        if let Some(uncond) = given.uncond {
            logits_of(cx, stream, given, (uncond, first, count), others_at)?;
        }
        let choice = Choice {
            logits: logits_at,
            others: others_at,
            uniforms: uniforms.as_ref().map_or(0, |u| u.address() + (first * size_of::<f32>()) as u64),
            codes: codes.as_ref().map_or(0, DeviceCodes::address),
            means: means_at + (first * dim * size_of::<f32>()) as u64,
            tokens: tokens_at + (first * size_of::<i64>()) as u64,
            classes: i32::try_from(classes)
                .map_err(|_| Error::argument("token weight", "fewer than 2^31 classes", classes))?,
            dim: dim as i32,
            rule: match given.choice {
                TokenChoice::Argmax => ARGMAX,
                TokenChoice::Multinomial { .. } => MULTINOMIAL,
                TokenChoice::Quant { .. } => MEAN,
            },
            in_shared: i32::from(in_shared),
            guidance: given.guidance,
            inverse_temperature: 1.0 / given.temperature,
        };
        let launch = Launch { shared_bytes, ..Launch::blocks(count, THREADS) };
        // SAFETY: as the kernel declares; all that a rule reads has been made, for `count` rows.
        unsafe { stream.launch(&KERNELS, "choose_token", None, launch, &[&choice])? };
    }
    if let Some(codes) = &codes {
        nearest(cx, stream, (&means, codes), NO_TOKEN, &mut tokens)?;
    }
    Ok(tokens)
}

/// The logits of `count` rows of features from row `first` on, to `out`: sums and results in F32.
fn logits_of(
    cx: &Context,
    stream: &Arc<Stream>,
    given: &Given,
    (features, first, count): (&Tensor, usize, usize),
    out: u64,
) -> Result<()> {
    let [classes, channels] = given.weight.dims_of("token weight")?;
    let precision = features.precision("token features")?;
    let weight = given.weight.on_as(cx, stream, "token weight", precision)?;
    let x = features.on(cx, stream)?;
    let matrix = |address, precision, leading, transposed| Matrix { address, precision, leading, transposed };
    let offset = (first * channels * precision.size()) as u64;
    let product = Product {
        m: count,
        n: classes,
        k: channels,
        a: matrix(x.address() + offset, precision, channels, false),
        b: matrix(weight.address(), precision, channels, true),
        out: matrix(out, Precision::F32, classes, false),
        alpha: 1.0,
        accumulate: false,
        batch: None,
        tail: Tail::default(),
    };
    // SAFETY: the features have so many rows, and there is room for the logits of as many.
    unsafe { stream.multiply(&product) }
}
