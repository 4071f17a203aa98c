//! What is trained and how.

use std::ffi::c_char;
use std::sync::RwLock;

use super::boundary::{Handle, HandleOut, Poison, boundary, enum_in, optional_in, release, text_in};
use super::cancel::wst_cancel;
use super::error::{wst_error, wst_status};
use super::generate::wst_stage;
use super::model::{TEST_PANIC, test_panic};
use super::tensor::{DTYPES, wst_dtype};
use crate::error::{Error, Result};
use crate::training::{Ema, Goal, TrainOptions};

/// In training only: the text tower and the image encoder as a contrastive pair, before all stages.
pub const WST_STAGE_PAIR: wst_stage = 3;

const GOALS: &[(&str, Goal)] = &[
    ("WST_STAGE_A", Goal::StageA),
    ("WST_STAGE_B", Goal::StageB),
    ("WST_STAGE_C", Goal::StageC),
    ("WST_STAGE_PAIR", Goal::Pair),
];

/// How a stage is trained. Exclusive while it is being set; a trainer has its own copy.
pub struct wst_train_options {
    inner: RwLock<Chosen>,
    poison: Poison,
}

/// The options, and what this layer adds when a trainer begins.
#[derive(Clone)]
pub(super) struct Chosen {
    pub(super) options: TrainOptions,
    /// Asked for by the option "test.panic".
    pub(super) panics: bool,
}

impl Handle for wst_train_options {
    fn poison(&self) -> Option<&Poison> {
        Some(&self.poison)
    }
}

impl wst_train_options {
    /// A copy for one trainer.
    pub(super) fn for_trainer(&self) -> Result<Chosen> {
        Ok(self.inner.try_read().map_err(|_| busy())?.clone())
    }
}

/// New options for training `stage`, that start from the paper's values for it.
///
/// Owner: the caller frees `*out` with wst_train_options_free.
/// Threads: any.
/// Errors: WST_INVALID_ARGUMENT, WST_OUT_OF_MEMORY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_train_options_new(
    stage: wst_stage,
    out: *mut *mut wst_train_options,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        boundary("wst_train_options_new", error, HandleOut("out", out), |_| {
            let options = TrainOptions::new(enum_in("stage", stage, GOALS)?);
            let inner = RwLock::new(Chosen { options, panics: false });
            Ok(wst_train_options { inner, poison: Poison::default() })
        })
    }
}

/// Changes options that nobody else uses now.
///
/// # Safety
/// `options` is NULL or live, `error` NULL or writable.
unsafe fn change(
    place: &'static str,
    options: *mut wst_train_options,
    error: *mut *mut wst_error,
    change: impl FnOnce(&mut Chosen) -> Result<()>,
) -> wst_status {
    // SAFETY: as the caller of this function promises.
    unsafe {
        boundary(place, error, (), |call| {
            let options = call.handle("options", options)?;
            let Ok(mut inner) = options.inner.try_write() else { return Err(busy()) };
            change(&mut inner)
        })
    }
}

fn busy() -> Error {
    Error::Busy { what: "options".into() }
}

/// The learning rate after the warm-up, 0 to 10.
///
/// Owner: nothing changes hands.
/// Threads: one at a time per options.
/// Errors: WST_INVALID_ARGUMENT, WST_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_train_options_set_learning_rate(
    options: *mut wst_train_options,
    rate: f32,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        change("wst_train_options_set_learning_rate", options, error, |o| o.options.set_learning_rate(rate))
    }
}

/// How slowly AdamW's averages of the gradient and of its square follow: each from 0 to below 1.
///
/// Owner: nothing changes hands.
/// Threads: one at a time per options.
/// Errors: WST_INVALID_ARGUMENT, WST_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_train_options_set_betas(
    options: *mut wst_train_options,
    beta1: f32,
    beta2: f32,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe { change("wst_train_options_set_betas", options, error, |o| o.options.set_betas(beta1, beta2)) }
}

/// AdamW's decay of the weights per unit of learning rate, 0 to 10.
///
/// Owner: nothing changes hands.
/// Threads: one at a time per options.
/// Errors: WST_INVALID_ARGUMENT, WST_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_train_options_set_weight_decay(
    options: *mut wst_train_options,
    decay: f32,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        change("wst_train_options_set_weight_decay", options, error, |o| o.options.set_weight_decay(decay))
    }
}

/// Steps over which the learning rate grows from 0; 0: none.
///
/// Owner: nothing changes hands.
/// Threads: one at a time per options.
/// Errors: WST_INVALID_ARGUMENT, WST_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_train_options_set_warmup_steps(
    options: *mut wst_train_options,
    steps: u64,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        change("wst_train_options_set_warmup_steps", options, error, |o| {
            o.options.set_warmup_steps(steps);
            Ok(())
        })
    }
}

