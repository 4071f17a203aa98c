//! Low-rank adapters of Stage C's attention projections, as diffusers and peft write them.
//!
//! One safetensors file, `pytorch_lora_weights.safetensors` in a folder, with two matrices per layer:
//! `prior.blocks.2.attention.to_q.lora_A.weight` `[rank, inputs]` and `.lora_B.weight` `[outputs, rank]`. Names are
//! v2's for both generations. Older spellings that diffusers still reads are read too, see `parse`.

mod settings;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use half::{bf16, f16};

use self::settings::Settings;
use super::Weights;
use crate::error::{Error, Result};
use crate::nn::{LowRank, Source};
use crate::tensor::{DType, Tensor};

/// What diffusers calls the file in its folder.
pub const ADAPTER_FILE: &str = "pytorch_lora_weights.safetensors";

/// What stands before the names: the prior's in diffusers' pipelines, then that of older files; or nothing, in files
/// that the network itself has saved.
const PREFIXES: [&str; 2] = ["prior.", "unet."];

/// The projections: diffusers' name, what older files begin with, and our name.
const PROJECTIONS: [(&str, &str, &str); 4] = [
    ("to_q", "to_q_lora", "query"),
    ("to_k", "to_k_lora", "key"),
    ("to_v", "to_v_lora", "value"),
    ("to_out.0", "to_out_lora", "output"),
];

/// The last parts of the structural names.
const DOWN: &str = ".lora.down";
const UP: &str = ".lora.up";

/// What a tensor of the file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Down,
    Up,
    Alpha,
}

/// An adapter file, mapped. Which layers it adapts is known; that the model has them is seen when it is loaded.
#[derive(Debug)]
pub struct Adapter {
    weights: Weights,
    layers: BTreeMap<String, Layer>,
}

/// What an adapter adds to the weight of a layer: scale * up down.
#[derive(Debug)]
pub struct Update {
    /// The structural name of the layer within its part.
    pub layer: String,
    /// `[rank, inputs]`.
    pub down: Tensor,
    /// `[outputs, rank]`.
    pub up: Tensor,
    /// alpha / rank.
    pub scale: f32,
}

/// One layer of an adapter.
#[derive(Debug)]
struct Layer {
    down: String,
    up: String,
    rank: usize,
    /// alpha / rank.
    scale: f32,
}

/// The names of a layer's tensors while the file is read.
#[derive(Debug, Default)]
struct Names {
    down: Option<String>,
    up: Option<String>,
    alpha: Option<String>,
}

impl Adapter {
    /// Opens a file, or the one of diffusers' name in a folder.
    ///
    /// # Errors
    /// `Io`; `Format`, naming the file and the tensor, for tensors that are no part of an adapter or lack their other
    /// half, a rank of 0, or an alpha that is no number; `OutOfMemory`.
    pub fn open(path: &Path) -> Result<Self> {
        let file = if path.is_dir() { path.join(ADAPTER_FILE) } else { path.to_owned() };
        let weights = Weights::open_file(&file)?;
        let settings = Settings::read(&weights)?;
        let mut found: BTreeMap<String, Names> = BTreeMap::new();
        for name in weights.names() {
            let Some((layer, role)) = parse(&name) else {
                let expected =
                    "the adapter of an attention projection, as blocks.2.attention.to_q.lora_A.weight";
                return Err(Error::format(place(&weights, &name), expected, "another tensor"));
            };
            let names = found.entry(layer).or_default();
            let slot = match role {
                Role::Down => &mut names.down,
                Role::Up => &mut names.up,
                Role::Alpha => &mut names.alpha,
            };
            if let Some(other) = slot.replace(name.clone()) {
                return Err(Error::format(place(&weights, &name), "one spelling of this tensor", other));
            }
        }
        if found.is_empty() {
            return Err(Error::format(file.display().to_string(), "the tensors of an adapter", "none"));
        }
        let layers = found
            .into_iter()
            .map(|(layer, names)| Ok((layer, names.checked(&weights, &settings)?)))
            .collect::<Result<_>>()?;
        Ok(Adapter { weights, layers })
    }

    /// The file.
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    /// What it adds to the weights of each layer.
    ///
    /// # Errors
    /// `Format`, naming the tensor, for elements that are no floats; `OutOfMemory`.
    pub fn updates(&self) -> impl Iterator<Item = Result<Update>> {
        self.layers.iter().map(|(name, layer)| {
            let [down, up] = [&layer.down, &layer.up].map(|name| self.weights.tensor(name));
            Ok(Update { layer: name.clone(), down: down?, up: up?, scale: layer.scale })
        })
    }

    /// Down `[rank, inputs]` or up `[outputs, rank]` of a layer.
    fn matrix(&self, layer: &Layer, role: Role, sides: [usize; 2]) -> Result<Tensor> {
        let (name, shape) = match role {
            Role::Up => (&layer.up, [sides[0], layer.rank]),
            _ => (&layer.down, [layer.rank, sides[1]]),
        };
        self.weights.tensor_shaped(name, &shape)
    }
}

