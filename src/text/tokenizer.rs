//! CLIP's tokenizer: bos, the prompt's tokens, eos, padding up to a fixed length.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Map, Value};
use tokenizers::PostProcessorWrapper;
use tokenizers::models::ModelWrapper;

use super::legacy;
use crate::device::{Buffer, threads};
use crate::error::{Error, Result};
use crate::files;

/// The file that holds a whole tokenizer.
pub(super) const TOKENIZER_FILE: &str = "tokenizer.json";

/// Files that name the special tokens, first come first served.
const SPECIALS_FILES: [&str; 2] = ["tokenizer_config.json", "special_tokens_map.json"];

/// The largest file of a tokenizer.
const TOKENIZER_MAX_BYTES: usize = 64 << 20;

/// The largest file of special tokens.
const SPECIALS_MAX_BYTES: usize = 8 << 20;

/// What a tokenizer takes in memory per byte of its file while it is built, at worst.
const BLOW_UP: usize = 32;

/// The longest prompt. Only the beginning of one counts, but all of it is split into tokens.
const PROMPT_MAX_BYTES: usize = 1 << 20;

/// What encoding takes in memory per byte of the prompt, at worst: offsets and text of every token.
const PROMPT_BLOW_UP: usize = 256;

/// The longest regular expression of a tokenizer, and the deepest nesting of its parts.
const REGEX_MAX_BYTES: usize = 4096;
const REGEX_MAX_DEPTH: usize = 32;

/// The deepest nesting of normalisers and splitters.
const COMPONENT_MAX_DEPTH: usize = 16;

/// The most characters of a prompt that an error repeats.
const PIECE_MAX_CHARS: usize = 40;

/// CLIP's own names of its special tokens.
pub(super) const BOS: &str = "<|startoftext|>";
pub(super) const EOS: &str = "<|endoftext|>";

/// The ids of the tokens around a prompt.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SpecialIds {
    /// Before the prompt.
    pub bos: Option<u32>,
    /// After the prompt.
    pub eos: Option<u32>,
    /// After eos, up to the length.
    pub pad: Option<u32>,
}

/// A tokenised prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenIds {
    /// Exactly as many ids as were asked for.
    pub ids: Vec<i64>,
    /// How many of them are not padding: bos, content and eos. The attention mask is 1 on these.
    pub tokens_used: usize,
}

/// A tokenizer. May be used from several threads at once.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    place: PathBuf,
    bos: u32,
    eos: u32,
    pad: u32,
    largest_id: u32,
    max_length: Option<usize>,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tokenizer({}, bos {}, eos {}, pad {})", self.place.display(), self.bos, self.eos, self.pad)
    }
}

impl Tokenizer {
    /// Opens `tokenizer.json`, else `vocab.json` and `merges.txt`, in `folder`.
    ///
    /// # Errors
    /// `Io`; `Format`; `OutOfMemory`.
    pub fn open(folder: &Path) -> Result<Self> {
        Self::open_with(folder, SpecialIds::default())
    }

    /// The same; `fallback` are the text encoder's ids, for tokenizers that do not say which theirs are.
    ///
    /// # Errors
    /// `Io`; `Format`; `OutOfMemory`.
    pub fn open_with(folder: &Path, fallback: SpecialIds) -> Result<Self> {
        let path = folder.join(TOKENIZER_FILE);
        let whole = path.try_exists().map_err(|source| Error::io(&path, source))?;
        if !whole && !folder.join(legacy::VOCABULARY_FILE).exists() {
            let (a, b) = (legacy::VOCABULARY_FILE, legacy::MERGES_FILE);
            let reason = format!("expected {TOKENIZER_FILE}, or {a} and {b}, found neither");
            return Err(Error::io(folder, std::io::Error::new(std::io::ErrorKind::NotFound, reason)));
        }
        let place = if whole { path } else { folder.join(legacy::VOCABULARY_FILE) };
        let read =
            [&[TOKENIZER_FILE, legacy::VOCABULARY_FILE, legacy::MERGES_FILE], &SPECIALS_FILES[..]].concat();
        let bytes: usize =
            read.iter().map(|name| files::size(&folder.join(name)).min(TOKENIZER_MAX_BYTES)).sum();
        files::guarded(&place, "a tokenizer", bytes * BLOW_UP, || {
            let specials = Specials::read(folder)?;
            if whole {
                let (inner, own) = open_whole(&place)?;
                return Self::assemble(inner, &place, own, &specials, fallback);
            }
            let texts = specials.texts();
            let unknown = specials.unk.as_deref().unwrap_or(EOS);
            let inner = legacy::open(folder, TOKENIZER_MAX_BYTES, &texts, unknown)?;
            Self::assemble(inner, &place, SpecialIds::default(), &specials, fallback)
        })
    }

