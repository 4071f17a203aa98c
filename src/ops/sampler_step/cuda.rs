//! The steps of the samplers on a GPU.

use std::sync::Arc;

use super::cpu::Ddpm;
use super::{KeptRegion, Prediction, Random};
use crate::device::Context;
use crate::device::cuda::{Launch, Parameter, Precision, Stream, Taken, kernels};
use crate::error::{Error, Result};
use crate::tensor::rng::{DeviceGenerators, HeldGenerators};
use crate::tensor::{DType, Tensor};

kernels!(KERNELS, "sampler_step");

/// Numbers of a thread, as the source has them.
const AT_ONCE: usize = 4;

/// Which step it is, as the source numbers them, and its numbers.
#[derive(Debug, Clone, Copy)]
pub struct Step {
    kind: i32,
    numbers: [f32; 4],
}

impl Step {
    pub fn ddpm(of: Ddpm) -> Self {
        Step { kind: 0, numbers: [of.root, of.weight, of.spread, of.deviation] }
    }

    pub fn ddim(alpha_bar: f32, next: f32) -> Self {
        let numbers = [(1.0 - alpha_bar).sqrt(), alpha_bar.sqrt(), next.sqrt(), (1.0 - next).sqrt()];
        Step { kind: 1, numbers }
    }

    pub fn clean(alpha_bar: f32) -> Self {
        Step { kind: 2, numbers: [(1.0 - alpha_bar).sqrt(), alpha_bar.sqrt(), 0.0, 0.0] }
    }
}

/// Random numbers as kernels take them: an address, or generators if that is 0; without numbers there are neither.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct DeviceRandom {
    given: u64,
    drawn: DeviceGenerators,
}

/// [`DeviceRandom`], and what it points to.
struct HeldRandom {
    parameter: DeviceRandom,
    _given: Option<Taken>,
    _drawn: Option<HeldGenerators>,
}

impl HeldRandom {
    fn new(cx: &Context, stream: &Arc<Stream>, random: Option<&Random>) -> Result<Self> {
        let (given, drawn) = match random {
            None => (None, None),
            Some(Random::Given(tensor)) => {
                (Some(tensor.on_as(cx, stream, "random numbers", Precision::F32)?), None)
            }
            Some(Random::Drawn(generators)) => (None, Some(generators.on(stream)?)),
        };
        let parameter = DeviceRandom {
            given: given.as_ref().map_or(0, Taken::address),
            drawn: drawn.as_ref().map_or(DeviceGenerators::NONE, |held| held.parameter),
        };
        Ok(HeldRandom { parameter, _given: given, _drawn: drawn })
    }
}

/// As the kernels take it.
#[repr(C)]
#[derive(Clone, Copy)]
struct Sizes {
    samples: i64,
    per_sample: i64,
}

impl Sizes {
    fn of(x: &Tensor) -> Self {
        let samples = x.dims().first().copied().unwrap_or(1);
        Sizes { samples: samples as i64, per_sample: (x.elements() / samples.max(1)) as i64 }
    }

    fn launch(self) -> Launch {
        Launch::elements(self.samples as usize * (self.per_sample as usize).div_ceil(AT_ONCE))
    }
}

/// As the kernel takes it.
#[repr(C)]
#[derive(Clone, Copy)]
struct StepParameters {
    x: u64,
    out: u64,
    conditional: u64,
    unconditional: u64,
    noise: DeviceRandom,
    sizes: Sizes,
    kind: i32,
    guidance: f32,
    numbers: [f32; 4],
}
// SAFETY: laid out as in the source.
unsafe impl Parameter for StepParameters {}

/// The result, which is `x` itself if nobody else owns it; and the addresses to read and to write, with what is held for
/// that.
fn target(cx: &Context, stream: &Arc<Stream>, mut x: Tensor) -> Result<(Tensor, [u64; 2], Option<Taken>)> {
    if x.dtype() != DType::F32 {
        return Err(Error::argument("a sample", "elements of type F32", x.dtype()));
    }
    x.settle(cx)?;
    if !x.is_own() {
        let mut out = Tensor::new(cx, "a sample", x.dims(), DType::F32)?;
        let to = out.on_mut(stream)?;
        let from = x.on(cx, stream)?;
        return Ok((out, [from.address(), to], Some(from)));
    }
    let to = x.on_mut(stream)?;
    Ok((x, [to; 2], None))
}

