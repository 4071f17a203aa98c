//! Depthwise convolution on a GPU.

use std::sync::Arc;

use super::{DepthwiseConv, Padding, Sizes, Then};
use crate::device::Context;
use crate::device::cuda::{Launch, Parameter, Precision, Stream, Taken, kernels};
use crate::error::Result;
use crate::tensor::{DType, Tensor};

kernels!(KERNELS, "depthwise_conv");

/// As the source has them.
const PIXELS: usize = 4;
const MOST_THREADS: usize = 512;
const PACK: usize = 16;
const WARP: usize = 32;

/// Threads of a block where channels need not share one.
const THREADS: usize = 256;

/// Warps of a block of the kernel for all sizes, and channels of a warp where they need not share one.
const WARPS: usize = 8;
const CHUNK: usize = 128;

/// Dynamic shared memory of a block of that kernel, in bytes, unless one pixel's channels take more.
const SHARED: usize = 48 << 10;

/// As the source has it.
#[repr(C)]
#[derive(Clone, Copy)]
struct Convolution {
    x: u64,
    skip: u64,
    weight: u64,
    bias: u64,
    y: u64,
    factor: u64,
    summand: u64,
    pixels: i64,
    sizes: [i32; 4],
    channels: i32,
    groups: i32,
    from_x: i32,
    kernel: i32,
    stride: i32,
    replicate: i32,
    then: i32,
    activation: i32,
    number: f32,
    chunk: i32,
}

// SAFETY: as `Convolution` in the source.
unsafe impl Parameter for Convolution {}

/// What follows, with its tensors on the device.
struct HeldThen {
    code: i32,
    activation: i32,
    number: f32,
    factor: Option<Taken>,
    summand: Option<Taken>,
}

impl HeldThen {
    fn new(cx: &Context, stream: &Arc<Stream>, then: &Then, precision: Precision) -> Result<Self> {
        let plain = HeldThen { code: 0, activation: 0, number: 0.0, factor: None, summand: None };
        let small = |what, tensor: &Tensor| tensor.on_as(cx, stream, what, Precision::F32).map(Some);
        Ok(match *then {
            Then::None => plain,
            Then::LayerNorm { eps } => HeldThen { code: 1, number: eps, ..plain },
            Then::ScaledResidual { gain, residual } => HeldThen {
                code: 2,
                factor: small("depthwise gain", gain)?,
                summand: Some(residual.on_as(cx, stream, "depthwise residual", precision)?),
                ..plain
            },
            Then::ChannelAffine { scale, shift, activation } => {
                let (activation, slope) = activation.code();
                HeldThen {
                    code: 3,
                    activation,
                    number: slope,
                    factor: small("depthwise scale", scale)?,
                    summand: small("depthwise shift", shift)?,
                }
            }
        })
    }

    fn is_layer_norm(&self) -> bool {
        self.code == 1
    }
}

