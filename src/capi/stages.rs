//! Stage by stage: what the paper's figures show, for tools and for checks against other implementations.

use std::ffi::c_char;

use super::axes::{floats, result, tokens_or_floats};
use super::boundary::{HandleOut, boundary, enum_in, handle_in, optional_in, text_in};
use super::error::{wst_error, wst_status};
use super::generate::{STAGES, wst_generate_options, wst_stage};
use super::image::wst_image;
use super::lists::{texts_in, with_images};
use super::model::wst_model;
use super::tensor::wst_tensor;

/// The token numbers of `text` as stage `for_stage` sees it: I64 [tokens]. The stages of a v1 model share a tokenizer.
///
/// Owner: the caller frees `*ids` with wst_tensor_free.
/// Threads: any.
/// Errors: WST_INVALID_ARGUMENT, WST_UNSUPPORTED for a stage without text, WST_OUT_OF_MEMORY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_tokenize(
    model: *const wst_model,
    for_stage: wst_stage,
    text: *const c_char,
    ids: *mut *mut wst_tensor,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        boundary("wst_tokenize", error, HandleOut("ids", ids), |call| {
            let model = call.handle("model", model)?;
            let stage = enum_in("for_stage", for_stage, STAGES)?;
            result(model.model.tokenize(stage, text_in("text", text)?)?)
        })
    }
}

/// The hidden states of `count` texts as stage `for_stage` sees them: [N, tokens, width].
///
/// Owner: the caller frees `*hidden` with wst_tensor_free.
/// Threads: any.
/// Errors: WST_INVALID_ARGUMENT, WST_UNSUPPORTED for a stage without text, WST_OUT_OF_MEMORY, WST_DEVICE.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_encode_text(
    model: *const wst_model,
    for_stage: wst_stage,
    texts: *const *const c_char,
    count: usize,
    hidden: *mut *mut wst_tensor,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks; `texts` has `count` entries.
    unsafe {
        boundary("wst_encode_text", error, HandleOut("hidden", hidden), |call| {
            let model = call.handle("model", model)?;
            let stage = enum_in("for_stage", for_stage, STAGES)?;
            let texts = texts_in("texts", texts, count)?;
            result(model.model.encode_text(stage, &texts)?)
        })
    }
}

/// What Stage C's latents of pictures are, by the image encoder, as Stage B takes them: [N, 16, h, w].
///
/// Owner: the caller frees `*latents` with wst_tensor_free.
/// Threads: any.
/// Errors: WST_INVALID_ARGUMENT, WST_UNSUPPORTED without an image encoder, WST_OUT_OF_MEMORY, WST_DEVICE.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_encode_image(
    model: *const wst_model,
    images: *const *const wst_image,
    count: usize,
    latents: *mut *mut wst_tensor,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks; `images` has `count` entries.
    unsafe {
        boundary("wst_encode_image", error, HandleOut("latents", latents), |call| {
            let model = call.handle("model", model)?;
            with_images(images, count, |images| result(model.model.encode_image(images)?))
        })
    }
}

/// Stage A's tokens of pictures of one size: I64 [N, H/4, W/4].
///
/// Owner: the caller frees `*tokens` with wst_tensor_free.
/// Threads: any.
/// Errors: WST_INVALID_ARGUMENT, WST_UNSUPPORTED, WST_OUT_OF_MEMORY, WST_DEVICE.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_stage_a_encode(
    model: *const wst_model,
    images: *const *const wst_image,
    count: usize,
    tokens: *mut *mut wst_tensor,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks; `images` has `count` entries.
    unsafe {
        boundary("wst_stage_a_encode", error, HandleOut("tokens", tokens), |call| {
            let model = call.handle("model", model)?;
            with_images(images, count, |images| result(model.model.stage_a_encode(images)?))
        })
    }
}

/// Stage A's picture of tokens, I64 [N, h, w], or of latents, [N, 4, h, w]: F32 [N, 3, H, W], 0 to 1, not clamped.
/// Tokens stand for codebook vectors as they are; latents are multiplied by the model's scale factor.
///
/// Owner: the caller frees `*pixels` with wst_tensor_free.
/// Threads: any.
/// Errors: WST_INVALID_ARGUMENT, WST_UNSUPPORTED, WST_OUT_OF_MEMORY, WST_DEVICE.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_stage_a_decode(
    model: *const wst_model,
    tokens_or_latents: *const wst_tensor,
    pixels: *mut *mut wst_tensor,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        boundary("wst_stage_a_decode", error, HandleOut("pixels", pixels), |call| {
            let model = call.handle("model", model)?;
            let input = handle_in("tokens_or_latents", tokens_or_latents)?;
            result(model.model.stage_a_decode(&tokens_or_floats("tokens_or_latents", &input.tensor)?)?)
        })
    }
}

