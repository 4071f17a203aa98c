//! The sum of gradients over ranks, begun while the backward pass still runs.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use crate::device::Reduce;
use crate::device::threads::{Thread, panic_error};
use crate::error::{Error, Result};
use crate::tensor::Tensor;
use crate::tensor::autograd::Gradients;

/// Gradients are summed in groups of at least this many numbers: a message per bias would cost more than its bytes.
const BUCKET: usize = 1 << 20;

/// Sends gradients away as they become complete, and brings their sums back. The order is the same on all ranks, since
/// all record the same ops.
pub(super) struct Reduction {
    reduce: Option<Arc<dyn Reduce>>,
    worker: Option<Worker>,
    bucket: Bucket,
}

/// A thread that sums while the backward pass goes on, where the ranks' link allows that.
struct Worker {
    to: Option<Sender<Bucket>>,
    from: Receiver<Result<Bucket>>,
    _thread: Thread,
}

/// Gradients of some leaves, one after the other.
#[derive(Default)]
struct Bucket {
    /// Leaf and length.
    parts: Vec<(usize, usize)>,
    values: Vec<f32>,
}

impl Reduction {
    /// Nothing is sent where there is one rank.
    ///
    /// # Errors
    /// `OutOfMemory` if no thread can be started.
    pub fn new(reduce: Option<&Arc<dyn Reduce>>) -> Result<Self> {
        let worker = match reduce {
            Some(reduce) if reduce.concurrent() => Some(Worker::start(reduce.clone())?),
            _ => None,
        };
        Ok(Reduction { reduce: reduce.cloned(), worker, bucket: Bucket::default() })
    }

    /// Takes a gradient that nothing will be added to any more.
    ///
    /// # Errors
    /// `OutOfMemory`; what summing failed with.
    pub fn send(&mut self, leaf: usize, gradient: &Tensor) -> Result<()> {
        if self.reduce.is_none() {
            return Ok(());
        }
        self.bucket.push(leaf, gradient.slice()?)?;
        if self.bucket.values.len() < BUCKET {
            return Ok(());
        }
        match &self.worker {
            Some(worker) => worker.send(std::mem::take(&mut self.bucket)),
            None => Ok(()),
        }
    }

    /// Puts the sums in the place of the gradients.
    ///
    /// # Errors
    /// What summing failed with.
    pub fn finish(mut self, gradients: &mut Gradients) -> Result<()> {
        let Some(reduce) = self.reduce.take() else { return Ok(()) };
        let mut bucket = std::mem::take(&mut self.bucket);
        let Some(mut worker) = self.worker.take() else {
            reduce.sum_f32(&mut bucket.values)?;
            return bucket.put_into(gradients);
        };
        worker.send(bucket)?;
        worker.to = None;
        for bucket in worker.from.iter() {
            bucket?.put_into(gradients)?;
        }
        Ok(())
    }
}

impl Worker {
    fn start(reduce: Arc<dyn Reduce>) -> Result<Self> {
        let (to, inbox) = channel::<Bucket>();
        let (outbox, from) = channel();
        let thread = Thread::start(move || {
            for mut bucket in inbox {
                let sum = std::panic::AssertUnwindSafe(|| reduce.sum_f32(&mut bucket.values));
                let summed = std::panic::catch_unwind(sum)
                    .unwrap_or_else(|payload| Err(panic_error("a sum over ranks", payload)));
                let failed = summed.is_err();
                if outbox.send(summed.map(|()| bucket)).is_err() || failed {
                    return;
                }
            }
        })?;
        Ok(Worker { to: Some(to), from, _thread: thread })
    }

    fn send(&self, bucket: Bucket) -> Result<()> {
        match &self.to {
            // A worker that has ended has left its error in the other channel, where `finish` finds it.
            Some(to) => to.send(bucket).or(Ok(())),
            None => Err(Error::internal("a sum over ranks", "sent after the end")),
        }
    }
}

impl Bucket {
    fn push(&mut self, leaf: usize, gradient: &[f32]) -> Result<()> {
        let bytes = size_of_val(gradient);
        self.values
            .try_reserve(gradient.len())
            .map_err(|_| Error::out_of_memory("gradients on their way to other ranks", bytes))?;
        self.values.extend_from_slice(gradient);
        self.parts.push((leaf, gradient.len()));
        Ok(())
    }

    fn put_into(self, gradients: &mut Gradients) -> Result<()> {
        let mut rest = self.values.as_slice();
        for (leaf, len) in self.parts {
            let (sum, others) = rest.split_at(len);
            gradients.replace(leaf, Tensor::from_slice(&[len], sum)?);
            rest = others;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    /// Two ranks that have the same gradients.
    #[derive(Debug)]
    struct Twins {
        concurrent: bool,
        messages: Mutex<Vec<usize>>,
        /// The message that fails.
        failing: Option<usize>,
    }

    impl Reduce for Twins {
        fn ranks(&self) -> usize {
            2
        }

        fn rank(&self) -> usize {
            0
        }

        fn sum_f64(&self, _: &mut [f64]) -> Result<()> {
            Err(Error::internal("test", "gradients are f32"))
        }

        fn sum_f32(&self, values: &mut [f32]) -> Result<()> {
            let mut messages = self.messages.lock().unwrap();
            if self.failing == Some(messages.len()) {
                return Err(Error::internal("test", "no link"));
            }
            messages.push(values.len());
            values.iter_mut().for_each(|value| *value *= 2.0);
            Ok(())
        }

        fn concurrent(&self) -> bool {
            self.concurrent
        }
    }

    const LENGTHS: [usize; 4] = [BUCKET - 1, 3, BUCKET, 5];

    /// Leaf i holds i + 1 everywhere.
    fn reduced(concurrent: bool, failing: Option<usize>) -> Result<(Vec<usize>, Gradients)> {
        let twins = Arc::new(Twins { concurrent, messages: Mutex::default(), failing });
        let shared: Arc<dyn Reduce> = twins.clone();
        let mut reduction = Reduction::new(Some(&shared))?;
        let mut gradients = Gradients::default();
        for (leaf, &len) in LENGTHS.iter().enumerate() {
            let gradient = Tensor::from_slice(&[len], &vec![leaf as f32 + 1.0; len])?;
            reduction.send(leaf, &gradient)?;
            gradients.replace(leaf, gradient);
        }
        reduction.finish(&mut gradients)?;
        let messages = twins.messages.lock().unwrap().clone();
        Ok((messages, gradients))
    }

    #[test]
    fn sums_come_back_to_their_leaves() {
        for (concurrent, expected) in [(true, vec![BUCKET + 2, BUCKET, 5]), (false, vec![2 * BUCKET + 7])] {
            let (messages, gradients) = reduced(concurrent, None).unwrap();
            assert_eq!(messages, expected);
            for (leaf, &len) in LENGTHS.iter().enumerate() {
                let sum = gradients.get(leaf).unwrap().slice::<f32>().unwrap();
                assert_eq!(sum.len(), len);
                assert!(sum.iter().all(|&value| value == 2.0 * (leaf as f32 + 1.0)), "leaf {leaf}");
            }
        }
    }

    #[test]
    fn a_sum_that_fails_is_an_error() {
        for (concurrent, message) in [(true, 0), (true, 1), (true, 2), (false, 0)] {
            let error = reduced(concurrent, Some(message)).map(|_| ()).unwrap_err();
            assert!(error.to_string().contains("no link"), "{error}");
        }
    }
}
