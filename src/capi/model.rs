//! Models and how they are opened.

use std::ffi::{c_char, c_void};
use std::sync::{Arc, RwLock};

use super::boundary::{
    Callback, Handle, HandleOut, Poison, Sized32, StructOut, boundary, enum_in, handle_in, optional_in,
    path_in, release, text_in,
};
use super::error::{c_text, wst_error, wst_status};
use super::hook;
use super::tensor::{DTYPES, wst_dtype};
use crate::device::threads::run_apart;
use crate::error::{Error, Result};
use crate::pipeline::{LogLevel, Model, ModelOptions, Residency};

/// Which weights are kept ready.
pub type wst_residency = i32;

/// Whatever the device does best.
pub const WST_RESIDENCY_AUTO: wst_residency = 0;
/// All stages.
pub const WST_RESIDENCY_ALL: wst_residency = 1;
/// Only the stage that runs; the others' memory goes back to the system.
pub const WST_RESIDENCY_STAGE: wst_residency = 2;

const RESIDENCIES: &[(&str, Residency)] = &[
    ("WST_RESIDENCY_AUTO", Residency::Auto),
    ("WST_RESIDENCY_ALL", Residency::All),
    ("WST_RESIDENCY_STAGE", Residency::Stage),
];

/// How much a log callback hears.
pub type wst_log_level = i32;

/// Nothing.
pub const WST_LOG_OFF: wst_log_level = 0;
/// What went wrong although the call succeeded.
pub const WST_LOG_WARNING: wst_log_level = 1;
/// What was chosen and how long it took.
pub const WST_LOG_INFO: wst_log_level = 2;
/// Every stage and step.
pub const WST_LOG_DEBUG: wst_log_level = 3;

const LOG_LEVELS: &[(&str, LogLevel)] = &[
    ("WST_LOG_OFF", LogLevel::Off),
    ("WST_LOG_WARNING", LogLevel::Warning),
    ("WST_LOG_INFO", LogLevel::Info),
    ("WST_LOG_DEBUG", LogLevel::Debug),
];

/// Hears one line of log, in UTF-8. It must not unwind (C++: not throw, Go: recover).
///
/// Owner: `message` is valid during the call.
/// Threads: called on any thread of the library, several at once.
/// Errors: none can be given back.
pub type wst_log_fn =
    Option<unsafe extern "C" fn(level: wst_log_level, message: *const c_char, user_data: *mut c_void)>;

/// How a model is opened. Exclusive while it is being set.
pub struct wst_model_options {
    options: RwLock<ModelOptions>,
    poison: Poison,
}

impl Handle for wst_model_options {
    fn poison(&self) -> Option<&Poison> {
        Some(&self.poison)
    }
}

/// An opened model: weights mapped from safetensors, on one device, immutable, shareable between threads.
pub struct wst_model {
    pub(super) model: Model,
    pub(super) poison: Poison,
}

impl Handle for wst_model {
    fn poison(&self) -> Option<&Poison> {
        Some(&self.poison)
    }
}

/// What is known of an opened model. Set `struct_size` to `sizeof(wst_model_info_t)` before the call.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct wst_model_info_t {
    /// The size that the caller was compiled with, in bytes.
    pub struct_size: u32,
    /// 1: the paper's first version; 2: Würstchen v2; 3: Stable Cascade.
    pub generation: u32,
    /// Parameters of Stage A.
    pub stage_a_parameters: u64,
    /// Parameters of Stage B.
    pub stage_b_parameters: u64,
    /// Parameters of Stage C.
    pub stage_c_parameters: u64,
    /// Parameters of the text encoders.
    pub text_encoder_parameters: u64,
    /// Parameters of the image encoder.
    pub image_encoder_parameters: u64,
    /// Pixels per row of a picture if no size is set.
    pub default_width: u32,
    /// Rows of a picture if no size is set.
    pub default_height: u32,
    /// Channels of Stage C's latents at that size.
    pub latent_channels: u32,
    /// Rows of Stage C's latents at that size.
    pub latent_height: u32,
    /// Columns of Stage C's latents at that size.
    pub latent_width: u32,
    /// 0.
    pub reserved: u32,
    /// Weights that are mapped from files.
    pub bytes_mapped: u64,
    /// Host memory held beyond that.
    pub bytes_host: u64,
    /// Device memory held.
    pub bytes_device: u64,
}

