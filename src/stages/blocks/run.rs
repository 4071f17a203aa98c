//! Runs of blocks, as a level string such as `CTA` names them.

use super::attention::{Attended, AttnBlock, AttnConfig};
use super::residual::{FeedForwardBlock, FoldedImage, InjectedResBlock, ResBlock, mapper_rows};
use super::{Conditioning, Modulations, TimestepBlock, timestep_embedding};
use crate::device::Context;
use crate::error::{Error, Result};
use crate::nn::{Linear, Params};
use crate::ops::elementwise::{activate, modulate};
use crate::ops::linear::Activation;
use crate::tensor::Tensor;

#[derive(Debug)]
enum Body {
    Res(ResBlock),
    InjectedRes(InjectedResBlock),
    FeedForward(FeedForwardBlock),
    Attn {
        block: AttnBlock,
        ordinal: usize,
    },
    /// A level that starts with a TimestepBlock: nothing comes before its modulation.
    Identity,
}

/// A block with the TimestepBlock that follows it, if one does.
#[derive(Debug)]
struct Block {
    body: Body,
    /// Ordinal of the following TimestepBlock within the network.
    modulated_by: Option<usize>,
}

/// A run of blocks as a level string such as `CTA` names them.
#[derive(Debug)]
pub struct Blocks {
    blocks: Vec<Block>,
}

/// Collects the TimestepBlocks and AttnBlocks of a network while its runs are loaded: their step-invariant
/// parts are computed for all of them at once.
#[derive(Debug, Default)]
pub struct Invariants {
    timesteps: Vec<TimestepBlock>,
    attentions: usize,
}

/// Where a `C` block takes in what joins its input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Joining {
    /// Before the convolution: [`ResBlock`].
    BeforeConvolution,
    /// After its LayerNorm: [`InjectedResBlock`], with the channels of the mapped image embedding that joins
    /// every `C` block; 0 if none does.
    AfterNorm {
        /// The channels.
        image_width: usize,
    },
}

/// The sizes of a run of blocks.
#[derive(Debug, Clone, Copy)]
pub struct RunConfig<'a> {
    /// One letter per block: C(onvolution), T(imestep), A(ttention), F(eed-forward).
    pub letters: &'a str,
    /// How often the letters are repeated.
    pub repeats: usize,
    /// Channels and attention; `heads` is only looked at where there is an `A`.
    pub attn: AttnConfig,
    /// Width of the time embedding.
    pub time_width: usize,
    /// Kernel of the depthwise convolutions.
    pub kernel: usize,
    /// How channels join a `C`.
    pub joining: Joining,
    /// Channels that join the first block, if that is a `C`.
    pub skip_channels: usize,
    /// Number of the first block within its level.
    pub first: usize,
}

/// What joins the input of a run's `C` blocks.
#[derive(Debug, Clone, Copy, Default)]
pub struct Joined<'a> {
    /// Joins the first block, if that is a `C`.
    pub skip: Option<&'a Tensor>,
    /// Joins all of them.
    pub injection: Option<&'a Injection>,
}

/// An image embedding as the `C` blocks of one run take it.
#[derive(Debug, Clone)]
pub struct Injection {
    /// The embedding at the size of the run's input, `[N, H, W, image channels]`.
    pub image: Tensor,
    /// For every `C` block, in order.
    pub folded: Vec<FoldedImage>,
}

impl Blocks {
    /// Reads blocks `p.first`, `p.first + 1`, …
    ///
    /// # Errors
    /// `Format` for missing or misshapen weights; `InvalidArgument` for an unknown letter.
    pub fn load(p: &Params, config: &RunConfig, invariants: &mut Invariants) -> Result<Self> {
        let channels = config.attn.channels;
        let mut blocks: Vec<Block> = Vec::new();
        let letters = (0..config.repeats).flat_map(|_| config.letters.chars());
        for (i, letter) in letters.enumerate() {
            let p = p.sub(config.first + i);
            let body = match letter {
                'T' => {
                    let timestep = TimestepBlock::load(&p, channels, config.time_width)?;
                    invariants.timesteps.push(timestep);
                    let ordinal = Some(invariants.timesteps.len() - 1);
                    match blocks.last_mut() {
                        Some(last) if last.modulated_by.is_none() => last.modulated_by = ordinal,
                        _ => blocks.push(Block { body: Body::Identity, modulated_by: ordinal }),
                    }
                    continue;
                }
                'C' => {
                    let skip = if i == 0 { config.skip_channels } else { 0 };
                    let kernel = config.kernel;
                    match config.joining {
                        Joining::BeforeConvolution => Body::Res(ResBlock::load(&p, channels, skip, kernel)?),
                        Joining::AfterNorm { image_width } => {
                            let block = InjectedResBlock::load(&p, channels, skip, image_width, kernel)?;
                            Body::InjectedRes(block)
                        }
                    }
                }
                'F' => Body::FeedForward(FeedForwardBlock::load(&p, channels)?),
                'A' => {
                    invariants.attentions += 1;
                    let block = AttnBlock::load(&p, &config.attn)?;
                    Body::Attn { block, ordinal: invariants.attentions - 1 }
                }
                other => return Err(Error::argument("level_config", "letters of C, T, A and F", other)),
            };
            blocks.push(Block { body, modulated_by: None });
        }
        Ok(Blocks { blocks })
    }

