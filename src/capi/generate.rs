//! Prompt to picture.

use std::ffi::{c_char, c_void};
use std::sync::{Arc, PoisonError, RwLock};

use super::axes::floats;
use super::boundary::{
    Callback, Handle, HandleOut, ImagesOut, Poison, Sized32, boundary, enum_in, get, handle_in, optional_in,
    optional_text_in, quietly, release, slice_in, text_in,
};
use super::cancel::wst_cancel;
use super::error::{wst_error, wst_status};
use super::hook;
use super::image::wst_image;
use super::model::{TEST_PANIC, test_panic, wst_model};
use super::tensor::wst_tensor;
use crate::error::{Error, Result};
use crate::pipeline::{Choice, GenerateOptions, Progress, Sampler, Stage};

/// A stage of the paper.
pub type wst_stage = i32;

/// The VQGAN: tokens to pixels.
pub const WST_STAGE_A: wst_stage = 0;
/// The token predictor: latents to tokens.
pub const WST_STAGE_B: wst_stage = 1;
/// The text-conditional diffusion model: noise to latents.
pub const WST_STAGE_C: wst_stage = 2;

pub(super) const STAGES: &[(&str, Stage)] =
    &[("WST_STAGE_A", Stage::A), ("WST_STAGE_B", Stage::B), ("WST_STAGE_C", Stage::C)];

/// How Stage C walks from noise to latents.
pub type wst_sampler = i32;

/// Ho et al. 2020: fresh noise in every step but the last.
pub const WST_DDPM: wst_sampler = 0;
/// Song et al. 2021 with eta 0: no noise after the start.
pub const WST_DDIM: wst_sampler = 1;

const SAMPLERS: &[(&str, Sampler)] = &[("WST_DDPM", Sampler::Ddpm), ("WST_DDIM", Sampler::Ddim)];

/// How Stage B turns logits into tokens.
pub type wst_choice = i32;

/// Sampled from softmax(logits / temperature).
pub const WST_MULTINOMIAL: wst_choice = 0;
/// The largest logit; ties go to the lowest token.
pub const WST_ARGMAX: wst_choice = 1;
/// The codebook's mean under softmax(logits / temperature), quantised again.
pub const WST_QUANT: wst_choice = 2;

const CHOICES: &[(&str, Choice)] =
    &[("WST_MULTINOMIAL", Choice::Multinomial), ("WST_ARGMAX", Choice::Argmax), ("WST_QUANT", Choice::Quant)];

/// Where a run stands. wst_job_poll: set `struct_size` to `sizeof(wst_progress)` before the call.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct wst_progress {
    /// The size that the writer's side was compiled with, in bytes.
    pub struct_size: u32,
    /// The stage that runs.
    pub stage: wst_stage,
    /// Steps of this stage that are done.
    pub step: u32,
    /// Steps of this stage in all.
    pub steps: u32,
    /// Time since the run started.
    pub seconds: f64,
    /// A rough picture, if asked for and due, else NULL. Borrowed: for the callback's duration, or until the next
    /// wst_job_poll or wst_job_free of that job.
    pub preview: *const wst_image,
}

// SAFETY: repr(C), starts with `struct_size`, 4 * 4 + 8 + 8 bytes without padding; all zeros is a value.
unsafe impl Sized32 for wst_progress {
    const NAME: &'static str = "wst_progress";
    const FIRST_END: usize = 8;
}

/// Hears of every step. It may cancel and use getters; it must not unwind (C++: not throw, Go: recover).
///
/// Owner: `progress` and its preview are valid during the call.
/// Threads: called on the thread that called wst_generate; for a job on the job's thread.
/// Errors: none can be given back; wst_cancel_request ends the run.
pub type wst_progress_fn =
    Option<unsafe extern "C" fn(progress: *const wst_progress, user_data: *mut c_void)>;

type ProgressFunction = unsafe extern "C" fn(*const wst_progress, *mut c_void);

/// What to generate. Exclusive while it is being set; runs that use it only read it.
pub struct wst_generate_options {
    inner: RwLock<Inner>,
    poison: Poison,
}

