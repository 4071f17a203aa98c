//! Pointwise ops on a GPU.

use std::sync::Arc;

use super::{Rescale, Rows};
use crate::device::Context;
use crate::device::cuda::{Launch, Parameter, Precision, Stream, Taken, kernels as cuda_kernels};
use crate::error::Result;
use crate::ops::activation::Activation;
use crate::ops::kernels::InPlace;
use crate::ops::sums;
use crate::tensor::{DType, Tensor};

cuda_kernels!(KERNELS, "elementwise");
cuda_kernels!(GRADIENT, "elementwise_gradient");

const THREADS: u32 = 256;
/// As the source of the gradients has them.
const COLUMNS: usize = 32;
const LINES: u32 = 8;
/// The most blocks along y.
const MOST_LAYERS: usize = 65_535;
/// Bytes that a thread reads at once, and to which they must then be aligned.
const RUN_BYTES: usize = 16;

/// How many numbers a thread owns: as many as it can read at once if a length and all addresses allow it, else one.
pub(crate) fn run(precision: Precision, length: usize, addresses: &[u64]) -> usize {
    let wide = RUN_BYTES / precision.size();
    let aligned = addresses.iter().all(|address| address.is_multiple_of(RUN_BYTES as u64));
    if aligned && length.is_multiple_of(wide) { wide } else { 1 }
}

/// Numbers by the run.
struct Runs {
    count: i64,
    wide: i32,
    launch: Launch,
}

impl Runs {
    fn of(precision: Precision, count: usize, addresses: &[u64]) -> Self {
        let run = run(precision, count, addresses);
        let runs = count / run;
        let launch = Launch::blocks(runs.div_ceil(THREADS as usize), THREADS);
        Runs { count: runs as i64, wide: i32::from(run > 1), launch }
    }
}

/// `a + b`, of the type of a.
pub(super) fn add(cx: &Context, stream: &Arc<Stream>, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let precision = a.precision("add")?;
    let mut y = Tensor::new(cx, "sum", a.dims(), a.dtype())?;
    if a.elements() == 0 {
        return Ok(y);
    }
    let (first, second) = (a.on(cx, stream)?, b.on_as(cx, stream, "add", precision)?);
    let (from, other, to) = (first.address(), second.address(), y.on_mut(stream)?);
    let runs = Runs::of(precision, a.elements(), &[from, other, to]);
    let parameters: [&dyn Parameter; 5] = [&from, &other, &to, &runs.count, &runs.wide];
    // SAFETY: as the kernel declares; all three have as many numbers.
    unsafe { stream.launch(&KERNELS, "add", Some(precision), runs.launch, &parameters)? };
    Ok(y)
}

/// [`super::activate`] without recording.
pub(super) fn activate(
    cx: &Context,
    stream: &Arc<Stream>,
    x: Tensor,
    activation: Activation,
) -> Result<Tensor> {
    let precision = x.precision("activation")?;
    if activation == Activation::None || x.elements() == 0 {
        return Ok(x);
    }
    let count = x.elements();
    let place = InPlace::of(cx, stream, "activation", x)?;
    let runs = Runs::of(precision, count, &[place.from, place.to]);
    let (code, slope) = activation.code();
    let parameters: [&dyn Parameter; 6] = [&place.from, &place.to, &runs.count, &runs.wide, &code, &slope];
    // SAFETY: as the kernel declares; both have as many numbers.
    unsafe { stream.launch(&KERNELS, "activate", Some(precision), runs.launch, &parameters)? };
    Ok(place.out)
}

/// `g activation'(input)`, all `F32`.
pub(super) fn activate_gradient(
    cx: &Context,
    stream: &Arc<Stream>,
    (input, g): (&Tensor, &Tensor),
    activation: Activation,
) -> Result<Tensor> {
    let mut dx = Tensor::new(cx, "gradient of an activation", g.dims(), DType::F32)?;
    if g.elements() == 0 {
        return Ok(dx);
    }
    let (x, g, to) = (input.on(cx, stream)?, g.on(cx, stream)?, dx.on_mut(stream)?);
    let ((code, slope), count) = (activation.code(), input.elements() as i64);
    let parameters: [&dyn Parameter; 6] = [&x.address(), &g.address(), &to, &count, &code, &slope];
    let launch = Launch::elements(input.elements());
    // SAFETY: as the kernel declares; all three have as many numbers.
    unsafe { stream.launch(&GRADIENT, "activate_gradient", None, launch, &parameters)? };
    Ok(dx)
}

