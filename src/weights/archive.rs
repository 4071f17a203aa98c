//! All weights of one part of a model: one safetensors file or several shards, under one roof.

use std::collections::HashMap;
use std::io::ErrorKind;
use std::path::{Component, Path, PathBuf};

use half::{bf16, f16};
use serde::Deserialize;

use super::file::WeightFile;
use crate::device::{Buffer, reserve};
use crate::error::{Error, Result};
use crate::files;
use crate::nn::Source;
use crate::tensor::{DType, Tensor};

/// The names that weight files have: transformers' and our own, then diffusers'.
pub const STEMS: &[&str] = &["model", "diffusion_pytorch_model"];

/// The largest `*.index.json`.
const INDEX_MAX_BYTES: usize = 64 << 20;

/// What an index may take in memory per byte of its text, at worst.
const INDEX_BLOW_UP: usize = 32;

/// The most shards of one part.
const SHARDS_MAX: usize = 4096;

/// The weights of one part of a model.
#[derive(Debug)]
pub struct Weights {
    /// The file or index that was opened: how errors name the whole.
    path: PathBuf,
    files: Vec<WeightFile>,
    /// Which file has a tensor; nothing if there is one file only.
    shard_of: HashMap<String, usize>,
    parameters: u64,
}

#[derive(Deserialize)]
struct Index {
    weight_map: HashMap<String, String>,
}

impl Weights {
    /// Opens the weights in `folder`: for each stem `STEM.safetensors` or its shards in
    /// `STEM.safetensors.index.json`, else the same with `.fp16`.
    ///
    /// # Errors
    /// `Io` if there is none, naming what was looked for; `Format`; `OutOfMemory`.
    pub fn open(folder: &Path, stems: &[&str]) -> Result<Self> {
        let mut sought = Vec::new();
        for variant in ["", ".fp16"] {
            for stem in stems {
                sought.push(format!("{stem}{variant}.safetensors"));
                sought.push(format!("{stem}{variant}.safetensors.index.json"));
                if !variant.is_empty() {
                    sought.push(format!("{stem}.safetensors.index{variant}.json"));
                }
            }
        }
        for name in &sought {
            let path = folder.join(name);
            match path.try_exists() {
                Ok(false) => continue,
                Ok(true) if name.ends_with(".json") => return Self::open_shards(folder, path),
                Ok(true) => return Self::open_file(&path),
                Err(source) => return Err(Error::io(path, source)),
            }
        }
        if let Err(source) = std::fs::metadata(folder) {
            return Err(Error::io(folder, source));
        }
        let reason = format!("expected one of {}, found none", sought.join(", "));
        Err(Error::io(folder, std::io::Error::new(ErrorKind::NotFound, reason)))
    }

    /// Opens one safetensors file.
    ///
    /// # Errors
    /// As [`WeightFile::open`].
    pub fn open_file(path: &Path) -> Result<Self> {
        let file = WeightFile::open(path)?;
        Weights { path: path.to_owned(), files: vec![file], shard_of: HashMap::new(), parameters: 0 }
            .counted()
    }

    fn open_shards(folder: &Path, path: PathBuf) -> Result<Self> {
        let content = files::read(&path, INDEX_MAX_BYTES)?;
        let place = path.display().to_string();
        reserve::with(&place, content.bytes().len() * INDEX_BLOW_UP, || {
            Self::open_listed(folder, path, &content)
        })
    }

    /// Opens the shards that an index lists.
    fn open_listed(folder: &Path, path: PathBuf, content: &Buffer) -> Result<Self> {
        let index: Index = serde_json::from_slice(content.bytes()).map_err(|error| {
            Error::format(path.display().to_string(), "an index with a weight_map", error)
        })?;
        let mut weights = Weights { path, files: Vec::new(), shard_of: HashMap::new(), parameters: 0 };
        let mut opened = HashMap::new();
        for (name, shard) in index.weight_map {
            let number = match opened.get(&shard) {
                Some(&number) => number,
                None => {
                    let file = weights.open_shard(folder, &name, &shard)?;
                    weights.files.push(file);
                    opened.insert(shard, weights.files.len() - 1);
                    weights.files.len() - 1
                }
            };
            if !weights.files[number].has(&name) {
                let place = weights.files[number].place(&name);
                let expected = format!("a tensor, as {} says", weights.path.display());
                return Err(Error::format(place, expected, "none of this name"));
            }
            weights.shard_of.insert(name, number);
        }
        weights.counted()
    }

    fn counted(mut self) -> Result<Self> {
        let elements = |name: &String| self.shape(name).map(|s| s.iter().map(|&n| n as u64).product::<u64>());
        self.parameters = self.listing(|| self.float_names().iter().filter_map(elements).sum())?;
        Ok(self)
    }

    /// Runs `work`, which may list the names of all tensors: there may be many.
    fn listing<T>(&self, work: impl FnOnce() -> T) -> Result<T> {
        let bytes = self.files.iter().map(WeightFile::list_bytes).sum();
        reserve::with(&self.path.display().to_string(), bytes, || Ok(work()))
    }