    /// What the tokenizer's own file says about special tokens comes first, then the folder, then the caller.
    fn assemble(
        inner: tokenizers::Tokenizer,
        place: &Path,
        own: SpecialIds,
        specials: &Specials,
        fallback: SpecialIds,
    ) -> Result<Self> {
        let id = |text: &Option<String>| text.as_deref().and_then(|text| inner.token_to_id(text));
        let missing = |name: &str| {
            let expected = format!("a token that marks the {name} of prompts");
            Error::format(place.display().to_string(), expected, "none")
        };
        let bos = own.bos.or_else(|| id(&specials.bos)).or(fallback.bos).or_else(|| inner.token_to_id(BOS));
        let eos = own.eos.or_else(|| id(&specials.eos)).or(fallback.eos).or_else(|| inner.token_to_id(EOS));
        let bos = bos.ok_or_else(|| missing("beginning"))?;
        let eos = eos.ok_or_else(|| missing("end"))?;
        let pad = id(&specials.pad).or(own.pad).or(fallback.pad).unwrap_or(eos);
        let largest = inner.get_vocab(true).into_values().max().unwrap_or(0);
        let largest_id = largest.max(bos).max(eos).max(pad);
        let max_length = specials.max_length;
        Ok(Tokenizer { inner, place: place.to_owned(), bos, eos, pad, largest_id, max_length })
    }

    /// The file that it was read from.
    pub fn path(&self) -> &Path {
        &self.place
    }

    /// The length in tokens that prompts are padded and cut to, if the folder says one (`model_max_length`).
    pub fn max_length(&self) -> Option<usize> {
        self.max_length
    }

    /// The ids of the special tokens.
    pub fn special_ids(&self) -> SpecialIds {
        SpecialIds { bos: Some(self.bos), eos: Some(self.eos), pad: Some(self.pad) }
    }

    /// The largest id that [`Tokenizer::encode`] can give: what a text encoder's vocabulary is checked against.
    pub fn largest_id(&self) -> u32 {
        self.largest_id
    }

    /// Exactly `length` ids: bos, as many tokens of the text as fit, eos, padding.
    ///
    /// # Errors
    /// `InvalidArgument` if the text is too long or has a piece that the vocabulary cannot spell; `OutOfMemory`.
    pub fn encode(&self, text: &str, length: usize) -> Result<TokenIds> {
        if length < 2 {
            return Err(Error::argument("length", "at least 2 tokens", length));
        }
        if text.len() > PROMPT_MAX_BYTES {
            let expected = format!("a prompt of at most {PROMPT_MAX_BYTES} bytes");
            return Err(Error::argument("prompt", expected, format!("{} bytes", text.len())));
        }
        let mut ids = Vec::new();
        ids.try_reserve_exact(length)
            .map_err(|_| Error::out_of_memory("token ids", length * size_of::<i64>()))?;
        // On a thread of ours: the crate keeps a cache per thread, which must not outlive an unloaded library.
        let bytes = text.len() * PROMPT_BLOW_UP;
        let content = threads::run_apart_with_reserve("a prompt", bytes, || self.content(text));
        let content = content.map_err(|error| match error {
            Error::Internal { reason, .. } => self.unspeakable(text, &reason),
            error => error,
        })?;
        ids.push(i64::from(self.bos));
        ids.extend(content.iter().take(length - 2).map(|&id| i64::from(id)));
        ids.push(i64::from(self.eos));
        let tokens_used = ids.len();
        ids.resize(length, i64::from(self.pad));
        Ok(TokenIds { ids, tokens_used })
    }

