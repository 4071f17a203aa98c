//! Pictures with captions, decoded ahead.

use std::sync::RwLock;

use super::batch::wst_batch;
use super::boundary::{
    Call, Handle, HandleOut, MaybeOut, Poison, Sized32, StructOut, ValueOut, boundary, handle_in, release,
};
use super::error::{wst_error, wst_status};
use super::lists::reserved;
use super::loader_options::wst_loader_options;
use super::trainer::{wst_train_metrics, wst_trainer};
use crate::error::{Error, Result};
use crate::image::Image;
use crate::training::data::{DataOptions, Loader};

/// A stream of batches, decoded ahead on threads of its own, in an order that is taken up again to the bit.
pub struct wst_loader {
    loader: RwLock<Loader>,
    options: DataOptions,
    poison: Poison,
}

impl Handle for wst_loader {
    fn poison(&self) -> Option<&Poison> {
        Some(&self.poison)
    }
}

impl wst_loader {
    /// For calls that move it on.
    fn exclusive<T>(&self, work: impl FnOnce(&mut Loader) -> Result<T>) -> Result<T> {
        let mut loader = self.loader.try_write().map_err(|_| busy())?;
        work(&mut loader)
    }

    /// For calls that only look.
    fn shared<T>(&self, work: impl FnOnce(&Loader) -> Result<T>) -> Result<T> {
        let loader = self.loader.try_read().map_err(|_| busy())?;
        work(&loader)
    }
}

fn busy() -> Error {
    Error::Busy { what: "loader".into() }
}

/// Where a loader stands and what it left out. Set `struct_size` to `sizeof(wst_loader_info_t)` before the call.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct wst_loader_info_t {
    /// The size that the caller was compiled with, in bytes.
    pub struct_size: u32,
    /// 0.
    pub reserved: u32,
    /// Epochs that are behind.
    pub epoch: u64,
    /// Skipped: the picture or the caption cannot be read.
    pub unreadable: u64,
    /// Skipped: kept out by their metadata.
    pub filtered: u64,
    /// Skipped: without a caption.
    pub no_caption: u64,
    /// Shards that are not whole, once for each time that one was looked through; the records before the damage are used.
    pub damaged_shards: u64,
}

// SAFETY: repr(C), starts with `struct_size`, 2 * 4 + 5 * 8 bytes without padding, numbers only.
unsafe impl Sized32 for wst_loader_info_t {
    const NAME: &'static str = "wst_loader_info_t";
    const FIRST_END: usize = 8;
}

/// Opens the data set and starts decoding, from the beginning.
///
/// Owner: the caller frees `*out` with wst_loader_free; the options are copied.
/// Threads: any.
/// Errors: WST_IO for a path that is not there; WST_FORMAT, naming the path, if there is nothing to train with;
/// WST_INVALID_ARGUMENT, WST_OUT_OF_MEMORY, WST_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_loader_open(
    options: *const wst_loader_options,
    out: *mut *mut wst_loader,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        boundary("wst_loader_open", error, HandleOut("out", out), |_| {
            let options = handle_in("options", options)?.for_loader()?;
            let loader = RwLock::new(Loader::new(&options)?);
            Ok(wst_loader { loader, options, poison: Poison::default() })
        })
    }
}

/// The next batch; `*out` is NULL after the last one of a single pass. Damaged records and those without a caption are
/// skipped and counted.
///
/// Owner: the caller frees `*out` with wst_batch_free.
/// Threads: one at a time per loader.
/// Errors: WST_FORMAT if no record of a whole epoch could be used; WST_IO, WST_INVALID_ARGUMENT, WST_OUT_OF_MEMORY,
/// WST_BUSY. After one of the data every call gives it again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_loader_next(
    loader: *mut wst_loader,
    out: *mut *mut wst_batch,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        boundary("wst_loader_next", error, MaybeOut(HandleOut("out", out)), |call| {
            let loader = call.handle("loader", loader)?;
            loader.exclusive(Loader::next_batch)?.map(wst_batch::new).transpose()
        })
    }
}