    fn open_shard(&self, folder: &Path, name: &str, shard: &str) -> Result<WeightFile> {
        let place = || format!("{}: weight_map.{name}", self.path.display());
        let mut parts = Path::new(shard).components();
        let plain = matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None));
        if !plain || shard.contains(['/', '\\', '\0']) || !shard.ends_with(".safetensors") {
            return Err(Error::format(place(), "the name of a .safetensors file in this folder", shard));
        }
        if self.files.len() == SHARDS_MAX {
            return Err(Error::format(place(), format!("at most {SHARDS_MAX} shards"), "more"));
        }
        WeightFile::open(&folder.join(shard))
    }

    /// Where the files are mapped.
    pub fn address_ranges(&self) -> impl Iterator<Item = std::ops::Range<usize>> {
        self.files.iter().map(WeightFile::address_range)
    }

    /// The file or index that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A note in the header of the file, if it is one file.
    pub fn note(&self, key: &str) -> Option<&str> {
        match self.files.as_slice() {
            [file] => file.note(key),
            _ => None,
        }
    }

    /// Whether there is a tensor `name`.
    pub fn has(&self, name: &str) -> bool {
        self.file_of(name).is_some()
    }

    fn file_of(&self, name: &str) -> Option<&WeightFile> {
        match self.files.as_slice() {
            [file] if self.shard_of.is_empty() => file.has(name).then_some(file),
            files => self.shard_of.get(name).and_then(|&number| files.get(number)),
        }
    }

    fn found(&self, name: &str, expected: impl FnOnce() -> String) -> Result<&WeightFile> {
        self.file_of(name).ok_or_else(|| {
            Error::format(format!("{}: {name}", self.path.display()), expected(), "none of this name")
        })
    }

    /// A tensor as it is stored.
    ///
    /// # Errors
    /// As [`WeightFile::tensor`].
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        self.found(name, || "a tensor".into())?.tensor(name)
    }

    /// A tensor of floats that must have this shape.
    ///
    /// # Errors
    /// `Format`, naming file and tensor, if it is missing or has another shape or no float elements.
    pub fn tensor_shaped(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let file = self.found(name, || format!("a tensor of shape {shape:?}"))?;
        let found = file.shape(name).unwrap_or_default();
        if found != shape {
            return Err(Error::format(file.place(name), format!("shape {shape:?}"), format!("{found:?}")));
        }
        if !file.dtype(name).is_some_and(DType::is_float) {
            let expected = "elements of type F32, F16 or BF16";
            return Err(Error::format(file.place(name), expected, file.stored_dtype(name)));
        }
        file.tensor(name)
    }

    /// The shape of a tensor.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.file_of(name).and_then(|file| file.shape(name))
    }

    /// The names of all tensors, sorted.
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = match self.files.as_slice() {
            [file] if self.shard_of.is_empty() => file.names(),
            _ => self.shard_of.keys().cloned().collect(),
        };
        names.sort_unstable();
        names
    }

    /// The size of all mappings.
    pub fn bytes_mapped(&self) -> usize {
        self.files.iter().map(WeightFile::bytes_mapped).sum()
    }

    /// The names of the tensors with float elements, sorted.
    pub fn float_names(&self) -> Vec<String> {
        let is_float =
            |name: &String| self.file_of(name).and_then(|file| file.dtype(name)).is_some_and(DType::is_float);
        self.names().into_iter().filter(is_float).collect()
    }

    /// How many numbers the float tensors hold.
    pub fn parameters(&self) -> u64 {
        self.parameters
    }

    /// The first float tensor with values that are infinite or not a number, and how many it has. Reads all weights.
    pub fn find_not_finite(&self) -> Option<(String, usize)> {
        let found = |name: String| {
            let count = not_finite(&self.tensor(&name).ok()?);
            (count > 0).then_some((name, count))
        };
        // Without memory for the list the search finds nothing.
        self.listing(|| self.float_names().into_iter().find_map(found)).ok()?
    }

    /// Gives the pages of all weights back to the system. They are read again when they are used.
    pub fn advise_dont_need(&self) {
        self.files.iter().for_each(WeightFile::advise_dont_need);
    }
}

fn not_finite(tensor: &Tensor) -> usize {
    if let Ok(values) = tensor.slice::<f32>() {
        return values.iter().filter(|v| !v.is_finite()).count();
    }
    if let Ok(values) = tensor.slice::<f16>() {
        return values.iter().filter(|v| !v.is_finite()).count();
    }
    tensor.slice::<bf16>().map_or(0, |values| values.iter().filter(|v| !v.is_finite()).count())
}

impl Source for Weights {
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        self.tensor_shaped(name, shape)
    }

    fn has(&self, name: &str) -> bool {
        Weights::has(self, name)
    }
}