    fn content(&self, text: &str) -> Result<Vec<u32>> {
        let encode = |text: &str| self.inner.encode(text, false);
        encode(text).map(|encoding| encoding.get_ids().to_vec()).map_err(|error| {
            let word = text.split_whitespace().find(|word| encode(word).is_err());
            self.unspeakable(word.unwrap_or(text), &error)
        })
    }

    fn unspeakable(&self, piece: &str, reason: &dyn std::fmt::Display) -> Error {
        let shown: String = piece.chars().take(PIECE_MAX_CHARS).collect();
        let expected = format!("text that the vocabulary of {} can spell", self.place.display());
        Error::argument("prompt", expected, format!("{shown:?} ({reason})"))
    }
}

/// The special tokens' texts, as far as the folder names them.
#[derive(Default)]
struct Specials {
    bos: Option<String>,
    eos: Option<String>,
    pad: Option<String>,
    unk: Option<String>,
    max_length: Option<usize>,
}

impl Specials {
    fn read(folder: &Path) -> Result<Self> {
        let mut specials = Specials::default();
        for name in SPECIALS_FILES {
            let path = folder.join(name);
            if !path.try_exists().map_err(|source| Error::io(&path, source))? {
                continue;
            }
            let content = files::read(&path, SPECIALS_MAX_BYTES)?;
            let fields: Map<String, Value> = serde_json::from_slice(content.bytes())
                .map_err(|error| Error::format(path.display().to_string(), "a JSON object", error))?;
            let text = |name: &str| {
                let value = fields.get(name)?;
                value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned)
            };
            // Files without a limit say 1e30, which is no whole number.
            let length = || fields.get("model_max_length")?.as_u64();
            specials.max_length = specials.max_length.or_else(|| usize::try_from(length()?).ok());
            specials.bos = specials.bos.or_else(|| text("bos_token"));
            specials.eos = specials.eos.or_else(|| text("eos_token"));
            specials.pad = specials.pad.or_else(|| text("pad_token"));
            specials.unk = specials.unk.or_else(|| text("unk_token"));
        }
        Ok(specials)
    }

    /// The tokens that are matched in the raw text.
    fn texts(&self) -> Vec<String> {
        let named = [self.bos.as_deref().unwrap_or(BOS), self.eos.as_deref().unwrap_or(EOS)];
        let all = named.into_iter().chain(self.pad.as_deref()).chain(self.unk.as_deref());
        all.filter(|text| !text.is_empty()).map(str::to_owned).collect()
    }
}

/// The parts of tokenizer.json that are looked at before the crate gets it.
#[derive(Deserialize)]
struct Outline {
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    post_processor: Value,
    #[serde(default)]
    decoder: Value,
    #[serde(default)]
    padding: Option<Padding>,
    model: ModelOutline,
}

#[derive(Deserialize)]
struct Padding {
    #[serde(default)]
    pad_id: Option<u32>,
}

#[derive(Deserialize)]
struct ModelOutline {
    #[serde(default)]
    continuing_subword_prefix: Option<String>,
}

/// A tokenizer from tokenizer.json, without its own truncation, padding and special tokens, and the ids of these.
fn open_whole(path: &Path) -> Result<(tokenizers::Tokenizer, SpecialIds)> {
    let content = files::read(path, TOKENIZER_MAX_BYTES)?;
    let own = check_outline(path, &content)?;
    let wrong = |error: tokenizers::Error| {
        Error::format(path.display().to_string(), "a Hugging Face tokenizer", error)
    };
    let mut tokenizer = tokenizers::Tokenizer::from_bytes(content.bytes()).map_err(wrong)?;
    tokenizer.with_truncation(None).map_err(wrong)?;
    tokenizer.with_padding(None);
    // The crate's own processor panics on a template that names a token it does not define.
    tokenizer.with_post_processor(None::<PostProcessorWrapper>);
    // Dropout, a device of training, would give other tokens in every call.
    if let ModelWrapper::BPE(bpe) = tokenizer.get_model()
        && bpe.dropout.is_some()
    {
        let mut bpe = bpe.clone();
        bpe.dropout = None;
        tokenizer.with_model(bpe);
    }
    Ok((tokenizer, own))
}