/// [`super::depthwise_conv`] without recording, of the type of activations. The arguments were checked.
pub fn convolve(
    cx: &Context,
    stream: &Arc<Stream>,
    (x, skip): (&Tensor, Option<&Tensor>),
    p: &DepthwiseConv,
    sizes: Sizes,
) -> Result<Tensor> {
    let dtype = DType::of_activations(cx);
    let precision = dtype.precision().unwrap_or(Precision::F32);
    let dims = [x.dims()[0], sizes.out_height, sizes.out_width, sizes.channels];
    let mut out = Tensor::new(cx, "depthwise convolution", &dims, dtype)?;
    if out.elements() == 0 {
        return Ok(out);
    }
    let on = |what, tensor: &Tensor| tensor.on_as(cx, stream, what, precision);
    let (input, weight) = (on("depthwise input", x)?, on("depthwise weight", p.weight)?);
    let second = skip.map(|skip| on("depthwise skip", skip)).transpose()?;
    let bias = p.bias.map(|bias| bias.on_as(cx, stream, "depthwise bias", Precision::F32)).transpose()?;
    let then = HeldThen::new(cx, stream, &p.then, precision)?;
    let address = |taken: &Option<Taken>| taken.as_ref().map_or(0, Taken::address);
    let mut job = Convolution {
        x: input.address(),
        skip: address(&second),
        weight: weight.address(),
        bias: address(&bias),
        y: out.on_mut(stream)?,
        factor: address(&then.factor),
        summand: address(&then.summand),
        pixels: (dims[0] * dims[1] * dims[2]) as i64,
        sizes: [sizes.height, sizes.width, sizes.out_height, sizes.out_width].map(|size| size as i32),
        channels: sizes.channels as i32,
        groups: sizes.groups as i32,
        from_x: x.shape().channels() as i32,
        kernel: sizes.kernel as i32,
        stride: sizes.stride as i32,
        replicate: i32::from(p.padding == Padding::Replicate),
        then: then.code,
        activation: then.activation,
        number: then.number,
        chunk: 0,
    };
    let threads = sizes.channels / job.channels_per_thread(precision).max(1);
    let (kernel, launch) = match job.three(precision) {
        Some(_) if then.is_layer_norm() && threads > MOST_THREADS => {
            // No block holds so many channels.
            let y = convolve(cx, stream, (x, skip), &DepthwiseConv { then: Then::None, ..*p }, sizes)?;
            return p.then.apply(cx, y);
        }
        Some(kernel) => (kernel, three(dims, threads, then.is_layer_norm())),
        None => ("depthwise_any", any(&mut job, then.is_layer_norm())),
    };
    // SAFETY: as the kernels declare; all shapes were checked, and the alignment that `three` asks for.
    unsafe { stream.launch(&KERNELS, kernel, Some(precision), launch, &[&job])? };
    Ok(out)
}

impl Convolution {
    /// Output channels of a thread of the kernels for 3 x 3.
    fn channels_per_thread(&self, precision: Precision) -> usize {
        PACK / precision.size() / self.groups as usize
    }

    /// Which of the kernels for 3 x 3 it is for, if it is for one.
    fn three(&self, precision: Precision) -> Option<&'static str> {
        let name = match self.groups {
            1 => "depthwise_three",
            2 => "depthwise_three_pairs",
            _ => return None,
        };
        let pack = (PACK / precision.size()) as i32;
        let whole = (self.channels * self.groups) % pack == 0 && self.from_x % pack == 0;
        let read = [self.x, self.skip, self.weight, if self.then == 2 { self.summand } else { 0 }];
        let aligned = read.iter().all(|address| address % PACK as u64 == 0);
        (self.kernel == 3 && self.stride == 1 && whole && aligned).then_some(name)
    }
}

/// The launch of a kernel for 3 x 3 over `threads` packs of channels.
fn three(dims: [usize; 4], threads: usize, together: bool) -> Launch {
    let most = if together { MOST_THREADS } else { THREADS };
    let block = threads.next_multiple_of(WARP).min(most);
    let tiles = dims[0] * dims[1] * dims[2].div_ceil(PIXELS);
    let mut launch = Launch::blocks(tiles, block as u32);
    launch.grid[1] = threads.div_ceil(block) as u32;
    launch
}

/// The launch of the kernel for all sizes, of which the job learns its channels per warp.
fn any(job: &mut Convolution, together: bool) -> Launch {
    let channels = job.channels as usize;
    let row = channels * size_of::<f32>();
    let (warps, chunk) = if together { ((SHARED / row).clamp(1, WARPS), channels) } else { (WARPS, CHUNK) };
    job.chunk = chunk as i32;
    let mut launch = Launch::blocks((job.pixels as usize).div_ceil(warps), (warps * WARP) as u32);
    launch.grid[1] = channels.div_ceil(chunk) as u32;
    launch.shared_bytes = if together { (warps * row) as u32 } else { 0 };
    launch
}
