//! Stage A: pictures through the quantiser and back (paper, section 3.1; VQGAN, Esser et al. 2021, section 3.1).
//!
//! The loss is that of the picture (how far the pixels are, and how different it looks), of the quantiser (van den
//! Oord et al. 2017), and of a discriminator that learns to tell the results from pictures. The discriminator ends in
//! a sigmoid, so both sides learn by the binary cross-entropy (Goodfellow et al. 2014, with the generator's
//! non-saturating loss).

use crate::device::Context;
use crate::error::{Error, Result};
use crate::nn::Mode;
use crate::ops::batch::concat;
use crate::ops::binary_cross_entropy::binary_cross_entropy;
use crate::ops::embedding::embedding;
use crate::ops::regression::{absolute_error, squared_error, weighted_sum};
use crate::ops::straight_through::straight_through;
use crate::ops::vector_quantize::nearest;
use crate::stages::discriminator::Discriminator;
use crate::stages::perceptual::Perceptual;
use crate::stages::stage_a::StageA;
use crate::tensor::Tensor;
use crate::tensor::autograd::{Gradients, Tape};

/// How much the encoder is held to its codes, beside the codes to the encoder.
const COMMITMENT: f32 = 0.25;

/// Keeps the adaptive weight finite where the adversary has no gradient.
const WEIGHT_EPS: f64 = 1e-4;
/// The largest adaptive weight.
const WEIGHT_MAX: f64 = 1e4;

/// Pictures after the quantiser, and what was seen on the way.
#[derive(Debug)]
pub struct Reconstruction {
    /// Not clamped, `[N, H, W, 3]`.
    pub pixels: Tensor,
    /// What the decoder's last layer saw.
    pub features: Tensor,
    /// What the quantiser saw, `[N, h, w, C]`.
    pub encoded: Tensor,
    /// Which code was nearest, `I64 [N, h, w]`.
    pub tokens: Tensor,
    /// mean((e - sg(z))^2) + 0.25 mean((z - sg(e))^2), z encoded, e its code, sg constant: a scalar.
    pub quantization: Tensor,
}

/// Pictures through encoder, quantiser and decoder. The gradient of a code goes unchanged to what was encoded; codes
/// learn from the quantiser's loss alone.
///
/// # Shapes
/// pixels `[N, H, W, 3]` in 0..1
///
/// # Errors
/// `InvalidArgument` for sides that do not divide; `OutOfMemory`; `Cancelled`.
pub fn reconstruct(cx: &Context, network: &StageA, pixels: &Tensor, mode: Mode) -> Result<Reconstruction> {
    let encoded = network.encode(cx, pixels, mode)?;
    let tokens = nearest(cx, &encoded.constant(), &network.codebook().constant())?;
    let codes = embedding(cx, &tokens, network.codebook())?;
    let codebook = squared_error(cx, &codes, &encoded.constant(), None)?;
    let commitment = squared_error(cx, &encoded, &codes.constant(), None)?;
    let quantization = weighted_sum(cx, &[(&codebook, 1.0), (&commitment, COMMITMENT)])?;
    let features = network.decoder_features(cx, &straight_through(cx, &codes, &encoded)?)?;
    let pixels = network.last_layer(cx, &features)?;
    Ok(Reconstruction { pixels, features, encoded, tokens, quantization })
}

/// mean |x - y| + mean (x - y)^2 + LPIPS(x, y), the last if its network is given: a scalar.
///
/// # Errors
/// `InvalidArgument` for shapes that differ, or pictures too small for LPIPS; `OutOfMemory`; `Cancelled`.
pub fn picture_loss(
    cx: &Context,
    found: &Tensor,
    target: &Tensor,
    perceptual: Option<&Perceptual>,
) -> Result<Tensor> {
    let absolute = absolute_error(cx, found, target)?;
    let squared = squared_error(cx, found, target, None)?;
    let mut terms = vec![(&absolute, 1.0), (&squared, 1.0)];
    let look = perceptual.map(|network| network.distance(cx, found, target)).transpose()?;
    terms.extend(look.as_ref().map(|look| (look, 1.0)));
    weighted_sum(cx, &terms)
}

/// What the generator learns from a discriminator: mean -ln D(x), a scalar.
///
/// # Errors
/// As [`Discriminator::logits`].
pub fn deception_loss(cx: &Context, discriminator: &Discriminator, found: &Tensor) -> Result<Tensor> {
    let logits = discriminator.logits(cx, found, None)?;
    binary_cross_entropy(cx, &logits, &vec![1.0; found.dims()[0]])
}

/// What a discriminator learns by: (mean -ln D(real) + mean -ln(1 - D(made))) / 2, a scalar.
///
/// # Errors
/// `InvalidArgument` for shapes that differ; as [`Discriminator::logits`].
pub fn judgement_loss(
    cx: &Context,
    discriminator: &Discriminator,
    real: &Tensor,
    made: &Tensor,
) -> Result<Tensor> {
    if real.dims() != made.dims() {
        return Err(Error::argument(
            "pictures to judge",
            format!("the shape {}", real.shape()),
            made.shape(),
        ));
    }
    // As one batch: every sample is normalised by itself.
    let logits = discriminator.logits(cx, &concat(cx, &[real, made])?, None)?;
    let targets: Vec<f32> = [1.0, 0.0].iter().flat_map(|&t| vec![t; real.dims()[0]]).collect();
    binary_cross_entropy(cx, &logits, &targets)
}

/// The gradient of a loss by the weight of the decoder's last layer, from that by the pixels.
///
/// # Errors
/// `Internal` for a network whose weights are constant; `OutOfMemory`; `Cancelled`.
pub fn last_layer_gradient(
    cx: &Context,
    network: &StageA,
    features: &Tensor,
    of_pixels: &Tensor,
) -> Result<Tensor> {
    let tape = Tape::new();
    let pixels = network.last_layer(&tape.attach(cx), &features.constant())?;
    let mut found = Gradients::default();
    tape.backward(cx, &[(&pixels, of_pixels.clone())], &mut found)?;
    let leaf = network.last_weight().tracked().and_then(|tracked| tracked.leaf());
    let gradient = leaf.and_then(|leaf| found.take(leaf));
    gradient.ok_or_else(|| Error::internal("adaptive weight", "the decoder's last layer does not train"))
}

/// The factor of the generator's adversarial loss (Esser et al. 2021, equation 7): the norm of the picture loss's
/// gradient at the decoder's last layer over that of the adversarial loss's, clamped to 0..10^4, with 10^-4 added to
/// the divisor as the authors of VQGAN do.
pub fn adaptive_weight(picture_norm: f64, adversarial_norm: f64) -> f64 {
    (picture_norm / (adversarial_norm + WEIGHT_EPS)).clamp(0.0, WEIGHT_MAX)
}

#[cfg(test)]
mod tests {
    use super::adaptive_weight;

    #[test]
    fn the_weight_balances_both_gradients() {
        assert!((adaptive_weight(3.0, 1.5 - 1e-4) - 2.0).abs() < 1e-12);
        assert_eq!(adaptive_weight(0.0, 1.0), 0.0);
        assert_eq!(adaptive_weight(1e6, 0.0), 1e4);
        assert!(adaptive_weight(f64::NAN, 1.0).is_nan());
    }
}
