//! The blocks that Stage B and Stage C share: ResBlock, TimestepBlock, AttnBlock, FeedForwardBlock.
//!
//! What does not change from step to step is computed apart from `forward`, once per generation: a
//! TimestepBlock's [`Modulations`] for all times, and an AttnBlock's keys and values of the conditioning
//! ([`Attended`]). The results are the same; the work is not done again.

use crate::device::Context;
use crate::error::{Error, Result};
use crate::nn::{Linear, Params};
use crate::ops::attention::{Columns, KeyValues, Mask, attention};
use crate::ops::depthwise_conv::{DepthwiseConv, Padding, Then, depthwise_conv};
use crate::ops::elementwise::{activate, modulate};
use crate::ops::layer_norm::{LayerNorm, layer_norm};
use crate::ops::linear::{Activation, Epilogue};
use crate::ops::response_norm::response_norm;
use crate::tensor::{DType, Tensor};

/// All LayerNorms of Stage B and C: over channels, without weights.
pub const NORM_EPS: f32 = 1e-6;

/// Times in 0..1 are spread over as many positions before they are embedded.
const TIME_POSITIONS: f32 = 10_000.0;

/// LayerNorm over channels without weights.
///
/// # Errors
/// `OutOfMemory`; `Cancelled`.
pub fn channel_norm(cx: &Context, x: &Tensor) -> Result<Tensor> {
    layer_norm(cx, x, &LayerNorm { eps: NORM_EPS, ..LayerNorm::default() })
}

/// The sinusoidal embedding of times: concat(sin(t f), cos(t f)), f_i = exp(-i ln(10000) / (width/2 - 1)), a
/// zero appended if the width is odd.
///
/// Computed in `f32` like the reference: the phase is up to 10,000, and a wider type would move the sine by up
/// to 6e-4 against the embedding that the networks were trained with.
///
/// # Shapes
/// times `[N]` -> `[N, width]`
///
/// # Errors
/// `OutOfMemory`.
pub fn timestep_embedding(cx: &Context, times: &[f32], width: usize) -> Result<Tensor> {
    let half = width / 2;
    let decay = -((TIME_POSITIONS as f64).ln() / (half as f64 - 1.0)) as f32;
    let mut embedded = Tensor::zeros(cx, "timestep embedding", &[times.len(), width], DType::F32)?;
    for (row, &time) in embedded.slice_mut::<f32>()?.chunks_exact_mut(width).zip(times) {
        for i in 0..half {
            let frequency = ((i as f32 * decay) as f64).exp() as f32;
            let phase = (time * TIME_POSITIONS * frequency) as f64;
            row[i] = phase.sin() as f32;
            row[half + i] = phase.cos() as f32;
        }
    }
    Ok(embedded)
}

/// x + Linear(GRN(GELU(Linear(LN(depthwise(concat(x, skip))))))) (ConvNeXt V2 block).
#[derive(Debug)]
pub struct ResBlock {
    depthwise_weight: Tensor,
    depthwise_bias: Tensor,
    mlp: ResponseMlp,
}

impl ResBlock {
    /// Reads a block of `channels` that takes `skip_channels` more beside its input.
    ///
    /// # Errors
    /// `Format` for missing or misshapen weights.
    pub fn load(p: &Params, channels: usize, skip_channels: usize, kernel: usize) -> Result<Self> {
        // groups = channels: with a skip each output channel sees (channels + skip) / channels inputs.
        let per_group = (channels + skip_channels) / channels;
        let depthwise = p.sub("depthwise");
        Ok(ResBlock {
            depthwise_weight: depthwise.tensor("weight", &[channels, per_group, kernel, kernel])?,
            depthwise_bias: depthwise.tensor("bias", &[channels])?,
            mlp: ResponseMlp::load(p, channels)?,
        })
    }

    /// # Shapes
    /// x `[N, H, W, C]`, skip `[N, H, W, S]` -> `[N, H, W, C]`
    ///
    /// # Errors
    /// `InvalidArgument` for other shapes; `OutOfMemory`; `Cancelled`.
    pub fn forward(
        &self,
        cx: &Context,
        x: &Tensor,
        skip: Option<&Tensor>,
        modulation: Option<&Tensor>,
    ) -> Result<Tensor> {
        let conv = DepthwiseConv {
            weight: &self.depthwise_weight,
            bias: Some(&self.depthwise_bias),
            stride: 1,
            padding: Padding::Zero,
            then: Then::LayerNorm { eps: NORM_EPS },
        };
        let mixed = depthwise_conv(cx, x, skip, &conv)?;
        self.mlp.forward(cx, mixed, x, modulation)
    }
}

