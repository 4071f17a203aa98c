//! Stage by stage: what the paper's figures show, for tools and for checks against other implementations.
//! Tensors are channels last here; the C ABI turns them to the reference's order.

use std::time::Instant;

use super::generate_options::GenerateOptions;
use super::halves::StageBPart;
use super::load::{Part, TextPart};
use super::model::Model;
use super::options::{Progress, Stage};
use super::walks::{StageBWalk, StageCWalk, Texts, check_finite, check_finite_latents};
use crate::device::Context;
use crate::device::threads::run_apart_with_reserve;
use crate::diffusion::noise::{NoiseSource, SeededNoise};
use crate::error::{Error, Result};
use crate::image::{Fit, Image, preprocess, to_pixels};
use crate::nn::Mode;
use crate::ops::kernels::widened;
use crate::ops::widen::widen;
use crate::stages::blocks::Conditioning;
use crate::tensor::{DType, Tensor};

impl Model {
    pub(super) fn context(&self) -> Context {
        let cx = Context::new(&self.inner.device);
        match &self.recorder {
            Some(recorder) => cx.recorded_by(recorder),
            None => cx,
        }
    }

    fn context_of(&self, options: &GenerateOptions) -> Context {
        options.cancel.iter().fold(self.context(), |cx, token| cx.cancelled_by(token))
    }

    /// Runs `work` on a library thread and takes its result out of the device's pool.
    fn apart(&self, work: impl FnOnce(&Context) -> Result<Tensor> + Send) -> Result<Tensor> {
        run_apart_with_reserve("a call of a stage", super::LISTS_BYTES, || {
            // A stream belongs to a context: nobody else may use it before the result is out.
            let cx = self.context();
            handed_out(&cx, &work(&cx)?)
        })
    }

    /// Token ids of a text as a stage sees it, padded to the model's length. The paper's stages share one tokenizer.
    ///
    /// # Shapes
    /// -> `I64 [T]`
    ///
    /// # Errors
    /// `InvalidArgument` for a stage without text, or text that the tokenizer cannot split; `Unsupported` for a
    /// stage that the model lacks.
    pub fn tokenize(&self, stage: Stage, text: &str) -> Result<Tensor> {
        let part = self.text_of(stage)?;
        self.apart(|_| part.tokenize(text))
    }

    /// The conditioning of texts for a stage: one vector per position, padding included.
    ///
    /// # Shapes
    /// -> `[N, T, width]`
    ///
    /// # Errors
    /// As [`Model::tokenize`]; `InvalidArgument` for no texts; `OutOfMemory`.
    pub fn encode_text(&self, stage: Stage, texts: &[&str]) -> Result<Tensor> {
        let part = self.text_of(stage)?;
        if texts.is_empty() {
            return Err(Error::argument("texts", "at least one", 0));
        }
        self.apart(|cx| part.embed(cx, texts))
    }

    /// Latents of pictures, which must have one size, as Stage B takes them.
    ///
    /// # Shapes
    /// -> `[N, h, w, latent_channels]`
    ///
    /// # Errors
    /// `InvalidArgument` for no pictures or different sizes; `Unsupported` without an image encoder.
    pub fn encode_image(&self, images: &[&Image]) -> Result<Tensor> {
        self.apart(|cx| self.encode_pictures(cx, images))
    }

    pub(super) fn encode_pictures(&self, cx: &Context, images: &[&Image]) -> Result<Tensor> {
        let _span = cx.span("image_encoder");
        let part = self.image_encoder()?;
        let (width, height) = common_size(images)?;
        let (height, width) = self.inner.geometry.encoder_size(width, height);
        let images: Vec<Image> = images.iter().map(|image| (*image).clone()).collect();
        let pixels = preprocess(cx, &images, [height, width], Fit::Stretch, &part.normalisation)?;
        let mut latents = widen(cx, &part.encoder.network.forward(cx, &pixels, Mode::Inference)?)?;
        check_finite(&latents, "image encoder", &part.encoder.weights)?;
        if let Some(prior) = &self.inner.halves.prior {
            prior.scaling.apply(latents.slice_mut()?);
        }
        Ok(latents)
    }

