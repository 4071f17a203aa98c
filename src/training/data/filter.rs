//! Which records are kept, by their metadata: the authors' `WebdatasetFilter` (dome272/Wuerstchen, `utils.py`).

use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::error::{Error, Result};

/// Bounds on a record's metadata, a JSON object. Each that is set must hold; a field that it needs and that is
/// missing, null or no number fails, as does a record without metadata. With no bound set, metadata are not read.
///
/// The authors' condition on captions (`text_conditions`) is not here: their training did not use it. Where they take
/// a score of exactly 0 for a missing one, it is 0 here.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct MetadataFilter {
    /// The least `original_width` and `original_height`, in pixels.
    pub min_size: Option<f64>,
    /// The largest of both.
    pub max_size: Option<f64>,
    /// The largest probability of a watermark, `pwatermark`.
    pub max_pwatermark: Option<f64>,
    /// The least aesthetic score: `aesthetic` or `AESTHETIC_SCORE`, one of them is enough.
    pub min_aesthetic: Option<f64>,
    /// The largest probability that the picture is unsafe, `punsafe`.
    pub max_unsafe: Option<f64>,
}

/// The fields that are looked at; all others may hold anything.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Fields {
    original_width: Option<f64>,
    original_height: Option<f64>,
    pwatermark: Option<f64>,
    aesthetic: Option<f64>,
    #[serde(rename = "AESTHETIC_SCORE")]
    aesthetic_score: Option<f64>,
    punsafe: Option<f64>,
}

impl MetadataFilter {
    /// The bounds that the authors trained Stages B and C with: 512 to 4096 pixels, watermark at most 0.5, aesthetic
    /// at least 5, unsafe at most 0.99.
    pub fn authors() -> Self {
        MetadataFilter {
            min_size: Some(512.0),
            max_size: Some(4096.0),
            max_pwatermark: Some(0.5),
            min_aesthetic: Some(5.0),
            max_unsafe: Some(0.99),
        }
    }

    /// Whether any bound is set.
    pub fn is_on(&self) -> bool {
        *self != MetadataFilter::default()
    }

    pub(super) fn check(&self) -> Result<()> {
        let bounds = [self.min_size, self.max_size, self.max_pwatermark, self.min_aesthetic, self.max_unsafe];
        match bounds.iter().flatten().find(|bound| bound.is_nan()) {
            Some(bound) => Err(Error::argument("filter", "numbers", bound)),
            None => Ok(()),
        }
    }

    /// Why a record with this metadata is kept out, if it is.
    pub(super) fn refuses(&self, metadata: Option<&[u8]>) -> Option<String> {
        if !self.is_on() {
            return None;
        }
        let Some(metadata) = metadata else { return Some("it has no metadata".into()) };
        let fields: Fields = match from_json(metadata) {
            Ok(fields) => fields,
            Err(error) => return Some(format!("its metadata: {error}")),
        };
        let aesthetic = [fields.aesthetic, fields.aesthetic_score].into_iter().flatten().reduce(f64::max);
        [
            at_least("original_width", fields.original_width, self.min_size),
            at_least("original_height", fields.original_height, self.min_size),
            at_most("original_width", fields.original_width, self.max_size),
            at_most("original_height", fields.original_height, self.max_size),
            at_most("pwatermark", fields.pwatermark, self.max_pwatermark),
            at_least("aesthetic", aesthetic, self.min_aesthetic),
            at_most("punsafe", fields.punsafe, self.max_unsafe),
        ]
        .into_iter()
        .flatten()
        .next()
    }
}

fn at_least(name: &str, value: Option<f64>, bound: Option<f64>) -> Option<String> {
    refusal(name, value, "at least", bound, |value, bound| value >= bound)
}

fn at_most(name: &str, value: Option<f64>, bound: Option<f64>) -> Option<String> {
    refusal(name, value, "at most", bound, |value, bound| value <= bound)
}

fn refusal(
    name: &str,
    value: Option<f64>,
    relation: &str,
    bound: Option<f64>,
    holds: impl Fn(f64, f64) -> bool,
) -> Option<String> {
    let bound = bound?;
    match value {
        Some(value) if holds(value, bound) => None,
        Some(value) => Some(format!("{name}: expected {relation} {bound}, found {value}")),
        None => Some(format!("{name}: expected {relation} {bound}, found none")),
    }
}