// SAFETY: repr(C), starts with `struct_size`, 8 + 5 * 8 + 6 * 4 + 3 * 8 bytes without padding, numbers only.
unsafe impl Sized32 for wst_model_info_t {
    const NAME: &'static str = "wst_model_info_t";
    const FIRST_END: usize = 8;
}

/// New options with the library's defaults.
///
/// Owner: the caller frees them with wst_model_options_free.
/// Threads: any.
/// Errors: NULL only if memory ran out.
#[unsafe(no_mangle)]
pub extern "C" fn wst_model_options_new() -> *mut wst_model_options {
    super::boundary::quietly(std::ptr::null_mut(), || {
        let options = RwLock::new(ModelOptions::default());
        super::boundary::give(wst_model_options { options, poison: Poison::default() })
    })
}

/// Frees options; models that were opened with them stay. NULL is a no-op.
///
/// Owner: takes the options from the caller.
/// Threads: any.
/// Errors: none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_model_options_free(options: *mut wst_model_options) {
    // SAFETY: NULL or live options, as the header asks.
    unsafe { release(options) }
}

/// Changes options that nobody else uses now.
///
/// # Safety
/// `options` is NULL or live, `error` NULL or writable.
unsafe fn change(
    place: &'static str,
    options: *mut wst_model_options,
    error: *mut *mut wst_error,
    change: impl FnOnce(&mut ModelOptions) -> Result<()>,
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

/// Where the model computes: "auto" (default: the first GPU if it can be used, else the CPU), "cpu", "cuda" (the first
/// GPU), "cuda:1". Whether the machine has it shows when a model is opened: WST_UNSUPPORTED then names the libraries
/// that were tried.
///
/// Owner: `device` is copied.
/// Threads: one at a time per options.
/// Errors: WST_INVALID_ARGUMENT for a name that is none, WST_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_model_options_set_device(
    options: *mut wst_model_options,
    device: *const c_char,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        change("wst_model_options_set_device", options, error, |o| o.set_device(text_in("device", device)?))
    }
}

/// How many threads compute; 0 (default): one per core.
///
/// Owner: nothing changes hands.
/// Threads: one at a time per options.
/// Errors: WST_INVALID_ARGUMENT, WST_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_model_options_set_threads(
    options: *mut wst_model_options,
    threads: u32,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe { change("wst_model_options_set_threads", options, error, |o| o.set_threads(threads)) }
}

/// The type in which the networks compute, whatever the weights are stored in. Sums are always in F32. What the device
/// lacks is WST_UNSUPPORTED when a model is opened.
///
/// On a GPU, the type of activations: WST_BF16 (default from compute capability 8.0 on), WST_F16 (default before it) or
/// WST_F32.
///
/// On the CPU activations are WST_F32, and this is the type of the factors of matrix products:
/// WST_F32 (default);
/// WST_BF16: of all products. Nearly twice as fast where the processor has fast instructions for it (AMD's with AVX-512
/// BF16); elsewhere the same as WST_F32;
/// WST_I8: of those in the blocks of Stages B and C, rounded to eight bits (weights by output, once, when they are used
/// first; activations by row), others as with WST_BF16. Faster still, in a quarter of the memory for those weights, and a
/// little less exact: the same seed gives a slightly different picture.
/// Training with such a model computes as its own options say.
///
/// Owner: nothing changes hands.
/// Threads: one at a time per options.
/// Errors: WST_INVALID_ARGUMENT, WST_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_model_options_set_compute_dtype(
    options: *mut wst_model_options,
    dtype: wst_dtype,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        change("wst_model_options_set_compute_dtype", options, error, |o| {
            o.set_compute_dtype(enum_in("dtype", dtype, DTYPES)?)
        })
    }
}

