//! What to load and how; validated when it is set.

use std::path::PathBuf;
use std::sync::Arc;

use super::filter::MetadataFilter;
use super::{Skip, order};
use crate::error::{Error, Result};

/// The largest side of a picture for training.
const MAX_SIDE: u32 = 4096;
/// More pictures than one step should hold in memory.
const MAX_BATCH: usize = 65_536;
/// More records than a permutation should hold in memory.
const MAX_BUFFER: usize = 1 << 24;
/// More threads than decoding gains from.
const MAX_THREADS: usize = 256;
/// More batches than should wait in memory.
const MAX_PREFETCH: usize = 1024;
/// More processes than train one model.
const MAX_RANKS: usize = 1 << 20;

/// A receiver of what is skipped: called by [`super::Loader::next_batch`], on the thread that calls that.
pub type SkipFn = Arc<dyn Fn(&Skip) + Send + Sync>;

/// Which square of a picture that is not one is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Crop {
    /// The middle.
    Centre,
    /// Any, each as likely.
    Random,
}

/// Whether records come in an order of chance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shuffle {
    /// By name in folders, as they stand in shards.
    Off,
    /// Another order in every epoch.
    On,
}

/// How often the data are gone through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Passes {
    /// Once; the last batch may be smaller.
    One,
    /// Again and again. Batches are always full: one may hold the end of an epoch and the start of the next.
    Endless,
}

/// What to load and how. Starts with what the authors trained with, where they said so.
#[derive(Clone)]
pub struct DataOptions {
    pub(super) paths: Vec<PathBuf>,
    pub(super) side: u32,
    pub(super) crop: Crop,
    pub(super) flip: f32,
    pub(super) batch_size: usize,
    pub(super) threads: usize,
    pub(super) prefetch: usize,
    pub(super) filter: MetadataFilter,
    pub(super) log: Option<SkipFn>,
    pub(super) plan: order::Plan,
}

