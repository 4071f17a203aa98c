//! Global response normalisation on a GPU: two passes over x, of which the second writes.

use std::sync::Arc;

use super::cpu::EPS;
use crate::device::Context;
use crate::device::cuda::{Launch, Parameter, Precision, Stream, Taken, kernels as cuda_kernels};
use crate::error::{Error, Result};
use crate::ops::elementwise::cuda::run;
use crate::ops::kernels::InPlace;
use crate::ops::sums;
use crate::tensor::{DType, Tensor};

cuda_kernels!(KERNELS, "response_norm");
cuda_kernels!(GRADIENT, "response_norm_gradient");

const THREADS: u32 = 256;
/// As the sources have them.
const WARP: usize = 32;
const LINES: usize = 8;
/// About how many blocks read a sample: enough to fill a large GPU.
const BLOCKS: usize = 640;
/// The fewest tokens of a block of the first pass: with fewer, its sums would cost what they save.
const LEAST_TOKENS: usize = 4 * LINES;
/// Tokens of a block of the second pass.
const TOKENS: usize = 8 * LINES;

/// As the source has it.
#[repr(C)]
#[derive(Clone, Copy)]
struct Shape {
    tokens: i64,
    channels: i32,
    tokens_per_part: i32,
    parts: i32,
    tiles: i32,
    norm_tiles: i32,
    wide: i32,
    gelu: i32,
}

// SAFETY: laid out as the source has it.
unsafe impl Parameter for Shape {}

impl Shape {
    /// The same with parts of so many tokens, and the launch of a block for each part of each tile.
    fn cut(mut self, samples: usize, tokens: usize) -> (Self, Launch) {
        let parts = (self.tokens as usize).div_ceil(tokens);
        (self.tokens_per_part, self.parts) = (tokens as i32, parts as i32);
        let blocks = Launch::blocks(samples * self.tiles as usize, THREADS);
        (self, Launch { grid: [blocks.grid[0], parts as u32, 1], ..blocks })
    }
}

/// At least so many of `tokens` tokens for each block: the grid has room for no more than 65535 parts.
fn tokens_of_block(tokens: usize, wanted: usize) -> usize {
    wanted.max(tokens.div_ceil(65_535)).next_multiple_of(LINES)
}

/// [`super::response_norm`] of x, or of GELU(x), without recording.
pub(crate) fn normalize(
    cx: &Context,
    stream: &Arc<Stream>,
    x: Tensor,
    (gamma, beta): (&Tensor, &Tensor),
    gelu: bool,
) -> Result<Tensor> {
    let precision = x.precision("response norm input")?;
    let (samples, channels) = (x.dims()[0], x.shape().channels());
    for (what, v) in [("response norm gamma", gamma), ("response norm beta", beta)] {
        if v.elements() != channels {
            return Err(Error::argument(what, format!("{channels} elements"), v.shape()));
        }
    }
    if x.elements() == 0 {
        return Ok(x);
    }
    let tokens = x.shape().rows() / samples;
    let gamma = gamma.on_as(cx, stream, "response norm gamma", Precision::F32)?;
    let beta = beta.on_as(cx, stream, "response norm beta", Precision::F32)?;
    let place = InPlace::of(cx, stream, "response norm", x)?;
    let run = run(precision, channels, &[place.from, place.to, gamma.address(), beta.address()]);
    let shape = Shape {
        tokens: tokens as i64,
        channels: channels as i32,
        tokens_per_part: 0,
        parts: 0,
        tiles: channels.div_ceil(WARP * run) as i32,
        norm_tiles: channels.div_ceil(WARP) as i32,
        wide: i32::from(run > 1),
        gelu: i32::from(gelu),
    };
    let [norms, shares] = norms(cx, stream, (place.from, precision), samples, shape)?;
    let (norms, shares) = (norms.on(cx, stream)?, shares.on(cx, stream)?);
    let (shape, launch) = shape.cut(samples, tokens_of_block(tokens, TOKENS));
    let addresses = [&norms, &shares, &gamma, &beta].map(Taken::address);
    let [norms, shares, gamma, beta] = &addresses;
    let parameters: [&dyn Parameter; 8] = [&place.from, norms, shares, gamma, beta, &place.to, &shape, &EPS];
    // SAFETY: as the kernel declares; the result is as large as x, gamma and beta have a number for each channel.
    unsafe { stream.launch(&KERNELS, "response_norm", Some(precision), launch, &parameters)? };
    Ok(place.out)
}

