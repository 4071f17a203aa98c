//! Trained weights as a model folder.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::path::Path;

use super::adapter::merged;
use super::parameters::Role;
use super::trainer::{LISTS_BYTES, Trainer};
use crate::device::threads::run_apart_with_reserve;
use crate::error::{Error, Result};
use crate::files::replace_folder;
use crate::pipeline::load::Keys;
use crate::tensor::Tensor;
use crate::weights::{Weights, stored_as, write_safetensors};

/// A part of a model whose weights were trained.
pub(super) struct TrainedPart<'a> {
    /// What its parameters lie below.
    pub prefix: &'static str,
    /// The file it began from.
    pub weights: &'a Weights,
    /// The file's names.
    pub keys: &'a Keys,
}

impl Trainer {
    /// Writes the model with the averaged weights of what was trained (before the average has followed a step, the
    /// weights themselves) to `folder`, which is replaced as a whole: everything else is copied from the model that
    /// training began with. Adapters are added to the weights that they adapt.
    ///
    /// # Errors
    /// `InvalidArgument` for a folder inside that model's; `Io`.
    pub fn export(&self, folder: &Path) -> Result<()> {
        run_apart_with_reserve("an export", LISTS_BYTES, || {
            let parts = self.task.parts(&self.model)?;
            write_model(
                self.model.folder(),
                folder,
                &parts,
                |part| self.changed(part),
                |new| self.task.write_beside(self, new),
            )
        })
    }

    /// What is exported of the parameters below `prefix`, by their names within it.
    pub(super) fn exported(&self, prefix: &str) -> Result<Vec<(String, Tensor)>> {
        let below = |name: &str| Some(name.strip_prefix(prefix)?.strip_prefix('.')?.to_owned());
        let list = self.parameters.list().iter().enumerate().filter(|(_, p)| p.role != Role::Frozen);
        list.filter_map(|(place, parameter)| Some((place, parameter, below(&parameter.name)?)))
            .map(|(place, parameter, name)| {
                let values = self.best(place).unwrap_or(parameter.master());
                Ok((name, self.rounded(values)?))
            })
            .collect()
    }

    /// The tensors of a part that training has changed, by the names of its file.
    fn changed(&self, part: &TrainedPart) -> Result<BTreeMap<String, Tensor>> {
        let updates = self.updates(part)?;
        if !updates.is_empty() {
            let merged = merged(&self.context(), part, &updates)?;
            return merged.into_iter().map(|(name, tensor)| Ok((name, self.rounded(&tensor)?))).collect();
        }
        let mut tensors = BTreeMap::new();
        let list = self.parameters.list().iter().enumerate();
        let mut packed: BTreeMap<String, BTreeMap<usize, Tensor>> = BTreeMap::new();
        for (place, parameter) in list.filter(|(_, p)| p.role != Role::Frozen) {
            let Some(name) = parameter.name.strip_prefix(part.prefix).and_then(|n| n.strip_prefix('.'))
            else {
                continue;
            };
            let values = self.best(place).unwrap_or(parameter.master());
            let key = part.keys.key(name);
            match key.part {
                None => drop(tensors.insert(key.name, self.rounded(values)?)),
                Some((i, _)) => drop(packed.entry(key.name).or_default().insert(i, values.clone())),
            }
        }
        for (name, parts) in packed {
            tensors.insert(name, self.rounded(&joined(parts.values())?)?);
        }
        Ok(tensors)
    }

    /// The averaged numbers of a trained parameter; before the average has followed a step, the numbers themselves.
    pub(super) fn best(&self, place: usize) -> Option<&Tensor> {
        let followed = self.progress.step >= self.options.ema.every;
        self.average.of.get(&place).filter(|_| followed)
    }

    fn rounded(&self, tensor: &Tensor) -> Result<Tensor> {
        stored_as(tensor, self.options.export_dtype)
    }
}