impl DataOptions {
    /// Everything at `path` (see [the module](super)): squares of 512 pixels cut at random, not flipped, in batches
    /// of 16; shuffled, with seed 0 and a buffer of 10,000 records, endlessly; two threads, two batches ahead; no
    /// filter.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        DataOptions {
            paths: vec![path.into()],
            side: 512,
            crop: Crop::Random,
            flip: 0.0,
            batch_size: 16,
            threads: 2,
            prefetch: 2,
            filter: MetadataFilter::default(),
            log: None,
            plan: order::Plan {
                seed: 0,
                shuffle: Shuffle::On,
                buffer: 10_000,
                passes: Passes::Endless,
                rank: 0,
                ranks: 1,
            },
        }
    }

    /// One more path, of the same kind as the first: folders or shards.
    pub fn add_path(&mut self, path: impl Into<PathBuf>) {
        self.paths.push(path.into());
    }

    /// The side of the squares in pixels. A picture is resized, bicubic and antialiased, so that its shorter side has
    /// this many, and then cropped.
    ///
    /// # Errors
    /// `InvalidArgument` for 0 or more than 4096.
    pub fn set_side(&mut self, side: u32) -> Result<()> {
        self.side = within("side", 1, MAX_SIDE, side)?;
        Ok(())
    }

    /// Which square is kept.
    pub fn set_crop(&mut self, crop: Crop) {
        self.crop = crop;
    }

    /// The probability that a picture is mirrored, left to right.
    ///
    /// # Errors
    /// `InvalidArgument` unless it is from 0 to 1.
    pub fn set_flip(&mut self, probability: f32) -> Result<()> {
        if !(0.0..=1.0).contains(&probability) {
            return Err(Error::argument("flip", "a probability from 0 to 1", probability));
        }
        self.flip = probability;
        Ok(())
    }

    /// Pictures per batch.
    ///
    /// # Errors
    /// `InvalidArgument` for 0 or more than 65,536.
    pub fn set_batch_size(&mut self, pictures: usize) -> Result<()> {
        self.batch_size = within("batch_size", 1, MAX_BATCH, pictures)?;
        Ok(())
    }

    /// Whether records are shuffled.
    pub fn set_shuffle(&mut self, shuffle: Shuffle) {
        self.plan.shuffle = shuffle;
    }

    /// How many records of shards are permuted together, rounded up to whole shards. Folders are permuted as a whole.
    ///
    /// # Errors
    /// `InvalidArgument` for 0 or more than 16,777,216.
    pub fn set_shuffle_buffer(&mut self, records: usize) -> Result<()> {
        self.plan.buffer = within("shuffle_buffer", 1, MAX_BUFFER, records)?;
        Ok(())
    }

    /// What all choices follow from: order, crops and flips. The same for all ranks.
    pub fn set_seed(&mut self, seed: u64) {
        self.plan.seed = seed;
    }

    /// How often the data are gone through.
    pub fn set_passes(&mut self, passes: Passes) {
        self.plan.passes = passes;
    }

    /// Threads that read and decode.
    ///
    /// # Errors
    /// `InvalidArgument` for 0 or more than 256.
    pub fn set_threads(&mut self, threads: usize) -> Result<()> {
        self.threads = within("threads", 1, MAX_THREADS, threads)?;
        Ok(())
    }

    /// How many batches are decoded ahead of the one that is asked for. So many wait in memory.
    ///
    /// # Errors
    /// `InvalidArgument` for 0 or more than 1024.
    pub fn set_prefetch(&mut self, batches: usize) -> Result<()> {
        self.prefetch = within("prefetch", 1, MAX_PREFETCH, batches)?;
        Ok(())
    }

    /// Which share of the records this loader takes, for training in several processes: disjoint shares that
    /// together are everything. Each process saves a position of its own.
    ///
    /// # Errors
    /// `InvalidArgument` unless `rank < ranks <= 1,048,576`.
    pub fn set_rank(&mut self, rank: usize, ranks: usize) -> Result<()> {
        within("ranks", 1, MAX_RANKS, ranks)?;
        self.plan.rank = within("rank", 0, ranks - 1, rank)?;
        self.plan.ranks = ranks;
        Ok(())
    }

    /// Which records are kept, by their metadata.
    ///
    /// # Errors
    /// `InvalidArgument` for a bound that is not a number.
    pub fn set_filter(&mut self, filter: MetadataFilter) -> Result<()> {
        filter.check()?;
        self.filter = filter;
        Ok(())
    }

    /// Who hears of what is skipped. Nobody does otherwise.
    pub fn set_log(&mut self, log: Option<SkipFn>) {
        self.log = log;
    }
}

fn within<T: PartialOrd + std::fmt::Display>(name: &str, least: T, most: T, value: T) -> Result<T> {
    if value < least || value > most {
        return Err(Error::argument(name, format!("{least} to {most}"), value));
    }
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_out_of_range_are_refused() {
        let mut options = DataOptions::new("x");
        assert!(options.set_side(0).is_err() && options.set_side(4097).is_err());
        assert!(options.set_flip(f32::NAN).is_err() && options.set_flip(1.5).is_err());
        assert!(options.set_batch_size(0).is_err() && options.set_shuffle_buffer(0).is_err());
        assert!(options.set_threads(0).is_err() && options.set_prefetch(0).is_err());
        assert!(options.set_rank(0, 0).is_err() && options.set_rank(2, 2).is_err());
        let filter = MetadataFilter { max_unsafe: Some(f64::NAN), ..Default::default() };
        assert!(options.set_filter(filter).is_err());
        options.set_rank(1, 2).unwrap();
        options.set_filter(MetadataFilter::authors()).unwrap();
        let message = options.set_rank(5, 2).unwrap_err().to_string();
        assert_eq!(message, "rank: expected 0 to 1, found 5");
    }
}
