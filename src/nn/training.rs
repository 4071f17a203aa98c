//! What layers do beyond inference while a network trains: statistics of the batch, blocks left out at random.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use crate::device::Reduce;
use crate::ops::batch_norm::Statistics;

/// How a network is run.
#[derive(Debug, Clone, Copy)]
pub enum Mode<'a> {
    /// BatchNorm by its running statistics, every block in its place.
    Inference,
    /// BatchNorm by the statistics of the batch, which are noted for the running ones; blocks left out at random.
    Training(&'a TrainingPass),
}

/// A residual block that may be left out for some samples of a batch (stochastic depth, Huang et al. 2016).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DepthDraw {
    /// The number of the block within its network.
    pub block: usize,
    /// How likely it is left out.
    pub probability: f32,
    /// Samples of the batch.
    pub samples: usize,
}

/// The factors of a block's residual branch, one per sample: 0, or 1 / (1 - probability).
pub type DepthFactors = dyn Fn(DepthDraw) -> Vec<f32> + Send + Sync;

/// One pass of a batch through networks that train.
pub struct TrainingPass {
    reduce: Option<Arc<dyn Reduce>>,
    depth: Option<Box<DepthFactors>>,
    seen: Mutex<Vec<RunningUpdate>>,
}

/// What a BatchNorm saw: `running = (1 - momentum) running + momentum * seen`.
#[derive(Debug)]
pub struct RunningUpdate {
    /// The layer's name; its statistics are `NAME.running_mean` and `NAME.running_var`.
    pub name: String,
    /// How fast the running statistics follow.
    pub momentum: f32,
    /// Of the whole batch, over all ranks.
    pub statistics: Statistics,
}

impl TrainingPass {
    /// A pass whose statistics are summed by `reduce` over all ranks, if there are several, and whose blocks are left
    /// out as `depth` draws, or never.
    pub fn new(reduce: Option<Arc<dyn Reduce>>, depth: Option<Box<DepthFactors>>) -> Self {
        TrainingPass { reduce, depth, seen: Mutex::default() }
    }

    /// What sums over ranks.
    pub fn reduce(&self) -> Option<&Arc<dyn Reduce>> {
        self.reduce.as_ref()
    }

    /// The factors of a block's residual branch; nothing if the block is always there.
    pub fn depth_factors(&self, draw: DepthDraw) -> Option<Vec<f32>> {
        self.depth.as_ref().filter(|_| draw.probability > 0.0).map(|depth| depth(draw))
    }

    /// Notes what a BatchNorm saw.
    pub fn note(&self, update: RunningUpdate) {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).push(update);
    }

    /// What all BatchNorms saw, in the order in which they ran.
    pub fn into_seen(self) -> Vec<RunningUpdate> {
        self.seen.into_inner().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for TrainingPass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TrainingPass").field("reduce", &self.reduce).finish_non_exhaustive()
    }
}