    /// Stage A's tokens of pictures, which must have one size.
    ///
    /// # Shapes
    /// -> `I64 [N, H/f, W/f]`
    ///
    /// # Errors
    /// `InvalidArgument` for no pictures, different sizes, or sides that do not divide by f.
    pub fn stage_a_encode(&self, images: &[&Image]) -> Result<Tensor> {
        common_size(images)?;
        let Part { network, weights, .. } = &self.decoder()?.stage_a;
        self.apart(|cx| {
            let _span = cx.span("stage_a");
            let encoded = network.encode(cx, &to_pixels(cx, images)?, Mode::Inference)?;
            check_finite(&encoded, "Stage A", weights)?;
            check_finite(&widened(cx, "codebook", network.codebook())?, "Stage A", weights)?;
            network.quantize(cx, &encoded)
        })
    }

    /// Pixels of tokens (`I64 [N, h, w]`) or of latents (`F32 [N, h, w, 4]`, codebook vectors divided by the
    /// scale factor), not clamped.
    ///
    /// # Shapes
    /// -> `F32 [N, H, W, 3]`
    ///
    /// # Errors
    /// `InvalidArgument` for other shapes or tokens that are not in the codebook.
    pub fn stage_a_decode(&self, tokens_or_latents: &Tensor) -> Result<Tensor> {
        let decoder = self.decoder()?;
        match tokens_or_latents.dtype() {
            DType::I64 => {
                tokens_or_latents.dims_of::<3>("tokens")?;
            }
            _ => {
                let channels = decoder.stage_a.network.config().latent_channels;
                expect_channels("latents", tokens_or_latents, channels)?;
            }
        }
        self.apart(|cx| decoder.pixels(cx, tokens_or_latents))
    }

    /// Stage B once: logits of every token (v1), or the noise in Stage A's latents (v2).
    ///
    /// # Shapes
    /// v1: x `I64 [N, H, W]` -> `[N, H, W, codebook_size]`; v2: x `F32 [N, H, W, 4]` -> `[N, H, W, 4]`.
    /// t `[N]`, latents `[N, h, w, C]`, text `[N, T, width]`
    ///
    /// # Errors
    /// `InvalidArgument` for shapes that do not fit; `Unsupported` without Stage B.
    pub fn stage_b_predict(&self, x: &Tensor, t: &Tensor, latents: &Tensor, text: &Tensor) -> Result<Tensor> {
        let decoder = self.decoder()?;
        let n = x.dims().first().copied().unwrap_or(0);
        expect_batch("latents", latents, n)?;
        expect_channels("latents", latents, decoder.stage_b.latent_channels())?;
        check_text(&decoder.text, "text", text, n)?;
        let times = check_times(t, n)?;
        match &decoder.stage_b {
            StageBPart::Tokens(Part { network, .. }) => {
                x.dims_of::<3>("x")?;
                self.apart(|cx| {
                    let _span = cx.span("stage_b");
                    let modulations = network.modulations(cx, times)?;
                    let attended =
                        [network.attend_to_latents(cx, latents)?, network.attend_to_text(cx, text)?];
                    let conditioning = Conditioning { modulations: &modulations, attended: &attended };
                    network.logits(cx, &network.features(cx, x, conditioning)?)
                })
            }
            StageBPart::Latents(Part { network, .. }, _) => {
                expect_channels("x", x, network.config().latent_channels)?;
                let [_, h, w, _] = x.dims_of("x")?;
                self.apart(|cx| {
                    let _span = cx.span("stage_b");
                    let modulations = network.modulations(cx, times)?;
                    let attended = [network.attend_to_text(cx, text)?];
                    let injected = network.inject(cx, latents, (h, w))?;
                    let conditioning = Conditioning { modulations: &modulations, attended: &attended };
                    network.forward(cx, x, conditioning, &injected)
                })
            }
        }
    }

    /// Stage B's walk with the steps, guidance and seed of `options`. Without a negative text it is guided away from
    /// the empty prompt. The size of the result follows the options in v1, the latents in v2.
    ///
    /// # Shapes
    /// latents `[N, h, w, C]`, text `[N, T, width]`, negative_text `[N or 1, T, width]` -> tokens `I64 [N, H, W]`
    /// (v1) or Stage A's latents `[N, H, W, 4]` (v2)
    ///
    /// # Errors
    /// `InvalidArgument` for shapes that do not fit; `Unsupported` without Stage B; `Cancelled`.
    pub fn stage_b_sample(
        &self,
        latents: &Tensor,
        text: &Tensor,
        negative_text: Option<&Tensor>,
        options: &GenerateOptions,
    ) -> Result<Tensor> {
        let mut noise = SeededNoise::new(seeds(options, latents.dims().first().copied().unwrap_or(0)));
        self.stage_b_sample_with(latents, text, negative_text, options, &mut noise)
    }

