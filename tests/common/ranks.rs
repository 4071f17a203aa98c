//! Ranks of a data-parallel run as threads of one process.
#![allow(dead_code, clippy::unwrap_used)]

use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use wuerstchen::device::Reduce;
use wuerstchen::{Error, Result};

/// How long a rank waits for the others before it takes them for lost.
const PATIENCE: Duration = Duration::from_secs(60);

/// Whether gradients are summed while statistics are.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Links {
    One,
    Two,
}

/// One of several threads that train together.
#[derive(Debug)]
pub struct ThreadRank {
    rank: usize,
    links: Links,
    statistics: Arc<Meeting<f64>>,
    gradients: Arc<Meeting<f32>>,
}

impl ThreadRank {
    /// As many as `count`, to be handed out to threads.
    pub fn all(count: usize, links: Links) -> Vec<Arc<Self>> {
        let (statistics, gradients) = (Arc::new(Meeting::of(count)), Arc::new(Meeting::of(count)));
        let rank =
            |rank| ThreadRank { rank, links, statistics: statistics.clone(), gradients: gradients.clone() };
        (0..count).map(rank).map(Arc::new).collect()
    }
}

impl Reduce for ThreadRank {
    fn ranks(&self) -> usize {
        self.statistics.ranks
    }

    fn rank(&self) -> usize {
        self.rank
    }

    fn sum_f64(&self, values: &mut [f64]) -> Result<()> {
        self.statistics.sum(self.rank, values)
    }

    fn sum_f32(&self, values: &mut [f32]) -> Result<()> {
        self.gradients.sum(self.rank, values)
    }

    fn concurrent(&self) -> bool {
        self.links == Links::Two
    }
}

/// Where the ranks bring their numbers and take the sums away.
#[derive(Debug)]
struct Meeting<T> {
    ranks: usize,
    state: Mutex<State<T>>,
    changed: Condvar,
}

#[derive(Debug)]
struct State<T> {
    /// What each rank brought; summed in this order once all have.
    brought: Vec<Option<Vec<T>>>,
    sums: Vec<T>,
    /// Ranks that have not taken the sums yet.
    to_leave: usize,
}

impl<T: Copy + std::ops::AddAssign> Meeting<T> {
    fn of(ranks: usize) -> Self {
        let brought = (0..ranks).map(|_| None).collect();
        let state = State { brought, sums: Vec::new(), to_leave: 0 };
        Meeting { ranks, state: Mutex::new(state), changed: Condvar::new() }
    }

    fn sum(&self, rank: usize, values: &mut [T]) -> Result<()> {
        let lost = || Error::internal("ranks", "one of them did not come");
        let state = self.state.lock().unwrap();
        let left = |state: &mut State<T>| state.to_leave > 0;
        let (mut state, waited) = self.changed.wait_timeout_while(state, PATIENCE, left).unwrap();
        if waited.timed_out() {
            return Err(lost());
        }
        state.brought[rank] = Some(values.to_vec());
        if state.brought.iter().all(Option::is_some) {
            let mut all = state.brought.iter_mut().map(|brought| brought.take().unwrap());
            let mut sums = all.next().unwrap();
            for brought in all {
                assert_eq!(brought.len(), sums.len(), "ranks sum different things");
                sums.iter_mut().zip(brought).for_each(|(sum, value)| *sum += value);
            }
            state.sums = sums;
            state.to_leave = self.ranks;
            self.changed.notify_all();
        }
        let summing = |state: &mut State<T>| state.to_leave == 0;
        let (mut state, waited) = self.changed.wait_timeout_while(state, PATIENCE, summing).unwrap();
        if waited.timed_out() {
            return Err(lost());
        }
        values.copy_from_slice(&state.sums);
        state.to_leave -= 1;
        self.changed.notify_all();
        Ok(())
    }
}

/// A trained tensor and its name.
pub type Named = (String, Vec<f32>);

/// How far weights may lie apart after some steps, in multiples of the learning rate.
const STEP_TOLERANCE: f64 = 0.02;
/// How far losses and running statistics may, relatively.
const RELATIVE_TOLERANCE: f64 = 1e-5;

/// Sums over ranks add the same numbers in another order, so runs differ by rounding and no more. Adam makes whole
/// steps of the rounding noise of gradients that should be 0 (biases of keys, and those before a BatchNorm), unless
/// its eps is well above that noise: such runs set `adam_eps` to this.
pub const EPS_ABOVE_NOISE: &str = "1e-6";

pub fn assert_same_weights(what: &str, found: &[Named], expected: &[Named], rate: f64) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for ((name, found), (expected_name, expected)) in found.iter().zip(expected) {
        assert_eq!((name, found.len()), (expected_name, expected.len()), "{what}");
        let statistic = name.contains(".running_");
        for (i, (&found, &expected)) in found.iter().zip(expected).enumerate() {
            let (found, expected) = (f64::from(found), f64::from(expected));
            let allowed =
                if statistic { RELATIVE_TOLERANCE * expected.abs().max(1.0) } else { STEP_TOLERANCE * rate };
            let error = (found - expected).abs();
            assert!(error <= allowed, "{what}: {name}[{i}] is {found}, with one rank {expected}");
        }
    }
}

pub fn assert_same_losses(what: &str, found: &[f64], expected: &[f64]) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (step, (found, expected)) in found.iter().zip(expected).enumerate() {
        let error = (found - expected).abs() / expected.abs();
        assert!(error <= RELATIVE_TOLERANCE, "{what}: loss {step} is {found}, with one rank {expected}");
    }
}
