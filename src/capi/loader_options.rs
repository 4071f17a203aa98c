//! Which pictures and captions a loader gives, and how.

use std::ffi::{c_char, c_void};
use std::sync::{Arc, RwLock};

use super::boundary::{Callback, Handle, HandleOut, Poison, boundary, enum_in, path_in, release, text_in};
use super::error::{c_text, wst_error, wst_status};
use super::hook;
use super::model::{LogFunction, WST_LOG_WARNING, wst_log_fn};
use crate::error::{Error, Result};
use crate::training::data::{Crop, DataOptions, Passes, Shuffle, Skip};

/// Which square of a picture that is not one is kept.
pub type wst_crop = i32;

/// The middle.
pub const WST_CROP_CENTRE: wst_crop = 0;
/// Any, each as likely.
pub const WST_CROP_RANDOM: wst_crop = 1;

const CROPS: &[(&str, Crop)] = &[("WST_CROP_CENTRE", Crop::Centre), ("WST_CROP_RANDOM", Crop::Random)];

/// How often the data are gone through.
pub type wst_passes = i32;

/// Once; the last batch may be smaller.
pub const WST_PASSES_ONE: wst_passes = 0;
/// Again and again. Batches are always full: one may hold the end of an epoch and the start of the next.
pub const WST_PASSES_ENDLESS: wst_passes = 1;

const PASSES: &[(&str, Passes)] = &[("WST_PASSES_ONE", Passes::One), ("WST_PASSES_ENDLESS", Passes::Endless)];

/// Which pictures and captions a loader gives, and how. Exclusive while it is being set; a loader has its own copy.
pub struct wst_loader_options {
    options: RwLock<DataOptions>,
    poison: Poison,
}

impl Handle for wst_loader_options {
    fn poison(&self) -> Option<&Poison> {
        Some(&self.poison)
    }
}

impl wst_loader_options {
    /// A copy for one loader.
    pub(super) fn for_loader(&self) -> Result<DataOptions> {
        Ok(self.options.try_read().map_err(|_| busy())?.clone())
    }
}

/// New options for everything at `path`: a folder of pictures (PNG, JPEG, WebP), each with its caption in a .txt file of
/// the same name beside it; a folder with captions.jsonl or metadata.jsonl, as Hugging Face's imagefolder has it;
/// WebDataset shards, a .tar file, a folder of them, or a pattern such as "shards/{00000..00012}.tar". They start as:
/// squares of 512 pixels cut at random, not mirrored, in batches of 16, shuffled with seed 0, endless.
///
/// Owner: the caller frees `*out` with wst_loader_options_free.
/// Threads: any.
/// Errors: WST_INVALID_ARGUMENT, WST_OUT_OF_MEMORY. The path is looked at by wst_loader_open.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_loader_options_new(
    path: *const c_char,
    out: *mut *mut wst_loader_options,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        boundary("wst_loader_options_new", error, HandleOut("out", out), |_| {
            let options = RwLock::new(DataOptions::new(path_in("path", path)?));
            Ok(wst_loader_options { options, poison: Poison::default() })
        })
    }
}

/// Changes options that nobody else uses now.
///
/// # Safety
/// `options` is NULL or live, `error` NULL or writable.
unsafe fn change(
    place: &'static str,
    options: *mut wst_loader_options,
    error: *mut *mut wst_error,
    change: impl FnOnce(&mut DataOptions) -> Result<()>,
) -> wst_status {
    // SAFETY: as the caller of this function promises.
    unsafe {
        boundary(place, error, (), |call| {
            let options = call.handle("options", options)?;
            let Ok(mut inner) = options.options.try_write() else { return Err(busy()) };
            change(&mut inner)
        })
    }
}

fn busy() -> Error {
    Error::Busy { what: "options".into() }
}

/// Adds a path of the same kind as the first: folders or shards. All together are one data set.
///
/// Owner: `path` is copied.
/// Threads: one at a time per options.
/// Errors: WST_INVALID_ARGUMENT, WST_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_loader_options_add_path(
    options: *mut wst_loader_options,
    path: *const c_char,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        change("wst_loader_options_add_path", options, error, |o| {
            o.add_path(path_in("path", path)?);
            Ok(())
        })
    }
}

/// The side of the pictures in pixels, 1 to 4096: each is resized, bicubic and antialiased, so that its shorter side has
/// this many, and then cut to a square.
///
/// Owner: nothing changes hands.
/// Threads: one at a time per options.
/// Errors: WST_INVALID_ARGUMENT, WST_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_loader_options_set_side(
    options: *mut wst_loader_options,
    side: u32,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe { change("wst_loader_options_set_side", options, error, |o| o.set_side(side)) }
}

/// Which square of a picture is kept.
///
/// Owner: nothing changes hands.
/// Threads: one at a time per options.
/// Errors: WST_INVALID_ARGUMENT, WST_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_loader_options_set_crop(
    options: *mut wst_loader_options,
    crop: wst_crop,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        change("wst_loader_options_set_crop", options, error, |o| {
            o.set_crop(enum_in("crop", crop, CROPS)?);
            Ok(())
        })
    }
}

/// How likely a picture is mirrored, left to right, 0 to 1.
///
/// Owner: nothing changes hands.
/// Threads: one at a time per options.
/// Errors: WST_INVALID_ARGUMENT, WST_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_loader_options_set_flip(
    options: *mut wst_loader_options,
    probability: f32,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe { change("wst_loader_options_set_flip", options, error, |o| o.set_flip(probability)) }
}