impl Names {
    fn checked(self, weights: &Weights, settings: &Settings) -> Result<Layer> {
        let (down, up) = match (self.down, self.up) {
            (Some(down), Some(up)) => (down, up),
            (Some(alone), None) | (None, Some(alone)) => {
                return Err(Error::format(place(weights, &alone), "its other half beside it", "none"));
            }
            (None, None) => {
                let alone = self.alpha.unwrap_or_default();
                return Err(Error::format(place(weights, &alone), "the matrices that it scales", "none"));
            }
        };
        let rank = match weights.shape(&down) {
            Some(&[rank, _]) if rank > 0 => rank,
            shape => {
                let found = format!("{:?}", shape.unwrap_or_default());
                return Err(Error::format(
                    place(weights, &down),
                    "shape [rank, inputs], rank 1 or more",
                    found,
                ));
            }
        };
        let alpha = match self.alpha {
            Some(name) => number(weights, &name)?,
            None => settings.alpha(&module_of(&down)).unwrap_or(rank as f32),
        };
        Ok(Layer { scale: settings.scale(alpha, rank), down, up, rank })
    }
}

/// The only number of a tensor.
fn number(weights: &Weights, name: &str) -> Result<f32> {
    let tensor = weights.tensor(name)?;
    let value = match tensor.dtype() {
        _ if tensor.elements() != 1 => None,
        DType::F32 => Some(tensor.slice::<f32>()?[0]),
        DType::F16 => Some(tensor.slice::<f16>()?[0].to_f32()),
        DType::BF16 => Some(tensor.slice::<bf16>()?[0].to_f32()),
        _ => None,
    };
    value.filter(|alpha| alpha.is_finite()).ok_or_else(|| {
        let found =
            value.map_or_else(|| format!("{} of {}", tensor.shape(), tensor.dtype()), |v| v.to_string());
        Error::format(place(weights, name), "one finite number, of a float type", found)
    })
}

/// The layer that a tensor belongs to, by its structural name, and what it is there:
///
/// | spelling | written by |
/// |---|---|
/// | `to_q.lora_A.weight`, `to_q.lora_B.weight` | peft, and diffusers since 0.22 |
/// | `to_q.lora.down.weight`, `to_q.lora.up.weight` | diffusers without peft |
/// | `processor.to_q_lora.down.weight`, `processor.to_q_lora.up.weight` | diffusers' first LoRA processors |
/// | `to_q.alpha` | kohya's scripts and converters |
fn parse(name: &str) -> Option<(String, Role)> {
    let name = PREFIXES.iter().find_map(|prefix| name.strip_prefix(prefix)).unwrap_or(name);
    let (block, rest) = name.split_once(".attention.")?;
    let number = block.strip_prefix("blocks.")?;
    // Only the plain decimal form: `02` would be a second name for a layer.
    if number.parse::<usize>().ok()?.to_string() != number {
        return None;
    }
    let rest = rest.strip_prefix("processor.").unwrap_or(rest);
    PROJECTIONS.iter().find_map(|(theirs, older, ours)| {
        let role = match (rest.strip_prefix(theirs), rest.strip_prefix(older)) {
            (_, Some(".down.weight")) | (Some(".lora_A.weight" | ".lora.down.weight"), _) => Role::Down,
            (_, Some(".up.weight")) | (Some(".lora_B.weight" | ".lora.up.weight"), _) => Role::Up,
            (_, Some(".alpha")) | (Some(".alpha"), _) => Role::Alpha,
            _ => return None,
        };
        Some((format!("{block}.{ours}"), role))
    })
}

/// The module that a down matrix belongs to, as the settings of a file name it.
fn module_of(down: &str) -> String {
    let name = PREFIXES.iter().find_map(|prefix| down.strip_prefix(prefix)).unwrap_or(down);
    let name = name.replace(".processor.", ".");
    let end = [".lora_A.", ".lora.", "_lora."].iter().find_map(|mark| name.find(mark));
    name[..end.unwrap_or(name.len())].to_owned()
}

/// What diffusers calls the matrices of a layer, down and up.
pub fn adapter_keys(layer: &str) -> [String; 2] {
    ["lora_A", "lora_B"]
        .map(|leaf| format!("{}{}", PREFIXES[0], super::v2::prior(&format!("{layer}.{leaf}.weight"))))
}

fn place(weights: &Weights, name: &str) -> String {
    format!("{}: {name}", weights.path().display())
}

/// An adapter and how strongly it is applied.
#[derive(Debug)]
pub struct ScaledAdapter {
    /// The file.
    pub adapter: Adapter,
    /// A factor of its updates beside their own.
    pub scale: f32,
}

