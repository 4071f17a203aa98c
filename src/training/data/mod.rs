//! Pictures with captions for training: from folders and from WebDataset shards, decoded ahead, in an order that a
//! killed run takes up again to the bit.
//!
//! # Sources
//! - **A folder** of `.jpg`, `.jpeg`, `.png` and `.webp` files, subfolders included, each with its caption in a `.txt`
//!   file of the same stem beside it, and with metadata in a `.json` file if a [`MetadataFilter`] wants them. Names
//!   that start with a dot are passed over.
//! - **A folder with `captions.jsonl` or `metadata.jsonl`** at its top, as Hugging Face's imagefolder has it: one
//!   object `{"file_name": "a/b.jpg", "text": "..."}` per line, whose other fields are the metadata. These lines are
//!   the data set, in their order; other files of the folder do not count, and no `file_name` leads out of it.
//! - **WebDataset shards**: a `.tar` file, a folder with `.tar` files at its top, or a pattern such as
//!   `shards/{00000..00012}.tar` or `{a,b}/0.tar`. Neighbouring members with the same name up to the first dot of its
//!   last part are one record: a picture, its caption `.txt`, its metadata `.json`; members of other kinds are passed
//!   over. Compressed archives are not read.
//!
//! Several paths make one data set; folders and shards do not mix.
//!
//! # What is skipped
//! A record without a caption, one that its filter keeps out, and one that cannot be read: damaged, or with a caption
//! that is not UTF-8, as it is for the authors. A shard that is damaged is used up to the damage. All of these are
//! counted ([`Loader::skipped`]) and named to the log callback; they do not end the run. Files that are not there,
//! a file system that fails, and memory that runs out do.
//!
//! # Order
//! A pure function of the files' names (of shards, also their members), the seed and the epoch. Folders are permuted
//! as a whole in every epoch. Of shards, the order is permuted; then as many neighbours are indexed as hold
//! [`DataOptions::set_shuffle_buffer`] records, and these are permuted. Only names and places are held for that, not
//! pictures. Rank r of R takes every R-th of the permuted records.
//!
//! Where a run stands is therefore a few numbers, [`Position`], and taking it up again costs no more than indexing
//! the shards of one buffer. Crops and flips depend on a record's place in the order alone, so neither the number of
//! threads nor an interruption changes a bit of any batch.
//!
//! ```no_run
//! use wuerstchen::training::data::{DataOptions, Loader};
//!
//! fn main() -> wuerstchen::Result<()> {
//!     let mut options = DataOptions::new("shards/{00000..00012}.tar");
//!     options.set_side(512)?;
//!     options.set_batch_size(8)?;
//!     let mut loader = Loader::new(&options)?;
//!     while let Some(batch) = loader.next_batch()? {
//!         println!("{} pictures, the first: {}", batch.images.len(), batch.captions[0]);
//!         let _to_be_saved_with_the_weights = loader.position();
//!     }
//!     Ok(())
//! }
//! ```

mod braces;
mod filter;
mod folder;
mod loader;
mod names;
mod options;
mod order;
mod record;
mod shards;
mod source;

pub use filter::MetadataFilter;
pub use loader::Loader;
pub use options::{Crop, DataOptions, Passes, Shuffle, SkipFn};
pub use order::Position;

use crate::image::Image;

/// Pictures of one size and their captions.
#[derive(Debug, Clone)]
pub struct Batch {
    /// Squares of [`DataOptions::set_side`] pixels.
    pub images: Vec<Image>,
    /// The caption of each, without white space around it.
    pub captions: Vec<String>,
    /// The name of each: a path within its folder, or `shard.tar/key`.
    pub keys: Vec<String>,
}

/// Why a record is skipped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// The picture or the caption cannot be read.
    Unreadable,
    /// The metadata do not pass the filter, or there are none.
    Filtered,
    /// There is no caption. An empty one is one.
    NoCaption,
    /// A shard is not whole; its records before the damage are used.
    DamagedShard,
}

/// A record, or the rest of a shard, that is not part of any batch.
#[derive(Debug, Clone)]
pub struct Skip {
    /// Its name, as in [`Batch::keys`]; the file name of a shard.
    pub key: String,
    /// Why it is skipped.
    pub reason: Reason,
    /// What exactly is wrong, in words.
    pub message: String,
}

/// How much was skipped since the loader was opened, of what stands before the end of the last batch.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Skipped {
    /// Records whose picture or caption cannot be read.
    pub unreadable: u64,
    /// Records that the filter keeps out.
    pub filtered: u64,
    /// Records without a caption.
    pub no_caption: u64,
    /// Shards that are not whole, once for each time that one was indexed.
    pub damaged_shards: u64,
}

impl Skipped {
    fn count(&mut self, reason: Reason) {
        match reason {
            Reason::Unreadable => self.unreadable += 1,
            Reason::Filtered => self.filtered += 1,
            Reason::NoCaption => self.no_caption += 1,
            Reason::DamagedShard => self.damaged_shards += 1,
        }
    }
}
