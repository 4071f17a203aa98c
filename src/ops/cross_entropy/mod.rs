//! The loss of a token predictor: its last layer, the softmax over all classes and the cross-entropy with smoothed
//! labels (Szegedy et al. 2016, arXiv:1512.00567), a few rows at a time.
//!
//! The logits of a whole batch never exist. While those of some rows are at hand, so are their gradients: on a tape
//! those by features and weight are summed at once, and the walk back only scales them (Hsu et al. 2024,
//! arXiv:2410.10989).

mod cpu;
mod cuda;
#[cfg(test)]
mod tests;

use crate::device::Context;
use crate::error::{Error, Result};
use crate::ops::linear::WeightLayout::{RowsAreInputs, RowsAreOutputs};
use crate::ops::linear::gradient::{Matrix, Place, scale, transposed_product};
use crate::ops::linear::{Epilogue, Rows, product};
use crate::tensor::autograd::{record, records};
use crate::tensor::{DType, Tensor};

/// Logits that are held at a time: 16 MiB. The whole gradient of the weight is read and written for each.
const SCRATCH_ELEMENTS: usize = 4 << 20;

/// What [`cross_entropy`] compares with, and how it counts.
#[derive(Debug, Clone, Copy)]
pub struct CrossEntropy<'a> {
    /// The true class of each token: `I64`, of any shape.
    pub targets: &'a Tensor,
    /// What each token's loss is multiplied by.
    pub coefficients: &'a [f32],
    /// The share of a label that is spread evenly over all classes, the true one among them: 0 for none.
    pub smoothing: f32,
}

/// What [`cross_entropy`] finds.
#[derive(Debug, Clone)]
pub struct TokenLoss {
    /// `[1]`: the sum of `coefficient * loss` over all tokens. Tracked if features or weight are.
    pub loss: Tensor,
    /// The loss of each token, `[R]`, without its coefficient. Not tracked.
    pub of_tokens: Tensor,
    /// For each token 1 if its largest logit (the first of equal ones) is at the true class, else 0: `U8 [R]`.
    pub hits: Tensor,
}

impl TokenLoss {
    /// How many tokens have their largest logit at the true class. The host waits for a GPU.
    ///
    /// # Errors
    /// Those of reading a tensor.
    pub fn correct(&self) -> Result<usize> {
        Ok(self.hits.slice::<u8>()?.iter().map(|&hit| usize::from(hit)).sum())
    }
}

/// With `p = softmax(features Wᵀ)` and V classes, token t's loss is
/// `-(1 - smoothing) log p[t, target] - smoothing / V * sum over v of log p[t, v]`.
///
/// # Shapes
/// `features` `F32 [.., C]` of R rows, `weight` `[V, C]` of any float type, R targets and R coefficients
///
/// # Errors
/// `InvalidArgument` if shapes do not fit together, a target is none of the classes or `smoothing` is not within
/// 0 .. 1; `OutOfMemory`; `Cancelled`. Targets that only a GPU knows are not looked at: one that is no class gives a loss
/// that is no number.
pub fn cross_entropy(
    cx: &Context,
    features: &Tensor,
    weight: &Tensor,
    p: &CrossEntropy,
) -> Result<TokenLoss> {
    let _span = cx.op("cross_entropy");
    let sizes = check(features, weight, p)?;
    let mut sums = Sums::new(cx, features, weight, sizes)?;
    if let Some(stream) = cx.cuda()? {
        let (of_features, of_weight) = (sums.of_features.as_mut(), sums.of_weight.as_mut());
        let input = cuda::Input { features, weight, sizes, of_features, of_weight };
        let cuda::Found { loss, of_tokens, hits } = cuda::losses(cx, stream, input, p)?;
        return Ok(TokenLoss { loss: sums.record(cx, loss, features, weight)?, of_tokens, hits });
    }
    let input = features.slice::<f32>()?;
    let chunk = (SCRATCH_ELEMENTS / sizes.classes).clamp(1, sizes.rows.max(1));
    let mut logits = Tensor::new(cx, "logits", &[chunk, sizes.classes], DType::F32)?;
    let mut of_tokens = Tensor::new(cx, "losses of tokens", &[sizes.rows], DType::F32)?;
    let mut hits = Tensor::new(cx, "whether tokens are right", &[sizes.rows], DType::U8)?;
    let rule = cpu::Rule {
        targets: p.targets.slice()?,
        coefficients: p.coefficients,
        smoothing: p.smoothing,
        gradients: sums.wanted(),
    };
    let (losses, right) = (of_tokens.slice_mut::<f32>()?, hits.slice_mut::<u8>()?);
    for first in (0..sizes.rows).step_by(chunk) {
        let part = first..sizes.rows.min(first + chunk);
        let logits = &mut logits.slice_mut::<f32>()?[..part.len() * sizes.classes];
        let rows = sizes.rows_of(&input[part.start * sizes.channels..part.end * sizes.channels]);
        product(cx, &rows, weight, RowsAreOutputs, &Epilogue::default(), 0, logits)?;
        cpu::losses(cx, &rule, first, logits, &mut losses[part.clone()], &mut right[part])?;
        sums.add(cx, weight, rows.values, logits, first)?;
    }
    let weighted = losses.iter().zip(p.coefficients).map(|(&loss, &c)| f64::from(loss) * f64::from(c));
    let loss = Tensor::from_slice(&[1], &[weighted.sum::<f64>() as f32])?;
    Ok(TokenLoss { loss: sums.record(cx, loss, features, weight)?, of_tokens, hits })
}