/// Pictures per batch, 1 to 65536.
///
/// Owner: nothing changes hands.
/// Threads: one at a time per options.
/// Errors: WST_INVALID_ARGUMENT, WST_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_loader_options_set_batch_size(
    options: *mut wst_loader_options,
    pictures: u32,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        change("wst_loader_options_set_batch_size", options, error, |o| o.set_batch_size(pictures as usize))
    }
}

/// How many records of shards are put into an order of chance together, rounded up to whole shards; 10000 by default.
/// 0: everything comes in its own order. Folders are shuffled as a whole, whatever the number.
///
/// Owner: nothing changes hands.
/// Threads: one at a time per options.
/// Errors: WST_INVALID_ARGUMENT, WST_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_loader_options_set_shuffle(
    options: *mut wst_loader_options,
    buffer: u32,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        change("wst_loader_options_set_shuffle", options, error, |o| {
            if buffer == 0 {
                o.set_shuffle(Shuffle::Off);
                return Ok(());
            }
            o.set_shuffle_buffer(buffer as usize)?;
            o.set_shuffle(Shuffle::On);
            Ok(())
        })
    }
}

/// What order, crops and flips follow from; 0 by default. The same for all ranks.
///
/// Owner: nothing changes hands.
/// Threads: one at a time per options.
/// Errors: WST_INVALID_ARGUMENT, WST_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_loader_options_set_seed(
    options: *mut wst_loader_options,
    seed: u64,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        change("wst_loader_options_set_seed", options, error, |o| {
            o.set_seed(seed);
            Ok(())
        })
    }
}

/// How often the data are gone through; WST_PASSES_ENDLESS by default.
///
/// Owner: nothing changes hands.
/// Threads: one at a time per options.
/// Errors: WST_INVALID_ARGUMENT, WST_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_loader_options_set_passes(
    options: *mut wst_loader_options,
    passes: wst_passes,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        change("wst_loader_options_set_passes", options, error, |o| {
            o.set_passes(enum_in("passes", passes, PASSES)?);
            Ok(())
        })
    }
}

/// Threads that read and decode, 1 to 256; 2 by default. They change no batch.
///
/// Owner: nothing changes hands.
/// Threads: one at a time per options.
/// Errors: WST_INVALID_ARGUMENT, WST_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_loader_options_set_threads(
    options: *mut wst_loader_options,
    threads: u32,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe { change("wst_loader_options_set_threads", options, error, |o| o.set_threads(threads as usize)) }
}

/// Which share of the records this loader gives, for training in several processes: number `rank` of `ranks` disjoint
/// ones that together are everything.
///
/// Owner: nothing changes hands.
/// Threads: one at a time per options.
/// Errors: WST_INVALID_ARGUMENT, WST_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_loader_options_set_rank(
    options: *mut wst_loader_options,
    rank: u32,
    ranks: u32,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        change("wst_loader_options_set_rank", options, error, |o| o.set_rank(rank as usize, ranks as usize))
    }
}

/// Tells `fn`, as warnings, of every record that is skipped and why; NULL: nobody (default). It must not free the loader.
///
/// Owner: the caller keeps `user_data` alive until the loaders with these options are freed.
/// Threads: one at a time per options; `fn` is called on the thread that asks for a batch or steps from the loader.
/// Errors: WST_INVALID_ARGUMENT, WST_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_loader_options_set_log(
    options: *mut wst_loader_options,
    r#fn: wst_log_fn,
    user_data: *mut c_void,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        change("wst_loader_options_set_log", options, error, |o| {
            let callback = r#fn.map(|function| Callback { function, user_data });
            o.set_log(match callback {
                Some(callback) => Some(Arc::new(move |skip: &Skip| forward_skip(&callback, skip))),
                None => None,
            });
            Ok(())
        })
    }
}

fn forward_skip(callback: &Callback<LogFunction>, skip: &Skip) {
    let text = c_text(format!("{}: {}", skip.key, skip.message));
    // SAFETY: the host gave the function with this user data, and promised to keep both alive.
    hook::outside(|| unsafe { (callback.function)(WST_LOG_WARNING, text.as_ptr(), callback.user_data) });
}

/// Sets an option by name, for configuration files and scripting languages: those above ("side", "crop", …), "prefetch",
/// and the bounds on metadata that the authors filtered by: "filter" with "authors" sets all, "min_size", "max_size",
/// "max_pwatermark", "min_aesthetic" and "max_unsafe" one; the message for an unknown key lists all.
///
/// Owner: `key` and `value` are copied.
/// Threads: one at a time per options.
/// Errors: WST_INVALID_ARGUMENT, WST_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_loader_options_set(
    options: *mut wst_loader_options,
    key: *const c_char,
    value: *const c_char,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        change("wst_loader_options_set", options, error, |o| {
            o.set(text_in("key", key)?, text_in("value", value)?)
        })
    }
}

/// Frees options. Loaders that were opened with them keep their own copy. NULL is a no-op.
///
/// Owner: takes the options from the caller.
/// Threads: any.
/// Errors: none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_loader_options_free(options: *mut wst_loader_options) {
    // SAFETY: NULL or live options, as the header asks.
    unsafe { release(options) }
}
