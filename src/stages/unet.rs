//! The U-Net that Stage B and v2's decoder have in common: levels of blocks, the grid halved between them.

use super::blocks::{
    Attended, AttnConfig, Blocks, Conditioning, Injection, Invariants, Joined, Joining, Modulations,
    RunConfig, attend, channel_norm, channel_norm_in_place,
};
use crate::device::Context;
use crate::error::{Error, Result};
use crate::nn::{Linear, Params};
use crate::ops::linear::{Epilogue, linear_transposed};
use crate::ops::pixel_shuffle::{pixel_shuffle, pixel_unshuffle};
use crate::ops::repeat::repeat_each;
use crate::tensor::Tensor;

/// Between two levels the grid shrinks by this factor.
const LEVEL_STRIDE: usize = 2;

/// One level of a U-Net.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LevelConfig {
    /// One letter per block: C, T, A, F.
    pub letters: String,
    /// How often the letters are repeated.
    pub repeats: usize,
    /// Channels.
    pub channels: usize,
    /// Attention heads; 1 where there is no attention.
    pub heads: usize,
}

/// The sizes of a U-Net.
#[derive(Debug, Clone, Copy)]
pub(super) struct UNetConfig<'a> {
    /// From the finest to the deepest.
    pub levels: &'a [LevelConfig],
    /// Channels of the tokens that blocks attend to.
    pub condition_width: usize,
    /// Whether positions attend to each other.
    pub self_attention: bool,
    /// Width of the time embedding.
    pub time_width: usize,
    /// Kernel of the depthwise convolutions.
    pub kernel: usize,
    /// Whether image embeddings join each level; without the list, skips join before the convolutions.
    pub injects: Option<&'a [bool]>,
}

impl UNetConfig<'_> {
    fn run(&self, level: usize) -> RunConfig<'_> {
        let LevelConfig { letters, repeats, channels, heads } = &self.levels[level];
        RunConfig {
            letters,
            repeats: *repeats,
            attn: AttnConfig {
                channels: *channels,
                condition_width: self.condition_width,
                heads: *heads,
                self_attention: self.self_attention,
            },
            time_width: self.time_width,
            kernel: self.kernel,
            joining: match self.injects.map(|injects| injects.get(level)) {
                None => Joining::BeforeConvolution,
                Some(Some(true)) => Joining::AfterNorm { image_width: self.condition_width },
                Some(_) => Joining::AfterNorm { image_width: 0 },
            },
            skip_channels: 0,
            first: 0,
        }
    }
}

/// Grids before a `patch_size` must be multiples of this in both directions.
pub(super) fn grid_multiple(patch_size: usize, levels: &[LevelConfig]) -> usize {
    patch_size * LEVEL_STRIDE.pow(levels.len().saturating_sub(1) as u32)
}

/// # Errors
/// `InvalidArgument`, saying which multiple `what` must have, unless both sides have it.
pub(super) fn check_grid(what: &str, [h, w]: [usize; 2], multiple: usize) -> Result<()> {
    if h == 0 || w == 0 || !h.is_multiple_of(multiple) || !w.is_multiple_of(multiple) {
        return Err(Error::argument(
            what,
            format!("a grid in multiples of {multiple}"),
            format!("{h} x {w}"),
        ));
    }
    Ok(())
}

/// The runs of blocks on the way down and up, and what lies between them.
#[derive(Debug)]
pub(super) struct UNet {
    down: Vec<DownLevel>,
    up: Vec<UpLevel>,
    invariants: Invariants,
    time_width: usize,
}

/// A level on the way down: the grid shrinks first, except at the finest.
#[derive(Debug)]
struct DownLevel {
    resample: Option<Linear>,
    blocks: Blocks,
}

/// A level on the way up: the grid grows last, except at the finest.
#[derive(Debug)]
struct UpLevel {
    blocks: Blocks,
    resample: Option<Upsample>,
}

impl UNet {
    /// Reads `down.0`, … from the finest level and `up.0`, … from the deepest.
    ///
    /// # Errors
    /// `Format` for missing or misshapen weights; `InvalidArgument` for a config without levels.
    pub fn load(p: &Params, config: &UNetConfig) -> Result<Self> {
        if config.levels.is_empty() {
            return Err(Error::argument("levels", "at least one", 0));
        }
        let mut invariants = Invariants::default();
        let down = Self::load_down(&p.sub("down"), config, &mut invariants)?;
        let up = Self::load_up(&p.sub("up"), config, &mut invariants)?;
        Ok(UNet { down, up, invariants, time_width: config.time_width })
    }

    fn load_down(p: &Params, config: &UNetConfig, invariants: &mut Invariants) -> Result<Vec<DownLevel>> {
        let mut levels = Vec::with_capacity(config.levels.len());
        for (i, level) in config.levels.iter().enumerate() {
            let p = p.sub(i);
            let resample = match i.checked_sub(1) {
                Some(finer) => {
                    let inputs = config.levels[finer].channels;
                    Some(load_downsample(&p.sub("resample"), inputs, level.channels)?)
                }
                None => None,
            };
            levels.push(DownLevel { resample, blocks: Blocks::load(&p, &config.run(i), invariants)? });
        }
        Ok(levels)
    }

