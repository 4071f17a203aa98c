//! A generation on a thread of its own: started without waiting, polled, waited for, cancelled.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::generate_options::GenerateOptions;
use super::model::Model;
use super::options::{Progress, ProgressFn};
use crate::device::CancelToken;
use crate::device::reserve::Reserve;
use crate::device::threads::{Thread, panic_error};
use crate::error::{Error, Result};
use crate::image::Image;

/// A running or finished generation. Dropping it cancels and waits.
pub struct Job {
    state: Arc<State>,
    cancel: CancelToken,
    /// Joined by its own drop, after ours has asked it to stop.
    thread: Option<Thread>,
    /// What the thread runs under, to its very end.
    _reserve: Arc<Reserve>,
}

#[derive(Default)]
struct State {
    inner: Mutex<Inner>,
    changed: Condvar,
}

#[derive(Default)]
struct Inner {
    latest: Option<Progress>,
    /// Reports for a caller that waits and listens on its own thread.
    unheard: VecDeque<Progress>,
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

    fn report(&self, progress: &Progress, keep: bool) {
        let mut inner = self.lock();
        if keep {
            inner.unheard.push_back(progress.clone());
        }
        inner.latest = Some(progress.clone());
        drop(inner);
        self.changed.notify_all();
    }

    fn finish(&self, outcome: Result<Vec<Image>>) {
        let mut inner = self.lock();
        inner.outcome = Some(outcome);
        inner.done = true;
        drop(inner);
        self.changed.notify_all();
    }
}

/// Where progress reports are heard.
enum Listener {
    /// On the job's thread.
    Own(Option<ProgressFn>),
    /// On the thread that waits, which takes them from the queue.
    Waiting,
}

impl Job {
    /// Starts generating. Progress is reported on the job's own thread.
    ///
    /// # Errors
    /// `InvalidArgument` if the options belong to another model or lack a prompt; `OutOfMemory` if no thread
    /// can be started.
    pub fn start(model: &Model, options: &GenerateOptions) -> Result<Self> {
        Self::start_with(model, options, Listener::Own(options.progress.clone()))
    }

    fn start_with(model: &Model, options: &GenerateOptions, listener: Listener) -> Result<Self> {
        model.check_options(options)?;
        let state = Arc::new(State::default());
        let cancel = CancelToken::new();
        let (shared, token) = (state.clone(), cancel.clone());
        let (model, options) = (model.clone(), options.clone());
        let reserve = Arc::new(Reserve::new("a generation", super::LISTS_BYTES)?);
        let at_hand = reserve.clone();
        let thread = Thread::start(move || {
            let report = |progress: &Progress| {
                shared.report(progress, matches!(listener, Listener::Waiting));
                if let Listener::Own(Some(listen)) = &listener {
                    listen(progress);
                }
            };
            let work = std::panic::AssertUnwindSafe(|| {
                at_hand.guard(|| model.run_generation(&options, &token, &report))
            });
            let outcome = std::panic::catch_unwind(work)
                .unwrap_or_else(|payload| Err(panic_error("a generation", payload)));
            // The last user of the model may be this thread: let go of it before anybody hears of the end.
            drop((options, model));
            shared.finish(outcome);
        })?;
        Ok(Job { state, cancel, thread: Some(thread), _reserve: reserve })
    }

    /// Generates while the calling thread waits and hears the progress.
    pub(super) fn run(model: &Model, options: &GenerateOptions) -> Result<Vec<Image>> {
        let listener = match &options.progress {
            Some(_) => Listener::Waiting,
            None => Listener::Own(None),
        };
        let job = Self::start_with(model, options, listener)?;
        let mut inner = job.state.lock();
        loop {
            while let Some(progress) = inner.unheard.pop_front() {
                drop(inner);
                if let Some(listen) = &options.progress {
                    listen(&progress);
                }
                inner = job.state.lock();
            }
            if inner.done {
                drop(inner);
                return job.images();
            }
            inner = job.state.wait(inner);
        }
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
