//! CLIP's tokenizer from `vocab.json` and `merges.txt`, as it was saved before tokenizer.json.

use std::path::Path;

use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::{AddedToken, Tokenizer};

use crate::error::{Error, Result};
use crate::files;

/// The list of all tokens.
pub(super) const VOCABULARY_FILE: &str = "vocab.json";

/// Which pairs of tokens join, in order.
pub(super) const MERGES_FILE: &str = "merges.txt";

/// What CLIP appends to the last token of a word.
pub(super) const END_OF_WORD: &str = "</w>";

/// Everything but the vocabulary: normalise, split, spell bytes as characters. The same for all of CLIP's.
pub(super) const SKELETON: &str = r#"{
  "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
  "normalizer": {"type": "Sequence", "normalizers": [
    {"type": "NFC"}, {"type": "Replace", "pattern": {"Regex": "\\s+"}, "content": " "}, {"type": "Lowercase"}]},
  "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
    {"type": "Split", "behavior": "Removed", "invert": true, "pattern": {"Regex":
      "<\\|startoftext\\|>|<\\|endoftext\\|>|'s|'t|'re|'ve|'m|'ll|'d|[\\p{L}]+|[\\p{N}]|[^\\s\\p{L}\\p{N}]+"}},
    {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}]},
  "post_processor": null, "decoder": null,
  "model": {"type": "BPE", "vocab": {}, "merges": []}
}"#;

/// Builds the tokenizer, under the caller's reserve. `specials` are the texts of the special tokens, `unknown` is the one for unknown bytes.
///
/// # Errors
/// `Io`; `Format`, naming the file and line; `OutOfMemory`.
pub(super) fn open(folder: &Path, max_bytes: usize, specials: &[String], unknown: &str) -> Result<Tokenizer> {
    let path = folder.join(VOCABULARY_FILE);
    let content = files::read(&path, max_bytes)?;
    let vocabulary: Vocab = serde_json::from_slice(content.bytes())
        .map_err(|error| Error::format(path.display().to_string(), "tokens and their ids", error))?;
    let merges = read_merges(&folder.join(MERGES_FILE), max_bytes)?;
    let wrong =
        |error: tokenizers::Error| Error::format(folder.display().to_string(), "a CLIP tokenizer", error);
    let bpe = BPE::builder()
        .vocab_and_merges(vocabulary, merges)
        .unk_token(unknown.to_owned())
        .end_of_word_suffix(END_OF_WORD.to_owned())
        .build()
        .map_err(wrong)?;
    let mut tokenizer = Tokenizer::from_bytes(SKELETON).map_err(wrong)?;
    tokenizer.with_model(bpe);
    let added = specials.iter().map(|text| AddedToken::from(text.as_str(), true).normalized(false));
    tokenizer.add_special_tokens(added).map_err(wrong)?;
    Ok(tokenizer)
}

fn read_merges(path: &Path, max_bytes: usize) -> Result<Merges> {
    let content = files::read(path, max_bytes)?;
    let mut merges = Merges::new();
    for (number, line) in files::text(path, &content)?.lines().enumerate() {
        if line.is_empty() || line.starts_with("#version") {
            continue;
        }
        match line.split_once(' ') {
            Some((a, b)) if !a.is_empty() && !b.is_empty() && !b.contains(' ') => {
                merges.push((a.to_owned(), b.to_owned()));
            }
            _ => {
                let place = format!("{}: line {}", path.display(), number + 1);
                return Err(Error::format(
                    place,
                    "two tokens",
                    format!("{:?}", line.get(..60).unwrap_or(line)),
                ));
            }
        }
    }
    Ok(merges)
}