/// The options, and what this layer adds when a run starts.
struct Inner {
    options: GenerateOptions,
    progress: Option<Callback<ProgressFunction>>,
    /// Asked for by the option "test.panic".
    panics: bool,
}

impl Handle for wst_generate_options {
    fn poison(&self) -> Option<&Poison> {
        Some(&self.poison)
    }
}

impl wst_generate_options {
    /// A copy for one run, with progress going to the host's callback inside of `around`.
    pub(super) fn for_run(
        &self,
        around: impl Fn(&mut dyn FnMut()) + Send + Sync + 'static,
    ) -> Result<GenerateOptions> {
        let inner = self.inner.try_read().map_err(|_| busy())?;
        let mut options = inner.options.clone();
        if let Some(callback) = inner.progress {
            let report = move |p: &Progress| around(&mut || forward_progress(&callback, p));
            options.set_progress(Some(Arc::new(report)))?;
        }
        if inner.panics {
            #[allow(clippy::panic)]
            options.set_progress(Some(Arc::new(|_: &Progress| {
                panic!("asked for by the option {TEST_PANIC}")
            })))?;
        }
        Ok(options)
    }
}

/// A stage as a number.
fn stage_number(stage: Stage) -> wst_stage {
    match stage {
        Stage::A => WST_STAGE_A,
        Stage::B => WST_STAGE_B,
        Stage::C => WST_STAGE_C,
    }
}

impl wst_progress {
    /// Before the first step.
    pub(super) fn start() -> Self {
        let preview = std::ptr::null();
        let struct_size = size_of::<wst_progress>() as u32;
        wst_progress { struct_size, stage: WST_STAGE_C, step: 0, steps: 0, seconds: 0.0, preview }
    }

    /// `preview` outlives the result.
    pub(super) fn new(p: &Progress, preview: Option<&Arc<wst_image>>) -> Self {
        wst_progress {
            stage: stage_number(p.stage),
            step: p.step,
            steps: p.steps,
            seconds: p.seconds,
            preview: preview.map_or(std::ptr::null(), Arc::as_ptr),
            ..Self::start()
        }
    }
}

fn forward_progress(callback: &Callback<ProgressFunction>, p: &Progress) {
    let preview = p.preview.clone().map(|image| Arc::new(wst_image::new(image)));
    let progress = wst_progress::new(p, preview.as_ref());
    // SAFETY: the host gave the function with this user data, and promised to keep both alive.
    hook::outside(|| unsafe { (callback.function)(&progress, callback.user_data) });
}

/// New options that start from the model's own recommended values.
///
/// Owner: the caller frees `*out` with wst_generate_options_free; they keep the model alive.
/// Threads: any.
/// Errors: WST_INVALID_ARGUMENT, WST_OUT_OF_MEMORY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_generate_options_new(
    model: *const wst_model,
    out: *mut *mut wst_generate_options,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        boundary("wst_generate_options_new", error, HandleOut("out", out), |call| {
            let model = call.handle("model", model)?;
            let options = GenerateOptions::new(&model.model)?;
            let inner = RwLock::new(Inner { options, progress: None, panics: false });
            Ok(wst_generate_options { inner, poison: Poison::default() })
        })
    }
}

/// Changes options that nobody else uses now.
///
/// # Safety
/// `options` is NULL or live, `error` NULL or writable.
unsafe fn change(
    place: &'static str,
    options: *mut wst_generate_options,
    error: *mut *mut wst_error,
    change: impl FnOnce(&mut Inner) -> Result<()>,
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

/// Adds a prompt; `negative_text` says what to steer away from and may be NULL (the empty text). Call it again for
/// several prompts in one run: the images come out prompt by prompt.
///
/// Owner: the texts are copied.
/// Threads: one at a time per options.
/// Errors: WST_INVALID_ARGUMENT, WST_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_generate_options_add_prompt(
    options: *mut wst_generate_options,
    text: *const c_char,
    negative_text: *const c_char,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        change("wst_generate_options_add_prompt", options, error, |o| {
            o.options.add_prompt(text_in("text", text)?, optional_text_in("negative_text", negative_text)?)
        })
    }
}

