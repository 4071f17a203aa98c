//! Sums over the processes of a data-parallel run, as the ops see them: who carries them is above.

use std::fmt::Debug;

use crate::error::Result;

/// The processes that train one model together, each on its share of a batch. Every one of them makes the same calls
/// in the same order, and each call returns when all have made it.
pub trait Reduce: Send + Sync + Debug {
    /// How many processes there are.
    fn ranks(&self) -> usize;

    /// The number of this one, below [`Reduce::ranks`].
    fn rank(&self) -> usize;

    /// Puts in the place of each number its sum over all processes, the same bits in each.
    ///
    /// # Errors
    /// If a process cannot be reached or was given another count of numbers.
    fn sum_f64(&self, values: &mut [f64]) -> Result<()>;

    /// As [`Reduce::sum_f64`].
    ///
    /// # Errors
    /// As [`Reduce::sum_f64`].
    fn sum_f32(&self, values: &mut [f32]) -> Result<()>;

    /// Whether [`Reduce::sum_f32`] may run on one thread while [`Reduce::sum_f64`] runs on another, each in the same
    /// order in all processes. Gradients are then summed while the backward pass, which needs statistics of the whole
    /// batch, still runs.
    fn concurrent(&self) -> bool {
        false
    }
}
