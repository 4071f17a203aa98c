//! A tokenizer for models that are trained from scratch: byte pairs (Sennrich et al. 2016, arXiv:1508.07909) over the
//! captions themselves, in CLIP's form.

use std::path::Path;

use serde_json::{Value, json};
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::tokenizer::{
    NormalizedString, Normalizer, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, Trainer,
};
use tokenizers::{AddedToken, Tokenizer};

use super::legacy::{END_OF_WORD, SKELETON};
use super::tokenizer::{BOS, EOS, TOKENIZER_FILE};
use crate::error::{Error, Result};
use crate::files;

/// The tokens around a text.
const SPECIALS: usize = 2;

/// Every byte, and every byte that ends a word: with them no text is unspeakable.
const BASE: usize = 512;

/// Pairs that occur less often are not joined.
const LEAST_COUNT: u64 = 2;

/// What counting words and pairs takes beside the words, at worst.
const TABLES_BYTES: usize = 256 << 20;

/// Learns a vocabulary of `vocabulary` tokens from texts and writes `tokenizer.json` into `folder`: lower-case, NFC,
/// bytes with `</w>` at the end of words, `<|startoftext|>` and `<|endoftext|>` as the last two ids. The same texts give
/// the same file. Few texts may fill less of the vocabulary; ids between are then never given.
///
/// # Errors
/// `InvalidArgument` for less than 514 tokens; `Io`; `OutOfMemory`.
pub fn train_tokenizer<T: AsRef<str> + Send>(
    texts: impl Iterator<Item = T> + Send,
    vocabulary: usize,
    folder: &Path,
) -> Result<()> {
    let least = BASE + SPECIALS;
    if vocabulary < least || u32::try_from(vocabulary).is_err() {
        return Err(Error::argument("vocabulary", format!("{least} to {} tokens", u32::MAX), vocabulary));
    }
    let path = folder.join(TOKENIZER_FILE);
    let file = files::guarded(&path, "texts", TABLES_BYTES, || {
        let model = learn(texts, vocabulary - SPECIALS).map_err(failed)?;
        serde_json::to_vec(&whole(model, vocabulary)?).map_err(|error| failed(error.into()))
    })?;
    std::fs::write(&path, file).map_err(|source| Error::io(&path, source))
}

fn failed(error: tokenizers::Error) -> Error {
    Error::internal("training a tokenizer", error.to_string())
}

/// The vocabulary without special tokens, and the pairs to join in their order, as tokenizer.json holds them.
fn learn<T: AsRef<str> + Send>(
    texts: impl Iterator<Item = T> + Send,
    tokens: usize,
) -> tokenizers::Result<Value> {
    // The crate's own threads would outlive the library.
    tokenizers::utils::parallelism::set_parallelism(false);
    let skeleton = Tokenizer::from_bytes(SKELETON)?;
    // Given as if they were special, all symbols have a place before a word is seen: the order in which the crate goes
    // through the words, which differs from run to run, is then of no consequence.
    let symbols = symbols().into_iter().map(|symbol| AddedToken::from(symbol, true)).collect();
    let mut trainer = BpeTrainer::builder()
        .vocab_size(tokens)
        .min_frequency(LEAST_COUNT)
        .show_progress(false)
        .special_tokens(symbols)
        .end_of_word_suffix(END_OF_WORD.to_owned())
        .build();
    trainer.feed(texts, |text| words(&skeleton, text))?;
    let mut model = BPE::default();
    trainer.train(&mut model)?;
    Ok(serde_json::to_value(&model)?)
}

/// The bytes as CLIP writes them, then the same at the end of a word.
fn symbols() -> Vec<String> {
    let mut bytes: Vec<char> = ByteLevel::alphabet().into_iter().collect();
    bytes.sort_unstable();
    let inside = bytes.iter().map(char::to_string);
    inside.chain(bytes.iter().map(|byte| format!("{byte}{END_OF_WORD}"))).collect()
}

/// The words of a text, byte by byte, as the tokenizer will see them.
fn words(skeleton: &Tokenizer, text: &str) -> tokenizers::Result<Vec<String>> {
    let mut text = NormalizedString::from(text);
    if let Some(normalizer) = skeleton.get_normalizer() {
        normalizer.normalize(&mut text)?;
    }
    let mut pieces = PreTokenizedString::from(text);
    if let Some(splitter) = skeleton.get_pre_tokenizer() {
        splitter.pre_tokenize(&mut pieces)?;
    }
    let splits = pieces.get_splits(OffsetReferential::Original, OffsetType::Byte);
    Ok(splits.into_iter().map(|(word, ..)| word.to_owned()).collect())
}

