//! A stage of a model in training.

use std::ffi::{c_char, c_void};
use std::sync::{Arc, PoisonError, RwLock};

use super::boundary::{
    Call, Callback, Handle, HandleOut, Poison, Sized32, StructOut, boundary, handle_in, path_in, quietly,
    release, retain, slice_in, text_in,
};
use super::error::{wst_error, wst_status};
use super::host_reduce::{HostReduce, SumFunction};
use super::image::wst_image;
use super::lists::{texts_in, with_images};
use super::model::{TEST_PANIC, wst_model};
use super::samples::wst_samples;
use super::train_options::wst_train_options;
use crate::device::CancelToken;
use crate::device::threads::run_apart;
use crate::error::{Error, Result};
use crate::training::{TrainMetrics, Trainer};

/// What one step showed. Set `struct_size` to `sizeof(wst_train_metrics)` before the call.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct wst_train_metrics {
    /// The size that the caller was compiled with, in bytes.
    pub struct_size: u32,
    /// 1: the loss or a gradient was not finite, and nothing was changed.
    pub skipped: i32,
    /// The number of the step, counted from 1.
    pub step: u64,
    /// Of the whole batch, over all ranks, before the update.
    pub loss: f32,
    /// The norm of all gradients together, before clipping.
    pub grad_norm: f32,
    /// The learning rate of this step.
    pub learning_rate: f32,
    /// Stage B: the share of tokens that were found. A pair: the share of texts. 0 elsewhere.
    pub token_accuracy: f32,
}

// SAFETY: repr(C), starts with `struct_size`, 2 * 4 + 8 + 4 * 4 bytes without padding, numbers only.
unsafe impl Sized32 for wst_train_metrics {
    const NAME: &'static str = "wst_train_metrics";
    const FIRST_END: usize = 8;
}

impl wst_train_metrics {
    /// Of no step.
    pub(super) fn none() -> Self {
        TrainMetrics::default().into()
    }
}

impl From<TrainMetrics> for wst_train_metrics {
    fn from(metrics: TrainMetrics) -> Self {
        wst_train_metrics {
            struct_size: size_of::<wst_train_metrics>() as u32,
            skipped: i32::from(metrics.skipped),
            step: metrics.step,
            loss: metrics.loss,
            grad_norm: metrics.grad_norm,
            learning_rate: metrics.learning_rate,
            token_accuracy: metrics.accuracy,
        }
    }
}

/// Where training stands. Set `struct_size` to `sizeof(wst_train_progress)` before the call.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct wst_train_progress {
    /// The size that the caller was compiled with, in bytes.
    pub struct_size: u32,
    /// 0.
    pub reserved: u32,
    /// Steps taken, skipped ones included.
    pub step: u64,
    /// Steps that changed nothing, since a loss or gradient was not finite.
    pub skipped: u64,
    /// Samples seen by all ranks together.
    pub samples: u64,
}

// SAFETY: repr(C), starts with `struct_size`, 2 * 4 + 3 * 8 bytes without padding, numbers only.
unsafe impl Sized32 for wst_train_progress {
    const NAME: &'static str = "wst_train_progress";
    const FIRST_END: usize = 8;
}

/// Puts in the place of each of `count` numbers its sum over all ranks, the same bits in each. `is_double`: 1 for
/// double, 0 for float. All ranks make the same calls in the same order. It must not unwind (C++: not throw, Go:
/// recover).
///
/// Owner: `values` is valid during the call.
/// Threads: called on the thread that called the step.
/// Errors: anything but 0 ends the step with WST_IO, and nothing has changed.
pub type wst_sum_fn = Option<
    unsafe extern "C" fn(values: *mut c_void, count: usize, is_double: i32, user_data: *mut c_void) -> i32,
>;

/// A stage of a model in training. The model itself is not changed: wst_trainer_export writes another.
pub struct wst_trainer {
    /// Nothing once it was freed.
    state: RwLock<Option<State>>,
    /// Apart from the state, which a running step holds.
    cancel: CancelToken,
    reduce: RwLock<Option<Arc<HostReduce>>>,
    base_poison: Poison,
    poison: Poison,
}

/// A trainer and what this layer adds to its steps.
pub(super) struct State {
    pub(super) trainer: Trainer,
    reduce: Option<Arc<HostReduce>>,
    panics: bool,
}

impl Handle for wst_trainer {
    fn poison(&self) -> Option<&Poison> {
        Some(&self.poison)
    }
}

impl wst_trainer {
    /// For calls that change it.
    pub(super) fn exclusive<T>(&self, call: &Call, work: impl FnOnce(&mut State) -> Result<T>) -> Result<T> {
        call.blame(&self.base_poison);
        let mut state = self.state.try_write().map_err(|_| busy())?;
        work(state.as_mut().ok_or(Error::Cancelled)?)
    }

