//! The threads that decode ahead, and the batches that come of them.
//!
//! Threads take numbered steps of the one [`Order`], one after the other, and put what they make of them into a ring;
//! batches are collected from the ring by number. So the order does not depend on which thread is faster.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::options::DataOptions;
use super::order::{Order, Position, Step};
use super::record::Example;
use super::source::Source;
use super::{Batch, Skip, Skipped};
use crate::device::threads::{self, Thread, panic_error};
use crate::device::{Context, Device};
use crate::error::{Error, Result};

/// What listing folders and indexing shards may hold in memory that cannot be allocated fallibly.
const LISTS_BYTES: usize = 32 << 20;

/// A stream of batches. Dropping it stops its threads and waits for them.
pub struct Loader {
    options: DataOptions,
    shared: Arc<Shared>,
    /// Joined by their own drop, after ours has asked them to stop.
    threads: Vec<Thread>,
    position: Position,
    skipped: Skipped,
    /// Records of this epoch that came into a batch, while no epoch is behind that was walked as a whole.
    used: u64,
    end: Option<End>,
}

/// Why there are no more batches.
enum End {
    Done,
    Failed(Error),
}

/// What became of a step.
enum Item {
    Example(Example, Position),
    Skip(Skip),
    EpochEnd { whole: bool, last: bool },
    Failed(Error),
}

struct Shared {
    source: Arc<Source>,
    options: DataOptions,
    /// The next steps. Locked before `ring`, never after.
    feed: Mutex<Feed>,
    ring: Mutex<Ring>,
    /// Told when an item is put into the ring, and when one is taken.
    filled: Condvar,
    emptied: Condvar,
}

struct Feed {
    order: Order,
    /// The number of the next step.
    next: u64,
    /// Whether there are no more.
    ended: bool,
}

/// Items from number `first` on, in their order; those that are being made are nothing yet.
struct Ring {
    first: u64,
    items: VecDeque<Option<Item>>,
    capacity: usize,
    closing: bool,
}

impl Loader {
    /// Starts at the beginning of the first epoch.
    ///
    /// # Errors
    /// `Io` for a path that is not there; `InvalidArgument` for a pattern that is none, and for folders and shards
    /// together; `Format`, naming the path, if there is nothing to train with; `OutOfMemory`.
    pub fn new(options: &DataOptions) -> Result<Self> {
        Self::start(options, None)
    }

    /// Goes on where a loader with the same data, seed, shuffling and rank stood. Batch size, threads, filter and the
    /// like may have changed; with the same ones, the batches are those that would have followed, to the bit.
    ///
    /// # Errors
    /// As [`Loader::new`]; `InvalidArgument` for a position of something else.
    pub fn resume(options: &DataOptions, position: &Position) -> Result<Self> {
        Self::start(options, Some(position))
    }

    fn start(options: &DataOptions, position: Option<&Position>) -> Result<Self> {
        let (source, order) = threads::run_apart_with_reserve("a data set", LISTS_BYTES, || {
            let source = Arc::new(Source::open(&options.paths)?);
            let order = Order::new(source.clone(), options.plan.clone(), position)?;
            Ok((source, order))
        })?;
        let position = order.position();
        let capacity = options.prefetch.saturating_mul(options.batch_size);
        let mut items = VecDeque::new();
        items
            .try_reserve_exact(capacity)
            .map_err(|_| Error::out_of_memory("batches ahead", capacity.saturating_mul(size_of::<Item>())))?;
        let shared = Arc::new(Shared {
            source,
            options: options.clone(),
            feed: Mutex::new(Feed { order, next: 0, ended: false }),
            ring: Mutex::new(Ring { first: 0, items, capacity, closing: false }),
            filled: Condvar::new(),
            emptied: Condvar::new(),
        });
        let mut loader = Loader {
            options: options.clone(),
            shared,
            threads: Vec::new(),
            position,
            skipped: Skipped::default(),
            used: 0,
            end: None,
        };
        for _ in 0..options.threads {
            let cx = Context::new(&Device::cpu(1)?);
            let shared = loader.shared.clone();
            loader.threads.push(Thread::start(move || shared.work(&cx))?);
        }
        Ok(loader)
    }

    /// The next batch; nothing after the last one of a single pass.
    ///
    /// # Errors
    /// `Format`, naming the path, if no record of a whole epoch could be used; `Io` if a shard cannot be read;
    /// `OutOfMemory`. After an error every call gives it again; [`Loader::position`] is that of the last batch.
    pub fn next_batch(&mut self) -> Result<Option<Batch>> {
        match &self.end {
            None => {}
            Some(End::Done) => return Ok(None),
            Some(End::Failed(error)) => return Err(error.duplicate()),
        }
        self.collect().inspect_err(|error| self.end = Some(End::Failed(error.duplicate())))
    }

