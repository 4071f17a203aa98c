//! From a prompt to token ids.

mod legacy;
mod tokenizer;
mod train;

pub use tokenizer::{SpecialIds, TokenIds, Tokenizer};
pub use train::train_tokenizer;