    /// For calls that only read it.
    pub(super) fn shared<T>(&self, call: &Call, work: impl FnOnce(&Trainer) -> Result<T>) -> Result<T> {
        call.blame(&self.base_poison);
        let state = self.state.try_read().map_err(|_| busy())?;
        work(&state.as_ref().ok_or(Error::Cancelled)?.trainer)
    }

    /// Whether this is the function that sums over ranks, which would wait for its own end.
    fn called_by_itself(&self) -> bool {
        let reduce = self.reduce.read().unwrap_or_else(PoisonError::into_inner);
        reduce.as_ref().is_some_and(|reduce| reduce.called_by_itself())
    }
}

impl State {
    /// Takes a step, with sums over ranks made on this thread.
    pub(super) fn step(
        &mut self,
        step: impl FnOnce(&mut Trainer) -> Result<TrainMetrics> + Send,
    ) -> Result<TrainMetrics> {
        if self.panics {
            #[allow(clippy::panic)]
            return run_apart(|| panic!("asked for by the option {TEST_PANIC}"));
        }
        let trainer = &mut self.trainer;
        match &self.reduce {
            None => step(trainer),
            Some(reduce) => reduce.serve(|| step(trainer)),
        }
    }
}

fn busy() -> Error {
    Error::Busy { what: "trainer".into() }
}

/// Begins training the options' stage of `base`, from its weights. The trainer holds the weights in training as
/// WST_F32, with two more numbers for each from the first step on, and their average.
///
/// Owner: the caller frees `*out` with wst_trainer_free; it keeps the model alive and copies the options.
/// Threads: any.
/// Errors: WST_INVALID_ARGUMENT; WST_UNSUPPORTED if the model lacks a part that the stage learns from; WST_IO and
/// WST_FORMAT for files that the options name; WST_OUT_OF_MEMORY, WST_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_trainer_new(
    base: *const wst_model,
    options: *const wst_train_options,
    out: *mut *mut wst_trainer,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        boundary("wst_trainer_new", error, HandleOut("out", out), |call| {
            let base = call.handle("base", base)?;
            let chosen = handle_in("options", options)?.for_trainer()?;
            let trainer = Trainer::new(&base.model, &chosen.options)?;
            Ok(wst_trainer {
                cancel: trainer.cancel_token(),
                state: RwLock::new(Some(State { trainer, reduce: None, panics: chosen.panics })),
                reduce: RwLock::new(None),
                base_poison: base.poison.clone(),
                poison: Poison::default(),
            })
        })
    }
}

/// Joins the other processes that train the same stage with the same options, `ranks` of them in all, each on its own
/// part of every batch, all parts of one size: the library calls `sum` for gradients and statistics. To be called
/// before the first step. 1 of `ranks` is training alone again, and needs no `sum`.
///
/// Owner: the caller keeps `user_data` alive until the trainer is freed or given another function.
/// Threads: one at a time per trainer; `sum` is called on the thread that calls a step.
/// Errors: WST_INVALID_ARGUMENT, WST_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_trainer_set_reduce(
    trainer: *mut wst_trainer,
    rank: u32,
    ranks: u32,
    sum: wst_sum_fn,
    user_data: *mut c_void,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        boundary("wst_trainer_set_reduce", error, (), |call| {
            let trainer = call.handle("trainer", trainer)?;
            trainer.exclusive(call, |state| {
                let reduce = joined(rank, ranks, sum.map(|function| Callback { function, user_data }))?;
                state.trainer.set_reduce(reduce.clone());
                state.reduce = (ranks > 1).then_some(reduce);
                *trainer.reduce.write().unwrap_or_else(PoisonError::into_inner) = state.reduce.clone();
                Ok(())
            })
        })
    }
}

fn joined(rank: u32, ranks: u32, sum: Option<Callback<SumFunction>>) -> Result<Arc<HostReduce>> {
    /// What a function that is never called is.
    unsafe extern "C" fn alone(_: *mut c_void, _: usize, _: i32, _: *mut c_void) -> i32 {
        0
    }
    if ranks == 0 {
        return Err(Error::argument("ranks", "at least 1", ranks));
    }
    if rank >= ranks {
        return Err(Error::argument("rank", format!("less than ranks, {ranks}"), rank));
    }
    let none = Callback { function: alone as SumFunction, user_data: std::ptr::null_mut() };
    let sum = match sum {
        Some(sum) => sum,
        None if ranks == 1 => none,
        None => return Err(Error::argument("sum", "a function", "NULL")),
    };
    Ok(Arc::new(HostReduce::new(rank as usize, ranks as usize, sum)))
}

