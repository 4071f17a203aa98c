//! From a prompt to token ids.

mod legacy;
mod tokenizer;

pub use tokenizer::{SpecialIds, TokenIds, Tokenizer};
