//! Stage B: which tokens noised tokens came from (paper, section 3.2; Paella, Rampas et al. 2023).

use crate::device::Context;
use crate::error::Result;
use crate::ops::cross_entropy::{CrossEntropy, TokenLoss, cross_entropy};
use crate::stages::blocks::Conditioning;
use crate::stages::stage_b::StageB;
use crate::tensor::Tensor;

/// How much of each token's target is spread over all tokens.
const LABEL_SMOOTHING: f32 = 0.1;

/// What a token that was not replaced counts at time 0.
const KEPT_WEIGHT: f32 = 0.3;

/// One batch of N samples.
#[derive(Debug, Clone, Copy)]
pub struct Batch<'a> {
    /// The tokens to find, `I64 [N, H, W]`.
    pub tokens: &'a Tensor,
    /// The tokens that the network sees.
    pub noised: &'a Tensor,
    /// Per token, whether it was replaced.
    pub replaced: &'a [bool],
    /// Per sample, in 0..1: the share of tokens that are replaced.
    pub times: &'a [f32],
    /// Image latents, `[N, h, w, C]`.
    pub latents: &'a Tensor,
    /// Embedded texts, `[N, T, width]`.
    pub text: &'a Tensor,
}

/// mean over samples of sum(w ce) / sum(w) over tokens, ce with a label smoothing of 0.1, w = 1 for replaced tokens
/// and 1 - 0.7 (1 - t) for the others.
///
/// # Errors
/// `InvalidArgument` for shapes that do not fit together; `OutOfMemory`; `Cancelled`.
pub fn loss(cx: &Context, network: &StageB, batch: &Batch) -> Result<TokenLoss> {
    let modulations = network.modulations(cx, batch.times)?;
    let attended = [network.attend_to_latents(cx, batch.latents)?, network.attend_to_text(cx, batch.text)?];
    let conditioning = Conditioning { modulations: &modulations, attended: &attended };
    let features = network.features(cx, batch.noised, conditioning)?;
    let coefficients = coefficients(batch.replaced, batch.times);
    let p = CrossEntropy { targets: batch.tokens, coefficients: &coefficients, smoothing: LABEL_SMOOTHING };
    cross_entropy(cx, &features, network.logits_weight(), &p)
}

/// What each token counts in the loss: w / sum(w) of its sample / N.
fn coefficients(replaced: &[bool], times: &[f32]) -> Vec<f32> {
    let per_sample = replaced.len() / times.len().max(1);
    let mut all = Vec::with_capacity(replaced.len());
    for (replaced, &t) in replaced.chunks_exact(per_sample.max(1)).zip(times) {
        let weight = |&replaced: &bool| if replaced { 1.0 } else { 1.0 - (1.0 - t) * (1.0 - KEPT_WEIGHT) };
        let sum: f64 = replaced.iter().map(|r| f64::from(weight(r))).sum();
        let share = 1.0 / (sum * times.len() as f64);
        all.extend(replaced.iter().map(|r| (f64::from(weight(r)) * share) as f32));
    }
    all
}
