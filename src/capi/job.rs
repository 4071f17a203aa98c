//! Runs in the background, for game loops and event loops.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::boundary::{
    Handle, HandleOut, ImagesOut, Poison, StructOut, ValueOut, boundary, handle_in, quietly, release, retain,
};
use super::error::{wst_error, wst_status};
use super::generate::{wst_generate_options, wst_progress};
use super::image::wst_image;
use super::model::wst_model;
use crate::error::{Error, Result};
use crate::pipeline::Job;

/// The longest single wait; a wait without end is many of them.
const LONGEST_WAIT: Duration = Duration::from_secs(3600);

/// A run in the background.
pub struct wst_job {
    job: Job,
    image_count: usize,
    /// The preview that the last poll lent out.
    lent: Mutex<Option<Arc<wst_image>>>,
    callback_thread: Arc<AtomicUsize>,
    model_poison: Poison,
    poison: Poison,
}

impl Handle for wst_job {
    fn poison(&self) -> Option<&Poison> {
        Some(&self.poison)
    }
}

/// A number for the thread that runs; never 0.
pub(super) fn this_thread() -> usize {
    // SAFETY: has no preconditions.
    unsafe { libc::pthread_self() as usize }
}

impl wst_job {
    /// Whether this is a callback of the job itself, which would wait for its own end.
    fn called_by_itself(&self) -> bool {
        self.callback_thread.load(Ordering::Acquire) == this_thread()
    }
}

/// Starts a run and returns at once. The options are copied: the job sees no later changes.
///
/// Owner: the caller frees `*out` with wst_job_free; the job keeps the model alive.
/// Threads: any; the progress callback comes on the job's thread.
/// Errors: WST_INVALID_ARGUMENT, WST_OUT_OF_MEMORY, WST_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_job_start(
    model: *const wst_model,
    options: *const wst_generate_options,
    out: *mut *mut wst_job,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        boundary("wst_job_start", error, HandleOut("out", out), |call| {
            let model = call.handle("model", model)?;
            let options = handle_in("options", options)?;
            let callback_thread = Arc::new(AtomicUsize::new(0));
            let marked = callback_thread.clone();
            let run = options.for_run(move |report| {
                marked.store(this_thread(), Ordering::Release);
                report();
                marked.store(0, Ordering::Release);
            })?;
            Ok(wst_job {
                job: Job::start(&model.model, &run)?,
                image_count: run.image_count(),
                lent: Mutex::new(None),
                callback_thread,
                model_poison: model.poison.clone(),
                poison: Poison::default(),
            })
        })
    }
}

/// Says where a job stands, without waiting. `*done` becomes 1 when it has ended, however it ended.
///
/// Owner: `out->preview` belongs to the job, until the next poll or its end; `out` is filled up to its `struct_size`.
/// Threads: one at a time per job.
/// Errors: WST_INVALID_ARGUMENT, WST_BUSY. How the run ended is what wst_job_images returns.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_job_poll(
    job: *mut wst_job,
    out: *mut wst_progress,
    done: *mut i32,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        boundary("wst_job_poll", error, (StructOut("out", out), ValueOut("done", done)), |call| {
            let job = call.handle("job", job)?;
            let Ok(mut lent) = job.lent.try_lock() else {
                return Err(Error::Busy { what: "job".into() });
            };
            let (progress, done) = job.job.poll();
            *lent = progress
                .as_ref()
                .and_then(|p| p.preview.clone())
                .map(|image| Arc::new(wst_image::new(image)));
            let progress =
                progress.map_or_else(wst_progress::start, |p| wst_progress::new(&p, lent.as_ref()));
            Ok((progress, i32::from(done)))
        })
    }
}

/// Waits until a job has ended, at most `timeout_seconds`; a negative or infinite time waits without limit. `*done`
/// becomes 1 when it has ended, however it ended.
///
/// Owner: nothing changes hands.
/// Threads: any, several at once; not the job's own callback, which gets WST_BUSY.
/// Errors: WST_INVALID_ARGUMENT, WST_BUSY. How the run ended is what wst_job_images returns.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_job_wait(
    job: *mut wst_job,
    timeout_seconds: f64,
    done: *mut i32,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        boundary("wst_job_wait", error, ValueOut("done", done), |call| {
            let job = call.handle("job", job)?;
            if timeout_seconds.is_nan() {
                return Err(Error::argument("timeout_seconds", "a number", timeout_seconds));
            }
            if job.called_by_itself() {
                return Err(Error::Busy { what: "job".into() });
            }
            wait(&job.job, timeout_seconds).map(i32::from)
        })
    }
}

fn wait(job: &Job, timeout_seconds: f64) -> Result<bool> {
    if timeout_seconds >= 0.0 && timeout_seconds <= LONGEST_WAIT.as_secs_f64() {
        return Ok(job.wait(Duration::from_secs_f64(timeout_seconds)));
    }
    let mut left = if timeout_seconds < 0.0 { f64::INFINITY } else { timeout_seconds };
    while left > 0.0 {
        if job.wait(LONGEST_WAIT.min(Duration::try_from_secs_f64(left).unwrap_or(LONGEST_WAIT))) {
            return Ok(true);
        }
        left -= LONGEST_WAIT.as_secs_f64();
    }
    Ok(false)
}

/// Asks a job to stop; it ends with WST_CANCELLED soon after. NULL is a no-op.
///
/// Owner: nothing changes hands.
/// Threads: any, callbacks too.
/// Errors: none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_job_cancel(job: *mut wst_job) {
    if !job.is_null() {
        // SAFETY: a live job, as the header asks.
        quietly((), || unsafe { retain(job) }.job.cancel());
    }
}

/// The images of a job that has ended. `image_count` must be wst_generate_options_image_count of its options. May
/// be called again.
///
/// Owner: the caller frees each of `images` with wst_image_free; all are NULL on failure.
/// Threads: any.
/// Errors: WST_BUSY while it runs; else what the run ended with, as wst_generate; WST_INVALID_ARGUMENT.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_job_images(
    job: *mut wst_job,
    images: *mut *mut wst_image,
    image_count: usize,
    error: *mut *mut wst_error,
) -> wst_status {
    let out = ImagesOut { images, count: image_count };
    // SAFETY: the pointers are NULL or as the header asks; `images` has `image_count` entries.
    unsafe {
        boundary("wst_job_images", error, &out, |call| {
            let job = call.handle("job", job)?;
            call.blame(&job.model_poison);
            out.expect(job.image_count)?;
            job.job.images()
        })
    }
}

/// Frees a job. One that runs is cancelled and waited for. NULL is a no-op. A job's own callback cannot free it:
/// there the call only cancels, and the job is to be freed elsewhere.
///
/// Owner: takes the job from the caller.
/// Threads: any but the job's own callback.
/// Errors: none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_job_free(job: *mut wst_job) {
    if job.is_null() {
        return;
    }
    quietly((), || {
        // SAFETY: a live job, as the header asks.
        let held = unsafe { retain(job) };
        held.job.cancel();
        if !held.called_by_itself() {
            // Waits here, so that no other call's reference is the last one on the job's own thread.
            while !held.job.wait(LONGEST_WAIT) {}
            // SAFETY: the caller's reference, which it gives up.
            unsafe { release(job) };
        }
    });
}