/// Goes on where the data stood when the checkpoint was saved that `trainer` loaded last; from the beginning if it holds
/// no such place. The loader needs the same data, seed, shuffling and rank as the one then: each rank resumes from a
/// checkpoint of its own.
///
/// Owner: nothing changes hands.
/// Threads: one at a time per loader, and not during a step of the trainer.
/// Errors: as wst_loader_open; WST_INVALID_ARGUMENT also for a place in other data.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_loader_resume(
    loader: *mut wst_loader,
    trainer: *const wst_trainer,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        boundary("wst_loader_resume", error, (), |call| {
            let loader = call.handle("loader", loader)?;
            let trainer = call.handle("trainer", trainer)?;
            loader.exclusive(|place| {
                *place = trainer.shared(call, |trainer| trainer.resume_loader(&loader.options))?;
                Ok(())
            })
        })
    }
}

/// Says where a loader stands and what it left out.
///
/// Owner: `out` is filled up to its `struct_size`.
/// Threads: any, several at once, but not during a call that takes a batch.
/// Errors: WST_INVALID_ARGUMENT, WST_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_loader_info(
    loader: *const wst_loader,
    out: *mut wst_loader_info_t,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        boundary("wst_loader_info", error, StructOut("out", out), |call| {
            let loader = call.handle("loader", loader)?;
            loader.shared(|loader| {
                let skipped = loader.skipped();
                Ok(wst_loader_info_t {
                    struct_size: size_of::<wst_loader_info_t>() as u32,
                    reserved: 0,
                    epoch: loader.position().epoch,
                    unreadable: skipped.unreadable,
                    filtered: skipped.filtered,
                    no_caption: skipped.no_caption,
                    damaged_shards: skipped.damaged_shards,
                })
            })
        })
    }
}

/// Frees a loader and ends its threads. NULL is a no-op.
///
/// Owner: takes the loader from the caller; its batches stay.
/// Threads: any.
/// Errors: none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_loader_free(loader: *mut wst_loader) {
    // SAFETY: NULL or a live loader, as the header asks.
    unsafe { release(loader) }
}

/// One step over the loader's next batch. Checkpoints then hold where the loader stands. `*end` becomes 1, without a
/// step, after the last batch of a single pass.
///
/// Owner: nothing changes hands; `out` is filled up to its `struct_size`.
/// Threads: one at a time per trainer and per loader.
/// Errors: as wst_loader_next and wst_trainer_step. A batch whose step failed is not given again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_trainer_step_from(
    trainer: *mut wst_trainer,
    loader: *mut wst_loader,
    out: *mut wst_train_metrics,
    end: *mut i32,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        boundary("wst_trainer_step_from", error, (StructOut("out", out), ValueOut("end", end)), |call| {
            let trainer = call.handle("trainer", trainer)?;
            let loader = call.handle("loader", loader)?;
            let metrics = loader.exclusive(|loader| step_from(call, &trainer, loader))?;
            Ok(metrics.map_or((wst_train_metrics::none(), 1), |metrics| (metrics, 0)))
        })
    }
}

fn step_from(call: &Call, trainer: &wst_trainer, loader: &mut Loader) -> Result<Option<wst_train_metrics>> {
    trainer.exclusive(call, |state| {
        let Some(batch) = loader.next_batch()? else { return Ok(None) };
        let mut images: Vec<&Image> = reserved("a batch", batch.images.len())?;
        images.extend(&batch.images);
        let mut captions: Vec<&str> = reserved("a batch", batch.captions.len())?;
        captions.extend(batch.captions.iter().map(String::as_str));
        let metrics = state.step(|trainer| trainer.step(&images, &captions))?;
        state.trainer.follow(loader)?;
        Ok(Some(metrics.into()))
    })
}

/// Lets checkpoints of `trainer` hold where `loader` stands now, for steps over batches that wst_loader_next gave.
///
/// Owner: nothing changes hands.
/// Threads: one at a time per trainer.
/// Errors: WST_INVALID_ARGUMENT, WST_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_trainer_follow(
    trainer: *mut wst_trainer,
    loader: *const wst_loader,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        boundary("wst_trainer_follow", error, (), |call| {
            let trainer = call.handle("trainer", trainer)?;
            let loader = handle_in("loader", loader)?;
            trainer.exclusive(call, |state| loader.shared(|loader| state.trainer.follow(loader)))
        })
    }
}
