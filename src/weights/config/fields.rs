//! Reading a JSON object field by field: every error names the file, the field, what was expected and found.

use std::borrow::Cow;
use std::ops::RangeInclusive;
use std::path::Path;

use serde_json::{Map, Value};

use crate::device::reserve;
use crate::error::{Error, Result};
use crate::files;

/// The largest configuration file.
const CONFIG_MAX_BYTES: usize = 1 << 20;

/// What a configuration may take in memory per byte of its text, at worst: `[[],[],…]`.
const CONFIG_BLOW_UP: usize = 64;

/// The most characters of a wrong value that an error repeats.
const FOUND_MAX_CHARS: usize = 60;

/// The fields of one JSON object. `null` counts as absent, unknown fields are ignored.
pub(super) struct Fields<'a> {
    place: String,
    map: Cow<'a, Map<String, Value>>,
}

impl Fields<'_> {
    /// Reads a file that holds one object.
    pub(super) fn read(path: &Path) -> Result<Self> {
        let content = files::read(path, CONFIG_MAX_BYTES)?;
        let place = path.display().to_string();
        let text = files::text(path, &content)?;
        reserve::with(&place, text.len() * CONFIG_BLOW_UP, || match serde_json::from_str(text) {
            Ok(Value::Object(map)) => Ok(Fields { place: format!("{place}: "), map: Cow::Owned(map) }),
            Ok(other) => Err(Error::format(&place, "a JSON object", shown(&other))),
            Err(error) => Err(Error::format(&place, "JSON", error)),
        })
    }

    fn get(&self, name: &str) -> Option<&Value> {
        self.map.get(name).filter(|value| !value.is_null())
    }

    /// An error about a field.
    pub(super) fn error(&self, name: &str, expected: impl Into<String>) -> Error {
        let found = self.get(name).map_or("nothing".into(), shown);
        Error::format(format!("{}{name}", self.place), expected, found)
    }

    /// An error about a field whose value is wrong only beside another one.
    pub(super) fn clash(&self, name: &str, expected: impl Into<String>, found: impl ToString) -> Error {
        Error::format(format!("{}{name}", self.place), expected, found.to_string())
    }

    /// A whole number in a range; without a default it must be there.
    pub(super) fn count(
        &self,
        name: &str,
        default: Option<usize>,
        range: RangeInclusive<usize>,
    ) -> Result<usize> {
        match (self.get(name), default) {
            (None, Some(default)) => Ok(default),
            (value, _) => value.and_then(|value| count_in(value, &range)).ok_or_else(|| {
                self.error(name, format!("a number from {} to {}", range.start(), range.end()))
            }),
        }
    }

    /// A whole number in a range that may be absent.
    pub(super) fn optional_count(&self, name: &str, range: RangeInclusive<usize>) -> Result<Option<usize>> {
        if self.get(name).is_none() {
            return Ok(None);
        }
        self.count(name, None, range).map(Some)
    }

    /// Checks a whole number that the networks have no choice of.
    pub(super) fn expect_count(&self, name: &str, value: usize) -> Result<()> {
        match self.count(name, Some(value), value..=value) {
            Ok(_) => Ok(()),
            Err(_) => Err(self.error(name, value.to_string())),
        }
    }

    /// A number in a range.
    pub(super) fn number(&self, name: &str, default: f64, range: RangeInclusive<f64>) -> Result<f64> {
        self.optional_number(name, range).map(|value| value.unwrap_or(default))
    }

    /// A number in a range that may be absent.
    pub(super) fn optional_number(&self, name: &str, range: RangeInclusive<f64>) -> Result<Option<f64>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match value.as_f64().filter(|number| range.contains(number)) {
            Some(number) => Ok(Some(number)),
            None => Err(self.error(name, format!("a number from {} to {}", range.start(), range.end()))),
        }
    }

    /// True or false.
    pub(super) fn flag(&self, name: &str, default: bool) -> Result<bool> {
        self.get(name)
            .map_or(Ok(default), |value| value.as_bool().ok_or_else(|| self.error(name, "true or false")))
    }

    /// A text that may be absent.
    pub(super) fn text(&self, name: &str) -> Result<Option<&str>> {
        self.get(name).map(|value| value.as_str().ok_or_else(|| self.error(name, "a text"))).transpose()
    }

    /// A list, each of whose elements `read` takes.
    pub(super) fn list<'a, T>(
        &'a self,
        name: &str,
        expected: &str,
        max_len: usize,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<Vec<T>>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let expected = || format!("a list of at most {max_len}, each {expected}");
        let list = value.as_array().filter(|list| list.len() <= max_len);
        let list = list.ok_or_else(|| self.error(name, expected()))?;
        let read = list.iter().map(read).collect::<Option<Vec<T>>>();
        read.map(Some).ok_or_else(|| self.error(name, expected()))
    }

    /// A list of exactly `N` numbers in a range.
    pub(super) fn numbers<const N: usize>(
        &self,
        name: &str,
        range: RangeInclusive<f64>,
    ) -> Result<Option<[f64; N]>> {
        let expected = format!("a number from {} to {}", range.start(), range.end());
        let list = self.list(name, &expected, N, |value| value.as_f64().filter(|n| range.contains(n)))?;
        list.map(|list| list.try_into().map_err(|_| self.error(name, format!("{N} numbers")))).transpose()
    }

    /// An object within this one, if it is there.
    pub(super) fn object(&self, name: &str) -> Result<Option<Fields<'_>>> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::Object(map)) => {
                Ok(Some(Fields { place: format!("{}{name}.", self.place), map: Cow::Borrowed(map) }))
            }
            Some(_) => Err(self.error(name, "an object")),
        }
    }

    /// A list of objects.
    pub(super) fn objects(&self, name: &str, max_len: usize) -> Result<Vec<Fields<'_>>> {
        let list = self.list(name, "an object", max_len, Value::as_object)?;
        let list = list.ok_or_else(|| self.error(name, "a list of objects"))?;
        let numbered = list.into_iter().enumerate();
        let fields =
            |(i, map)| Fields { place: format!("{}{name}[{i}].", self.place), map: Cow::Borrowed(map) };
        Ok(numbered.map(fields).collect())
    }

    /// Checks that the object describes a `class`. Folders without a `_class_name` are taken at their word.
    pub(super) fn expect_class(&self, class: &str) -> Result<()> {
        match self.text("_class_name")? {
            Some(found) if found != class => Err(self.error("_class_name", format!("{class:?}"))),
            _ => Ok(()),
        }
    }
}

/// A JSON value as a whole number in a range.
pub(super) fn count_in(value: &Value, range: &RangeInclusive<usize>) -> Option<usize> {
    value.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|n| range.contains(n))
}

/// A value as errors show it: its beginning.
fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(FOUND_MAX_CHARS) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}
