//! Runs of blocks, as a level string such as `CTA` names them.

use super::attention::{Attended, AttnBlock, AttnConfig, KeysAndValues};
use super::residual::{FeedForwardBlock, FoldedImage, InjectedResBlock, ResBlock, mapper_rows};
use super::{Conditioning, Modulations, TimestepBlock, timestep_embedding};
use crate::device::Context;
use crate::error::{Error, Result};
use crate::nn::{Linear, Params};
use crate::ops::elementwise::{activate, modulate};
use crate::ops::linear::Activation;
use crate::ops::widen::widen;
use crate::tensor::Tensor;
use crate::tensor::autograd::{recompute, recomputes};

// A network has a hundred at most: boxing them would save nothing that matters.
#[allow(clippy::large_enum_variant)]
#[derive(Debug, Clone)]
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

/// A block with the TimestepBlock that follows it, if one does. Clones share the weights.
#[derive(Debug, Clone)]
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

/// What one block takes.
struct Inputs<'a> {
    x: &'a Tensor,
    skip: Option<&'a Tensor>,
    image: Option<(&'a Tensor, &'a FoldedImage)>,
    modulation: Option<&'a Tensor>,
    /// For an AttnBlock, its groups of tokens, and which entry each sample attends to.
    attended: Vec<(&'a KeysAndValues, &'a [usize])>,
}

impl Body {
    /// What its span is called.
    fn name(&self) -> &'static str {
        match self {
            Body::Res(_) | Body::InjectedRes(_) => "res_block",
            Body::FeedForward(_) => "feed_forward_block",
            Body::Attn { .. } => "attn_block",
            Body::Identity => "timestep_block",
        }
    }
}

impl Block {
    fn attended<'a>(&self, conditioning: Conditioning<'a>) -> Vec<(&'a KeysAndValues, &'a [usize])> {
        match self.body {
            Body::Attn { ordinal, .. } => {
                let groups = conditioning.attended.iter();
                groups.map(|a| (&a.keys_and_values[ordinal], a.index.as_slice())).collect()
            }
            _ => Vec::new(),
        }
    }

    fn forward(&self, cx: &Context, inputs: &Inputs) -> Result<Tensor> {
        let &Inputs { x, skip, image, modulation, ref attended } = inputs;
        match &self.body {
            Body::Res(res) => res.forward(cx, x, skip, modulation),
            Body::InjectedRes(res) => res.forward(cx, x, skip, image, modulation),
            Body::FeedForward(mlp) => mlp.forward(cx, x, modulation),
            Body::Attn { block, .. } => block.forward(cx, x, attended.iter().copied(), modulation),
            Body::Identity => match modulation {
                Some(modulation) => modulate(cx, x.clone(), modulation),
                None => Ok(x.clone()),
            },
        }
    }

    /// [`Block::forward`] as one unit of a tape that keeps what goes into a block and runs it again.
    fn forward_kept(&self, cx: &Context, inputs: &Inputs) -> Result<Tensor> {
        if inputs.image.is_some() || !recomputes(cx) {
            return self.forward(cx, inputs);
        }
        let mut kept = vec![Some(inputs.x), inputs.skip, inputs.modulation];
        kept.extend(inputs.attended.iter().flat_map(|(tokens, _)| tokens.both().map(Some)));
        let indices: Vec<Vec<usize>> = inputs.attended.iter().map(|(_, index)| index.to_vec()).collect();
        let block = self.clone();
        recompute(cx, &kept, move |cx, kept| {
            let [Some(x), skip, modulation, tokens @ ..] = kept else {
                return Err(Error::internal("a block", "its input was not kept"));
            };
            let tokens: Vec<KeysAndValues> =
                tokens.chunks_exact(2).filter_map(|pair| KeysAndValues::of(&pair[0], &pair[1])).collect();
            let attended = tokens.iter().zip(indices.iter().map(Vec::as_slice)).collect();
            let (skip, modulation) = (skip.as_ref(), modulation.as_ref());
            block.forward(cx, &Inputs { x, skip, image: None, modulation, attended })
        })
    }
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
        // What a block adds to x is small beside it, and the next one normalises it: it bears less exact products than
        // what goes into a network, comes out of it or steers it.
        let cx = &cx.coarse();
        let mut folded = joined.injection.map_or([].iter(), |i| i.folded.iter());
        for (i, block) in self.blocks.iter().enumerate() {
            let image = match block.body {
                Body::InjectedRes(_) => joined.injection.map(|i| &i.image).zip(folded.next()),
                _ => None,
            };
            let _span = cx.span_of(block.body.name(), i);
            let inputs = Inputs {
                x: &x,
                skip: joined.skip.filter(|_| i == 0),
                image,
                modulation: block.modulated_by.map(|m| &conditioning.modulations.0[m]),
                attended: block.attended(conditioning),
            };
            x = block.forward_kept(cx, &inputs)?;
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
        let _span = cx.span("modulations");
        let embedded = timestep_embedding(cx, times, time_width)?;
        // Widened once: every step reads them so.
        let mapped = self.timesteps.iter().map(|block| widen(cx, &block.mapper.forward(cx, &embedded)?));
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
    let _span = cx.span("keys_and_values");
    let [entries, _, _] = condition.dims_of("conditioning")?;
    let activated = activate(cx, condition.clone(), Activation::Silu)?;
    let keys_and_values = runs
        .flat_map(Blocks::attentions)
        .map(|block| block.keys_and_values(cx, &activated))
        .collect::<Result<_>>()?;
    Ok(Attended { keys_and_values, index: (0..entries).collect() })
}