    /// [`Model::stage_b_sample`] with random numbers of the caller's.
    ///
    /// # Errors
    /// As there, and what the source returns.
    pub fn stage_b_sample_with(
        &self,
        latents: &Tensor,
        text: &Tensor,
        negative_text: Option<&Tensor>,
        options: &GenerateOptions,
        noise: &mut (dyn NoiseSource + Send),
    ) -> Result<Tensor> {
        let decoder = self.decoder()?;
        let [n, h, w, _] = latents.dims_of("latents")?;
        expect_channels("latents", latents, decoder.stage_b.latent_channels())?;
        let started = Instant::now();
        self.apart_with_progress(options, |cancel, report| {
            let cx = self.context_of(options).cancelled_by(cancel);
            let walk = StageBWalk::new(self, options, &cx, (h, w))?;
            let texts = texts_of_call(&decoder.text, &cx, text, negative_text, n, walk.is_guided())?;
            let decoded = walk.run(latents, &texts, noise, &mut |done, _| {
                report(&progress(Stage::B, done, walk.steps(), started));
                Ok(())
            })?;
            handed_out(&cx, &decoded)
        })
    }

    /// Stage C once: the noise in `x`.
    ///
    /// # Shapes
    /// x `[N, h, w, C]`, t `[N]`, text `[N, T, width]` -> `[N, h, w, C]`
    ///
    /// # Errors
    /// `InvalidArgument` for shapes that do not fit.
    pub fn stage_c_predict(&self, x: &Tensor, t: &Tensor, text: &Tensor) -> Result<Tensor> {
        let prior = self.prior()?;
        let network = &prior.stage_c.network;
        let [n, _, _, _] = x.dims_of("x")?;
        expect_channels("x", x, network.config().latent_channels)?;
        check_text(&prior.text, "text", text, n)?;
        let times = check_times(t, n)?;
        self.apart(|cx| {
            let _span = cx.span("stage_c");
            let modulations = network.modulations(cx, times)?;
            let attended = [network.attend_to_text(cx, text)?];
            network.forward(cx, x, Conditioning { modulations: &modulations, attended: &attended })
        })
    }

    /// Stage C's walk with the steps, guidance, sampler and seed of `options`, from `initial_noise` or from
    /// the seed at the options' size. Without a negative text it is guided away from the empty prompt. The result is
    /// what Stage B takes: in v2, 42 times Stage C's own latents, less 1.
    ///
    /// # Shapes
    /// text `[N, T, width]`, negative_text `[N or 1, T, width]`, initial_noise `[N, h, w, C]` -> `[N, h, w, C]`
    ///
    /// # Errors
    /// `InvalidArgument` for shapes that do not fit; `Cancelled`.
    pub fn stage_c_sample(
        &self,
        text: &Tensor,
        negative_text: Option<&Tensor>,
        initial_noise: Option<&Tensor>,
        options: &GenerateOptions,
    ) -> Result<Tensor> {
        let mut noise = SeededNoise::new(seeds(options, text.dims().first().copied().unwrap_or(0)));
        self.stage_c_sample_with(text, negative_text, initial_noise, options, &mut noise)
    }

    /// [`Model::stage_c_sample`] with random numbers of the caller's.
    ///
    /// # Errors
    /// As there, and what the source returns.
    pub fn stage_c_sample_with(
        &self,
        text: &Tensor,
        negative_text: Option<&Tensor>,
        initial_noise: Option<&Tensor>,
        options: &GenerateOptions,
        noise: &mut (dyn NoiseSource + Send),
    ) -> Result<Tensor> {
        let prior = self.prior()?;
        let channels = prior.stage_c.network.config().latent_channels;
        let [n, _, _] = text.dims_of("text")?;
        let mut grid = self.inner.geometry.latent_size(options.width, options.height);
        if let Some(noise) = initial_noise {
            let [_, h, w, _] = noise.dims_of("initial_noise")?;
            expect_batch("initial_noise", noise, n)?;
            expect_channels("initial_noise", noise, channels)?;
            grid = (h, w);
        }
        options.check_init_latents(n)?;
        let started = Instant::now();
        self.apart_with_progress(options, |cancel, report| {
            let cx = self.context_of(options).cancelled_by(cancel);
            let walk = StageCWalk::new(self, options, &cx, grid)?;
            let texts = texts_of_call(&prior.text, &cx, text, negative_text, n, walk.is_guided())?;
            let start =
                initial_noise.map(|x| Tensor::from_parts(&cx, "latents", x.dims(), &[x])).transpose()?;
            let latents = walk.run(0..n, &texts, noise, start, &mut |step| {
                report(&progress(Stage::C, step.done, walk.steps(), started));
                Ok(())
            })?;
            check_finite_latents(&latents, prior)?;
            handed_out(&cx, &latents)
        })
    }
}

