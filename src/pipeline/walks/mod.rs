//! The walks of a generation, networks and mathematics joined: Stage C's over latents, Stage B's over tokens (v1) or
//! Stage A's latents (v2). What does not change between steps is computed when a walk is made or started.

mod guided;
mod latents;
mod stage_b;
mod stage_c;
mod tokens;

pub(super) use guided::Texts;
pub(super) use stage_b::StageBWalk;
pub(super) use stage_c::{StageCWalk, initial_latents, one_each};

use super::halves::Prior;
use crate::device::Context;
use crate::error::{Error, Result};
use crate::ops::batch::concat;
use crate::stages::blocks::Modulations;
use crate::tensor::replay::Replay;
use crate::tensor::{DType, Tensor};
use crate::weights::Weights;

/// A step of a network: `forward` of x and of what its TimestepBlocks do at one time. On a GPU it is recorded.
fn modulated(
    cx: &Context,
    replay: &Replay,
    x: &Tensor,
    modulations: &Modulations,
    forward: impl Fn(&Context, &Tensor, &Modulations) -> Result<Tensor>,
) -> Result<Tensor> {
    let inputs: Vec<&Tensor> = std::iter::once(x).chain(modulations.per_block()).collect();
    replay.run(cx, &inputs, |cx, inputs| match inputs {
        [x, modulations @ ..] => forward(cx, x, &Modulations::of_blocks(modulations)),
        [] => Err(Error::internal("a step", "no inputs")),
    })
}

/// Guidance with this weight is the conditional prediction itself.
const NO_GUIDANCE: f32 = 1.0;

/// Whether a weight asks for guidance. v2's reference takes every weight up to 1 as none.
fn is_guided(generation: u32, weight: f32) -> bool {
    if generation == 1 { weight != NO_GUIDANCE } else { weight > NO_GUIDANCE }
}

/// Latents, with one entry of zeros after them if there are unconditional twins to see it.
fn with_zero_twin(cx: &Context, latents: &Tensor, twins: bool) -> Result<Tensor> {
    if !twins {
        return Ok(latents.clone());
    }
    let [_, h, w, c] = latents.dims_of("stage_b latents")?;
    let zero = Tensor::zeros(cx, "latents", &[1, h, w, c], DType::F32)?;
    concat(cx, &[latents, &zero])
}

/// # Errors
/// `Format`, naming the tensor, if `x` is not finite because a weight is not; `InvalidArgument` if the weights
/// are finite and the options have driven the values out of range.
pub(super) fn check_finite(x: &Tensor, stage: &str, weights: &Weights) -> Result<()> {
    if is_finite(x)? {
        return Ok(());
    }
    Err(not_finite(stage, &[weights]))
}

/// [`check_finite`] for what Stage C gave, whose adapters may be at fault too.
///
/// # Errors
/// As there.
pub(super) fn check_finite_latents(x: &Tensor, prior: &Prior) -> Result<()> {
    if is_finite(x)? {
        return Ok(());
    }
    Err(not_finite("Stage C", &prior.stage_c_weights().collect::<Vec<_>>()))
}

fn is_finite(x: &Tensor) -> Result<bool> {
    Ok(match x.dtype() {
        DType::F16 => x.slice::<half::f16>()?.iter().all(|v| v.is_finite()),
        DType::BF16 => x.slice::<half::bf16>()?.iter().all(|v| v.is_finite()),
        _ => x.slice::<f32>()?.iter().all(|v| v.is_finite()),
    })
}

/// Why an output is not finite: the first weight that is not, or the options.
fn not_finite(stage: &str, weights: &[&Weights]) -> Error {
    for weights in weights {
        if let Some((name, count)) = weights.find_not_finite() {
            let place = format!("{}: {name}", weights.path().display());
            return Error::format(place, "finite weights", format!("{count} that are not"));
        }
    }
    Error::argument(
        format!("{stage} options"),
        "values that keep the network's output finite",
        "an output that is not (guidance or temperature may be extreme)",
    )
}