/// A CUDA stream of the host's (a CUstream or cudaStream_t) in the primary context of the device: all work runs on it,
/// behind what the host gave it before, one call at a time; another call gets WST_BUSY. NULL (default): streams of the
/// library's own, one for each call that runs.
///
/// Owner: the stream stays the caller's and must outlive the model and everything made with it.
/// Threads: one at a time per options.
/// Errors: WST_INVALID_ARGUMENT, WST_BUSY. The stream is looked at when a model is opened.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_model_options_set_cuda_stream(
    options: *mut wst_model_options,
    stream: *mut c_void,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks; so is the stream.
    unsafe {
        change("wst_model_options_set_cuda_stream", options, error, |o| o.set_cuda_stream(stream as usize))
    }
}

/// Which weights are kept ready; WST_RESIDENCY_AUTO by default.
///
/// Owner: nothing changes hands.
/// Threads: one at a time per options.
/// Errors: WST_INVALID_ARGUMENT, WST_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_model_options_set_residency(
    options: *mut wst_model_options,
    residency: wst_residency,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        change("wst_model_options_set_residency", options, error, |o| {
            o.set_residency(enum_in("residency", residency, RESIDENCIES)?)
        })
    }
}

/// Sends log lines up to `level` of models opened with these options to `fn`; NULL: to nobody (default).
/// Without it the library writes nothing anywhere.
///
/// Owner: the caller keeps `user_data` alive until the models, and the options and jobs made from them, are freed.
/// Threads: one at a time per options; `fn` is called on any thread, several at once.
/// Errors: WST_INVALID_ARGUMENT, WST_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_model_options_set_log(
    options: *mut wst_model_options,
    level: wst_log_level,
    r#fn: wst_log_fn,
    user_data: *mut c_void,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        change("wst_model_options_set_log", options, error, |o| {
            let level = enum_in("level", level, LOG_LEVELS)?;
            match r#fn.map(|function| Callback { function, user_data }) {
                Some(callback) => {
                    let log = move |level: LogLevel, text: &str| forward_log(&callback, level, text);
                    o.set_log(level, Some(Arc::new(log)));
                }
                None => o.set_log(LogLevel::Off, None),
            }
            Ok(())
        })
    }
}

pub(super) type LogFunction = unsafe extern "C" fn(wst_log_level, *const c_char, *mut c_void);

fn forward_log(callback: &Callback<LogFunction>, level: LogLevel, text: &str) {
    let number = LOG_LEVELS.iter().position(|(_, l)| *l == level).unwrap_or(0);
    let text = c_text(text.to_owned());
    // SAFETY: the host gave the function with this user data, and promised to keep both alive.
    hook::outside(|| unsafe {
        (callback.function)(number as wst_log_level, text.as_ptr(), callback.user_data)
    });
}

/// Adds a LoRA adapter of Stage C, as diffusers or wst_trainer_save_adapter writes it: a .safetensors file, or a folder
/// with pytorch_lora_weights.safetensors. Its updates are multiplied by `scale`; those of several adapters add up.
///
/// Owner: `path` is copied.
/// Threads: one at a time per options.
/// Errors: WST_INVALID_ARGUMENT, WST_BUSY. The file is looked at by wst_model_open.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_model_options_add_lora(
    options: *mut wst_model_options,
    path: *const c_char,
    scale: f32,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        change("wst_model_options_add_lora", options, error, |o| o.add_lora(path_in("path", path)?, scale))
    }
}