/// x + Linear(GRN(GELU(Linear(LN(x))))): a ResBlock without its convolution.
#[derive(Debug)]
pub struct FeedForwardBlock {
    mlp: ResponseMlp,
}

impl FeedForwardBlock {
    /// # Errors
    /// `Format` for missing or misshapen weights.
    pub fn load(p: &Params, channels: usize) -> Result<Self> {
        Ok(FeedForwardBlock { mlp: ResponseMlp::load(p, channels)? })
    }

    /// # Shapes
    /// `[N, H, W, C] -> [N, H, W, C]`
    ///
    /// # Errors
    /// `OutOfMemory`; `Cancelled`.
    pub fn forward(&self, cx: &Context, x: &Tensor, modulation: Option<&Tensor>) -> Result<Tensor> {
        self.mlp.forward(cx, channel_norm(cx, x)?, x, modulation)
    }
}

/// The pointwise half of a block: Linear C -> 4C, GELU, global response normalisation, Linear 4C -> C.
#[derive(Debug)]
struct ResponseMlp {
    expand: Linear,
    gamma: Tensor,
    beta: Tensor,
    project: Linear,
}

/// How much wider the hidden layer of a block is.
const EXPANSION: usize = 4;

impl ResponseMlp {
    fn load(p: &Params, channels: usize) -> Result<Self> {
        let hidden = EXPANSION * channels;
        let response = p.sub("response");
        Ok(ResponseMlp {
            expand: Linear::load(&p.sub("expand"), channels, hidden)?,
            gamma: response.tensor("gamma", &[1, 1, 1, hidden])?,
            beta: response.tensor("beta", &[1, 1, 1, hidden])?,
            project: Linear::load(&p.sub("project"), hidden, channels)?,
        })
    }

    /// `modulation` is that of the TimestepBlock that follows: it costs nothing where the sum is written.
    fn forward(
        &self,
        cx: &Context,
        x: Tensor,
        residual: &Tensor,
        modulation: Option<&Tensor>,
    ) -> Result<Tensor> {
        let then = Epilogue { activation: Activation::Gelu, ..Epilogue::default() };
        let hidden = self.expand.forward_then(cx, &x, then)?;
        drop(x);
        let hidden = response_norm(cx, hidden, &self.gamma, &self.beta)?;
        let then = Epilogue { residual: Some(residual), modulation, ..Epilogue::default() };
        self.project.forward_then(cx, &hidden, then)
    }
}

/// x * (1 + a) + b with (a, b) = Linear(embedded time).
#[derive(Debug)]
pub struct TimestepBlock {
    mapper: Linear,
}

impl TimestepBlock {
    /// # Errors
    /// `Format` for missing or misshapen weights.
    pub fn load(p: &Params, channels: usize, time_width: usize) -> Result<Self> {
        Ok(TimestepBlock { mapper: Linear::load(&p.sub("mapper"), time_width, 2 * channels)? })
    }
}

/// x + attention(LN(x), keys and values of x itself and of the conditioning).
#[derive(Debug)]
pub struct AttnBlock {
    condition_mapper: Linear,
    query_key_value: Linear,
    output: Linear,
    channels: usize,
    heads: usize,
    self_attention: bool,
}

impl AttnBlock {
    /// # Errors
    /// `Format` for missing or misshapen weights.
    pub fn load(p: &Params, config: &AttnConfig) -> Result<Self> {
        let channels = config.channels;
        Ok(AttnBlock {
            condition_mapper: Linear::load(&p.sub("condition_mapper"), config.condition_width, channels)?,
            query_key_value: Linear::load(&p.sub("query_key_value"), channels, 3 * channels)?,
            output: Linear::load(&p.sub("output"), channels, channels)?,
            channels,
            heads: config.heads,
            self_attention: config.self_attention,
        })
    }

    /// Keys and values of conditioning tokens: Linear(SiLU(condition)) through this block's projections.
    ///
    /// # Shapes
    /// `[N, T, condition_width] -> [N, T, 2 C]`, keys first
    ///
    /// # Errors
    /// `InvalidArgument` for another width; `OutOfMemory`; `Cancelled`.
    pub fn keys_and_values(&self, cx: &Context, activated_condition: &Tensor) -> Result<Tensor> {
        let mapped = self.condition_mapper.forward(cx, activated_condition)?;
        self.query_key_value.outputs(self.channels, 2 * self.channels)?.forward(cx, &mapped)
    }

