//! What a sampler does between two runs of the network: guidance, a step to the next time, fresh noise; and putting
//! tokens back to their start. On a GPU each of these is one kernel, which draws its own noise, and gives the bits of the
//! CPU for the same predictions.

pub mod cpu;
mod cuda;
#[cfg(test)]
mod tests;

use crate::device::Context;
use crate::error::{Error, Result};
use crate::ops::token_choice::NO_TOKEN;
use crate::tensor::rng::Generators;
use crate::tensor::{DType, Tensor};

/// What a network predicts of a sample, and of its twin that guidance leads away from (Ho and Salimans 2022,
/// arXiv:2207.12598).
#[derive(Debug, Clone)]
pub struct Prediction {
    /// Under the condition; all there is without guidance.
    pub conditional: Tensor,
    /// Without it, and the weight of guidance: `unconditional + weight (conditional - unconditional)` is meant.
    pub unconditional: Option<(Tensor, f32)>,
}

impl From<Tensor> for Prediction {
    fn from(conditional: Tensor) -> Self {
        Prediction { conditional, unconditional: None }
    }
}

impl Prediction {
    /// The guided prediction on the host.
    fn guided(&self, cx: &Context) -> Result<Tensor> {
        let Some((unconditional, weight)) = &self.unconditional else { return Ok(self.conditional.clone()) };
        let mut guided = Tensor::new(cx, "guided prediction", self.conditional.dims(), DType::F32)?;
        let values = guided.slice_mut::<f32>()?;
        values.copy_from_slice(self.conditional.slice()?);
        cpu::guide(values, unconditional.slice()?, *weight);
        Ok(guided)
    }

    /// That of `count` samples from sample `start` on.
    ///
    /// # Errors
    /// As [`Tensor::narrow`].
    pub fn narrow(&self, start: usize, count: usize) -> Result<Self> {
        let conditional = self.conditional.narrow(start, count)?;
        let unconditional = match &self.unconditional {
            Some((unconditional, weight)) => Some((unconditional.narrow(start, count)?, *weight)),
            None => None,
        };
        Ok(Prediction { conditional, unconditional })
    }

    fn expect_like(&self, x: &Tensor) -> Result<()> {
        let parts = std::iter::once(&self.conditional).chain(self.unconditional.as_ref().map(|(u, _)| u));
        parts.into_iter().try_for_each(|part| expect(x, "a prediction", part.dims()))
    }
}

/// Random numbers that an op takes: those of a tensor of the shape of the result, or what generators give for it, one for
/// each sample.
#[derive(Debug, Clone)]
pub enum Random {
    /// `F32`.
    Given(Tensor),
    /// Drawn where they are needed.
    Drawn(Generators),
}

impl Random {
    /// The numbers as a tensor: `fill` draws them.
    fn tensor(
        &self,
        cx: &Context,
        dims: &[usize],
        fill: impl Fn(&Generators, &mut Tensor) -> Result<()>,
    ) -> Result<Tensor> {
        match self {
            Random::Given(tensor) => Ok(tensor.clone()),
            Random::Drawn(generators) => {
                let mut tensor = Tensor::new(cx, "random numbers", dims, DType::F32)?;
                fill(generators, &mut tensor)?;
                Ok(tensor)
            }
        }
    }

    fn expect_like(&self, x: &Tensor) -> Result<()> {
        match self {
            Random::Given(tensor) => expect(x, "random numbers", tensor.dims()),
            Random::Drawn(generators) if x.dims().first() == Some(&generators.seeds.len()) => Ok(()),
            Random::Drawn(generators) => {
                let expected = format!("one for each sample of {}", x.shape());
                Err(Error::argument("random generators", expected, generators.seeds.len()))
            }
        }
    }
}

fn expect(x: &Tensor, what: &str, dims: &[usize]) -> Result<()> {
    if x.dims() == dims {
        return Ok(());
    }
    Err(Error::argument(what, format!("the shape {}", x.shape()), format!("{dims:?}")))
}

/// One step of DDPM ([`cpu::ddpm_step`]) from one share of the signal's variance to the next, guidance included.
///
/// # Shapes
/// x `F32 [N, ..]`, prediction and noise alike -> `F32 [N, ..]`; on a GPU predictions may be of any float type
///
/// # Errors
/// `InvalidArgument` for other shapes or types; `OutOfMemory`.
pub fn ddpm_step(
    cx: &Context,
    x: Tensor,
    predicted: &Prediction,
    noise: Option<&Random>,
    [alpha_bar, alpha_bar_next]: [f32; 2],
) -> Result<Tensor> {
    let _span = cx.op("sampler_step");
    predicted.expect_like(&x)?;
    noise.map_or(Ok(()), |noise| noise.expect_like(&x))?;
    if let Some(stream) = cx.cuda()? {
        let step = cuda::Step::ddpm(cpu::Ddpm::new(alpha_bar, alpha_bar_next));
        return cuda::step(cx, stream, (x, predicted), step, noise);
    }
    let noise = noise.map(|noise| noise.tensor(cx, x.dims(), Generators::fill_normal)).transpose()?;
    let noise = noise.as_ref().map(Tensor::slice).transpose()?;
    let guided = predicted.guided(cx)?;
    changed(cx, x, |x| {
        cpu::ddpm_step(x, guided.slice()?, noise, alpha_bar, alpha_bar_next);
        Ok(())
    })
}