/// The ids that a post-processor puts before and after a prompt.
fn ids_around(processor: &Value) -> Option<(u32, u32)> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match processor.get("type")?.as_str()? {
        "RobertaProcessing" | "BertProcessing" => {
            Some((id(processor.get("cls")?.get(1)?)?, id(processor.get("sep")?.get(1)?)?))
        }
        "TemplateProcessing" => {
            let special = |piece: &Value| {
                let name = piece.get("SpecialToken")?.get("id")?.as_str()?;
                match processor.get("special_tokens")?.get(name)?.get("ids")?.as_array()?.as_slice() {
                    [only] => id(only),
                    _ => None,
                }
            };
            match processor.get("single")?.as_array()?.as_slice() {
                [bos, content, eos] if content.get("Sequence").is_some() => {
                    Some((special(bos)?, special(eos)?))
                }
                _ => None,
            }
        }
        "Sequence" => processor.get("processors")?.as_array()?.iter().find_map(ids_around),
        _ => None,
    }
}

/// Refuses what the crate would take too long or too much stack for.
fn check_outline(path: &Path, content: &Buffer) -> Result<SpecialIds> {
    let outline: Outline = serde_json::from_slice(content.bytes())
        .map_err(|error| Error::format(path.display().to_string(), "a Hugging Face tokenizer", error))?;
    let parts = [
        ("normalizer", &outline.normalizer),
        ("pre_tokenizer", &outline.pre_tokenizer),
        ("post_processor", &outline.post_processor),
        ("decoder", &outline.decoder),
    ];
    for (name, part) in parts {
        check_component(part, 0).map_err(|(expected, found)| {
            Error::format(format!("{}: {name}", path.display()), expected, found)
        })?;
    }
    if outline.model.continuing_subword_prefix.is_some_and(|prefix| !prefix.is_empty()) {
        let what = format!("{}: model.continuing_subword_prefix", path.display());
        return Err(Error::unsupported(what, "CLIP's tokenizers have none"));
    }
    let (bos, eos) = ids_around(&outline.post_processor).unzip();
    Ok(SpecialIds { bos, eos, pad: outline.padding.and_then(|padding| padding.pad_id) })
}

fn check_component(value: &Value, depth: usize) -> Result<(), (String, String)> {
    if depth > COMPONENT_MAX_DEPTH {
        return Err((format!("at most {COMPONENT_MAX_DEPTH} levels of nesting"), "more".into()));
    }
    match value {
        Value::Array(list) => list.iter().try_for_each(|value| check_component(value, depth + 1)),
        Value::Object(map) => map.iter().try_for_each(|(name, value)| match value.as_str() {
            Some(regex) if name == "Regex" => check_regex(regex),
            _ => check_component(value, depth + 1),
        }),
        _ => Ok(()),
    }
}

fn check_regex(regex: &str) -> Result<(), (String, String)> {
    let mut depth = 0usize;
    let mut deepest = 0usize;
    for byte in regex.bytes() {
        match byte {
            b'(' | b'[' => depth += 1,
            b')' | b']' => depth = depth.saturating_sub(1),
            _ => {}
        }
        deepest = deepest.max(depth);
    }
    if regex.len() > REGEX_MAX_BYTES || deepest > REGEX_MAX_DEPTH {
        let expected =
            format!("a regular expression of at most {REGEX_MAX_BYTES} bytes, {REGEX_MAX_DEPTH} deep");
        return Err((expected, format!("{} bytes, {deepest} deep", regex.len())));
    }
    Ok(())
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
