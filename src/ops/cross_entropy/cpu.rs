//! Softmax, loss and gradient on the CPU: one row of logits, which lies in cache, at a time.

use crate::device::Context;
use crate::device::scratch::SharedMut;
use crate::device::simd::exp;
use crate::error::Result;
use crate::ops::kernels::{self, maximum, mul_add, per_cpu, sum};

/// What all rows of one call share.
pub struct Rule<'a> {
    /// One class for each row of the whole call, all known to exist.
    pub targets: &'a [i64],
    /// One factor for each row of the whole call.
    pub coefficients: &'a [f32],
    pub smoothing: f32,
    /// Whether logits become the gradients of the weighted loss by them.
    pub gradients: bool,
}

/// The losses of rows, of which the first is row `first_row` of the call, and whether their largest logits are those
/// of the targets. Overwrites the logits.
pub fn losses(
    cx: &Context,
    rule: &Rule,
    first_row: usize,
    logits: &mut [f32],
    losses: &mut [f32],
    hits: &mut [u8],
) -> Result<()> {
    let classes = logits.len() / losses.len().max(1);
    let at_once = kernels::rows_per_task(classes);
    let (logits, hits) = (SharedMut::new(logits), SharedMut::new(hits));
    kernels::parallel_chunks(cx, losses, at_once, |i, losses| {
        for (r, loss) in (i * at_once..).zip(losses) {
            // SAFETY: each row number occurs once, and the parts of different rows are disjoint.
            let (logits, hit) = unsafe { (logits.part(r * classes, classes), hits.part(r, 1)) };
            let label = Label { target: rule.targets[first_row + r] as usize, smoothing: rule.smoothing };
            let row = soften(logits, label);
            (*loss, hit[0]) = (row.loss, u8::from(row.is_right));
            if rule.gradients {
                differentiate(logits, label, rule.coefficients[first_row + r], row.total);
            }
        }
    })
}

/// What a row should have been.
#[derive(Clone, Copy)]
struct Label {
    target: usize,
    smoothing: f32,
}

/// What a row is.
struct Row {
    loss: f32,
    is_right: bool,
    /// The sum of the weights that its logits became.
    total: f32,
}

#[inline(always)]
fn soften_body<const FMA: bool>(logits: &mut [f32], label: Label) -> Row {
    let largest = maximum(logits);
    let of_target = logits[label.target] - largest;
    let is_right = of_target == 0.0 && !logits[..label.target].contains(&largest);
    let mean = sum(logits) / logits.len() as f32 - largest;
    for v in logits.iter_mut() {
        *v = exp::<FMA>(*v - largest);
    }
    let total = sum(logits);
    let expected = mul_add::<FMA>(label.smoothing, mean - of_target, of_target);
    Row { loss: total.ln() - expected, is_right, total }
}

per_cpu! {
    /// The loss of a row, whose logits become `e^(l - max)`. With m = l - max, the logarithm of the probability of v is
    /// `m[v] - log(sum of e^m)`.
    fn soften(logits: &mut [f32], label: Label) -> Row = soften_body
}

#[inline(always)]
fn differentiate_body<const FMA: bool>(weights: &mut [f32], label: Label, coefficient: f32, total: f32) {
    let (factor, spread) = (coefficient / total, coefficient * label.smoothing / weights.len() as f32);
    for v in weights.iter_mut() {
        *v = mul_add::<FMA>(*v, factor, -spread);
    }
    weights[label.target] -= coefficient * (1.0 - label.smoothing);
}

per_cpu! {
    /// The weights of a row become the gradient of its weighted loss by its logits: probability minus label.
    fn differentiate(weights: &mut [f32], label: Label, coefficient: f32, total: f32) = differentiate_body
}