/// A result as the caller gets it: on the host, floats as F32 whatever the device computes in.
fn handed_out(cx: &Context, result: &Tensor) -> Result<Tensor> {
    match result.dtype() {
        DType::F16 | DType::BF16 => widen(cx, result)?.detached(),
        _ => result.detached(),
    }
}

/// The texts of a stage-level call. Without a negative one, guidance leads away from the empty prompt.
fn texts_of_call(
    part: &TextPart,
    cx: &Context,
    text: &Tensor,
    negative: Option<&Tensor>,
    n: usize,
    guided: bool,
) -> Result<Texts> {
    check_text(part, "text", text, n)?;
    let unconditional = match (guided, negative) {
        (false, _) => None,
        // In the type that the caller's text has.
        (true, None) => Some((widen(cx, &part.embed(cx, &[""])?)?, vec![0; n])),
        (true, Some(negative)) => {
            let [entries, _, _] = negative.dims_of("negative_text")?;
            let index = if entries == 1 { vec![0; n] } else { (0..n).collect() };
            check_text(part, "negative_text", negative, index.last().map_or(0, |last| last + 1))?;
            Some((negative.clone(), index))
        }
    };
    Ok(Texts { conditional: text.clone(), index: (0..n).collect(), unconditional })
}

fn check_text(part: &TextPart, name: &str, text: &Tensor, n: usize) -> Result<()> {
    let [entries, length, width] = text.dims_of(name)?;
    let expected = part.tower.network.config().width;
    if entries != n || n == 0 || length == 0 || width != expected || text.dtype() != DType::F32 {
        let found = format!("{} of {}", text.shape(), text.dtype());
        let expected = format!("[{}, tokens, {expected}] of F32", n.max(1));
        return Err(Error::argument(name, expected, found));
    }
    Ok(())
}

fn check_times(t: &Tensor, n: usize) -> Result<&[f32]> {
    if t.dims() != [n] {
        return Err(Error::argument("t", format!("shape [{n}]"), t.shape()));
    }
    let times = t.slice::<f32>()?;
    match times.iter().find(|t| !(0.0..=1.0).contains(*t)) {
        Some(time) => Err(Error::argument("t", "times within 0 and 1", time)),
        None => Ok(times),
    }
}

fn expect_batch(name: &str, tensor: &Tensor, n: usize) -> Result<()> {
    match tensor.dims().first() {
        Some(&entries) if entries == n && n > 0 => Ok(()),
        _ => Err(Error::argument(name, format!("{n} samples, at least one"), tensor.shape())),
    }
}

/// # Errors
/// `InvalidArgument` unless the tensor is `F32 [N, h, w, channels]` and not empty.
fn expect_channels(name: &str, tensor: &Tensor, channels: usize) -> Result<()> {
    let [_, _, _, found] = tensor.dims_of(name)?;
    if found != channels || tensor.elements() == 0 || tensor.dtype() != DType::F32 {
        let found = format!("{} of {}", tensor.shape(), tensor.dtype());
        return Err(Error::argument(name, format!("F32 with {channels} channels"), found));
    }
    Ok(())
}

fn common_size(images: &[&Image]) -> Result<(u32, u32)> {
    let size = |image: &Image| (image.width(), image.height());
    let Some(first) = images.first().map(|image| size(image)) else {
        return Err(Error::argument("images", "at least one", 0));
    };
    match images.iter().map(|image| size(image)).find(|other| *other != first) {
        Some((width, height)) => {
            let expected = format!("pictures of one size, {} x {} like the first", first.0, first.1);
            Err(Error::argument("images", expected, format!("{width} x {height}")))
        }
        None => Ok(first),
    }
}

fn seeds(options: &GenerateOptions, n: usize) -> Vec<u64> {
    (0..n as u64).map(|i| options.seed.wrapping_add(i)).collect()
}

fn progress(stage: Stage, done: usize, steps: usize, started: Instant) -> Progress {
    let seconds = started.elapsed().as_secs_f64();
    Progress { stage, step: done as u32, steps: steps as u32, seconds, preview: None }
}