/// Parses JSON, also that of Python's `json.dumps`, which writes numbers that are none as `NaN` or `Infinity`: they
/// count as null.
pub(super) fn from_json<T: DeserializeOwned>(bytes: &[u8]) -> serde_json::Result<T> {
    serde_json::from_slice(bytes).or_else(|error| {
        let Some(bytes) = with_nulls(bytes) else { return Err(error) };
        serde_json::from_slice(&bytes)
    })
}

/// The same text with `null` for Python's words outside of strings; nothing if there is none.
fn with_nulls(bytes: &[u8]) -> Option<Vec<u8>> {
    const WORDS: [&[u8]; 3] = [b"NaN", b"-Infinity", b"Infinity"];
    let (mut out, mut found, mut at) = (Vec::new(), false, 0);
    out.try_reserve_exact(bytes.len().saturating_mul(2)).ok()?;
    let mut in_string = false;
    while let Some(&byte) = bytes.get(at) {
        let word = WORDS.iter().find(|word| !in_string && bytes[at..].starts_with(word));
        if let Some(word) = word {
            out.extend_from_slice(b"null");
            at += word.len();
            found = true;
            continue;
        }
        out.push(byte);
        at += 1;
        match byte {
            b'"' => in_string = !in_string,
            b'\\' if in_string => {
                out.extend(bytes.get(at));
                at += 1;
            }
            _ => {}
        }
    }
    found.then_some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"{"original_width": 800, "original_height": 600, "pwatermark": 0.1, "AESTHETIC_SCORE": 5.5,
        "punsafe": 0.01, "exif": {"a": [1, "x"]}, "caption": "NaN \"Infinity"}"#;

    fn authors(metadata: &str) -> Option<String> {
        MetadataFilter::authors().refuses(Some(metadata.as_bytes()))
    }

    #[test]
    fn the_authors_bounds() {
        assert_eq!(authors(GOOD), None);
        assert_eq!(authors(&GOOD.replace("AESTHETIC_SCORE", "aesthetic")), None);
        let both = GOOD.replace("\"punsafe\"", "\"aesthetic\": 1, \"punsafe\"");
        assert_eq!(authors(&both), None, "one aesthetic score is enough");
        for (from, to, named) in [
            ("800", "511", "original_width"),
            ("600", "511.5", "original_height"),
            ("800", "4097", "original_width"),
            ("600", "5000", "original_height"),
            ("0.1", "0.51", "pwatermark"),
            ("5.5", "4.99", "aesthetic"),
            ("0.01", "0.995", "punsafe"),
            ("0.01", "null", "punsafe"),
            ("0.01", "NaN", "punsafe"),
            ("5.5", "-Infinity", "aesthetic"),
            ("punsafe", "p", "punsafe"),
            ("800", "\"800\"", "metadata"),
            ("{", "[", "metadata"),
        ] {
            let message = authors(&GOOD.replacen(from, to, 1));
            assert!(message.as_ref().is_some_and(|m| m.contains(named)), "{from} -> {to}: {message:?}");
        }
        for edge in [("800", "512"), ("600", "4096"), ("0.1", "0.5"), ("5.5", "5"), ("0.01", "0.99")] {
            assert_eq!(authors(&GOOD.replace(edge.0, edge.1)), None, "{edge:?}");
        }
        assert_eq!(authors(&GOOD.replace("[1, \"x\"]", "[NaN, Infinity]")), None, "a field of no concern");
    }

    #[test]
    fn metadata_are_needed_only_if_a_bound_is_set() {
        let off = MetadataFilter::default();
        assert!(!off.is_on());
        assert_eq!(off.refuses(None), None);
        assert_eq!(off.refuses(Some(b"rubbish")), None);
        let on = MetadataFilter { max_pwatermark: Some(0.5), ..off };
        assert!(on.refuses(None).is_some() && on.refuses(Some(b"rubbish")).is_some());
        assert_eq!(on.refuses(Some(br#"{"pwatermark": 0}"#)), None);
        let deep = "[".repeat(100_000);
        assert!(on.refuses(Some(format!("{{\"pwatermark\": {deep}").as_bytes())).is_some());
    }

    #[test]
    fn words_of_python_are_null_outside_of_strings() {
        let replaced = |text: &str| with_nulls(text.as_bytes()).map(|b| String::from_utf8(b).unwrap());
        assert_eq!(
            replaced(r#"{"NaN": NaN, "b\"NaN": -Infinity}"#).unwrap(),
            r#"{"NaN": null, "b\"NaN": null}"#
        );
        assert_eq!(replaced(r#"{"NaN": "\\", "b": 1}"#), None);
        assert_eq!(replaced("\"\\"), None);
    }
}
