//! What an adapter file says of itself: the `LoraConfig` that diffusers writes into its header.

use serde_json::{Map, Value};

use super::PREFIXES;
use crate::device::reserve;
use crate::error::{Error, Result};
use crate::weights::Weights;

/// Where diffusers puts it.
const KEY: &str = "lora_adapter_metadata";

/// What it may take in memory per byte of its text, at worst.
const BLOW_UP: usize = 64;

/// How updates are scaled, as far as tensors of the file do not say it.
#[derive(Debug, Default)]
pub(super) struct Settings {
    alpha: Option<f32>,
    /// Of some modules, by the ends of their names.
    patterns: Vec<(String, f32)>,
    by_root: Scaling,
}

/// What alpha is divided by.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Scaling {
    #[default]
    ByRank,
    /// peft's `use_rslora`.
    ByRootOfRank,
}

impl Settings {
    /// Those of a file; without any, updates are not scaled.
    ///
    /// # Errors
    /// `Format`, naming the file, for what is no such JSON; `Unsupported` for DoRA, or patterns that are more than
    /// names; `OutOfMemory`.
    pub fn read(weights: &Weights) -> Result<Self> {
        let Some(text) = weights.note(KEY) else { return Ok(Settings::default()) };
        let place = format!("{}: {KEY}", weights.path().display());
        reserve::with(&place, text.len() * BLOW_UP, || {
            let json: Map<String, Value> = serde_json::from_str(text)
                .map_err(|error| Error::format(place.clone(), "a JSON object", error))?;
            Self::of(&json, &place)
        })
    }

    /// # Errors
    /// As [`Settings::read`].
    pub fn of(json: &Map<String, Value>, place: &str) -> Result<Self> {
        let prefixed = |name: &str| PREFIXES.iter().find_map(|prefix| json.get(&format!("{prefix}{name}")));
        let get = |name: &str| prefixed(name).or_else(|| json.get(name)).filter(|value| !value.is_null());
        let is_set = |name: &str| get(name).is_some_and(|value| value != &Value::Bool(false));
        if is_set("use_dora") {
            return Err(Error::unsupported(
                format!("{place}: use_dora"),
                "only plain LoRA adapters are read",
            ));
        }
        let number = |name: &str, value: &Value| {
            let found = value.as_f64().map(|v| v as f32).filter(|v| v.is_finite());
            found.ok_or_else(|| Error::format(format!("{place}: {name}"), "a number", value))
        };
        let patterns = match get("alpha_pattern") {
            None => Vec::new(),
            Some(Value::Object(patterns)) => patterns
                .iter()
                .map(|(pattern, value)| Ok((plain(pattern, place)?, number("alpha_pattern", value)?)))
                .collect::<Result<_>>()?,
            Some(other) => return Err(Error::format(format!("{place}: alpha_pattern"), "an object", other)),
        };
        let alpha = get("lora_alpha").map(|value| number("lora_alpha", value)).transpose()?;
        let by_root = if is_set("use_rslora") { Scaling::ByRootOfRank } else { Scaling::ByRank };
        Ok(Settings { alpha, patterns, by_root })
    }

    /// The alpha of a module, if the file says it.
    pub fn alpha(&self, module: &str) -> Option<f32> {
        let matches =
            |name: &str| module.strip_suffix(name).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'));
        let own = self.patterns.iter().find(|(name, _)| matches(name)).map(|(_, alpha)| *alpha);
        own.or(self.alpha)
    }

    /// The factor of an update.
    pub fn scale(&self, alpha: f32, rank: usize) -> f32 {
        match self.by_root {
            Scaling::ByRank => alpha / rank as f32,
            Scaling::ByRootOfRank => alpha / (rank as f32).sqrt(),
        }
    }
}

/// A pattern that is the end of a name, or all of it.
fn plain(pattern: &str, place: &str) -> Result<String> {
    let name = pattern.strip_prefix('^').unwrap_or(pattern);
    if name.is_empty() || name.contains(|c: char| !c.is_ascii_alphanumeric() && !"._".contains(c)) {
        let what = format!("{place}: alpha_pattern {pattern:?}");
        return Err(Error::unsupported(what, "only names of layers are read, no regular expressions"));
    }
    Ok(name.to_owned())
}
