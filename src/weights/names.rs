//! Weights under the structural names that layers ask for.

use std::collections::HashSet;
use std::sync::{Mutex, PoisonError};

use super::Weights;
use crate::error::{Error, Result};
use crate::nn::Source;
use crate::tensor::Tensor;

/// Where a checkpoint has a weight.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Key {
    /// The tensor's name.
    pub name: String,
    /// Part i of n, if the tensor holds n weights, one after the other along the first dimension.
    pub part: Option<(usize, usize)>,
}

impl From<String> for Key {
    fn from(name: String) -> Self {
        Key { name, part: None }
    }
}

/// Weights under other names: `rename` turns a structural name into the checkpoint's key.
pub struct Renamed<'a> {
    weights: &'a Weights,
    rename: Box<dyn Fn(&str) -> Key + Send + Sync + 'a>,
    /// The keys that were asked for.
    used: Mutex<HashSet<String>>,
}

impl<'a> Renamed<'a> {
    /// The weights, seen through `rename`.
    pub fn new<K: Into<Key>>(weights: &'a Weights, rename: impl Fn(&str) -> K + Send + Sync + 'a) -> Self {
        Renamed { weights, rename: Box::new(move |name| rename(name).into()), used: Mutex::default() }
    }

    /// Checks that the layers have asked for every float tensor of the file: a configuration with fewer blocks
    /// than the weights would run and make wrong pictures.
    ///
    /// # Errors
    /// `Format`, naming the first tensor that nobody asked for.
    pub fn expect_all_used(&self) -> Result<()> {
        let used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        match self.weights.float_names().into_iter().find(|name| !used.contains(name)) {
            Some(name) => {
                let place = format!("{}: {name}", self.weights.path().display());
                Err(Error::format(place, "no tensor that config.json has no layer for", "one"))
            }
            None => Ok(()),
        }
    }
}

impl Source for Renamed<'_> {
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let key = (self.rename)(name);
        let tensor = match (key.part, shape) {
            (Some((part, parts)), &[rows, ref inner @ ..]) => {
                let whole = [&[parts * rows], inner].concat();
                self.weights.tensor_shaped(&key.name, &whole)?.narrow(part * rows, rows)?
            }
            _ => self.weights.tensor_shaped(&key.name, shape)?,
        };
        self.used.lock().unwrap_or_else(PoisonError::into_inner).insert(key.name);
        Ok(tensor)
    }

    fn has(&self, name: &str) -> bool {
        self.weights.has(&(self.rename)(name).name)
    }
}