/// One evaluation of Stage B with `t` [N], `latents` [N, 16, h, w] and `text` [N, tokens, width]. v1: `x` is tokens,
/// I64 [N, H, W], and gives logits [N, labels, H, W]. v2: `x` is Stage A's latents, [N, 4, H, W], and gives the noise
/// in them, [N, 4, H, W]. Floats of any width are taken, F32 is given.
///
/// Owner: the caller frees `*out` with wst_tensor_free.
/// Threads: any.
/// Errors: WST_INVALID_ARGUMENT, WST_UNSUPPORTED, WST_OUT_OF_MEMORY, WST_DEVICE.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_stage_b_predict(
    model: *const wst_model,
    x: *const wst_tensor,
    t: *const wst_tensor,
    latents: *const wst_tensor,
    text: *const wst_tensor,
    out: *mut *mut wst_tensor,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        boundary("wst_stage_b_predict", error, HandleOut("out", out), |call| {
            let model = call.handle("model", model)?;
            let x = tokens_or_floats("x", &handle_in("x", x)?.tensor)?;
            let t = floats("t", &handle_in("t", t)?.tensor, "[N]")?;
            let latents = floats("latents", &handle_in("latents", latents)?.tensor, "[N, C, h, w]")?;
            let text = floats("text", &handle_in("text", text)?.tensor, "[N, tokens, width]")?;
            result(model.model.stage_b_predict(&x, &t, &latents, &text)?)
        })
    }
}

/// All of Stage B: `latents` [N, 16, h, w] and `text` [N, tokens, width] to tokens, I64 [N, H, W] (v1; H and W follow
/// the options' size), or to Stage A's latents, F32 [N, 4, H, W] (v2; H = int(h * 10.67), as the reference rounds).
/// `negative_text`, of the shape of `text`, may be NULL. Prompts in the options are not used.
///
/// Owner: the caller frees `*out` with wst_tensor_free.
/// Threads: any; the progress callback comes on this thread.
/// Errors: WST_INVALID_ARGUMENT, WST_UNSUPPORTED, WST_OUT_OF_MEMORY, WST_DEVICE, WST_CANCELLED, WST_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_stage_b_sample(
    model: *const wst_model,
    latents: *const wst_tensor,
    text: *const wst_tensor,
    negative_text: *const wst_tensor,
    options: *const wst_generate_options,
    out: *mut *mut wst_tensor,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        boundary("wst_stage_b_sample", error, HandleOut("out", out), |call| {
            let model = call.handle("model", model)?;
            let latents = floats("latents", &handle_in("latents", latents)?.tensor, "[N, C, h, w]")?;
            let text = floats("text", &handle_in("text", text)?.tensor, "[N, tokens, width]")?;
            let negative = optional_in("negative_text", negative_text)?
                .map(|t| floats("negative_text", &t.tensor, "[N, tokens, width]"))
                .transpose()?;
            let run = handle_in("options", options)?.for_run(|report| report())?;
            result(model.model.stage_b_sample(&latents, &text, negative.as_ref(), &run)?)
        })
    }
}

/// One evaluation of Stage C: `x` is [N, 16, h, w], `t` [N], `text` [N, tokens, width]; gives the noise that it
/// sees in `x`, F32 [N, 16, h, w].
///
/// Owner: the caller frees `*noise` with wst_tensor_free.
/// Threads: any.
/// Errors: WST_INVALID_ARGUMENT, WST_UNSUPPORTED, WST_OUT_OF_MEMORY, WST_DEVICE.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_stage_c_predict(
    model: *const wst_model,
    x: *const wst_tensor,
    t: *const wst_tensor,
    text: *const wst_tensor,
    noise: *mut *mut wst_tensor,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        boundary("wst_stage_c_predict", error, HandleOut("noise", noise), |call| {
            let model = call.handle("model", model)?;
            let x = floats("x", &handle_in("x", x)?.tensor, "[N, C, h, w]")?;
            let t = floats("t", &handle_in("t", t)?.tensor, "[N]")?;
            let text = floats("text", &handle_in("text", text)?.tensor, "[N, tokens, width]")?;
            result(model.model.stage_c_predict(&x, &t, &text)?)
        })
    }
}

/// All of Stage C: `text` [N, tokens, width] to latents, F32 [N, 16, h, w], as Stage B takes them (in v2 diffusers'
/// image_embeddings: 42 times Stage C's own, less 1). `negative_text`, of the shape of `text`,
/// and `initial_noise`, [N, 16, h, w] (else from the seed), may be NULL. Prompts in the options are not used.
///
/// Owner: the caller frees `*latents` with wst_tensor_free.
/// Threads: any; the progress callback comes on this thread.
/// Errors: WST_INVALID_ARGUMENT, WST_UNSUPPORTED, WST_OUT_OF_MEMORY, WST_DEVICE, WST_CANCELLED, WST_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_stage_c_sample(
    model: *const wst_model,
    text: *const wst_tensor,
    negative_text: *const wst_tensor,
    initial_noise: *const wst_tensor,
    options: *const wst_generate_options,
    latents: *mut *mut wst_tensor,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        boundary("wst_stage_c_sample", error, HandleOut("latents", latents), |call| {
            let model = call.handle("model", model)?;
            let text = floats("text", &handle_in("text", text)?.tensor, "[N, tokens, width]")?;
            let negative = optional_in("negative_text", negative_text)?
                .map(|t| floats("negative_text", &t.tensor, "[N, tokens, width]"))
                .transpose()?;
            let noise = optional_in("initial_noise", initial_noise)?
                .map(|t| floats("initial_noise", &t.tensor, "[N, C, h, w]"))
                .transpose()?;
            let run = handle_in("options", options)?.for_run(|report| report())?;
            result(model.model.stage_c_sample(&text, negative.as_ref(), noise.as_ref(), &run)?)
        })
    }
}
