//! Stage B's walk over tokens (v1).

use super::guided::{Guided, Texts};
use super::{NO_GUIDANCE, check_finite, modulated, not_finite, with_zero_twin};
use crate::device::Context;
use crate::diffusion::noise::{Draw, NoiseSource};
use crate::diffusion::tokens::{Choice, TokenSampling, TokenStep};
use crate::error::Result;
use crate::ops::token_choice::{NO_TOKEN, TokenChoice, choose_tokens};
use crate::pipeline::generate_options::GenerateOptions;
use crate::pipeline::halves::Decoder;
use crate::pipeline::load::Part;
use crate::stages::blocks::{Attended, Conditioning, Modulations};
use crate::stages::stage_b::StageB;
use crate::tensor::replay::Replay;
use crate::tensor::{DType, Tensor};

/// Stage B's walk from random tokens to predicted ones.
pub(super) struct TokenWalk<'a> {
    decoder: &'a Decoder,
    part: &'a Part<StageB>,
    cx: &'a Context,
    sampling: TokenSampling,
    modulations: Modulations,
    grid: (usize, usize),
}

/// What the blocks take beside x: latents and text.
type Condition = ([Attended; 2], Replay);

impl<'a> TokenWalk<'a> {
    /// A walk over a grid of tokens.
    pub fn new(
        decoder: &'a Decoder,
        part: &'a Part<StageB>,
        cx: &'a Context,
        sampling: TokenSampling,
        grid: (usize, usize),
    ) -> Result<Self> {
        let modulations = part.network.modulations(cx, &sampling.times())?;
        Ok(TokenWalk { decoder, part, cx, sampling, modulations, grid })
    }

    /// How the options ask to walk.
    pub fn sampling(options: &GenerateOptions) -> TokenSampling {
        let b = &options.stage_b;
        TokenSampling {
            temperature: b.temperature,
            ..TokenSampling::new(b.steps as usize, b.guidance, b.choice)
        }
    }

    /// The shortest walk there is: one greedy step without guidance.
    pub fn preview() -> TokenSampling {
        TokenSampling::new(1, NO_GUIDANCE, Choice::Argmax)
    }

    pub fn is_guided(&self) -> bool {
        self.sampling.guidance != (NO_GUIDANCE, NO_GUIDANCE)
    }

    pub fn steps(&self) -> usize {
        self.sampling.steps
    }

    /// Positions of the finest grid that blocks work on, per sample.
    pub fn positions(&self) -> usize {
        let patch = self.part.network.config().patch_size;
        (self.grid.0 * self.grid.1 / (patch * patch)).max(1)
    }

    /// Walks with these latents and texts; `after_step(steps done, tokens)` watches.
    ///
    /// # Shapes
    /// latents `[N, h, w, C]` -> tokens `I64 [N, H, W]`
    pub fn run(
        &self,
        latents: &Tensor,
        texts: &Texts,
        noise: &mut dyn NoiseSource,
        after_step: &mut dyn FnMut(usize, &Tensor) -> Result<()>,
    ) -> Result<Tensor> {
        let guided = self.condition(latents, texts)?;
        let dims = [guided.samples, self.grid.0, self.grid.1];
        let mut start = Tensor::new(self.cx, "tokens", &dims, DType::I64)?;
        let codebook_size = u32::try_from(self.part.network.config().codebook_size).unwrap_or(u32::MAX);
        noise.below(Draw::TokenStart, 0, codebook_size, &mut start)?;
        let choose = |tokens: &Tensor, step: TokenStep, uniforms: Option<&Tensor>| {
            self.choose(&guided, tokens, step, uniforms)
        };
        let tokens = self.sampling.run(self.cx, &start, start.clone(), noise, choose, after_step)?;
        self.check_tokens(&tokens)?;
        Ok(tokens)
    }

    /// # Errors
    /// `Format` or `InvalidArgument`, saying what is not finite, if a token could not be chosen.
    fn check_tokens(&self, tokens: &Tensor) -> Result<()> {
        match tokens.slice::<i64>()?.contains(&NO_TOKEN) {
            true => Err(not_finite("Stage B", &[&self.part.weights, &self.decoder.stage_a.weights])),
            false => Ok(()),
        }
    }

    /// Keys and values of latents and texts. The twins see latents of zero, all of them the same ones.
    fn condition(&self, latents: &Tensor, texts: &Texts) -> Result<Guided<Condition>> {
        let network = &self.part.network;
        let samples = texts.index.len();
        let entries = with_zero_twin(self.cx, latents, texts.unconditional.is_some())?;
        let attended = network.attend_to_latents(self.cx, &entries)?;
        texts.guided(self.cx, |texts, index, who| {
            let text = network.attend_to_text(self.cx, texts)?.with_index(index);
            Ok(([attended.with_index(who.entries(samples)), text], Replay::new()))
        })
    }

    fn choose(
        &self,
        guided: &Guided<Condition>,
        tokens: &Tensor,
        step: TokenStep,
        uniforms: Option<&Tensor>,
    ) -> Result<Tensor> {
        let Part { network, weights, .. } = self.part;
        let stage_a = &self.decoder.stage_a;
        let modulations = self.modulations.at(step.step)?;
        let (conditional, unconditional) = guided.run(self.cx, tokens, |tokens, (attended, replay)| {
            modulated(self.cx, replay, tokens, &modulations, |cx, tokens, modulations| {
                network.features(cx, tokens, Conditioning { modulations, attended })
            })
        })?;
        // A GPU is not waited for in a step: what is not finite gives no token, and shows at the end.
        let looks_now = self.cx.device().accelerator().is_none();
        if looks_now {
            check_finite(&conditional, "Stage B", weights)?;
        }
        let rows = |x: &Tensor| x.reshape(&[x.shape().rows(), x.shape().channels()]);
        let (conditional, unconditional) =
            (rows(&conditional)?, unconditional.as_ref().map(rows).transpose()?);
        let uniforms = uniforms.map(|u| u.reshape(&[u.elements()])).transpose()?;
        let choice = match (step.choice, &uniforms) {
            (Choice::Multinomial, Some(uniforms)) => TokenChoice::Multinomial { uniforms },
            (Choice::Quant, _) => TokenChoice::Quant { codebook: stage_a.network.codebook() },
            _ => TokenChoice::Argmax,
        };
        let chosen = choose_tokens(
            self.cx,
            &conditional,
            unconditional.as_ref(),
            network.logits_weight(),
            step.guidance,
            step.temperature,
            choice,
        )?;
        if looks_now {
            self.check_tokens(&chosen)?;
        }
        chosen.reshape(tokens.dims())
    }
}