/// The largest norm of all gradients together: longer ones are scaled down to it. 0: never.
///
/// Owner: nothing changes hands.
/// Threads: one at a time per options.
/// Errors: WST_INVALID_ARGUMENT, WST_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_train_options_set_grad_clip(
    options: *mut wst_train_options,
    norm: f32,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe { change("wst_train_options_set_grad_clip", options, error, |o| o.options.set_grad_clip(norm)) }
}

/// Parts that each batch is cut into, run one after the other: the gradient of the whole batch in the memory that a
/// part takes. 1 by default, 65536 at most.
///
/// Owner: nothing changes hands.
/// Threads: one at a time per options.
/// Errors: WST_INVALID_ARGUMENT, WST_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_train_options_set_grad_accumulation(
    options: *mut wst_train_options,
    parts: u32,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        change("wst_train_options_set_grad_accumulation", options, error, |o| {
            o.options.set_grad_accumulation(parts)
        })
    }
}

/// The average of the weights over the steps, which is what wst_trainer_export writes: a copy before step `start`, then
/// decay * average + (1 - decay) * weights on every `every`-th step. A decay of 0 exports the weights themselves, as of
/// the last such step.
///
/// Owner: nothing changes hands.
/// Threads: one at a time per options.
/// Errors: WST_INVALID_ARGUMENT, WST_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_train_options_set_ema(
    options: *mut wst_train_options,
    decay: f32,
    start: u64,
    every: u64,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        change("wst_train_options_set_ema", options, error, |o| {
            o.options.set_ema(Ema { decay, start, every })
        })
    }
}

/// How likely a caption is replaced by the empty one, 0 to 1: what classifier-free guidance needs.
///
/// Owner: nothing changes hands.
/// Threads: one at a time per options.
/// Errors: WST_INVALID_ARGUMENT, WST_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_train_options_set_text_dropout(
    options: *mut wst_train_options,
    probability: f32,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        change("wst_train_options_set_text_dropout", options, error, |o| {
            o.options.set_text_dropout(probability)
        })
    }
}

/// Where the random numbers of training come from; 0 by default. Same model, options, batches and seed: the same
/// weights.
///
/// Owner: nothing changes hands.
/// Threads: one at a time per options.
/// Errors: WST_INVALID_ARGUMENT, WST_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_train_options_set_seed(
    options: *mut wst_train_options,
    seed: u64,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        change("wst_train_options_set_seed", options, error, |o| {
            o.options.set_seed(seed);
            Ok(())
        })
    }
}

/// What the weights are rounded to for computing: WST_F32 (default), WST_F16 or WST_BF16. The optimiser keeps WST_F32,
/// and so do activations and gradients; on a GPU, and with WST_BF16 on a CPU that is fast at it (AMD with AVX-512 BF16),
/// those are rounded likewise where they are factors of matrix products, which makes a step faster.
///
/// Owner: nothing changes hands.
/// Threads: one at a time per options.
/// Errors: WST_INVALID_ARGUMENT, WST_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_train_options_set_compute_dtype(
    options: *mut wst_train_options,
    dtype: wst_dtype,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        change("wst_train_options_set_compute_dtype", options, error, |o| {
            o.options.set_compute_dtype(enum_in("dtype", dtype, DTYPES)?)
        })
    }
}

/// The token that stops what trainers with these options do, with WST_CANCELLED; NULL: none (default).
///
/// Owner: the options keep a reference to the token; the caller's may be freed at any time.
/// Threads: one at a time per options.
/// Errors: WST_INVALID_ARGUMENT, WST_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_train_options_set_cancel(
    options: *mut wst_train_options,
    cancel: *mut wst_cancel,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        change("wst_train_options_set_cancel", options, error, |o| {
            let cancel = optional_in("cancel", cancel)?;
            o.options.set_cancel(cancel.as_ref().map(|cancel| &cancel.token));
            Ok(())
        })
    }
}

/// Sets an option by name, for configuration files and scripting languages: those above ("learning_rate", "beta1",
/// "ema_decay", …) and those without a function of their own; the message for an unknown key lists all. "test.panic"
/// makes a call fail with WST_INTERNAL as a defect would, so that a host can test what it does then: this call with
/// "caller" or "thread", a trainer's steps with "step".
///
/// Owner: `key` and `value` are copied.
/// Threads: one at a time per options.
/// Errors: WST_INVALID_ARGUMENT, WST_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_train_options_set(
    options: *mut wst_train_options,
    key: *const c_char,
    value: *const c_char,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        change("wst_train_options_set", options, error, |o| {
            let (key, value) = (text_in("key", key)?, text_in("value", value)?);
            match (key, value) {
                (TEST_PANIC, "step") => {
                    o.panics = true;
                    Ok(())
                }
                (TEST_PANIC, value) => test_panic(value),
                _ => o.options.set(key, value),
            }
        })
    }
}

/// Frees options. Trainers that were made with them keep their own copy. NULL is a no-op.
///
/// Owner: takes the options from the caller.
/// Threads: any.
/// Errors: none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_train_options_free(options: *mut wst_train_options) {
    // SAFETY: NULL or live options, as the header asks.
    unsafe { release(options) }
}