/// How many images each prompt gets; 1 by default. Image i of the run is made from seed + i.
///
/// Owner: nothing changes hands.
/// Threads: one at a time per options.
/// Errors: WST_INVALID_ARGUMENT, WST_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_generate_options_set_images_per_prompt(
    options: *mut wst_generate_options,
    images_per_prompt: u32,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        change("wst_generate_options_set_images_per_prompt", options, error, |o| {
            o.options.set_images_per_prompt(images_per_prompt)
        })
    }
}

/// The size of the images in pixels; the model's own by default. The model says which sizes it can make.
///
/// Owner: nothing changes hands.
/// Threads: one at a time per options.
/// Errors: WST_INVALID_ARGUMENT, WST_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_generate_options_set_size(
    options: *mut wst_generate_options,
    width: u32,
    height: u32,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe { change("wst_generate_options_set_size", options, error, |o| o.options.set_size(width, height)) }
}

/// Where the noise comes from; 0 by default. Same model, options and seed: the same image.
///
/// Owner: nothing changes hands.
/// Threads: one at a time per options.
/// Errors: WST_INVALID_ARGUMENT, WST_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_generate_options_set_seed(
    options: *mut wst_generate_options,
    seed: u64,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe { change("wst_generate_options_set_seed", options, error, |o| o.options.set_seed(seed)) }
}

/// Stage C, from noise to latents: denoising steps, evenly spaced, and the weight of classifier-free guidance (1: none;
/// in v2, any up to 1). A v2 model starts with the 29 unevenly spaced steps that it was published with; to keep them
/// and change the guidance, set the key "stage_c_guidance".
///
/// Owner: nothing changes hands.
/// Threads: one at a time per options.
/// Errors: WST_INVALID_ARGUMENT, WST_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_generate_options_set_stage_c(
    options: *mut wst_generate_options,
    steps: u32,
    guidance: f32,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        change("wst_generate_options_set_stage_c", options, error, |o| o.options.set_stage_c(steps, guidance))
    }
}

/// How Stage C walks from noise to latents.
///
/// Owner: nothing changes hands.
/// Threads: one at a time per options.
/// Errors: WST_INVALID_ARGUMENT, WST_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_generate_options_set_stage_c_sampler(
    options: *mut wst_generate_options,
    sampler: wst_sampler,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        change("wst_generate_options_set_stage_c_sampler", options, error, |o| {
            o.options.set_stage_c_sampler(enum_in("sampler", sampler, SAMPLERS)?)
        })
    }
}

/// The times that Stage C visits, falling, in place of evenly spaced ones.
///
/// Owner: the numbers are copied.
/// Threads: one at a time per options.
/// Errors: WST_INVALID_ARGUMENT, WST_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_generate_options_set_stage_c_timesteps(
    options: *mut wst_generate_options,
    timesteps: *const f32,
    count: usize,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        change("wst_generate_options_set_stage_c_timesteps", options, error, |o| {
            o.options.set_stage_c_timesteps(slice_in(("timesteps", timesteps), ("count", count))?)
        })
    }
}

/// Stage B, from latents to tokens (v1) or to Stage A's latents (v2): steps, and the weight of classifier-free guidance
/// (1: none; in v2, any up to 1).
///
/// Owner: nothing changes hands.
/// Threads: one at a time per options.
/// Errors: WST_INVALID_ARGUMENT, WST_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_generate_options_set_stage_b(
    options: *mut wst_generate_options,
    steps: u32,
    guidance: f32,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        change("wst_generate_options_set_stage_b", options, error, |o| o.options.set_stage_b(steps, guidance))
    }
}

