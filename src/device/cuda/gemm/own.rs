//! Products by kernels of our own.

use super::{Parameter, Product, Stream, Tail};
use crate::device::cuda::{Capability, Launch, Memory, Precision, kernels};
use crate::error::Result;

kernels!(KERNELS, "gemm");

/// As the source has them.
const THREADS: u32 = 256;
const STEP: usize = 32;
const STAGES: usize = 3;
const PADDING: usize = 8;

/// Tensor cores that multiply 16 x 8 x 16.
const WITH_MMA: Capability = Capability { major: 8, minor: 0 };

/// Sums are cut into parts where blocks are fewer than multiprocessors, but none shorter than this.
const LEAST_DEPTH: usize = 256;

/// The most parts of a sum.
const MOST_PARTS: usize = 32;

/// [`Product`] as the kernels take it.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Call {
    a: u64,
    b: u64,
    out: u64,
    partial: u64,
    m: i64,
    n: i64,
    k: i64,
    batches: i64,
    parts: i64,
    depth: i64,
    leading: [i64; 3],
    stride: [i64; 3],
    a_transposed: i32,
    b_transposed: i32,
    out_is_float: i32,
    accumulate: i32,
    fused: i32,
    alpha: f32,
    tail: Follow,
}

/// [`Tail`] as the kernels take it.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Follow {
    scale: u64,
    bias: u64,
    residual: u64,
    modulation: u64,
    rows_per_sample: i64,
    bias_is_float: i32,
    activation: i32,
    slope: f32,
    gain: f32,
}

// SAFETY: the struct of this name in gemm.cu.
unsafe impl Parameter for Call {}

impl Call {
    fn new(p: &Product) -> Self {
        let strides = p.batch.map_or([0; 3], |batch| batch.strides);
        Call {
            a: p.a.address,
            b: p.b.address,
            out: p.out.address,
            partial: 0,
            m: p.m as i64,
            n: p.n as i64,
            k: p.k as i64,
            batches: p.batches() as i64,
            parts: 1,
            depth: p.k as i64,
            leading: [p.a, p.b, p.out].map(|matrix| matrix.leading as i64),
            stride: strides.map(|stride| stride as i64),
            a_transposed: p.a.transposed.into(),
            b_transposed: p.b.transposed.into(),
            out_is_float: (p.out.precision == Precision::F32).into(),
            accumulate: p.accumulate.into(),
            fused: (p.out.precision == p.a.precision && in_runs(p, 4)).into(),
            alpha: p.alpha,
            tail: Follow::new(&p.tail),
        }
    }
}

impl Follow {
    fn new(tail: &Tail) -> Self {
        Follow {
            scale: tail.scale,
            bias: tail.bias.map_or(0, |(address, _)| address),
            residual: tail.residual,
            modulation: tail.modulation,
            rows_per_sample: tail.rows_per_sample as i64,
            bias_is_float: tail.bias.is_some_and(|(_, precision)| precision == Precision::F32).into(),
            activation: tail.activation.0,
            slope: tail.activation.1,
            gain: tail.gain,
        }
    }
}

/// Which kernel computes a product, and in how many parts.
struct Plan {
    name: &'static str,
    /// Of a tile.
    side: usize,
    threads: u32,
    shared_bytes: usize,
    parts: usize,
    depth: usize,
}

impl Plan {
    /// `tensor_cores` may be false although there are some: for tests.
    fn new(stream: &Stream, p: &Product, tensor_cores: bool) -> Self {
        let info = stream.gpu().info();
        let enough = info.multiprocessors as usize;
        let tensor_cores = tensor_cores && p.a.precision != Precision::F32 && info.capability >= WITH_MMA;
        let tiles = |side: usize| p.m.div_ceil(side) * p.n.div_ceil(side) * p.batches();
        let has_large = if tensor_cores { !p.a.transposed } else { p.a.precision == Precision::F32 };
        let side = if has_large && tiles(128) >= enough { 128 } else { 64 };
        let name = match (tensor_cores, side, p.a.transposed, p.b.transposed) {
            (true, 128, _, false) => "multiply_tensor_128_nn",
            (true, 128, _, true) => "multiply_tensor_128_nt",
            (true, _, false, false) => "multiply_tensor_64_nn",
            (true, _, false, true) => "multiply_tensor_64_nt",
            (true, _, true, false) => "multiply_tensor_64_tn",
            (true, _, true, true) => "multiply_tensor_64_tt",
            (false, 128, ..) => "multiply_128",
            (false, ..) => "multiply_64",
        };
        let stage = |k_together: bool| match k_together {
            true => side * (STEP + PADDING),
            false => STEP * (side + PADDING),
        };
        let shared_bytes = STAGES * (stage(!p.a.transposed) + stage(p.b.transposed)) * Precision::F16.size();
        let most = (p.k / LEAST_DEPTH).clamp(1, MOST_PARTS);
        let parts = (enough / tiles(side).max(1)).clamp(1, most);
        let depth = p.k.div_ceil(parts).next_multiple_of(STEP);
        Plan {
            name,
            side,
            threads: if tensor_cores { 2 * side as u32 } else { THREADS },
            shared_bytes: if tensor_cores { shared_bytes } else { 0 },
            parts: p.k.div_ceil(depth.max(1)).max(1),
            depth,
        }
    }