    fn load_up(p: &Params, config: &UNetConfig, invariants: &mut Invariants) -> Result<Vec<UpLevel>> {
        let deepest = config.levels.len() - 1;
        let mut levels = Vec::with_capacity(config.levels.len());
        for (u, i) in (0..=deepest).rev().enumerate() {
            let p = p.sub(u);
            let channels = config.levels[i].channels;
            let skip_channels = if i < deepest { channels } else { 0 };
            let run = RunConfig { skip_channels, ..config.run(i) };
            let blocks = Blocks::load(&p, &run, invariants)?;
            let resample = match i.checked_sub(1) {
                Some(finer) => {
                    let outputs = config.levels[finer].channels;
                    Some(Upsample::load(&p.sub("resample"), channels, outputs)?)
                }
                None => None,
            };
            levels.push(UpLevel { blocks, resample });
        }
        Ok(levels)
    }

    /// The runs of blocks in the order in which they are run: the levels down, then up.
    pub fn runs(&self) -> impl Iterator<Item = &Blocks> {
        self.down.iter().map(|l| &l.blocks).chain(self.up.iter().map(|l| &l.blocks))
    }

    /// What the TimestepBlocks do at each of `times`.
    ///
    /// # Errors
    /// `OutOfMemory`; `Cancelled`.
    pub fn modulations(&self, cx: &Context, times: &[f32]) -> Result<Modulations> {
        self.invariants.modulations(cx, times, self.time_width)
    }

    /// Keys and values of LN(condition) for every AttnBlock.
    ///
    /// # Shapes
    /// condition `[entries, T, condition_width]`
    ///
    /// # Errors
    /// `InvalidArgument` for another width; `OutOfMemory`; `Cancelled`.
    pub fn attend(&self, cx: &Context, condition: &Tensor) -> Result<Attended> {
        attend(cx, self.runs(), &channel_norm(cx, condition)?)
    }

    /// `injections` holds for every run what joins its blocks; runs beyond its end have none.
    ///
    /// # Shapes
    /// `[N, H, W, C] -> [N, H, W, C]` with the channels of the finest level
    ///
    /// # Errors
    /// `InvalidArgument` for shapes that do not fit; `OutOfMemory`; `Cancelled`.
    pub fn forward(
        &self,
        cx: &Context,
        mut x: Tensor,
        injections: &[Option<Injection>],
        conditioning: Conditioning,
    ) -> Result<Tensor> {
        let injection = |run: usize| injections.get(run).and_then(Option::as_ref);
        let mut skips = Vec::with_capacity(self.down.len());
        for (i, level) in self.down.iter().enumerate() {
            let _span = cx.span_of("down", i);
            if let Some(resample) = &level.resample {
                let patches = pixel_unshuffle(cx, &channel_norm(cx, &x)?, LEVEL_STRIDE)?;
                x = resample.forward(cx, &patches)?;
            }
            let joined = Joined { skip: None, injection: injection(i) };
            x = level.blocks.forward(cx, x, joined, conditioning)?;
            skips.push(x.clone());
        }
        // The deepest level's output is x itself, not a skip.
        skips.pop();
        for (u, level) in self.up.iter().enumerate() {
            let _span = cx.span_of("up", u);
            let skip = if u == 0 { None } else { skips.pop() };
            let joined = Joined { skip: skip.as_ref(), injection: injection(self.down.len() + u) };
            x = level.blocks.forward(cx, x, joined, conditioning)?;
            if let Some(resample) = &level.resample {
                x = resample.forward(cx, &channel_norm_in_place(cx, x)?)?;
            }
        }
        Ok(x)
    }
}

/// The grid of level `level` under a grid of the finest.
pub(super) fn level_grid(finest: [usize; 2], level: usize) -> [usize; 2] {
    finest.map(|side| side / LEVEL_STRIDE.pow(level as u32))
}

/// A convolution whose kernel is its stride: a pixel unshuffle, whose channel order is the checkpoint's own,
/// then a product.
fn load_downsample(p: &Params, inputs: usize, outputs: usize) -> Result<Linear> {
    let weight = p.tensor("weight", &[outputs, inputs, LEVEL_STRIDE, LEVEL_STRIDE])?;
    let weight = weight.reshape(&[outputs, inputs * LEVEL_STRIDE * LEVEL_STRIDE])?;
    Ok(Linear::from_parts(weight, Some(p.tensor("bias", &[outputs])?)))
}

/// A transposed convolution whose kernel is its stride: a product, then a pixel shuffle.
#[derive(Debug)]
struct Upsample {
    /// `[inputs, outputs * stride^2]`: the checkpoint's own order, as it is the pixel shuffle's.
    weight: Tensor,
    bias: Tensor,
}

impl Upsample {
    fn load(p: &Params, inputs: usize, outputs: usize) -> Result<Self> {
        let weight = p.tensor("weight", &[inputs, outputs, LEVEL_STRIDE, LEVEL_STRIDE])?;
        let weight = weight.reshape(&[inputs, outputs * LEVEL_STRIDE * LEVEL_STRIDE])?;
        Ok(Upsample { weight, bias: p.tensor("bias", &[outputs])? })
    }

    fn forward(&self, cx: &Context, x: &Tensor) -> Result<Tensor> {
        // Each output channel is spread over a patch: so is its bias.
        let bias = repeat_each(cx, &self.bias, LEVEL_STRIDE * LEVEL_STRIDE)?;
        let then = Epilogue { bias: Some(&bias), ..Epilogue::default() };
        pixel_shuffle(cx, &linear_transposed(cx, x, &self.weight, &then)?, LEVEL_STRIDE)
    }
}