/// A step of a sampler.
pub fn step(
    cx: &Context,
    stream: &Arc<Stream>,
    (x, predicted): (Tensor, &Prediction),
    step: Step,
    noise: Option<&Random>,
) -> Result<Tensor> {
    let precision = predicted.conditional.precision("a prediction")?;
    let conditional = predicted.conditional.on(cx, stream)?;
    let unconditional = predicted.unconditional.as_ref();
    let guidance = unconditional.map_or(1.0, |(_, weight)| *weight);
    let unconditional =
        unconditional.map(|(u, _)| u.on_as(cx, stream, "a prediction", precision)).transpose()?;
    let noise = HeldRandom::new(cx, stream, noise)?;
    let (out, [from, to], _held) = target(cx, stream, x)?;
    if out.elements() == 0 {
        return Ok(out);
    }
    let sizes = Sizes::of(&out);
    let parameters = StepParameters {
        x: from,
        out: to,
        conditional: conditional.address(),
        unconditional: unconditional.as_ref().map_or(0, Taken::address),
        noise: noise.parameter,
        sizes,
        kind: step.kind,
        guidance,
        numbers: step.numbers,
    };
    // SAFETY: as the kernel declares; all that it reads has the shape of the result, as the callers checked.
    unsafe { stream.launch(&KERNELS, "sampler_step", Some(precision), sizes.launch(), &[&parameters])? };
    Ok(out)
}

/// As the kernel takes it.
#[repr(C)]
#[derive(Clone, Copy)]
struct DiffuseParameters {
    x: u64,
    out: u64,
    kept: u64,
    mask: u64,
    noise: DeviceRandom,
    sizes: Sizes,
    channels: i32,
    signal: f32,
    spread: f32,
}
// SAFETY: laid out as in the source.
unsafe impl Parameter for DiffuseParameters {}

/// Noises x; or, where a region is kept, that, and joins both.
pub fn diffuse(
    cx: &Context,
    stream: &Arc<Stream>,
    x: Tensor,
    kept: Option<KeptRegion>,
    (noise, alpha_bar): (&Random, f32),
) -> Result<Tensor> {
    let kept = match kept {
        Some(kept) => Some([kept.latents, kept.mask]),
        None => None,
    };
    let wide = |x: &Tensor| x.on_as(cx, stream, "a kept region", Precision::F32);
    let kept = kept.map(|[latents, mask]| Ok([wide(latents)?, wide(mask)?])).transpose()?;
    let [latents, mask] = kept.as_ref().map_or([0; 2], |kept| kept.each_ref().map(Taken::address));
    let noise = HeldRandom::new(cx, stream, Some(noise))?;
    let (out, [from, to], _held) = target(cx, stream, x)?;
    if out.elements() == 0 {
        return Ok(out);
    }
    let sizes = Sizes::of(&out);
    let parameters = DiffuseParameters {
        x: from,
        out: to,
        kept: latents,
        mask,
        noise: noise.parameter,
        sizes,
        channels: out.shape().channels() as i32,
        signal: alpha_bar.sqrt(),
        spread: (1.0 - alpha_bar).sqrt(),
    };
    // SAFETY: as the kernel declares; all that it reads fits the result, as the callers checked.
    unsafe { stream.launch(&KERNELS, "sampler_diffuse", None, sizes.launch(), &[&parameters])? };
    Ok(out)
}

/// As the kernel takes it.
#[repr(C)]
#[derive(Clone, Copy)]
struct RenoiseParameters {
    tokens: u64,
    random: u64,
    out: u64,
    uniforms: DeviceRandom,
    sizes: Sizes,
    t: f32,
}
// SAFETY: laid out as in the source.
unsafe impl Parameter for RenoiseParameters {}

/// [`super::renoise`], into `out`.
pub fn renoise(
    cx: &Context,
    stream: &Arc<Stream>,
    (tokens, random): (&Tensor, &Tensor),
    (uniforms, t): (&Random, f32),
    out: &mut Tensor,
) -> Result<()> {
    if [tokens, random].iter().any(|x| x.dtype() != DType::I64) {
        return Err(Error::argument("tokens", "elements of type I64", tokens.dtype()));
    }
    let sizes = Sizes::of(out);
    if out.elements() == 0 {
        return Ok(());
    }
    let uniforms = HeldRandom::new(cx, stream, Some(uniforms))?;
    let (tokens, random) = (tokens.on(cx, stream)?, random.on(cx, stream)?);
    let parameters = RenoiseParameters {
        tokens: tokens.address(),
        random: random.address(),
        out: out.on_mut(stream)?,
        uniforms: uniforms.parameter,
        sizes,
        t,
    };
    // SAFETY: as the kernel declares; all have the shape of the result, as the caller checked.
    unsafe { stream.launch(&KERNELS, "renoise_tokens", None, sizes.launch(), &[&parameters]) }
}
