//! The decoder of v2: a diffusion model of Stage A's latents, in the place of Stage B (diffusers,
//! `WuerstchenDiffNeXt`). A U-Net whose blocks attend to the text and are joined by the image embedding.

use super::blocks::{Attended, Conditioning, Injection, Modulations, channel_norm_in_place};
use super::unet::{LevelConfig, UNet, UNetConfig, check_grid, grid_multiple, level_grid};
use crate::device::Context;
use crate::error::{Error, Result};
use crate::nn::{Linear, Params};
use crate::ops::batch::concat;
use crate::ops::noise_head::noise_from_bounded_head;
use crate::ops::pixel_shuffle::{pixel_shuffle, pixel_unshuffle};
use crate::ops::resize::{Corners, Filter, resize};
use crate::tensor::Tensor;

/// The sizes of the decoder. The published one: 4, 16, 1024, 64, 2, 1024, 3, four levels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiffNeXtConfig {
    /// Channels of Stage A's latents.
    pub latent_channels: usize,
    /// Channels of the image embedding.
    pub image_channels: usize,
    /// Channels of the text embedding.
    pub text_width: usize,
    /// Width of the time embedding.
    pub time_width: usize,
    /// Latents per side that become one position.
    pub patch_size: usize,
    /// Channels of the mapped text and of the mapped image embedding.
    pub condition_width: usize,
    /// Kernel of the depthwise convolutions.
    pub kernel: usize,
    /// The levels, from the finest to the deepest.
    pub levels: Vec<LevelConfig>,
    /// Whether the image embedding joins each level.
    pub injects: Vec<bool>,
}

impl DiffNeXtConfig {
    /// Latent grids must be multiples of this in both directions.
    pub fn grid_multiple(&self) -> usize {
        grid_multiple(self.patch_size, &self.levels)
    }

    fn unet(&self) -> UNetConfig<'_> {
        UNetConfig {
            levels: &self.levels,
            condition_width: self.condition_width,
            self_attention: true,
            time_width: self.time_width,
            kernel: self.kernel,
            injects: Some(&self.injects),
        }
    }

    /// The levels in the order in which their blocks are run: down, then up.
    fn runs(&self) -> impl Iterator<Item = usize> + use<> {
        let levels = self.levels.len();
        (0..levels).chain((0..levels).rev())
    }
}

/// Predicts the noise in Stage A's latents from them, the image embedding, the text and the time.
#[derive(Debug)]
pub struct DiffNeXt {
    config: DiffNeXtConfig,
    input: Linear,
    text: Linear,
    /// For each run of blocks the layer that maps the image embedding, where the level has one.
    images: Vec<Option<Linear>>,
    unet: UNet,
    output: Linear,
}

/// Image embeddings as the blocks of a [`DiffNeXt`] take them, at every level of one grid.
#[derive(Debug, Clone)]
pub struct Injected {
    /// One embedding per sample.
    entries: usize,
    /// Rows and columns of the latents.
    grid: [usize; 2],
    /// Per run of blocks.
    runs: Vec<Option<Injection>>,
}

impl Injected {
    /// Entry `index[n]` for sample n of a batch. What does not depend on the embedding is shared.
    ///
    /// # Errors
    /// `InvalidArgument` for an entry that is not there, or none at all; `OutOfMemory`.
    pub fn select(&self, cx: &Context, index: &[usize]) -> Result<Self> {
        if index.is_empty() || index.iter().any(|&i| i >= self.entries) {
            let expected = format!("numbers below {}", self.entries);
            return Err(Error::argument("image embeddings of a batch", expected, format!("{index:?}")));
        }
        let mut selected = self.clone();
        selected.entries = index.len();
        if index.iter().copied().eq(0..self.entries) {
            return Ok(selected);
        }
        let levels = self.runs.len() / 2;
        for run in 0..self.runs.len() {
            // The levels on the way up see what they saw on the way down.
            let twin = self.runs.len() - 1 - run;
            let image = match (&self.runs[run], &selected.runs[twin]) {
                (Some(_), Some(twin)) if run >= levels => twin.image.clone(),
                (Some(injection), _) => {
                    let of_samples = index.iter().map(|&i| injection.image.narrow(i, 1));
                    let of_samples = of_samples.collect::<Result<Vec<_>>>()?;
                    concat(cx, &of_samples.iter().collect::<Vec<_>>())?
                }
                (None, _) => continue,
            };
            if let Some(injection) = &mut selected.runs[run] {
                injection.image = image;
            }
        }
        Ok(selected)
    }
}