    /// Where the parts of the sums go, if there are several.
    fn partial(&self, stream: &Stream, p: &Product) -> Result<Option<Memory>> {
        let elements = p.batches() * self.parts * p.m * p.n;
        let take = || stream.take("parts of a matrix product", elements * Precision::F32.size());
        (self.parts > 1).then(take).transpose()
    }
}

/// A product with its tail: in one go where that is aligned, else in a pass of its own.
///
/// # Safety
/// As [`Stream::multiply`].
pub unsafe fn multiply(stream: &Stream, p: &Product, tensor_cores: bool) -> Result<()> {
    let plan = Plan::new(stream, p, tensor_cores);
    let partial = plan.partial(stream, p)?;
    let call = Call {
        partial: partial.as_ref().map_or(0, Memory::address),
        parts: plan.parts as i64,
        depth: plan.depth as i64,
        ..Call::new(p)
    };
    let tiles = p.m.div_ceil(plan.side) * p.n.div_ceil(plan.side);
    let blocks = tiles * plan.parts * p.batches();
    let launch = Launch { shared_bytes: plan.shared_bytes as u32, ..Launch::blocks(blocks, plan.threads) };
    // SAFETY: as the kernel declares; the numbers are there by this function's contract, and the parts have their
    // memory.
    unsafe { stream.launch(&KERNELS, plan.name, Some(p.a.precision), launch, &[&call])? };
    if plan.parts > 1 {
        let launch = Launch::elements(p.batches() * p.m * p.n);
        // SAFETY: as above.
        unsafe { stream.launch(&KERNELS, "add_parts", Some(p.out.precision), launch, &[&call])? };
    } else if call.fused == 0 && p.tail != Tail::default() {
        // SAFETY: by this function's contract.
        unsafe { follow(stream, p)? };
    }
    Ok(())
}

/// Whether the result and all that goes with it lie in aligned runs of `count` elements.
fn in_runs(p: &Product, count: usize) -> bool {
    let stride = p.batch.map_or(0, |batch| batch.strides[2]);
    let whole = [p.n, p.out.leading, stride].iter().all(|elements| elements.is_multiple_of(count));
    // At most 16 bytes are read at once.
    let aligned = |address: u64, precision: Precision| {
        address.is_multiple_of((count * precision.size()).min(16) as u64)
    };
    let (bias, of_bias) = p.tail.bias.unwrap_or((0, Precision::F32));
    whole
        && aligned(bias, of_bias)
        && [p.out.address, p.tail.residual].iter().all(|&address| aligned(address, p.out.precision))
        && [p.tail.scale, p.tail.modulation].iter().all(|&address| aligned(address, Precision::F32))
}

/// The tail of a product that lies in `out`.
///
/// # Safety
/// As [`Stream::multiply`]; the factors are not looked at.
pub unsafe fn follow(stream: &Stream, p: &Product) -> Result<()> {
    let p = &Product { alpha: 1.0, accumulate: false, ..*p };
    let at_once = 16 / p.out.precision.size();
    let (name, each) =
        if in_runs(p, at_once) { ("follow_product_wide", at_once) } else { ("follow_product", 1) };
    let launch = Launch::elements(p.batches() * p.m * (p.n / each));
    // SAFETY: as the kernel declares; the result and the vectors are there by this function's contract.
    unsafe { stream.launch(&KERNELS, name, Some(p.out.precision), launch, &[&Call::new(p)]) }
}
