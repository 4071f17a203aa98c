//! A generation on a thread of its own: started without waiting, polled, waited for, cancelled.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::generate_options::GenerateOptions;
use super::model::Model;
use super::options::Progress;
use crate::device::CancelToken;
use crate::device::threads::{Thread, panic_error};
use crate::error::{Error, Result};
use crate::image::Image;

/// A running or finished generation. Dropping it cancels and waits.
pub struct Job {
    state: Arc<State>,
    cancel: CancelToken,
    /// Joined by its own drop, after ours has asked it to stop.
    thread: Option<Thread>,
}

#[derive(Default)]
struct State {
    inner: Mutex<Inner>,
    changed: Condvar,
}

#[derive(Default)]
struct Inner {
    latest: Option<Progress>,
    outcome: Option<Result<Vec<Image>>>,
    done: bool,
}

impl State {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, inner: MutexGuard<'a, Inner>) -> MutexGuard<'a, Inner> {
        self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner)
    }

    fn report(&self, progress: &Progress) {
        self.lock().latest = Some(progress.clone());
    }

    fn finish(&self, outcome: Result<Vec<Image>>) {
        let mut inner = self.lock();
        inner.outcome = Some(outcome);
        inner.done = true;
        drop(inner);
        self.changed.notify_all();
    }
}

impl Job {
    /// Starts generating. Progress is reported on the job's own thread.
    ///
    /// # Errors
    /// `InvalidArgument` if the options belong to another model or lack a prompt; `OutOfMemory` if no thread
    /// can be started.
    pub fn start(model: &Model, options: &GenerateOptions) -> Result<Self> {
        model.check_options(options)?;
        let state = Arc::new(State::default());
        let cancel = CancelToken::new();
        let (shared, token) = (state.clone(), cancel.clone());
        let (model, options) = (model.clone(), options.clone());
        let thread = Thread::start(move || {
            let report = |progress: &Progress| {
                shared.report(progress);
                if let Some(listen) = &options.progress {
                    listen(progress);
                }
            };
            let work = std::panic::AssertUnwindSafe(|| model.run_generation(&options, &token, &report));
            let outcome = std::panic::catch_unwind(work)
                .unwrap_or_else(|payload| Err(panic_error("a generation", payload)));
            // The last user of the model may be this thread: let go of it before anybody hears of the end.
            drop((options, model));
            shared.finish(outcome);
        })?;
        Ok(Job { state, cancel, thread: Some(thread) })
    }

    /// The latest report, if there was one, and whether the job is done.
    pub fn poll(&self) -> (Option<Progress>, bool) {
        let inner = self.state.lock();
        (inner.latest.clone(), inner.done)
    }

    /// Waits until the job is done or the time is up; says whether it is done.
    pub fn wait(&self, timeout: Duration) -> bool {
        let deadline = Instant::now().checked_add(timeout);
        let mut inner = self.state.lock();
        while !inner.done {
            let Some(deadline) = deadline else {
                inner = self.state.wait(inner);
                continue;
            };
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let waited = self.state.changed.wait_timeout(inner, left);
            inner = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        inner.done
    }

    /// Asks the job to stop; it then ends with `Cancelled`.
    pub fn cancel(&self) {
        self.cancel.cancel();
    }

    /// The pictures of a finished job.
    ///
    /// # Errors
    /// `Busy` while it runs; what the generation failed with.
    pub fn images(&self) -> Result<Vec<Image>> {
        match &self.state.lock().outcome {
            None => Err(Error::Busy { what: "the job".into() }),
            Some(Ok(images)) => Ok(images.clone()),
            Some(Err(error)) => Err(error.duplicate()),
        }
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        self.cancel.cancel();
        self.thread.take();
    }
}