// SAFETY: three floats, as the source has them.
unsafe impl Parameter for Rescale {}

/// [`super::rescale`] without recording.
pub(super) fn rescale(cx: &Context, stream: &Arc<Stream>, x: Tensor, p: Rescale) -> Result<Tensor> {
    let precision = x.precision("rescaled numbers")?;
    let count = x.elements();
    if count == 0 {
        return Ok(x);
    }
    let place = InPlace::of(cx, stream, "rescaled numbers", x)?;
    let runs = Runs::of(precision, count, &[place.from, place.to]);
    let parameters: [&dyn Parameter; 5] = [&place.from, &place.to, &runs.count, &runs.wide, &p];
    // SAFETY: as the kernel declares; both have as many numbers.
    unsafe { stream.launch(&KERNELS, "rescale", Some(precision), runs.launch, &parameters)? };
    Ok(place.out)
}

/// The factors and summands of channels.
#[derive(Debug, Clone, Copy)]
pub(super) enum Parameters<'a> {
    /// `[N, C]`, or `[C]` for all samples; a scale that is not there is 1, a shift 0.
    Apart {
        /// The factors.
        scale: Option<&'a Tensor>,
        /// The summands.
        shift: Option<&'a Tensor>,
    },
    /// `[N or 1, 2 C]`: the factors less 1, then the summands.
    Modulation {
        /// Both.
        values: &'a Tensor,
        /// Whether the summands are added.
        shifted: bool,
    },
}

/// [`Parameters`] on the device.
struct Held {
    scale: Option<Taken>,
    shift: Option<Taken>,
    /// Bytes from the start of the shift's tensor.
    shift_offset: u64,
    /// Numbers from sample to sample; 0 where all share them.
    stride: usize,
    plus: f32,
}

impl Held {
    fn new(cx: &Context, stream: &Arc<Stream>, p: Parameters, channels: usize) -> Result<Self> {
        let on = |what, v: Option<&Tensor>| v.map(|v| v.on_as(cx, stream, what, Precision::F32)).transpose();
        match p {
            Parameters::Apart { scale, shift } => {
                let of_all = scale.or(shift).is_none_or(|v| v.elements() == channels);
                Ok(Held {
                    scale: on("channel scale", scale)?,
                    shift: on("channel shift", shift)?,
                    shift_offset: 0,
                    stride: if of_all { 0 } else { channels },
                    plus: 0.0,
                })
            }
            Parameters::Modulation { values, shifted } => {
                let held = on("modulation", Some(values))?;
                Ok(Held {
                    shift: held.clone().filter(|_| shifted),
                    scale: held,
                    shift_offset: (channels * Precision::F32.size()) as u64,
                    stride: if values.elements() == 2 * channels { 0 } else { 2 * channels },
                    plus: 1.0,
                })
            }
        }
    }

    fn addresses(&self) -> [u64; 2] {
        let shift = self.shift.as_ref().map_or(0, |shift| shift.address() + self.shift_offset);
        [self.scale.as_ref().map_or(0, Taken::address), shift]
    }
}

/// As the source has it.
#[repr(C)]
#[derive(Clone, Copy)]
struct Channels {
    scale: u64,
    shift: u64,
    samples: i64,
    stride: i64,
    runs: i64,
    channel_runs: i64,
    plus: f32,
}

// SAFETY: laid out as the source has it.
unsafe impl Parameter for Channels {}

