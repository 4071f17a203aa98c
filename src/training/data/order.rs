//! The order of the records: a pure function of the data set, the seed and the epoch, walked from any position.
//!
//! An epoch is a row of windows. A window of folders is all of them; one of shards is as many neighbours, in the
//! epoch's order of shards, as hold the records of the shuffle buffer. The records of a window are permuted.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::names::{numbers, push};
use super::options::{Passes, Shuffle};
use super::record::{Draw, Record};
use super::shards::Index;
use super::source::Source;
use super::{Reason, Skip};
use crate::error::{Error, Result};
use crate::tensor::rng::Philox;

/// What decides the order.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    pub(super) seed: u64,
    pub(super) shuffle: Shuffle,
    pub(super) buffer: usize,
    pub(super) passes: Passes,
    pub(super) rank: usize,
    pub(super) ranks: usize,
}

/// What a random number is for: the upper half of its stream, the epoch is the lower. Beyond the numbers of
/// `diffusion::noise`, so that one seed may serve both.
#[derive(Debug, Clone, Copy)]
enum Use {
    Shards = 0x4441_5400,
    Records = 0x4441_5401,
    Pictures = 0x4441_5402,
}

/// Where a run stands: between two batches. Saved with the weights, as JSON for instance, it lets
/// [`super::Loader::resume`] go on with exactly the batches that would have followed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Position {
    /// Epochs that are behind.
    pub epoch: u64,
    /// Shards of this epoch that are behind, in its order of shards.
    pub shard: u64,
    /// Records of the present window that this rank has taken, those that were skipped included.
    pub taken: u64,
    /// A fingerprint of the data set, the seed, the shuffling and the rank.
    pub data: u64,
}

/// What comes next.
#[derive(Debug)]
pub(super) enum Step {
    /// A record, and the position after it.
    Record { record: Record, draw: Draw, after: Position },
    /// A shard that is not whole.
    Skip(Skip),
    /// The end of an epoch; whether the walk began at its start, and whether it goes on.
    EpochEnd { whole: bool, last: bool },
}

/// A walk over the records of one rank.
#[derive(Debug)]
pub(super) struct Order {
    source: Arc<Source>,
    plan: Plan,
    data: u64,
    epoch: u64,
    /// Whether this epoch was walked from its start.
    whole: bool,
    /// The epoch's order of shards.
    shards: Vec<u32>,
    /// The first shard of the present or next window.
    shard: usize,
    taken: usize,
    window: Option<Window>,
    /// Damage of the window's shards that was not told yet, the last first.
    damage: Vec<Skip>,
}

/// Records that are permuted together.
#[derive(Debug)]
struct Window {
    /// The shard after its last.
    end: usize,
    /// The first record of each folder or shard, and the number of all at the end.
    starts: Vec<usize>,
    /// Of shards: their records.
    indices: Vec<Arc<Index>>,
    permutation: Vec<u32>,
}

impl Order {
    /// The walk from a position, or from the start.
    ///
    /// # Errors
    /// `InvalidArgument` for a position of another data set, seed, shuffling or rank, or one that cannot be; what
    /// indexing shards fails with.
    pub(super) fn new(source: Arc<Source>, plan: Plan, position: Option<&Position>) -> Result<Self> {
        let data = fingerprint(&source, &plan);
        let at = position.cloned().unwrap_or(Position { epoch: 0, shard: 0, taken: 0, data });
        if at.data != data {
            let expected = "one of the same data, seed, shuffling and rank";
            return Err(Error::argument("position", expected, "another"));
        }
        let mut order = Order {
            source,
            plan,
            data,
            epoch: at.epoch,
            whole: at.shard == 0 && at.taken == 0,
            shards: Vec::new(),
            shard: usize::try_from(at.shard).unwrap_or(usize::MAX),
            taken: usize::try_from(at.taken).unwrap_or(usize::MAX),
            window: None,
            damage: Vec::new(),
        };
        order.begin_epoch()?;
        order.check(&at)?;
        Ok(order)
    }

    /// Opens the window that a position lies in.
    fn check(&mut self, at: &Position) -> Result<()> {
        let wrong = || Error::argument("position", "one of these data", format!("{at:?}"));
        if self.shard > self.shards.len() {
            return Err(wrong());
        }
        if self.taken == 0 {
            return Ok(());
        }
        if self.shard == self.shards.len() {
            return Err(wrong());
        }
        let window = self.open_window()?;
        let last = self.taken.checked_sub(1).and_then(|taken| self.place(taken));
        if last.is_none_or(|place| place >= window.permutation.len()) {
            return Err(wrong());
        }
        self.window = Some(window);
        Ok(())
    }

    /// Where the walk stands.
    pub(super) fn position(&self) -> Position {
        Position { epoch: self.epoch, shard: self.shard as u64, taken: self.taken as u64, data: self.data }
    }

