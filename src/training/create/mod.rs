//! A model to train from scratch: the configurations of a folder, with weights made anew where there are none.

pub(super) mod draw;
mod rules;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use self::rules::Rules;
use super::export::{copy_folder, is_weights, joined};
use super::trainer::LISTS_BYTES;
use crate::device::threads::run_apart_with_reserve;
use crate::device::{Context, Device};
use crate::error::{Error, Result};
use crate::files::replace_folder;
use crate::nn::{Params, Source};
use crate::pipeline::load::{self, Keys, Layout};
use crate::pipeline::{Model, ModelOptions};
use crate::stages::image_encoder::ImageEncoder;
use crate::stages::stage_a::StageA;
use crate::stages::stage_b::StageB;
use crate::stages::stage_c::StageC;
use crate::stages::text_encoder::TextEncoder;
use crate::tensor::{DType, Tensor};
use crate::weights::config::{ModelIndex, TextEncoderConfig};
use crate::weights::write_safetensors;

/// The file that fresh weights are written to.
const WEIGHTS_FILE: &str = "model.safetensors";

/// A running statistic of every BatchNorm, and the counter of batches that PyTorch keeps beside it.
const STATISTIC: &str = "running_var";
const COUNTER: &str = "num_batches_tracked";

/// Makes a whole model of `configs`, a model folder of generation 1 that need not have all its weights, and puts it at
/// `folder`, which is replaced as a whole and may be `configs` itself. Parts without weights get fresh ones, drawn as
/// the authors' constructors draw them: element e of a tensor is a function of the seed, the tensor's name and e.
/// Everything else is copied. Only the image encoder may be missing.
///
/// # Errors
/// `Io`; `Format`, naming the file and the field, for configurations that do not fit together; `Unsupported` for
/// another generation; `InvalidArgument` for a folder inside `configs`; `OutOfMemory`. After an error `folder` is as it
/// was.
pub fn create_model(configs: &Path, folder: &Path, seed: u64) -> Result<()> {
    run_apart_with_reserve("a new model", LISTS_BYTES, || {
        let index = ModelIndex::read(configs)?;
        if index.pipeline.generation() != 1 {
            let what = format!("new weights for a {}", index.pipeline.class_name());
            return Err(Error::unsupported(what, "models are made anew in the layout of generation 1"));
        }
        if folder != configs && folder.starts_with(configs) {
            let expected = format!("a folder outside {}", configs.display());
            return Err(Error::argument("folder", expected, folder.display()));
        }
        let cx = Context::new(&Device::cpu(0)?);
        replace_folder(folder, |new| {
            copy_folder(configs, new, &HashSet::new())?;
            fill_parts(&cx, configs, new, seed)?;
            let opened = Model::open(new, &ModelOptions::default());
            opened.map(drop).map_err(|error| named_after(error, new, configs))
        })
    })
}

/// An error about a file of one folder as one about the same file of another.
fn named_after(error: Error, folder: &Path, other: &Path) -> Error {
    let named = |place: String| place.replace(&folder.display().to_string(), &other.display().to_string());
    match error {
        Error::Format { place, expected, found } => Error::format(named(place), named(expected), found),
        error => error,
    }
}

fn fill_parts(cx: &Context, configs: &Path, new: &Path, seed: u64) -> Result<()> {
    let part = |name| Blank { cx, configs: configs.join(name), folder: new.join(name), name, seed };
    part("text_encoder").fill(|folder| {
        let Layout { sizes, keys } = load::text_encoder_layout(folder)?;
        let rules = rules::text_encoder(&sizes, TextEncoderConfig::read(folder)?.initializer_factor);
        Ok((keys, rules, move |p: &Params| TextEncoder::load(p, sizes)))
    })?;
    if configs.join("image_encoder").exists() {
        part("image_encoder").fill(|folder| {
            let Layout { sizes, keys } = load::image_encoder_layout(folder)?;
            Ok((keys, rules::image_encoder(), move |p: &Params| ImageEncoder::load(p, sizes)))
        })?;
    }
    part("stage_a").fill(|folder| {
        let Layout { sizes, keys } = load::stage_a_layout(folder)?;
        Ok((keys, rules::stage_a(&sizes), move |p: &Params| StageA::load(p, sizes)))
    })?;
    part("stage_b").fill(|folder| {
        let Layout { sizes, keys } = load::stage_b_layout(folder)?;
        Ok((keys, rules::stage_b(&sizes), move |p: &Params| StageB::load(p, sizes)))
    })?;
    part("stage_c").fill(|folder| {
        let Layout { sizes, keys } = load::stage_c_layout(folder)?;
        Ok((keys, rules::stage_c(&sizes), move |p: &Params| StageC::load(p, sizes)))
    })
}