/// Writes the model folder `root` to `folder`, which is replaced as a whole, with the tensors of `parts` that `changed`
/// gives in the place of those of their names, and what `beside` writes into it.
///
/// # Errors
/// `InvalidArgument` for a `folder` inside `root`; `Unsupported` for a part that is not inside `root`; `Io`; those of
/// `changed` and `beside`.
pub(super) fn write_model(
    root: &Path,
    folder: &Path,
    parts: &[TrainedPart],
    changed: impl Fn(&TrainedPart) -> Result<BTreeMap<String, Tensor>>,
    beside: impl FnOnce(&Path) -> Result<()>,
) -> Result<()> {
    expect_outside(root, folder)?;
    let replaced: HashSet<&Path> = parts.iter().filter_map(|part| part.weights.path().parent()).collect();
    replace_folder(folder, |new| {
        copy_folder(root, new, &replaced)?;
        parts.iter().try_for_each(|part| write_part(part, changed(part)?, root, new))?;
        beside(new)
    })
}

/// # Errors
/// `InvalidArgument` if `folder` lies inside `root`, whose copy would then hold itself.
fn expect_outside(root: &Path, folder: &Path) -> Result<()> {
    let real = |path: &Path| fs::canonicalize(path).map_err(|source| Error::io(path, source));
    let whole = std::path::absolute(folder).map_err(|source| Error::io(folder, source))?;
    let inside = match whole.ancestors().skip(1).find(|parent| parent.exists()) {
        Some(parent) => real(parent)?.starts_with(real(root)?),
        None => false,
    };
    if inside {
        let expected = format!("a folder outside the model's, {}", root.display());
        return Err(Error::argument("directory", expected, folder.display()));
    }
    Ok(())
}

/// Writes the weights of a part in one file: what changed, and all else as it was.
fn write_part(
    part: &TrainedPart,
    mut tensors: BTreeMap<String, Tensor>,
    root: &Path,
    new: &Path,
) -> Result<()> {
    for name in part.weights.names() {
        if let Entry::Vacant(place) = tensors.entry(name) {
            let tensor = part.weights.tensor(place.key())?;
            place.insert(tensor);
        }
    }
    let folder = part.weights.path().parent().unwrap_or(root);
    let inside = folder.strip_prefix(root).map_err(|_| {
        Error::unsupported("exporting a model of several folders", "open each half from its own folder")
    })?;
    let stem = part.weights.path().file_name().map(|name| name.to_string_lossy().into_owned());
    let stem = stem.as_deref().and_then(|name| name.split('.').next()).unwrap_or("model").to_owned();
    let path = new.join(inside).join(format!("{stem}.safetensors"));
    write_safetensors(&path, tensors.iter().map(|(name, tensor)| (name.clone(), tensor)))
}

/// Tensors one after the other along the first dimension.
pub(super) fn joined<'a>(parts: impl Iterator<Item = &'a Tensor> + Clone) -> Result<Tensor> {
    let rows: usize = parts.clone().map(|part| part.dims().first().copied().unwrap_or(0)).sum();
    let mut values = Vec::new();
    let mut dims = Vec::new();
    for part in parts {
        dims = part.dims().to_vec();
        values.extend_from_slice(part.slice::<f32>()?);
    }
    if let Some(first) = dims.first_mut() {
        *first = rows;
    }
    Tensor::from_slice(&dims, &values)
}

/// Copies a model folder without the weights of the `replaced` parts.
pub(super) fn copy_folder(from: &Path, to: &Path, replaced: &HashSet<&Path>) -> Result<()> {
    fs::create_dir_all(to).map_err(|source| Error::io(to, source))?;
    for entry in fs::read_dir(from).map_err(|source| Error::io(from, source))? {
        let path = entry.map_err(|source| Error::io(from, source))?.path();
        let target = to.join(path.file_name().unwrap_or_default());
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if path.is_dir() {
            copy_folder(&path, &target, replaced)?;
        } else if !(is_weights(&name) && replaced.contains(from)) {
            copy_file(&path, &target)?;
        }
    }
    Ok(())
}

/// Whether a file of this name holds weights, or lists the files that do.
pub(super) fn is_weights(name: &str) -> bool {
    name.ends_with(".safetensors") || name.contains(".safetensors.index")
}

/// The content alone: a copy of a read-only file is the caller's to change. Reading and writing fail under names of
/// their own.
fn copy_file(from: &Path, to: &Path) -> Result<()> {
    let mut source = fs::File::open(from).map_err(|source| Error::io(from, source))?;
    let mut target = fs::File::create(to).map_err(|source| Error::io(to, source))?;
    std::io::copy(&mut source, &mut target).map_err(|source| Error::io(to, source))?;
    Ok(())
}