/// A source with adapters: their updates add up. One of scale 0 is as if it were not there.
pub struct Adapted<'a> {
    base: &'a dyn Source,
    adapters: &'a [ScaledAdapter],
    /// The layers that asked for an adapter.
    asked: Mutex<HashSet<String>>,
}

impl<'a> Adapted<'a> {
    /// The weights of `base`, with `adapters` beside them.
    pub fn new(base: &'a dyn Source, adapters: &'a [ScaledAdapter]) -> Self {
        Adapted { base, adapters, asked: Mutex::default() }
    }

    /// Checks that the model has every layer that the files adapt.
    ///
    /// # Errors
    /// `Format`, naming the file and the first tensor that belongs to no layer.
    pub fn expect_all_used(&self) -> Result<()> {
        let asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        for ScaledAdapter { adapter, .. } in self.adapters {
            if let Some((name, layer)) = adapter.layers.iter().find(|(name, _)| !asked.contains(*name)) {
                let expected = "the adapter of a layer that the model has";
                return Err(Error::format(
                    place(&adapter.weights, &layer.down),
                    expected,
                    format!("one of {name}"),
                ));
            }
        }
        Ok(())
    }

    /// The updates of a layer, with the factor of each.
    fn updates<'s>(&'s self, layer: &'s str) -> impl Iterator<Item = (&'s Adapter, &'s Layer, f32)> + Clone {
        let of = move |scaled: &'s ScaledAdapter| {
            let found = scaled.adapter.layers.get(layer)?;
            Some((&scaled.adapter, found, scaled.scale * found.scale))
        };
        self.adapters.iter().filter_map(of).filter(|(_, _, scale)| *scale != 0.0)
    }

    /// One adapter's matrix as the file has it; those of several side by side, each up with its factor.
    fn matrix(&self, layer: &str, role: Role, shape: [usize; 2]) -> Result<Tensor> {
        let updates = self.updates(layer);
        if let (1, Some((adapter, layer, _))) = (updates.clone().count(), updates.clone().next()) {
            return adapter.matrix(layer, role, shape);
        }
        let mut values = room(shape[0] * shape[1])?;
        values.resize(shape[0] * shape[1], 0.0);
        let mut first = 0;
        for (adapter, layer, scale) in updates {
            let matrix = floats(&adapter.matrix(layer, role, shape)?)?;
            match role {
                Role::Up => {
                    let rows = values.chunks_exact_mut(shape[1]).zip(matrix.chunks_exact(layer.rank));
                    for (row, update) in rows {
                        row[first..].iter_mut().zip(update).for_each(|(v, u)| *v = scale * u);
                    }
                }
                _ => values[first * shape[1]..][..matrix.len()].copy_from_slice(&matrix),
            }
            first += layer.rank;
        }
        Tensor::from_slice(&shape, &values)
    }
}

fn floats(tensor: &Tensor) -> Result<Vec<f32>> {
    let mut values = room(tensor.elements())?;
    match tensor.dtype() {
        DType::F16 => values.extend(tensor.slice::<f16>()?.iter().map(|v| v.to_f32())),
        DType::BF16 => values.extend(tensor.slice::<bf16>()?.iter().map(|v| v.to_f32())),
        _ => values.extend_from_slice(tensor.slice()?),
    }
    Ok(values)
}

fn room(elements: usize) -> Result<Vec<f32>> {
    let mut values = Vec::new();
    let bytes = elements.saturating_mul(size_of::<f32>());
    values.try_reserve_exact(elements).map_err(|_| Error::out_of_memory("adapters side by side", bytes))?;
    Ok(values)
}

impl Source for Adapted<'_> {
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let of = |end, role| name.strip_suffix(end).map(|layer| (layer, role));
        match (of(DOWN, Role::Down).or(of(UP, Role::Up)), shape) {
            (Some((layer, role)), &[rows, columns]) => self.matrix(layer, role, [rows, columns]),
            _ => self.base.tensor(name, shape),
        }
    }

    fn has(&self, name: &str) -> bool {
        self.base.has(name)
    }

    fn adapter(&self, layer: &str) -> Option<LowRank> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).insert(layer.to_owned());
        let updates = self.updates(layer);
        let rank = updates.clone().map(|(_, layer, _)| layer.rank).sum();
        match (updates.clone().count(), updates.clone().next()) {
            (1, Some((_, _, scale))) => Some(LowRank { rank, scale }),
            (0, _) => None,
            _ => Some(LowRank { rank, scale: 1.0 }),
        }
    }
}

/// The file that `path` means: itself if it is called one, else diffusers' in a folder of this name.
pub fn adapter_file(path: &Path) -> PathBuf {
    let is_file = path.extension().is_some_and(|end| end == "safetensors");
    if is_file { path.to_owned() } else { path.join(ADAPTER_FILE) }
}