/// A part that may have no weights yet.
struct Blank<'a> {
    cx: &'a Context,
    /// Its configuration.
    configs: PathBuf,
    /// Where its weights go.
    folder: PathBuf,
    name: &'static str,
    seed: u64,
}

impl Blank<'_> {
    /// Writes weights, unless there are some. `read` gives what the configuration says: the file's names, how tensors
    /// are drawn, and the network, whose loading shows which tensors there are.
    fn fill<T, L: FnOnce(&Params) -> Result<T>>(
        &self,
        read: impl FnOnce(&Path) -> Result<(Keys, Rules, L)>,
    ) -> Result<()> {
        if self.has_weights()? {
            return Ok(());
        }
        let (keys, rules, load) = read(&self.configs)?;
        let drawn = self.draw(&rules, load)?;
        let tensors = under_keys(&keys, drawn)?;
        let path = self.folder.join(WEIGHTS_FILE);
        write_safetensors(&path, tensors.iter().map(|(name, tensor)| (name.clone(), tensor)))
    }

    fn has_weights(&self) -> Result<bool> {
        let failed = |source| Error::io(&self.configs, source);
        for entry in std::fs::read_dir(&self.configs).map_err(failed)? {
            if is_weights(&entry.map_err(failed)?.file_name().to_string_lossy()) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Every tensor that `load` asks for, by its structural name.
    fn draw<T>(
        &self,
        rules: &Rules,
        load: impl FnOnce(&Params) -> Result<T>,
    ) -> Result<Vec<(String, Tensor)>> {
        let blanks = Blanks { cx: self.cx, asked: Mutex::default() };
        // The network shares the tensors: it must be gone before they are filled.
        drop(load(&Params::new(&blanks))?);
        let mut asked = blanks.asked.into_inner().unwrap_or_else(PoisonError::into_inner);
        let shapes: HashMap<String, Vec<usize>> =
            asked.iter().map(|(name, tensor)| (name.clone(), tensor.dims().to_vec())).collect();
        for (name, tensor) in &mut asked {
            let (rule, drawn_as) = rules.of(name).ok_or_else(|| {
                Error::internal("a new model", format!("no rule says how {}.{name} begins", self.name))
            })?;
            let rng = draw::stream(self.seed, &format!("{}.{drawn_as}", self.name));
            let spread =
                rule.spread(tensor.dims(), || shapes.get(&weight_beside(name)).map(Vec::as_slice))?;
            draw::fill(self.cx, tensor.slice_mut()?, rng, spread)?;
        }
        Ok(asked)
    }
}

/// The weight of the layer that a bias belongs to.
fn weight_beside(bias: &str) -> String {
    format!("{}weight", bias.strip_suffix("bias").unwrap_or(bias))
}

/// Answers every question with a tensor that is not filled yet, and remembers it.
struct Blanks<'a> {
    cx: &'a Context,
    asked: Mutex<Vec<(String, Tensor)>>,
}

impl Source for Blanks<'_> {
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let tensor = Tensor::new(self.cx, "a new weight", shape, DType::F32)?;
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        asked.push((name.to_owned(), tensor.clone()));
        Ok(tensor)
    }

    fn has(&self, _: &str) -> bool {
        true
    }
}

/// The tensors as a file holds them: parts of one joined, and a counter beside each BatchNorm.
fn under_keys(keys: &Keys, drawn: Vec<(String, Tensor)>) -> Result<BTreeMap<String, Tensor>> {
    let mut tensors = BTreeMap::new();
    let mut packed: BTreeMap<String, BTreeMap<usize, Tensor>> = BTreeMap::new();
    for (name, tensor) in drawn {
        let key = keys.key(&name);
        if let Some(norm) = key.name.strip_suffix(STATISTIC) {
            tensors.insert(format!("{norm}{COUNTER}"), Tensor::from_slice::<i64>(&[], &[0])?);
        }
        match key.part {
            None => drop(tensors.insert(key.name, tensor)),
            Some((i, _)) => drop(packed.entry(key.name).or_default().insert(i, tensor)),
        }
    }
    for (name, parts) in packed {
        tensors.insert(name, joined(parts.values())?);
    }
    Ok(tensors)
}