/// Sets an option by name, for configuration files and scripting languages: "device", "threads", …; the message
/// for an unknown key lists all. "prior_path" and "decoder_path" name the folder of a v2 model's other half. "lora" adds a
/// LoRA adapter of Stage C, a file or a folder as diffusers writes it; "lora_scale" is a factor of the one named last.
/// "test.panic" with "caller" or "thread" makes this call fail with WST_INTERNAL as a
/// defect would, so that a host can test what it does then.
///
/// Owner: `key` and `value` are copied.
/// Threads: one at a time per options.
/// Errors: WST_INVALID_ARGUMENT, WST_UNSUPPORTED, WST_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_model_options_set(
    options: *mut wst_model_options,
    key: *const c_char,
    value: *const c_char,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        change("wst_model_options_set", options, error, |o| {
            let (key, value) = (text_in("key", key)?, text_in("value", value)?);
            if key == TEST_PANIC {
                return test_panic(value);
            }
            o.set(key, value)
        })
    }
}

/// The option that makes a defect, for tests of hosts.
pub(super) const TEST_PANIC: &str = "test.panic";

/// Panics on the thread that `value` names.
#[allow(clippy::panic)]
pub(super) fn test_panic(value: &str) -> Result<()> {
    match value {
        "caller" => panic!("asked for by the option {TEST_PANIC}"),
        "thread" => run_apart(|| panic!("asked for by the option {TEST_PANIC}")),
        _ => Err(Error::argument(TEST_PANIC, "\"caller\" or \"thread\"", format!("{value:?}"))),
    }
}

/// Opens the model in folder `path`; `options` may be NULL for the defaults. Weights are mapped, not read. v1: a folder
/// of this library's layout. v2: a folder as diffusers saves it, with both halves or one of them; the option
/// "decoder_path" or "prior_path" names the folder of the other. A model with one half does what that half can.
///
/// Owner: the caller frees `*out` with wst_model_free; `options` may be freed or changed at once.
/// Threads: any.
/// Errors: WST_INVALID_ARGUMENT, WST_IO, WST_FORMAT, WST_UNSUPPORTED, WST_OUT_OF_MEMORY, WST_DEVICE, WST_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_model_open(
    path: *const c_char,
    options: *const wst_model_options,
    out: *mut *mut wst_model,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        boundary("wst_model_open", error, HandleOut("out", out), |_| {
            let path = path_in("path", path)?;
            let model = match optional_in("options", options)? {
                None => Model::open(path, &ModelOptions::default())?,
                Some(options) => {
                    // A copy: a log callback may look at the options.
                    let options = options.options.try_read().map_err(|_| busy())?.clone();
                    Model::open(path, &options)?
                }
            };
            Ok(wst_model { model, poison: Poison::default() })
        })
    }
}

/// Frees a model. Options and jobs made from it keep what they need of it. NULL is a no-op.
///
/// Owner: takes the model from the caller.
/// Threads: any.
/// Errors: none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_model_free(model: *mut wst_model) {
    // SAFETY: NULL or a live model, as the header asks.
    unsafe { release(model) }
}

/// Describes a model.
///
/// Owner: the caller's struct is filled up to its `struct_size`.
/// Threads: any.
/// Errors: WST_INVALID_ARGUMENT for NULL or a bad `struct_size`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_model_info(
    model: *const wst_model,
    out: *mut wst_model_info_t,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        boundary("wst_model_info", error, StructOut("out", out), |_| {
            let info = handle_in("model", model)?.model.info();
            Ok(wst_model_info_t {
                struct_size: size_of::<wst_model_info_t>() as u32,
                generation: info.generation,
                stage_a_parameters: info.stage_a_parameters,
                stage_b_parameters: info.stage_b_parameters,
                stage_c_parameters: info.stage_c_parameters,
                text_encoder_parameters: info.text_encoder_parameters,
                image_encoder_parameters: info.image_encoder_parameters,
                default_width: info.default_width,
                default_height: info.default_height,
                latent_channels: info.latent_channels,
                latent_height: info.latent_height,
                latent_width: info.latent_width,
                reserved: 0,
                bytes_mapped: info.bytes_mapped,
                bytes_host: info.bytes_host,
                bytes_device: info.bytes_device,
            })
        })
    }
}