    /// # Shapes
    /// `[N, H, W, C] -> [N, H, W, C]`
    ///
    /// # Errors
    /// `InvalidArgument` for shapes that do not fit; `OutOfMemory`; `Cancelled`.
    pub fn forward(
        &self,
        cx: &Context,
        mut x: Tensor,
        joined: Joined,
        conditioning: Conditioning,
    ) -> Result<Tensor> {
        let mut folded = joined.injection.map_or([].iter(), |i| i.folded.iter());
        for (i, block) in self.blocks.iter().enumerate() {
            let modulation = block.modulated_by.map(|m| &conditioning.modulations.0[m]);
            let skip = joined.skip.filter(|_| i == 0);
            x = match &block.body {
                Body::Res(res) => res.forward(cx, &x, skip, modulation)?,
                Body::InjectedRes(res) => {
                    let image = joined.injection.map(|i| &i.image).zip(folded.next());
                    res.forward(cx, &x, skip, image, modulation)?
                }
                Body::FeedForward(mlp) => mlp.forward(cx, &x, modulation)?,
                Body::Attn { block, ordinal } => {
                    let attended = conditioning.attended.iter();
                    let attended = attended.map(|a| (&a.keys_and_values[*ordinal], a.index.as_slice()));
                    block.forward(cx, &x, attended, modulation)?
                }
                Body::Identity => match modulation {
                    Some(modulation) => modulate(cx, x, modulation)?,
                    None => x,
                },
            };
        }
        Ok(x)
    }

    /// What `image`, through the 1x1 convolution `mapper`, brings to these blocks.
    ///
    /// # Shapes
    /// image `[N, H, W, image channels]` at the size of the run's input
    ///
    /// # Errors
    /// `InvalidArgument` for a mapper of another width; `OutOfMemory`; `Cancelled`.
    pub fn inject(&self, cx: &Context, mapper: &Linear, image: Tensor) -> Result<Injection> {
        let rows = mapper_rows(cx, mapper)?;
        let blocks = self.blocks.iter().filter_map(|b| match &b.body {
            Body::InjectedRes(res) => Some(res),
            _ => None,
        });
        let folded = blocks.map(|block| block.fold(cx, &rows)).collect::<Result<_>>()?;
        Ok(Injection { image, folded })
    }

    fn attentions(&self) -> impl Iterator<Item = &AttnBlock> {
        self.blocks.iter().filter_map(|b| match &b.body {
            Body::Attn { block, .. } => Some(block),
            _ => None,
        })
    }
}

impl Invariants {
    /// What every TimestepBlock does at each of `times`.
    ///
    /// # Errors
    /// `OutOfMemory`; `Cancelled`.
    pub fn modulations(&self, cx: &Context, times: &[f32], time_width: usize) -> Result<Modulations> {
        let embedded = timestep_embedding(cx, times, time_width)?;
        let mapped = self.timesteps.iter().map(|block| block.mapper.forward(cx, &embedded));
        Ok(Modulations(mapped.collect::<Result<_>>()?))
    }
}

/// The keys and values of `condition` for every AttnBlock of `runs`, in the order they were loaded. Sample n
/// attends to entry n until [`Attended::with_index`] says otherwise.
///
/// # Shapes
/// condition `[entries, T, condition_width]`
///
/// # Errors
/// `InvalidArgument` for another width; `OutOfMemory`; `Cancelled`.
pub fn attend<'a>(
    cx: &Context,
    runs: impl Iterator<Item = &'a Blocks>,
    condition: &Tensor,
) -> Result<Attended> {
    let [entries, _, _] = condition.dims_of("conditioning")?;
    let activated = activate(cx, condition.clone(), Activation::Silu)?;
    let keys_and_values = runs
        .flat_map(Blocks::attentions)
        .map(|block| block.keys_and_values(cx, &activated))
        .collect::<Result<_>>()?;
    Ok(Attended { keys_and_values, index: (0..entries).collect() })
}