/// The content of tokenizer.json.
fn whole(learnt: Value, vocabulary: usize) -> Result<Value> {
    let mut file: Value = serde_json::from_str(SKELETON).map_err(|error| failed(error.into()))?;
    let (bos, eos) = (vocabulary - 2, vocabulary - 1);
    let mut vocab = learnt["vocab"].clone();
    vocab[BOS] = bos.into();
    vocab[EOS] = eos.into();
    file["model"] = json!({
        "type": "BPE", "dropout": null, "unk_token": EOS, "continuing_subword_prefix": null,
        "end_of_word_suffix": END_OF_WORD, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
        "vocab": vocab, "merges": learnt["merges"],
    });
    let added = |id: usize, content: &str| {
        json!({
            "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true,
        })
    };
    file["added_tokens"] = json!([added(bos, BOS), added(eos, EOS)]);
    let special = |id: usize, content: &str| json!({ "id": content, "ids": [id], "tokens": [content] });
    let mark = |content: &str| json!({ "SpecialToken": { "id": content, "type_id": 0 } });
    let text = |id: &str, kind: usize| json!({ "Sequence": { "id": id, "type_id": kind } });
    file["post_processor"] = json!({
        "type": "TemplateProcessing",
        "single": [mark(BOS), text("A", 0), mark(EOS)],
        "pair": [text("A", 0), text("B", 1)],
        "special_tokens": { BOS: special(bos, BOS), EOS: special(eos, EOS) },
    });
    file["decoder"] =
        json!({ "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true });
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::Tokenizer;

    const TEXTS: [&str; 6] = [
        "a red apple on a wooden table",
        "Two red apples and a green apple",
        "a smiling cat with a red hat",
        "the cat on the table is smiling",
        "Ein Äpfelchen \u{1F34E}\u{1F34E}, 100 %",
        "名前 名前 猫",
    ];

    fn trained(name: &str, vocabulary: usize) -> (std::path::PathBuf, Tokenizer) {
        let folder = std::env::temp_dir().join(format!("wst-bpe-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        train_tokenizer(TEXTS.iter(), vocabulary, &folder).unwrap();
        let tokenizer = Tokenizer::open(&folder).unwrap();
        (folder, tokenizer)
    }

    /// Spells ids with the file's vocabulary.
    fn spelt(file: &Value, ids: &[i64]) -> String {
        let vocab = file["model"]["vocab"].as_object().unwrap();
        let text = |id: i64| vocab.iter().find(|(_, value)| value.as_i64() == Some(id)).unwrap().0.as_str();
        ids.iter().map(|&id| text(id)).collect::<String>().replace(END_OF_WORD, " ")
    }

    #[test]
    fn any_text_is_spelt_and_frequent_words_are_one_token() {
        let (folder, tokenizer) = trained("spelt", 600);
        let file: Value =
            serde_json::from_slice(&std::fs::read(folder.join(TOKENIZER_FILE)).unwrap()).unwrap();
        let specials = tokenizer.special_ids();
        assert_eq!((specials.bos, specials.eos, specials.pad), (Some(598), Some(599), Some(599)));
        assert_eq!(tokenizer.largest_id(), 599);
        let content = |text: &str| {
            let tokens = tokenizer.encode(text, 64).unwrap();
            tokens.ids[1..tokens.tokens_used - 1].to_vec()
        };
        assert_eq!(content("APPLE  red table").len(), 3, "whole words, whatever the case");
        assert_eq!(content("Apple"), content("apple"));
        assert_eq!(content("e\u{301}"), content("\u{e9}"), "NFC");
        assert_eq!(spelt(&file, &content("a red zebra")), "a red zebra ");
        // One byte is one character of CLIP's alphabet.
        for text in ["\u{1F600}", "猫が好き", "Ж", "$", "\"", "a_b", "x\u{0}y", "\u{10FFFF}", "'s"] {
            let ids = content(text);
            assert!(!ids.is_empty() && !ids.contains(&599), "{text:?}: {ids:?}");
            let bytes = text.to_lowercase().len();
            assert_eq!(spelt(&file, &ids).replace(' ', "").chars().count(), bytes, "{text:?}");
        }
        std::fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn the_same_texts_give_the_same_file() {
        let (first, _) = trained("first", 560);
        let read = |folder: &Path| std::fs::read(folder.join(TOKENIZER_FILE)).unwrap();
        for round in 0..3 {
            let (again, _) = trained(&format!("again{round}"), 560);
            assert!(read(&again) == read(&first));
            std::fs::remove_dir_all(again).unwrap();
        }
        std::fs::remove_dir_all(first).unwrap();
    }

    #[test]
    fn a_vocabulary_holds_at_least_all_bytes() {
        let none = std::iter::empty::<&str>;
        assert!(train_tokenizer(none(), 513, Path::new("nowhere")).is_err());
        let folder = std::env::temp_dir().join(format!("wst-bpe-none-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        train_tokenizer(none(), 1000, &folder).unwrap();
        let tokenizer = Tokenizer::open(&folder).unwrap();
        assert_eq!(tokenizer.encode("ab c", 8).unwrap().ids[..5], [998, 64, 256 + 65, 256 + 66, 999]);
        std::fs::remove_dir_all(folder).unwrap();
    }
}