    /// The next step. After the last one of the last epoch it must not be asked again.
    ///
    /// # Errors
    /// `Io` if a shard cannot be read; `OutOfMemory`.
    pub(super) fn step(&mut self) -> Result<Step> {
        loop {
            if let Some(damage) = self.damage.pop() {
                return Ok(Step::Skip(damage));
            }
            if let Some(window) = &self.window {
                let place = self.place(self.taken);
                if let Some((place, &number)) = place.and_then(|p| window.permutation.get(p).map(|n| (p, n)))
                {
                    let record = window.record(number as usize);
                    let draw = self.philox(Use::Pictures).block((self.shard as u64) << 32 | place as u64);
                    self.taken += 1;
                    return Ok(Step::Record { record, draw, after: self.position() });
                }
                self.shard = window.end;
                self.taken = 0;
                self.window = None;
            }
            if self.shard < self.shards.len() {
                self.window = Some(self.open_window()?);
                continue;
            }
            let whole = std::mem::replace(&mut self.whole, true);
            self.epoch = self.epoch.wrapping_add(1);
            self.shard = 0;
            self.begin_epoch()?;
            return Ok(Step::EpochEnd { whole, last: self.plan.passes == Passes::One });
        }
    }

    /// The place in the window's permutation of this rank's record `taken`. Ranks take turns; who is first changes
    /// from window to window, so that what is left over does not always go to the same.
    fn place(&self, taken: usize) -> Option<usize> {
        let Plan { rank, ranks, .. } = self.plan;
        taken.checked_mul(ranks)?.checked_add((rank + self.shard % ranks) % ranks)
    }

    fn philox(&self, what: Use) -> Philox {
        Philox::new(self.plan.seed, (what as u64) << 32 | u64::from(self.epoch as u32))
    }

    fn begin_epoch(&mut self) -> Result<()> {
        self.shards = match self.source.as_ref() {
            Source::Folders(_) => vec![0],
            Source::Shards(shards) => numbers(shards.len())?,
        };
        if self.plan.shuffle == Shuffle::On {
            let philox = self.philox(Use::Shards);
            permute(&mut self.shards, &philox, 0);
        }
        Ok(())
    }

    /// The window that starts at the present shard; its damage is noted.
    fn open_window(&mut self) -> Result<Window> {
        let mut window =
            Window { end: self.shard, starts: vec![0], indices: Vec::new(), permutation: Vec::new() };
        let mut records = 0usize;
        match self.source.as_ref() {
            Source::Folders(folders) => {
                for folder in folders {
                    records += folder.len();
                    push(&mut window.starts, records)?;
                }
                window.end = 1;
            }
            Source::Shards(shards) => {
                // Without shuffling there is nothing to be gained from a larger window.
                let wanted = if self.plan.shuffle == Shuffle::On { self.plan.buffer } else { 1 };
                while let Some(&number) = self.shards.get(window.end) {
                    let shard = &shards[number as usize];
                    let mut index = shard.index()?;
                    if let Some(message) = index.damage.take() {
                        self.damage.push(Skip { key: shard.name(), reason: Reason::DamagedShard, message });
                    }
                    records += index.len();
                    window.end += 1;
                    push(&mut window.starts, records)?;
                    push(&mut window.indices, Arc::new(index))?;
                    if records >= wanted {
                        break;
                    }
                }
                self.damage.reverse();
            }
        }
        window.permutation = numbers(records)?;
        if self.plan.shuffle == Shuffle::On {
            permute(&mut window.permutation, &self.philox(Use::Records), (self.shard as u64) << 32);
        }
        Ok(window)
    }
}

impl Window {
    /// Record `number` of the window, before it was permuted.
    fn record(&self, number: usize) -> Record {
        let part = self.starts.partition_point(|&start| start <= number).saturating_sub(1);
        let number = number - self.starts[part];
        match self.indices.get(part) {
            Some(index) => Record::InShard { index: index.clone(), number },
            None => Record::InFolder { folder: part, number },
        }
    }
}

/// Fisher and Yates' shuffle, with the words of `philox` from `first` on.
fn permute(list: &mut [u32], philox: &Philox, first: u64) {
    for last in (1..list.len()).rev() {
        let other = philox.below(first + last as u64, last as u32 + 1);
        list.swap(last, other as usize);
    }
}

/// What tells positions of one order from those of another.
fn fingerprint(source: &Source, plan: &Plan) -> u64 {
    let Plan { seed, shuffle, buffer, passes: _, rank, ranks } = plan;
    // The buffer does not matter to folders, nor without shuffling.
    let buffer = match (source, shuffle) {
        (Source::Shards(_), Shuffle::On) => *buffer as u64,
        _ => 0,
    };
    let seed = if *shuffle == Shuffle::On { [1, *seed] } else { [0, *seed] };
    let mixed = [source.fingerprint(), buffer, *rank as u64, *ranks as u64].into_iter().chain(seed);
    mixed.enumerate().fold(0, |sum, (i, value)| {
        let [a, b, ..] = Philox::new(value, i as u64).block(sum);
        u64::from(a) << 32 | u64::from(b)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_permutation_is_as_likely() {
        let mut counts = std::collections::HashMap::new();
        for epoch in 0..24_000 {
            let mut list = numbers(4).unwrap();
            permute(&mut list, &Philox::new(1, epoch), 7 << 32);
            *counts.entry(list).or_insert(0.0) += 1.0f64;
        }
        assert_eq!(counts.len(), 24);
        let chi2: f64 = counts.values().map(|n| (n - 1000.0).powi(2) / 1000.0).sum();
        // 23 degrees of freedom: above 50 once in a thousand.
        assert!(chi2 < 50.0, "chi-square {chi2}");
    }
}