impl DiffNeXt {
    /// # Errors
    /// `Format` for missing or misshapen weights; `InvalidArgument` for a config without levels or with another
    /// number of `injects`.
    pub fn load(p: &Params, config: DiffNeXtConfig) -> Result<Self> {
        let Some(finest) = config.levels.first().map(|level| level.channels) else {
            return Err(Error::argument("decoder levels", "at least one", 0));
        };
        if config.injects.len() != config.levels.len() {
            let expected = format!("{} elements, as levels", config.levels.len());
            return Err(Error::argument("decoder injects", expected, config.injects.len()));
        }
        let patch = config.patch_size * config.patch_size;
        let latents = config.latent_channels * patch;
        let mapper = |(run, level): (usize, usize)| match config.injects[level] {
            true => {
                let p = p.sub("images").sub(run);
                Linear::load_conv1x1(&p, config.image_channels, config.condition_width).map(Some)
            }
            false => Ok(None),
        };
        Ok(DiffNeXt {
            input: Linear::load_conv1x1(&p.sub("input"), latents, finest)?,
            text: Linear::load(&p.sub("text"), config.text_width, config.condition_width)?,
            images: config.runs().enumerate().map(mapper).collect::<Result<_>>()?,
            unet: UNet::load(p, &config.unet())?,
            output: Linear::load_conv1x1(&p.sub("output"), finest, 2 * latents)?,
            config,
        })
    }

    /// The sizes.
    pub fn config(&self) -> &DiffNeXtConfig {
        &self.config
    }

    /// What the TimestepBlocks do at each of `times`, in 0..1.
    ///
    /// # Errors
    /// `OutOfMemory`; `Cancelled`.
    pub fn modulations(&self, cx: &Context, times: &[f32]) -> Result<Modulations> {
        self.unet.modulations(cx, times)
    }

    /// Keys and values of LN(Linear(text)) for every AttnBlock. The image embedding has none.
    ///
    /// # Shapes
    /// text `[entries, T, text_width]`
    ///
    /// # Errors
    /// `InvalidArgument` for another width; `OutOfMemory`; `Cancelled`.
    pub fn attend_to_text(&self, cx: &Context, text: &Tensor) -> Result<Attended> {
        self.unet.attend(cx, &self.text.forward(cx, text)?)
    }

    /// Image embeddings for latents of `grid` = (rows, columns): resized to each level (bicubic, antialiased,
    /// corners kept in place), and the layers that they go through, folded.
    ///
    /// # Shapes
    /// image `[entries, h, w, image_channels]`
    ///
    /// # Errors
    /// `InvalidArgument` for another number of channels, an empty embedding, or a grid that does not divide;
    /// `OutOfMemory`; `Cancelled`.
    pub fn inject(&self, cx: &Context, image: &Tensor, grid: (usize, usize)) -> Result<Injected> {
        let _span = cx.span("injection");
        let grid = [grid.0, grid.1];
        check_grid("decoder latents", grid, self.config.grid_multiple())?;
        let [entries, _, _, channels] = image.dims_of("image embedding")?;
        if channels != self.config.image_channels {
            let expected = format!("[N, h, w, {}]", self.config.image_channels);
            return Err(Error::argument("image embedding", expected, image.shape()));
        }
        let finest = grid.map(|side| side / self.config.patch_size);
        let resized = self.config.injects.iter().enumerate().map(|(level, &injects)| match injects {
            true => {
                let size = level_grid(finest, level);
                resize(cx, image, size, Filter::Bicubic, Corners::Centres).map(Some)
            }
            false => Ok(None),
        });
        let resized = resized.collect::<Result<Vec<_>>>()?;
        let runs = self.config.runs().zip(self.unet.runs().zip(&self.images));
        let runs = runs.map(|(level, (blocks, mapper))| match (mapper, &resized[level]) {
            (Some(mapper), Some(image)) => blocks.inject(cx, mapper, image.clone()).map(Some),
            _ => Ok(None),
        });
        Ok(Injected { entries, grid, runs: runs.collect::<Result<_>>()? })
    }

    /// The noise in `x`.
    ///
    /// # Shapes
    /// `[N, H, W, latent_channels] -> [N, H, W, latent_channels]`; `injected` has N entries for H x W
    ///
    /// # Errors
    /// `InvalidArgument` for other shapes; `OutOfMemory`; `Cancelled`.
    pub fn forward(
        &self,
        cx: &Context,
        x: &Tensor,
        conditioning: Conditioning,
        injected: &Injected,
    ) -> Result<Tensor> {
        let [n, h, w, channels] = x.dims_of("decoder latents")?;
        check_grid("decoder latents", [h, w], self.config.grid_multiple())?;
        if channels != self.config.latent_channels {
            let expected = format!("[N, H, W, {}]", self.config.latent_channels);
            return Err(Error::argument("decoder latents", expected, x.shape()));
        }
        if (injected.entries, injected.grid) != (n, [h, w]) {
            let [rows, columns] = injected.grid;
            let found = format!("{} for {rows} x {columns}", injected.entries);
            return Err(Error::argument("image embeddings", format!("{n} for latents of {h} x {w}"), found));
        }
        let patches = pixel_unshuffle(cx, x, self.config.patch_size)?;
        let hidden = channel_norm_in_place(cx, self.input.forward(cx, &patches)?)?;
        drop(patches);
        let hidden = self.unet.forward(cx, hidden, &injected.runs, conditioning)?;
        let head = self.output.forward_f32(cx, &channel_norm_in_place(cx, hidden)?)?;
        noise_from_bounded_head(cx, x, &pixel_shuffle(cx, &head, self.config.patch_size)?)
    }
}