/// The times that Stage B of v2 visits, falling, in place of evenly spaced ones; none go back to those.
///
/// Owner: the numbers are copied.
/// Threads: one at a time per options.
/// Errors: WST_INVALID_ARGUMENT, WST_UNSUPPORTED for v1, WST_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_generate_options_set_stage_b_timesteps(
    options: *mut wst_generate_options,
    timesteps: *const f32,
    count: usize,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        change("wst_generate_options_set_stage_b_timesteps", options, error, |o| {
            o.options.set_stage_b_timesteps(slice_in(("timesteps", timesteps), ("count", count))?)
        })
    }
}

/// The temperature of Stage B's choice in v1, falling from `start` to `end` over its steps.
///
/// Owner: nothing changes hands.
/// Threads: one at a time per options.
/// Errors: WST_INVALID_ARGUMENT, WST_UNSUPPORTED for v2, WST_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_generate_options_set_stage_b_temperature(
    options: *mut wst_generate_options,
    start: f32,
    end: f32,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        change("wst_generate_options_set_stage_b_temperature", options, error, |o| {
            o.options.set_stage_b_temperature(start, end)
        })
    }
}

/// How Stage B of v1 turns logits into tokens.
///
/// Owner: nothing changes hands.
/// Threads: one at a time per options.
/// Errors: WST_INVALID_ARGUMENT, WST_UNSUPPORTED for v2, WST_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_generate_options_set_stage_b_choice(
    options: *mut wst_generate_options,
    choice: wst_choice,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        change("wst_generate_options_set_stage_b_choice", options, error, |o| {
            o.options.set_stage_b_choice(enum_in("choice", choice, CHOICES)?)
        })
    }
}

/// Starts from `image` instead of pure noise; `strength` from 0 (keep it) to 1 (noise only).
///
/// Owner: the options keep a reference to the image; the caller's may be freed at once.
/// Threads: one at a time per options.
/// Errors: WST_INVALID_ARGUMENT, WST_UNSUPPORTED, WST_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_generate_options_set_init_image(
    options: *mut wst_generate_options,
    image: *const wst_image,
    strength: f32,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        change("wst_generate_options_set_init_image", options, error, |o| {
            o.options.set_init_image(&handle_in("image", image)?.image, strength)
        })
    }
}

/// Starts from latents instead of noise: [1, C, h, w] for all pictures, or one for each, as wst_encode_image and
/// wst_stage_c_sample give them. `strength` as for an init image; 0 only decodes them, without Stage C: image
/// variation from latents at hand. Replaces an init image.
///
/// Owner: the options keep a copy.
/// Threads: one at a time per options.
/// Errors: WST_INVALID_ARGUMENT, WST_OUT_OF_MEMORY, WST_BUSY. Their size is held to the pictures' when these are made.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_generate_options_set_init_latents(
    options: *mut wst_generate_options,
    latents: *const wst_tensor,
    strength: f32,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        change("wst_generate_options_set_init_latents", options, error, |o| {
            let latents = floats("latents", &handle_in("latents", latents)?.tensor, "[N, C, h, w]")?;
            o.options.set_init_latents(&latents, strength)
        })
    }
}

/// Where the picture may change from the init image: white is made anew, black is kept.
///
/// Owner: the options keep a reference to the mask; the caller's may be freed at once.
/// Threads: one at a time per options.
/// Errors: WST_INVALID_ARGUMENT, WST_UNSUPPORTED, WST_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_generate_options_set_mask(
    options: *mut wst_generate_options,
    mask: *const wst_image,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        change("wst_generate_options_set_mask", options, error, |o| {
            o.options.set_mask(&handle_in("mask", mask)?.image)
        })
    }
}

/// Calls `fn` after every step; NULL: nobody (default).
///
/// Owner: the caller keeps `user_data` alive until the runs and jobs with these options have ended.
/// Threads: one at a time per options.
/// Errors: WST_INVALID_ARGUMENT, WST_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_generate_options_set_progress(
    options: *mut wst_generate_options,
    r#fn: wst_progress_fn,
    user_data: *mut c_void,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        change("wst_generate_options_set_progress", options, error, |o| {
            o.progress = r#fn.map(|function| Callback { function, user_data });
            Ok(())
        })
    }
}