/// Sizes that are known to fit together.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    rows: usize,
    channels: usize,
    classes: usize,
}

impl Sizes {
    fn rows_of<'a>(&self, values: &'a [f32]) -> Rows<'a> {
        Rows { values, channels: self.channels, per_sample: self.rows }
    }
}

fn check(features: &Tensor, weight: &Tensor, p: &CrossEntropy) -> Result<Sizes> {
    let (rows, channels) = (features.shape().rows(), features.shape().channels());
    let [classes, inputs] = weight.dims_of("cross_entropy weight")?;
    if inputs != channels || classes == 0 {
        return Err(Error::argument("cross_entropy weight", format!("[V, {channels}]"), weight.shape()));
    }
    if p.targets.elements() != rows {
        let expected = format!("{rows} tokens");
        return Err(Error::argument("cross_entropy targets", expected, p.targets.shape()));
    }
    if p.coefficients.len() != rows {
        let expected = format!("one for each of {rows} tokens");
        return Err(Error::argument("cross_entropy coefficients", expected, p.coefficients.len()));
    }
    if !(0.0..=1.0).contains(&p.smoothing) {
        return Err(Error::argument("cross_entropy smoothing", "a share within 0 .. 1", p.smoothing));
    }
    if p.targets.dtype() == DType::I64 && !p.targets.is_on_host() {
        return Ok(Sizes { rows, channels, classes });
    }
    let targets = p.targets.slice::<i64>()?;
    let is_class = |&target: &i64| usize::try_from(target).is_ok_and(|target| target < classes);
    if let Some(place) = targets.iter().position(|target| !is_class(target)) {
        let found = format!("{} as token {place}", targets[place]);
        return Err(Error::argument("cross_entropy targets", format!("classes below {classes}"), found));
    }
    Ok(Sizes { rows, channels, classes })
}

/// The gradients of the loss that are wanted, as far as they are summed.
struct Sums {
    sizes: Sizes,
    of_features: Option<Tensor>,
    of_weight: Option<Tensor>,
}

impl Sums {
    fn new(cx: &Context, features: &Tensor, weight: &Tensor, sizes: Sizes) -> Result<Self> {
        let of = |what, x: &Tensor| {
            let wanted = records(cx, &[Some(x)]);
            // Without rows nothing is added.
            let new = if sizes.rows == 0 { Tensor::zeros } else { Tensor::new };
            wanted.then(|| new(cx, what, x.dims(), DType::F32)).transpose()
        };
        let of_weight = of("a weight's gradient", weight)?;
        Ok(Sums { sizes, of_features: of("features' gradient", features)?, of_weight })
    }

    fn wanted(&self) -> bool {
        self.of_features.is_some() || self.of_weight.is_some()
    }

    /// Adds what the rows from `first_row` on give: `features`, and the gradients of their logits.
    fn add(
        &mut self,
        cx: &Context,
        weight: &Tensor,
        features: &[f32],
        of_logits: &[f32],
        first_row: usize,
    ) -> Result<()> {
        let Sizes { channels, classes, .. } = self.sizes;
        if let Some(dx) = &mut self.of_features {
            let dx = &mut dx.slice_mut::<f32>()?[first_row * channels..][..features.len()];
            let rows = Rows { values: of_logits, channels: classes, per_sample: self.sizes.rows };
            product(cx, &rows, weight, RowsAreInputs, &Epilogue::default(), 0, dx)?;
        }
        if let Some(dw) = &mut self.of_weight {
            let dy = Matrix { values: of_logits, columns: classes };
            let x = Matrix { values: features, columns: channels };
            let place = Place { leading: channels, accumulate: first_row > 0 };
            transposed_product(cx, dy, x, place, dw.slice_mut()?)?;
        }
        Ok(())
    }

    /// The loss on the tape, which keeps the gradients.
    fn record(self, cx: &Context, loss: Tensor, features: &Tensor, weight: &Tensor) -> Result<Tensor> {
        record(cx, loss, &[Some(features), Some(weight)], || {
            let (to_features, to_weight) = (features.tracked(), weight.tracked());
            move |cx, flow| {
                let scaled = |x: Tensor, by: &Tensor| match cx.cuda()? {
                    Some(stream) => cuda::scaled_by(cx, stream, x, by),
                    None => scale(cx, x, by.slice::<f32>()?[0]),
                };
                if let Some(dx) = self.of_features {
                    flow.give(cx, to_features, |by| scaled(dx, by))?;
                }
                if let Some(dw) = self.of_weight {
                    flow.give(cx, to_weight, |by| scaled(dw, by))?;
                }
                Ok(())
            }
        })
    }
}