/// One step of the optimiser over `count` pictures of one size and their captions. Everything that a frozen network
/// makes of them is made anew in every call; wst_trainer_prepare keeps it. A loss or gradient that is not finite skips
/// the step.
///
/// Owner: nothing changes hands; `out` is filled up to its `struct_size`.
/// Threads: one at a time per trainer.
/// Errors: WST_INVALID_ARGUMENT, WST_OUT_OF_MEMORY, WST_DEVICE, WST_CANCELLED, WST_IO from the sum over ranks, WST_BUSY;
/// after each of them nothing has changed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_trainer_step(
    trainer: *mut wst_trainer,
    images: *const *const wst_image,
    captions: *const *const c_char,
    count: usize,
    out: *mut wst_train_metrics,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks; `images` and `captions` have `count` entries.
    unsafe {
        boundary("wst_trainer_step", error, StructOut("out", out), |call| {
            let trainer = call.handle("trainer", trainer)?;
            let captions = texts_in("captions", captions, count)?;
            with_images(images, count, |images| {
                trainer
                    .exclusive(call, |state| state.step(|trainer| trainer.step(images, &captions)))
                    .map(wst_train_metrics::from)
            })
        })
    }
}

/// Makes of `count` pictures of one size and their captions what stays the same from epoch to epoch: latents and
/// tokens of frozen networks, resized pixels. Steps over samples save that work. They serve any trainer of the same
/// model and options.
///
/// Owner: the caller frees `*out` with wst_samples_free.
/// Threads: any, several at once per trainer, but not during a step.
/// Errors: WST_INVALID_ARGUMENT, WST_OUT_OF_MEMORY, WST_DEVICE, WST_CANCELLED, WST_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_trainer_prepare(
    trainer: *const wst_trainer,
    images: *const *const wst_image,
    captions: *const *const c_char,
    count: usize,
    out: *mut *mut wst_samples,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks; `images` and `captions` have `count` entries.
    unsafe {
        boundary("wst_trainer_prepare", error, HandleOut("out", out), |call| {
            let trainer = call.handle("trainer", trainer)?;
            let captions = texts_in("captions", captions, count)?;
            with_images(images, count, |images| {
                trainer.shared(call, |trainer| trainer.prepare(images, &captions)).map(wst_samples::new)
            })
        })
    }
}

/// Gives sample number `index` another caption; its picture is not looked at again.
///
/// Owner: `caption` is copied.
/// Threads: one at a time per `samples`, and not during a step of the trainer.
/// Errors: WST_INVALID_ARGUMENT, WST_OUT_OF_MEMORY, WST_CANCELLED, WST_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_trainer_recaption(
    trainer: *const wst_trainer,
    samples: *mut wst_samples,
    index: usize,
    caption: *const c_char,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        boundary("wst_trainer_recaption", error, (), |call| {
            let trainer = call.handle("trainer", trainer)?;
            let samples = call.handle("samples", samples)?;
            let caption = text_in("caption", caption)?;
            trainer.shared(call, |trainer| samples.change(index, |sample| trainer.recaption(sample, caption)))
        })
    }
}

/// One step of the optimiser over prepared samples, picked by their numbers; a `count` of 0 takes all, in order.
///
/// Owner: nothing changes hands; `out` is filled up to its `struct_size`.
/// Threads: one at a time per trainer; `samples` may be used by several, but not changed meanwhile.
/// Errors: as wst_trainer_step; WST_INVALID_ARGUMENT also for samples that another stage prepared.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_trainer_step_samples(
    trainer: *mut wst_trainer,
    samples: *const wst_samples,
    indices: *const usize,
    count: usize,
    out: *mut wst_train_metrics,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks; `indices` has `count` entries.
    unsafe {
        boundary("wst_trainer_step_samples", error, StructOut("out", out), |call| {
            let trainer = call.handle("trainer", trainer)?;
            let samples = handle_in("samples", samples)?;
            let indices = slice_in(("indices", indices), ("count", count))?;
            samples.with(indices, |samples| {
                trainer
                    .exclusive(call, |state| state.step(|trainer| trainer.step_over(samples)))
                    .map(wst_train_metrics::from)
            })
        })
    }
}