/// The first pass: the norms `[N, C]` of x, which lies at an address, and their sums over 32 channels each.
fn norms(
    cx: &Context,
    stream: &Arc<Stream>,
    (x, precision): (u64, Precision),
    samples: usize,
    shape: Shape,
) -> Result<[Tensor; 2]> {
    let (tokens, channels) = (shape.tokens as usize, shape.channels as usize);
    let most = BLOCKS.div_ceil(shape.tiles as usize).min(tokens.div_ceil(LEAST_TOKENS));
    let (shape, launch) = shape.cut(samples, tokens_of_block(tokens, tokens.div_ceil(most)));
    let new = |dims: &[usize]| Tensor::new(cx, "response norms", dims, DType::F32);
    let mut sums = new(&[samples, shape.parts as usize, channels])?;
    let mut norms = new(&[samples, channels])?;
    let mut shares = new(&[samples, shape.norm_tiles as usize])?;
    let sums_at = sums.on_mut(stream)?;
    let parameters: [&dyn Parameter; 3] = [&x, &sums_at, &shape];
    // SAFETY: as the kernel declares; x has so many tokens of the channels, the sums a row for each part.
    unsafe { stream.launch(&KERNELS, "response_sums", Some(precision), launch, &parameters)? };
    let (norms_at, shares_at) = (norms.on_mut(stream)?, shares.on_mut(stream)?);
    let launch = Launch::blocks(samples * shape.norm_tiles as usize, THREADS);
    let parameters: [&dyn Parameter; 4] = [&sums_at, &norms_at, &shares_at, &shape];
    // SAFETY: as the kernel declares; a norm for each channel, a share for each tile of 32.
    unsafe { stream.launch(&KERNELS, "response_norms", None, launch, &parameters)? };
    Ok([norms, shares])
}

/// What a backward pass finds.
pub struct Gradients {
    /// Of x, if it was asked for.
    pub dx: Option<Tensor>,
    /// `[4, C]`, of which the second and the third row are the gradients of gamma and beta.
    pub shared: Tensor,
}

/// The gradients from that of the result, `F32` as x is.
pub fn gradients(
    cx: &Context,
    stream: &Arc<Stream>,
    (x, g): (&Tensor, &Tensor),
    gamma: &Tensor,
    of_x: bool,
) -> Result<Gradients> {
    let (samples, channels) = (x.dims()[0], x.shape().channels());
    let mut dx = of_x.then(|| Tensor::new(cx, "response norm gradient", x.dims(), DType::F32)).transpose()?;
    if x.elements() == 0 {
        let shared = Tensor::zeros(cx, "response norm sums", &[4, channels], DType::F32)?;
        return Ok(Gradients { dx, shared });
    }
    let tokens = x.shape().rows() / samples;
    let gamma = gamma.on_as(cx, stream, "response norm gamma", Precision::F32)?;
    let (input, gradient) = (x.on(cx, stream)?, g.on(cx, stream)?);
    let (x, g) = (input.address(), gradient.address());
    let (parts, tiles) = (sums::parts(tokens), channels.div_ceil(WARP));
    let blocks = Launch::blocks(samples * tiles, THREADS);
    let launch = Launch { grid: [blocks.grid[0], parts.count as u32, 1], ..blocks };
    let (count, width) = (tokens as i64, channels as i32);
    let (of_part, tiles) = (parts.rows as i32, tiles as i32);

    let dims = [samples, parts.count, 3 * channels];
    let mut partial = Tensor::new(cx, "response norm sums", &dims, DType::F32)?;
    let to = partial.on_mut(stream)?;
    let parameters: [&dyn Parameter; 7] = [&x, &g, &to, &count, &width, &of_part, &tiles];
    // SAFETY: as the kernel declares; the sums have three rows for each part.
    unsafe { stream.launch(&GRADIENT, "response_gradient_sums", None, launch, &parameters)? };
    let of_samples = sums::groups_on(cx, stream, "response norm sums", &partial)?;
    drop(partial);

    let mut finished = Tensor::new(cx, "response norm sums", &[samples, 4 * channels], DType::F32)?;
    let (from, to) = (of_samples.on(cx, stream)?, finished.on_mut(stream)?);
    let parameters: [&dyn Parameter; 5] = [&from.address(), &gamma.address(), &to, &width, &EPS];
    // SAFETY: as the kernel declares; three rows of each sample become four.
    unsafe {
        let launch = Launch::blocks(samples, THREADS);
        stream.launch(&GRADIENT, "response_gradient_finish", None, launch, &parameters)?;
    }
    if let Some(dx) = &mut dx {
        let dx = dx.on_mut(stream)?;
        let parameters: [&dyn Parameter; 8] = [&x, &g, &to, &dx, &count, &width, &of_part, &tiles];
        // SAFETY: as the kernel declares; dx is as large as x.
        unsafe { stream.launch(&GRADIENT, "response_gradient", None, launch, &parameters)? };
    }
    let shared = sums::columns_on(cx, stream, "response norm gradient", &finished)?;
    Ok(Gradients { dx, shared: shared.reshape(&[4, channels])? })
}
