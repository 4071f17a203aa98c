//! Low-rank adapters out of training: as diffusers' file, or added to the weights of a model folder.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::export::{TrainedPart, write_model};
use super::trainer::{LISTS_BYTES, Trainer};
use crate::device::Context;
use crate::device::threads::run_apart_with_reserve;
use crate::error::{Error, Result};
use crate::files::replace_file;
use crate::ops::linear::{Epilogue, linear_transposed};
use crate::ops::widen::widen;
use crate::pipeline::{Model, ModelOptions};
use crate::tensor::Tensor;
use crate::weights::lora::{ScaledAdapter, Update, adapter_file, adapter_keys};
use crate::weights::{stored_as, write_safetensors};

impl Trainer {
    /// Writes the averaged adapter as diffusers does for its Würstchen prior, in the names of v2 for both generations:
    /// to `path` if that ends in `.safetensors`, else to `pytorch_lora_weights.safetensors` in the folder `path`.
    ///
    /// alpha / rank is multiplied into the matrices that widen, so that every reader applies the adapter as it was
    /// trained: diffusers takes files without an alpha as unscaled.
    ///
    /// # Errors
    /// `Unsupported` if no adapter is trained; `Io`.
    pub fn save_adapter(&self, path: &Path) -> Result<PathBuf> {
        if self.parameters.adapters().next().is_none() {
            let reason = "no adapter is trained: the option lora_rank is 0";
            return Err(Error::unsupported("saving an adapter", reason));
        }
        let file = adapter_file(path);
        run_apart_with_reserve("an adapter", LISTS_BYTES, || {
            let cx = self.context();
            let mut tensors = BTreeMap::new();
            for part in self.task.parts(&self.model)? {
                for update in self.updates(&part)? {
                    let [down, up] = adapter_keys(&update.layer);
                    let mut scaled = widen(&cx, &update.up)?.detached()?;
                    scaled.slice_mut::<f32>()?.iter_mut().for_each(|v| *v *= update.scale);
                    tensors.insert(down, stored_as(&update.down, self.options.export_dtype)?);
                    tensors.insert(up, stored_as(&scaled, self.options.export_dtype)?);
                }
            }
            replace_file(&file, |new| {
                write_safetensors(new, tensors.iter().map(|(name, tensor)| (name.clone(), tensor)))
            })
        })?;
        Ok(file)
    }

    /// What the averaged adapters add to a part.
    pub(super) fn updates(&self, part: &TrainedPart) -> Result<Vec<Update>> {
        let value = |place: usize| {
            let average = self.best(place);
            average.unwrap_or(self.parameters.list()[place].master()).clone()
        };
        let of_part = self.parameters.adapters().filter_map(|(name, adapter, [down, up])| {
            let layer = name.strip_prefix(part.prefix)?.strip_prefix('.')?.to_owned();
            Some(Update { layer, down: value(down), up: value(up), scale: adapter.scale })
        });
        Ok(of_part.collect())
    }
}

/// The tensors of a part's file that `updates` change, with the changes: W + scale * up down, `F32`.
///
/// # Errors
/// `Format` if the file has a weight in another shape; `OutOfMemory`.
pub(super) fn merged(
    cx: &Context,
    part: &TrainedPart,
    updates: &[Update],
) -> Result<BTreeMap<String, Tensor>> {
    let mut tensors = BTreeMap::new();
    for Update { layer, down, up, scale } in updates {
        let [outputs, inputs] = [up.dims().first(), down.dims().last()].map(|n| n.copied().unwrap_or(0));
        let key = part.keys.key(&format!("{layer}.weight"));
        let (i, parts) = key.part.unwrap_or((0, 1));
        let mut whole = match tensors.remove(&key.name) {
            Some(whole) => whole,
            None => {
                let stored = part.weights.tensor_shaped(&key.name, &[parts * outputs, inputs])?;
                widen(cx, &stored)?.detached()?
            }
        };
        let sum = {
            let weight = whole.narrow(i * outputs, outputs)?;
            let then = Epilogue { gain: *scale, residual: Some(&weight), ..Epilogue::default() };
            linear_transposed(cx, &widen(cx, up)?, down, &then)?
        };
        whole.slice_mut::<f32>()?[i * outputs * inputs..][..outputs * inputs].copy_from_slice(sum.slice()?);
        tensors.insert(key.name, whole);
    }
    Ok(tensors)
}

/// Writes the model folder `model` to `out`, which is replaced as a whole, with `scale` times the updates of
/// an adapter added to Stage C's weights. These keep the types that they are stored in; all else is copied.
///
/// # Errors
/// Those of opening the model and the adapter; `InvalidArgument` for a scale that is not finite, or an `out` inside
/// the model's folder; `Unsupported` without Stage C; `OutOfMemory`; `Io`.
pub fn merge_adapter(model: &Path, adapter: &Path, scale: f32, out: &Path) -> Result<()> {
    let mut options = ModelOptions::default();
    options.add_lora(adapter, scale)?;
    let opened = Model::open(model, &options)?;
    run_apart_with_reserve("a merged model", LISTS_BYTES, || {
        let cx = Context::new(opened.device());
        let (stage_c, adapters) = opened.adapted_stage_c()?;
        let part = TrainedPart { prefix: "", weights: &stage_c.weights, keys: &stage_c.keys };
        write_model(
            opened.folder(),
            out,
            &[part],
            |part| {
                let mut updates = Vec::new();
                for ScaledAdapter { adapter, scale } in adapters {
                    for update in adapter.updates() {
                        let update = update?;
                        updates.push(Update { scale: scale * update.scale, ..update });
                    }
                }
                // Adding nothing could still turn -0 into 0.
                updates.retain(|update| update.scale != 0.0);
                let as_stored = |(name, tensor): (String, Tensor)| {
                    let dtype = part.weights.tensor(&name)?.dtype();
                    Ok((name, stored_as(&tensor, dtype)?))
                };
                merged(&cx, part, &updates)?.into_iter().map(as_stored).collect()
            },
            |_| Ok(()),
        )
    })
}