    /// Where this loader stands: after the last batch that it gave.
    pub fn position(&self) -> Position {
        self.position.clone()
    }

    /// What was skipped so far.
    pub fn skipped(&self) -> Skipped {
        self.skipped
    }

    fn collect(&mut self) -> Result<Option<Batch>> {
        let mut batch = Batch { images: Vec::new(), captions: Vec::new(), keys: Vec::new() };
        let mut position = None;
        while batch.images.len() < self.options.batch_size {
            match self.shared.take() {
                Item::Example(example, after) => {
                    batch.images.push(example.image);
                    batch.captions.push(example.caption);
                    batch.keys.push(example.key);
                    self.used += 1;
                    position = Some(after);
                }
                Item::Skip(skip) => {
                    self.skipped.count(skip.reason);
                    if let Some(log) = &self.options.log {
                        log(&skip);
                    }
                }
                Item::EpochEnd { whole, last } => {
                    if whole && self.used == 0 {
                        return Err(self.nothing_usable());
                    }
                    self.used = 0;
                    if last {
                        self.end = Some(End::Done);
                        break;
                    }
                }
                Item::Failed(error) => return Err(error),
            }
        }
        let Some(position) = position else { return Ok(None) };
        self.position = position;
        Ok(Some(batch))
    }

    /// An epoch without a single record that could be used.
    fn nothing_usable(&self) -> Error {
        let paths: Vec<_> = self.options.paths.iter().map(|path| path.display().to_string()).collect();
        let Skipped { unreadable, filtered, no_caption, damaged_shards } = self.skipped;
        let (rank, ranks) = (self.options.plan.rank, self.options.plan.ranks);
        let share = if ranks > 1 { format!(" for rank {rank} of {ranks}") } else { String::new() };
        let found = format!(
            "none{share}: {unreadable} unreadable, {filtered} filtered, {no_caption} without a caption, \
             {damaged_shards} damaged shards"
        );
        Error::format(paths.join(", "), "at least one record to train with", found)
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        self.shared.ring().closing = true;
        self.shared.emptied.notify_all();
        self.threads.clear();
    }
}

impl Shared {
    fn ring(&self) -> MutexGuard<'_, Ring> {
        // What a panic could leave half done is never seen: every change is one call.
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes items until there are no more steps, or the loader goes.
    fn work(&self, cx: &Context) {
        while let Some((number, step)) = self.next_step() {
            let item = match step {
                Ok(step) => self.item(cx, step),
                Err(error) => Item::Failed(error),
            };
            let mut ring = self.ring();
            let place = number - ring.first;
            if let Some(slot) = ring.items.get_mut(place as usize) {
                *slot = Some(item);
            }
            drop(ring);
            self.filled.notify_one();
        }
    }

    /// The next step and its number, once there is room for what comes of it.
    fn next_step(&self) -> Option<(u64, Result<Step>)> {
        let mut feed = self.feed.lock().unwrap_or_else(PoisonError::into_inner);
        if feed.ended {
            return None;
        }
        let mut ring = self.ring();
        while ring.items.len() >= ring.capacity && !ring.closing {
            ring = self.emptied.wait(ring).unwrap_or_else(PoisonError::into_inner);
        }
        if ring.closing {
            return None;
        }
        ring.items.push_back(None);
        drop(ring);
        let number = feed.next;
        feed.next += 1;
        let step = catch_unwind(AssertUnwindSafe(|| feed.order.step()))
            .unwrap_or_else(|payload| Err(panic_error("the order of a data set", payload)));
        feed.ended = matches!(step, Err(_) | Ok(Step::EpochEnd { last: true, .. }));
        Some((number, step))
    }

    /// What becomes of a step.
    fn item(&self, cx: &Context, step: Step) -> Item {
        let (record, draw, after) = match step {
            Step::Record { record, draw, after } => (record, draw, after),
            Step::Skip(skip) => return Item::Skip(skip),
            Step::EpochEnd { whole, last } => return Item::EpochEnd { whole, last },
        };
        let load = AssertUnwindSafe(|| record.load(cx, &self.source, &self.options, draw));
        let loaded =
            catch_unwind(load).unwrap_or_else(|payload| Err(panic_error("a record of a data set", payload)));
        match loaded {
            Ok(Ok(example)) => Item::Example(example, after),
            Ok(Err(skip)) => Item::Skip(skip),
            Err(error) => Item::Failed(error),
        }
    }

    /// The next item. Must not be called after the last one.
    fn take(&self) -> Item {
        let mut ring = self.ring();
        loop {
            if let Some(item) = ring.items.front_mut().and_then(Option::take) {
                ring.items.pop_front();
                ring.first += 1;
                drop(ring);
                self.emptied.notify_all();
                return item;
            }
            ring = self.filled.wait(ring).unwrap_or_else(PoisonError::into_inner);
        }
    }
}