    fn forward(
        &self,
        cx: &Context,
        x: &Tensor,
        condition: &[(&Tensor, &[usize])],
        modulation: Option<&Tensor>,
    ) -> Result<Tensor> {
        let [n, h, w, c] = x.dims_of("attention block input")?;
        let normed = channel_norm(cx, x)?.reshape(&[n, h * w, c])?;
        let outputs = if self.self_attention { 3 * c } else { c };
        let projected = self.query_key_value.outputs(0, outputs)?.forward(cx, &normed)?;
        drop(normed);

        let mut segments = Vec::with_capacity(1 + condition.len());
        if self.self_attention {
            segments.push(key_values(&projected, c, None));
        }
        segments.extend(condition.iter().map(|(kv, index)| key_values(kv, 0, Some(index))));
        let query = Columns { tensor: &projected, start: 0 };
        let attended = attention(cx, query, c, self.heads, &segments, Mask::None)?;
        let then = Epilogue { residual: Some(x), modulation, ..Epilogue::default() };
        self.output.forward_then(cx, &attended.reshape(&[n, h, w, c])?, then)
    }
}

/// Keys in `C` columns from `start` on, values in the next `C`.
fn key_values<'a>(tensor: &'a Tensor, start: usize, index: Option<&'a [usize]>) -> KeyValues<'a> {
    let width = tensor.shape().channels();
    // Two halves after the queries, which take `start` columns.
    let channels = (width - start) / 2;
    KeyValues { keys: Columns { tensor, start }, values: Columns { tensor, start: start + channels }, index }
}

/// The sizes of an [`AttnBlock`].
#[derive(Debug, Clone, Copy)]
pub struct AttnConfig {
    /// Channels of x.
    pub channels: usize,
    /// Channels of the conditioning.
    pub condition_width: usize,
    /// Attention heads; divides `channels`.
    pub heads: usize,
    /// Whether x attends to itself too.
    pub self_attention: bool,
}

/// Conditioning tokens as every AttnBlock of a network needs them, and which of them each sample attends to.
#[derive(Debug, Clone)]
pub struct Attended {
    /// Per AttnBlock, `[entries, T, 2 C]`.
    keys_and_values: Vec<Tensor>,
    /// Per sample, an entry.
    index: Vec<usize>,
}

impl Attended {
    /// The same tokens, attended to by other samples: `index` names an entry for each.
    #[must_use]
    pub fn with_index(&self, index: Vec<usize>) -> Self {
        Attended { keys_and_values: self.keys_and_values.clone(), index }
    }
}

/// What the TimestepBlocks of a network do at some times: per block `[times, 2 C]`.
#[derive(Debug, Clone)]
pub struct Modulations(Vec<Tensor>);

impl Modulations {
    /// Those of one time alone, for all samples of a batch.
    ///
    /// # Errors
    /// `InvalidArgument` if there is no such time.
    pub fn at(&self, time: usize) -> Result<Self> {
        Ok(Modulations(self.0.iter().map(|m| m.narrow(time, 1)).collect::<Result<_>>()?))
    }
}

/// Everything beside x that a network's blocks take.
#[derive(Debug, Clone, Copy)]
pub struct Conditioning<'a> {
    /// One row for all samples, or one per sample.
    pub modulations: &'a Modulations,
    /// Token groups, concatenated over the sequence.
    pub attended: &'a [Attended],
}

#[derive(Debug)]
enum Body {
    Res(ResBlock),
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
    /// Channels that join the first block, if that is a `C`.
    pub skip_channels: usize,
    /// Number of the first block within its level.
    pub first: usize,
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
                    Body::Res(ResBlock::load(&p, channels, skip, config.kernel)?)
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
        skip: Option<&Tensor>,
        conditioning: Conditioning,
    ) -> Result<Tensor> {
        for (i, block) in self.blocks.iter().enumerate() {
            let modulation = block.modulated_by.map(|m| &conditioning.modulations.0[m]);
            x = match &block.body {
                Body::Res(res) => res.forward(cx, &x, skip.filter(|_| i == 0), modulation)?,
                Body::FeedForward(mlp) => mlp.forward(cx, &x, modulation)?,
                Body::Attn { block, ordinal } => {
                    let attended: Vec<_> = conditioning
                        .attended
                        .iter()
                        .map(|a| (&a.keys_and_values[*ordinal], a.index.as_slice()))
                        .collect();
                    block.forward(cx, &x, &attended, modulation)?
                }
                Body::Identity => match modulation {
                    Some(modulation) => modulate(cx, x, modulation)?,
                    None => x,
                },
            };
        }
        Ok(x)
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
