//! From features to tokens: logits, guidance, temperature and choice, a few rows at a time, so that the logits of
//! a whole image (16,384 tokens of 8,192 classes: 512 MiB) never exist.

mod cpu;
mod cuda;
#[cfg(test)]
mod tests;

use crate::device::Context;
use crate::device::gemm::Layout;
use crate::error::{Error, Result};
use crate::ops::linear::{Epilogue, Rows, product};
use crate::ops::vector_quantize::{self, Codes};
use crate::ops::work;
use crate::tensor::autograd::refuse;
use crate::tensor::{DType, Tensor};

/// Logits that are held at a time, for each of the two branches: 8 MiB. Each group of rows packs the weight anew, which fewer
/// rows would not pay for; more rows would not stay in cache.
const SCRATCH_ELEMENTS: usize = 1 << 21;

/// In the place of a token whose logits are not all finite numbers.
pub const NO_TOKEN: i64 = -1;

/// How a token is chosen from its logits.
#[derive(Debug, Clone, Copy)]
pub enum TokenChoice<'a> {
    /// By the inverse distribution function of softmax(logits / temperature).
    Multinomial {
        /// `[R]`, `F32`, in `[0, 1)`: one for each row.
        uniforms: &'a Tensor,
    },
    /// The largest logit, the lowest index of equal ones. The temperature has no say.
    Argmax,
    /// The code nearest to the mean of the codebook under softmax(logits / temperature).
    Quant {
        /// `[V, D]`, of any float type.
        codebook: &'a Tensor,
    },
}

/// A token for each row of features: `logits = g * cond W^T + (1 - g) * uncond W^T`, or `cond W^T` without
/// `uncond`; then `choice`. [`NO_TOKEN`] where logits, or the mean of the codebook, are not all finite.
///
/// # Shapes
/// `cond` and `uncond` `[R, C]`, `F32`, on a GPU of any float type; `weight` `[V, C]`, of any float type; the result `[R]`, `I64`.
///
/// # Errors
/// `InvalidArgument` if shapes do not fit, or the temperature is needed and not at least [`f32::MIN_POSITIVE`].
pub fn choose_tokens(
    cx: &Context,
    cond: &Tensor,
    uncond: Option<&Tensor>,
    weight: &Tensor,
    guidance: f32,
    temperature: f32,
    choice: TokenChoice,
) -> Result<Tensor> {
    let span = cx.op("token_choice");
    refuse(cx, "choice of tokens", &[cond, uncond.unwrap_or(cond), weight])?;
    let [rows, channels] = cond.dims_of::<2>("token features")?;
    let [classes, weight_channels] = weight.dims_of::<2>("token weight")?;
    if weight_channels != channels || classes == 0 {
        return Err(Error::argument("token weight", format!("[V, {channels}]"), weight.shape()));
    }
    if let Some(uncond) = uncond.filter(|u| u.dims() != cond.dims()) {
        return Err(Error::argument("token features", format!("{}", cond.shape()), uncond.shape()));
    }
    check(&choice, rows, classes, temperature)?;
    if let TokenChoice::Quant { codebook } = choice {
        vector_quantize::check(cx, codebook)?;
    }
    let _span = span.working(|| match uncond {
        Some(uncond) => work::multiplying(2 * rows, &[weight], &[cond, uncond]),
        None => work::multiplying(rows, &[weight], &[cond]),
    });
    let given = Given { cond, uncond, weight, guidance, temperature, choice };
    match cx.cuda()? {
        Some(stream) => cuda::choose(cx, stream, &given),
        None => choose_here(cx, &given),
    }
}

/// What [`choose_tokens`] was given, found to fit together.
struct Given<'a> {
    cond: &'a Tensor,
    uncond: Option<&'a Tensor>,
    weight: &'a Tensor,
    guidance: f32,
    temperature: f32,
    choice: TokenChoice<'a>,
}

fn choose_here(cx: &Context, given: &Given) -> Result<Tensor> {
    let &Given { cond, uncond, weight, guidance, temperature, choice } = given;
    let [rows, classes] = [cond.dims()[0], weight.dims()[0]];
    let codes = match choice {
        TokenChoice::Quant { codebook } => Some(Codes::new(cx, codebook)?),
        _ => None,
    };
    let chooser = cpu::Chooser {
        guidance,
        inverse_temperature: 1.0 / temperature,
        rule: match (&choice, &codes) {
            (TokenChoice::Multinomial { uniforms }, _) => cpu::Rule::Multinomial(uniforms.slice()?),
            (_, Some(codes)) => cpu::Rule::Quant(codes.table()?),
            _ => cpu::Rule::Argmax,
        },
    };
    let mut tokens = Tensor::new(cx, "tokens", &[rows], DType::I64)?;
    let chunk = (SCRATCH_ELEMENTS / classes).clamp(1, rows.max(1));
    let mut logits = Tensor::new(cx, "logits", &[chunk, classes], DType::F32)?;
    let mut others =
        Tensor::new(cx, "logits", &[if uncond.is_some() { chunk } else { 0 }, classes], DType::F32)?;
    let mut means =
        Tensor::new(cx, "mean codes", &[chunk, codes.as_ref().map_or(0, Codes::dim)], DType::F32)?;
    for (i, tokens) in tokens.slice_mut::<i64>()?.chunks_mut(chunk).enumerate() {
        let features = |x: &Tensor| x.narrow(i * chunk, tokens.len());
        let logits = &mut logits.slice_mut::<f32>()?[..tokens.len() * classes];
        fill_logits(cx, &features(cond)?, weight, logits)?;
        let others = others.slice_mut::<f32>()?;
        if let Some(uncond) = uncond {
            fill_logits(cx, &features(uncond)?, weight, &mut others[..tokens.len() * classes])?;
        }
        cpu::choose(cx, &chooser, i * chunk, logits, others, means.slice_mut()?, tokens)?;
    }
    Ok(tokens)
}

fn check(choice: &TokenChoice, rows: usize, classes: usize, temperature: f32) -> Result<()> {
    match choice {
        TokenChoice::Argmax => return Ok(()),
        TokenChoice::Multinomial { uniforms } if uniforms.dims() != [rows] => {
            return Err(Error::argument("uniforms", format!("[{rows}]"), uniforms.shape()));
        }
        TokenChoice::Quant { codebook } if codebook.dims().first() != Some(&classes) => {
            return Err(Error::argument("codebook", format!("[{classes}, D]"), codebook.shape()));
        }
        _ => {}
    }
    // The inverse of a smaller one is infinite.
    if temperature >= f32::MIN_POSITIVE && temperature.is_finite() {
        return Ok(());
    }
    Err(Error::argument("temperature", format!("a number from {:e}", f32::MIN_POSITIVE), temperature))
}

/// `features W^T`.
fn fill_logits(cx: &Context, features: &Tensor, weight: &Tensor, logits: &mut [f32]) -> Result<()> {
    let rows = Rows {
        values: features.slice()?,
        channels: features.shape().channels(),
        per_sample: features.shape().rows(),
    };
    product(cx, &rows, weight, Layout::RowsAreOutputs, &Epilogue::default(), 0, logits)
}