/// Adds a rough picture to the progress of every n-th step; 0: never (default).
///
/// Owner: nothing changes hands.
/// Threads: one at a time per options.
/// Errors: WST_INVALID_ARGUMENT, WST_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_generate_options_set_preview(
    options: *mut wst_generate_options,
    every_n_steps: u32,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        change("wst_generate_options_set_preview", options, error, |o| o.options.set_preview(every_n_steps))
    }
}

/// The token that stops runs with these options; NULL: none (default).
///
/// Owner: the options keep a reference to the token; the caller's may be freed at any time.
/// Threads: one at a time per options.
/// Errors: WST_INVALID_ARGUMENT, WST_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_generate_options_set_cancel(
    options: *mut wst_generate_options,
    cancel: *mut wst_cancel,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        change("wst_generate_options_set_cancel", options, error, |o| {
            let cancel = optional_in("cancel", cancel)?;
            o.options.set_cancel(cancel.as_ref().map(|cancel| &cancel.token))
        })
    }
}

/// Sets an option by name, for configuration files and scripting languages: "seed", "stage_c_steps", …; the message
/// for an unknown key lists all. "test.panic" makes a call fail with WST_INTERNAL as a defect would, so that a host can
/// test what it does then: this call with "caller" or "thread", the run with "generate".
///
/// Owner: `key` and `value` are copied.
/// Threads: one at a time per options.
/// Errors: WST_INVALID_ARGUMENT, WST_UNSUPPORTED, WST_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_generate_options_set(
    options: *mut wst_generate_options,
    key: *const c_char,
    value: *const c_char,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        change("wst_generate_options_set", options, error, |o| {
            let (key, value) = (text_in("key", key)?, text_in("value", value)?);
            match (key, value) {
                (TEST_PANIC, "generate") => {
                    o.panics = true;
                    Ok(())
                }
                (TEST_PANIC, value) => test_panic(value),
                _ => o.options.set(key, value),
            }
        })
    }
}

/// Frees options. Jobs that were started with them keep their own copy. NULL is a no-op.
///
/// Owner: takes the options from the caller.
/// Threads: any.
/// Errors: none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_generate_options_free(options: *mut wst_generate_options) {
    // SAFETY: NULL or live options, as the header asks.
    unsafe { release(options) }
}

/// How many images a run makes: prompts x images per prompt; 0 for NULL.
///
/// Owner: nothing changes hands.
/// Threads: any; waits while another thread sets an option.
/// Errors: none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_generate_options_image_count(options: *const wst_generate_options) -> usize {
    let count = |options: &wst_generate_options| {
        options.inner.read().unwrap_or_else(PoisonError::into_inner).options.image_count()
    };
    // SAFETY: NULL or live options, as the header asks.
    quietly(0, || unsafe { get(options, 0, count) })
}

/// Makes the images and returns when they are done. `image_count` must be wst_generate_options_image_count.
///
/// Owner: the caller frees each of `images` with wst_image_free; all are NULL on failure.
/// Threads: any, several at once on one model and one set of options; the options cannot be set meanwhile.
/// Errors: WST_INVALID_ARGUMENT, WST_UNSUPPORTED, WST_OUT_OF_MEMORY, WST_DEVICE, WST_CANCELLED, WST_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_generate(
    model: *const wst_model,
    options: *const wst_generate_options,
    images: *mut *mut wst_image,
    image_count: usize,
    error: *mut *mut wst_error,
) -> wst_status {
    let out = ImagesOut { images, count: image_count };
    // SAFETY: the pointers are NULL or as the header asks; `images` has `image_count` entries.
    unsafe {
        boundary("wst_generate", error, &out, |call| {
            let model = call.handle("model", model)?;
            let options = handle_in("options", options)?;
            // Held during the run: a second thread that sets an option gets WST_BUSY.
            let inner = options.inner.try_read().map_err(|_| busy())?;
            let run = options.for_run(|report| report())?;
            out.expect(run.image_count())?;
            let images = model.model.generate(&run);
            drop(inner);
            images
        })
    }
}