/// `x[n, .., c] * scale[n, c] + shift[n, c]`.
pub(super) fn affine(
    cx: &Context,
    stream: &Arc<Stream>,
    rows: Rows,
    x: Tensor,
    p: Parameters,
) -> Result<Tensor> {
    let precision = x.precision("scaled channels")?;
    let count = x.elements();
    if count == 0 {
        return Ok(x);
    }
    let held = Held::new(cx, stream, p, rows.channels)?;
    let [scale, shift] = held.addresses();
    let place = InPlace::of(cx, stream, "scaled channels", x)?;
    let run = run(precision, rows.channels, &[place.from, place.to, scale, shift]);
    let samples = if held.stride == 0 { 1 } else { rows.samples };
    let runs = count / samples / run;
    let channels = Channels {
        scale,
        shift,
        samples: samples as i64,
        stride: held.stride as i64,
        runs: runs as i64,
        channel_runs: (rows.channels / run) as i64,
        plus: held.plus,
    };
    let mut launch = Launch::blocks(runs.div_ceil(THREADS as usize), THREADS);
    launch.grid[1] = samples.min(MOST_LAYERS) as u32;
    let parameters: [&dyn Parameter; 4] = [&place.from, &place.to, &i32::from(run > 1), &channels];
    // SAFETY: as the kernel declares; x and the result have as many runs of each sample, and the caller checked that
    // the parameters are those of all channels.
    unsafe { stream.launch(&KERNELS, "affine_channels", Some(precision), launch, &parameters)? };
    Ok(place.out)
}

/// Which sums over rows are wanted, and how they lie.
#[derive(Debug, Clone, Copy)]
pub(super) enum Wanted<'a> {
    /// Of g: `[1, groups, C]`.
    Values,
    /// Of g x: `[1, groups, C]`.
    Products(&'a Tensor),
    /// Of g x, then of g: `[2, groups, C]`.
    ProductsThenValues(&'a Tensor),
    /// Both of each group: `[groups, 2, C]`.
    Pairs(&'a Tensor),
}

/// As the source has it.
#[repr(C)]
#[derive(Clone, Copy)]
struct ChannelSums {
    products: u64,
    values: u64,
    stride: i64,
    rows: i64,
    channels: i32,
    rows_per_part: i32,
    tiles: i32,
}

// SAFETY: laid out as the source has it.
unsafe impl Parameter for ChannelSums {}

/// Sums over the rows of each group, `groups` of `rows` rows of the channels of g, as [`Wanted`] has them.
pub(super) fn sums(
    cx: &Context,
    stream: &Arc<Stream>,
    g: &Tensor,
    (groups, rows): (usize, usize),
    wanted: Wanted,
) -> Result<Tensor> {
    let channels = g.shape().channels();
    let (x, kinds) = match wanted {
        Wanted::Values => (None, 1),
        Wanted::Products(x) => (Some(x), 1),
        Wanted::ProductsThenValues(x) | Wanted::Pairs(x) => (Some(x), 2),
    };
    let parts = sums::parts(rows);
    let mut partial = Tensor::new(cx, "sums", &[kinds * groups, parts.count, channels], DType::F32)?;
    if g.elements() > 0 {
        let to = partial.on_mut(stream)?;
        let of_group = parts.count * channels;
        let after = |blocks: usize| to + (blocks * of_group * Precision::F32.size()) as u64;
        let (products, values, stride) = match wanted {
            Wanted::Values => (0, to, of_group),
            Wanted::Products(_) => (to, 0, of_group),
            Wanted::ProductsThenValues(_) => (to, after(groups), of_group),
            Wanted::Pairs(_) => (to, after(1), 2 * of_group),
        };
        let tiles = channels.div_ceil(COLUMNS);
        let sums = ChannelSums {
            products,
            values,
            stride: stride as i64,
            rows: rows as i64,
            channels: channels as i32,
            rows_per_part: parts.rows as i32,
            tiles: tiles as i32,
        };
        let blocks = Launch::blocks(groups * tiles, COLUMNS as u32);
        let grid = [blocks.grid[0], parts.count as u32, 1];
        let launch = Launch { grid, block: [COLUMNS as u32, LINES, 1], ..blocks };
        let x = x.map(|x| x.on(cx, stream)).transpose()?;
        let (x, g) = (x.as_ref().map_or(0, Taken::address), g.on(cx, stream)?);
        // SAFETY: as the kernel declares; x and g have so many rows in each group, the sums a row for each part.
        unsafe { stream.launch(&GRADIENT, "channel_sums", None, launch, &[&x, &g.address(), &sums])? };
    }
    let sums = sums::groups_on(cx, stream, "sums", &partial)?;
    match wanted {
        Wanted::Pairs(_) => sums.reshape(&[groups, 2, channels]),
        _ => Ok(sums),
    }
}