/// Says where training stands.
///
/// Owner: `out` is filled up to its `struct_size`.
/// Threads: any, several at once, but not during a step.
/// Errors: WST_INVALID_ARGUMENT, WST_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_trainer_progress(
    trainer: *const wst_trainer,
    out: *mut wst_train_progress,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        boundary("wst_trainer_progress", error, StructOut("out", out), |call| {
            let trainer = call.handle("trainer", trainer)?;
            let progress = trainer.shared(call, |trainer| Ok(trainer.progress()))?;
            Ok(wst_train_progress {
                struct_size: size_of::<wst_train_progress>() as u32,
                reserved: 0,
                step: progress.step,
                skipped: progress.skipped,
                samples: progress.samples,
            })
        })
    }
}

/// Writes a checkpoint: everything that the next step depends on, with where the data loader stands if steps came from
/// one. The folder is replaced as a whole: a crash or an error at any moment leaves the old checkpoint or the new one.
///
/// Owner: nothing changes hands.
/// Threads: one at a time per trainer.
/// Errors: WST_INVALID_ARGUMENT, WST_IO, WST_OUT_OF_MEMORY, WST_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_trainer_save(
    trainer: *mut wst_trainer,
    directory: *const c_char,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        boundary("wst_trainer_save", error, (), |call| {
            let trainer = call.handle("trainer", trainer)?;
            let directory = path_in("directory", directory)?;
            trainer.exclusive(call, |state| state.trainer.save(directory))
        })
    }
}

/// Takes up a checkpoint of the same stage and model: with the same options and batches, the steps that follow are those
/// that would have followed the save, bit for bit on the same device.
///
/// Owner: nothing changes hands.
/// Threads: one at a time per trainer.
/// Errors: WST_INVALID_ARGUMENT, WST_IO, WST_OUT_OF_MEMORY, WST_BUSY; WST_FORMAT, naming the file and the tensor or
/// field, for a checkpoint of something else. After an error the trainer is as it was.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_trainer_load(
    trainer: *mut wst_trainer,
    directory: *const c_char,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        boundary("wst_trainer_load", error, (), |call| {
            let trainer = call.handle("trainer", trainer)?;
            let directory = path_in("directory", directory)?;
            trainer.exclusive(call, |state| state.trainer.load(directory))
        })
    }
}

/// Writes the model with the averaged weights of what was trained, as a folder that wst_model_open takes; before the
/// average has followed a step, with the weights themselves. Everything else is copied from the model that training
/// began with. The folder is replaced as a whole.
///
/// Owner: nothing changes hands.
/// Threads: any, several at once, but not during a step.
/// Errors: WST_INVALID_ARGUMENT, WST_IO, WST_UNSUPPORTED, WST_OUT_OF_MEMORY, WST_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_trainer_export(
    trainer: *const wst_trainer,
    model_directory: *const c_char,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        boundary("wst_trainer_export", error, (), |call| {
            let trainer = call.handle("trainer", trainer)?;
            let directory = path_in("model_directory", model_directory)?;
            trainer.shared(call, |trainer| trainer.export(directory))
        })
    }
}

/// Writes the averaged adapter that is trained with the option "lora_rank", in diffusers' format: to `path` if that ends
/// in .safetensors, else to pytorch_lora_weights.safetensors in the folder `path`. wst_model_options_add_lora and
/// wst_model_merge_adapter take it; wst_trainer_export writes the model with the adapter added.
///
/// Owner: nothing changes hands.
/// Threads: any, several at once, but not during a step.
/// Errors: WST_INVALID_ARGUMENT, WST_IO, WST_UNSUPPORTED if no adapter is trained, WST_OUT_OF_MEMORY, WST_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_trainer_save_adapter(
    trainer: *const wst_trainer,
    path: *const c_char,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        boundary("wst_trainer_save_adapter", error, (), |call| {
            let trainer = call.handle("trainer", trainer)?;
            let path = path_in("path", path)?;
            trainer.shared(call, |trainer| trainer.save_adapter(path).map(drop))
        })
    }
}

/// Frees a trainer. A step that runs on another thread is cancelled, ends with WST_CANCELLED, and is waited for. NULL is
/// a no-op. The function that sums over ranks cannot free the trainer that called it: there the call only cancels, and
/// the trainer is to be freed elsewhere.
///
/// Owner: takes the trainer from the caller.
/// Threads: any.
/// Errors: none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_trainer_free(trainer: *mut wst_trainer) {
    if trainer.is_null() {
        return;
    }
    quietly((), || {
        // SAFETY: a live trainer, as the header asks.
        let held = unsafe { retain(trainer) };
        held.cancel.cancel();
        if !held.called_by_itself() {
            // Waits for what runs, and ends it here rather than on the thread of the last call.
            drop(held.state.write().unwrap_or_else(PoisonError::into_inner).take());
            // SAFETY: the caller's reference, which it gives up.
            unsafe { release(trainer) };
        }
    });
}