/// One step of DDIM ([`cpu::ddim_step`]), guidance included.
///
/// # Shapes
/// As [`ddpm_step`].
///
/// # Errors
/// As [`ddpm_step`].
pub fn ddim_step(
    cx: &Context,
    x: Tensor,
    predicted: &Prediction,
    [alpha_bar, alpha_bar_next]: [f32; 2],
) -> Result<Tensor> {
    let _span = cx.op("sampler_step");
    predicted.expect_like(&x)?;
    if let Some(stream) = cx.cuda()? {
        let step = cuda::Step::ddim(alpha_bar, alpha_bar_next);
        return cuda::step(cx, stream, (x, predicted), step, None);
    }
    let guided = predicted.guided(cx)?;
    changed(cx, x, |x| {
        cpu::ddim_step(x, guided.slice()?, alpha_bar, alpha_bar_next);
        Ok(())
    })
}

/// The clean sample that a prediction implies ([`cpu::implied_clean`]), guidance included.
///
/// # Shapes
/// As [`ddpm_step`].
///
/// # Errors
/// As [`ddpm_step`].
pub fn implied_clean(cx: &Context, x: &Tensor, predicted: &Prediction, alpha_bar: f32) -> Result<Tensor> {
    let _span = cx.op("sampler_step");
    predicted.expect_like(x)?;
    if let Some(stream) = cx.cuda()? {
        return cuda::step(cx, stream, (x.clone(), predicted), cuda::Step::clean(alpha_bar), None);
    }
    let guided = predicted.guided(cx)?;
    changed(cx, x.clone(), |x| {
        let pairs = x.iter_mut().zip(guided.slice::<f32>()?);
        pairs.for_each(|(x, predicted)| *x = cpu::implied_clean(*x, *predicted, alpha_bar));
        Ok(())
    })
}

/// `sqrt(alpha_bar) x + sqrt(1 - alpha_bar) noise`.
///
/// # Shapes
/// x and noise `F32 [N, ..]` -> the same
///
/// # Errors
/// `InvalidArgument` for other shapes or types; `OutOfMemory`.
pub fn diffuse(cx: &Context, x: Tensor, noise: &Random, alpha_bar: f32) -> Result<Tensor> {
    let _span = cx.op("sampler_step");
    noise.expect_like(&x)?;
    if let Some(stream) = cx.cuda()? {
        return cuda::diffuse(cx, stream, x, None, (noise, alpha_bar));
    }
    let noise = noise.tensor(cx, x.dims(), Generators::fill_normal)?;
    changed(cx, x, |x| {
        cpu::diffuse(x, noise.slice()?, alpha_bar);
        Ok(())
    })
}

/// What a region is kept as while the rest is generated.
#[derive(Debug, Clone, Copy)]
pub struct KeptRegion<'a> {
    /// `F32 [N, .., C]`.
    pub latents: &'a Tensor,
    /// `F32 [N, .., 1]`: 1 generates, 0 keeps.
    pub mask: &'a Tensor,
}

/// `mask x + (1 - mask) kept`, where what is kept is noised as by [`diffuse`].
///
/// # Shapes
/// x and noise `F32 [N, .., C]` -> the same
///
/// # Errors
/// `InvalidArgument` for other shapes or types; `OutOfMemory`.
pub fn keep_region(
    cx: &Context,
    x: Tensor,
    kept: KeptRegion,
    noise: &Random,
    alpha_bar: f32,
) -> Result<Tensor> {
    let _span = cx.op("sampler_step");
    noise.expect_like(&x)?;
    expect(&x, "kept latents", kept.latents.dims())?;
    if kept.mask.elements() != x.shape().rows() {
        return Err(Error::argument("mask", format!("{} numbers", x.shape().rows()), kept.mask.shape()));
    }
    if let Some(stream) = cx.cuda()? {
        return cuda::diffuse(cx, stream, x, Some(kept), (noise, alpha_bar));
    }
    let channels = x.shape().channels();
    let noised = diffuse(cx, kept.latents.clone(), noise, alpha_bar)?;
    changed(cx, x, |x| {
        cpu::keep(x, noised.slice()?, kept.mask.slice()?, channels);
        Ok(())
    })
}

/// Each token put back to `random` where its uniform number is at most `t`; [`NO_TOKEN`] stays.
///
/// # Shapes
/// tokens, random `I64 [N, ..]`, uniforms alike -> `I64 [N, ..]`
///
/// # Errors
/// `InvalidArgument` for other shapes or types; `OutOfMemory`.
pub fn renoise(cx: &Context, tokens: &Tensor, random: &Tensor, uniforms: &Random, t: f32) -> Result<Tensor> {
    let _span = cx.op("sampler_step");
    uniforms.expect_like(tokens)?;
    expect(tokens, "random tokens", random.dims())?;
    let mut noised = Tensor::new(cx, "tokens", tokens.dims(), DType::I64)?;
    if let Some(stream) = cx.cuda()? {
        cuda::renoise(cx, stream, (tokens, random), (uniforms, t), &mut noised)?;
        return Ok(noised);
    }
    let uniforms = uniforms.tensor(cx, tokens.dims(), Generators::fill_uniform)?;
    let sources = tokens.slice::<i64>()?.iter().zip(random.slice::<i64>()?).zip(uniforms.slice::<f32>()?);
    for (out, ((token, random), u)) in noised.slice_mut::<i64>()?.iter_mut().zip(sources) {
        *out = if *u <= t && *token != NO_TOKEN { *random } else { *token };
    }
    Ok(noised)
}

/// `x`, changed where it lies if nobody else owns its memory, else in a copy.
fn changed(cx: &Context, mut x: Tensor, change: impl FnOnce(&mut [f32]) -> Result<()>) -> Result<Tensor> {
    if !x.is_own() {
        x = Tensor::from_parts(cx, "a sample", x.dims(), &[&x])?;
    }
    change(x.slice_mut()?)?;
    Ok(x)
}
