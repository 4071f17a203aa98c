//! Model folders that training begins with and ends in.

use std::ffi::c_char;

use super::boundary::{boundary, path_in};
use super::error::{wst_error, wst_status};
use super::lists::texts_in;
use crate::text::train_tokenizer;
use crate::training::{create_model, merge_adapter};

/// Learns a tokenizer of `vocabulary` tokens, 514 at least, from `count` texts (65536 at most), and writes
/// tokenizer.json into `directory`: for the folder "tokenizer" of a new model's configurations.
///
/// Owner: nothing changes hands.
/// Threads: any.
/// Errors: WST_INVALID_ARGUMENT, WST_IO, WST_OUT_OF_MEMORY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_tokenizer_train(
    texts: *const *const c_char,
    count: usize,
    vocabulary: u32,
    directory: *const c_char,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks; `texts` has `count` entries.
    unsafe {
        boundary("wst_tokenizer_train", error, (), |_| {
            let texts = texts_in("texts", texts, count)?;
            let directory = path_in("directory", directory)?;
            train_tokenizer(texts.into_iter(), vocabulary as usize, directory)
        })
    }
}

/// Makes a whole v1 model of the folder `configs`, which holds the config.json of each part, a tokenizer, and the
/// weights of some parts or of none. Parts without weights get fresh ones, drawn as the authors' constructors draw them;
/// everything else is copied. `directory` is replaced as a whole.
///
/// Owner: nothing changes hands.
/// Threads: any.
/// Errors: WST_INVALID_ARGUMENT, WST_IO, WST_UNSUPPORTED for v2, WST_OUT_OF_MEMORY; WST_FORMAT, naming the file and the
/// field, for configurations that do not fit together. After an error `directory` is as it was.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_model_create(
    configs: *const c_char,
    directory: *const c_char,
    seed: u64,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        boundary("wst_model_create", error, (), |_| {
            create_model(path_in("configs", configs)?, path_in("directory", directory)?, seed)
        })
    }
}

/// Writes the model of `directory` to `out_directory`, which is replaced as a whole, with `scale` times the updates of
/// an adapter added to Stage C's weights: a .safetensors file, or a folder with pytorch_lora_weights.safetensors.
///
/// Owner: nothing changes hands.
/// Threads: any.
/// Errors: WST_INVALID_ARGUMENT, WST_IO, WST_FORMAT, WST_UNSUPPORTED, WST_OUT_OF_MEMORY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_model_merge_adapter(
    directory: *const c_char,
    adapter: *const c_char,
    scale: f32,
    out_directory: *const c_char,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        boundary("wst_model_merge_adapter", error, (), |_| {
            let (directory, adapter) = (path_in("directory", directory)?, path_in("adapter", adapter)?);
            merge_adapter(directory, adapter, scale, path_in("out_directory", out_directory)?)
        })
    }
}
