//! The blocks around a wide pointwise MLP: ResBlock, its form in v2's decoder, and FeedForwardBlock.

use super::{NORM_EPS, channel_norm};
use crate::device::Context;
use crate::error::{Error, Result};
use crate::nn::{Linear, Params};
use crate::ops::depthwise_conv::{DepthwiseConv, Padding, Then, depthwise_conv};
use crate::ops::elementwise::add;
use crate::ops::linear::{Epilogue, Term, WeightLayout, linear_sum};
use crate::ops::response_expand::{ResponseExpand, response_expand};
use crate::ops::widen::widen;
use crate::tensor::{DType, Tensor};

/// x + Linear(GRN(GELU(Linear(LN(depthwise(concat(x, skip))))))) (ConvNeXt V2 block).
#[derive(Debug, Clone)]
pub struct ResBlock {
    mixing: Mixing,
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
        Ok(ResBlock {
            mixing: Mixing::load(&p.sub("depthwise"), channels, per_group, kernel)?,
            mlp: ResponseMlp::load(p, channels, channels)?,
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
        self.mlp.forward(cx, self.mixing.forward(cx, x, skip)?, x, modulation)
    }
}

/// x + Linear(GRN(GELU(Linear(concat(LN(depthwise(x)), skip, M i + m))))): the ResBlock of v2's decoder
/// (diffusers, `ResBlockStageB`). What joins does so after the convolution: the level's output on the way down,
/// and the image embedding i through a 1x1 convolution M, m that a level's blocks share.
///
/// Nothing nonlinear lies between i and the block's first layer. With W the columns of that layer which see
/// M i + m, the two are one layer over i: F = W M, and its bias joins that of the block. [`super::Blocks::inject`]
/// computes F once per generation. F has as few columns as i has channels (16), so that a step costs a hundredth
/// more than without an image, and what is kept is 14 MB for all blocks of the published decoder. The image's
/// part of every hidden layer, computed once instead, would be kept in 1 GB at 1024 x 1024 pixels.
#[derive(Debug, Clone)]
pub struct InjectedResBlock {
    mixing: Mixing,
    mlp: ResponseMlp,
    inputs: Inputs,
}

/// What the first layer of an [`InjectedResBlock`] sees, in this order.
#[derive(Debug, Clone, Copy)]
struct Inputs {
    channels: usize,
    skip: usize,
    /// Width of the mapped image embedding; 0 if none joins.
    image: usize,
}

/// A block's first layer, as the image embedding itself sees it.
#[derive(Debug, Clone)]
pub struct FoldedImage {
    /// F, `[image channels, 4 C]`.
    weight: Tensor,
    /// `[4 C]`: the layer's own and the mapper's.
    bias: Tensor,
}

impl InjectedResBlock {
    /// Reads a block of `channels`, which `skip_channels` and then `image_width` channels join.
    ///
    /// # Errors
    /// `Format` for missing or misshapen weights.
    pub fn load(
        p: &Params,
        channels: usize,
        skip_channels: usize,
        image_width: usize,
        kernel: usize,
    ) -> Result<Self> {
        let inputs = Inputs { channels, skip: skip_channels, image: image_width };
        Ok(InjectedResBlock {
            mixing: Mixing::load(&p.sub("depthwise"), channels, 1, kernel)?,
            mlp: ResponseMlp::load(p, channels + skip_channels + image_width, channels)?,
            inputs,
        })
    }

    /// This block's first layer over the image embedding. `mapper` is M with m as its last row, as
    /// [`mapper_rows`] makes it.
    ///
    /// # Shapes
    /// mapper `[image channels + 1, image_width]`
    ///
    /// # Errors
    /// `InvalidArgument` for another shape; `OutOfMemory`; `Cancelled`.
    pub(super) fn fold(&self, cx: &Context, mapper: &Tensor) -> Result<FoldedImage> {
        let [rows, width] = mapper.dims_of("an image mapper")?;
        if width != self.inputs.image {
            return Err(Error::argument("an image mapper", format!("{} outputs", self.inputs.image), width));
        }
        let through = Term { x: mapper, first_input: self.inputs.channels + self.inputs.skip, ..self.term() };
        let folded = linear_sum(cx, &[through], &Epilogue::default())?;
        let hidden = folded.shape().channels();
        let shift = folded.narrow(rows - 1, 1)?.reshape(&[hidden])?;
        let bias = match self.mlp.expand.bias() {
            Some(bias) => add(cx, &widen(cx, &shift)?, &widen(cx, bias)?)?,
            None => shift,
        };
        Ok(FoldedImage { weight: folded.narrow(0, rows - 1)?, bias })
    }

    /// # Shapes
    /// x `[N, H, W, C]`, skip `[N, H, W, S]`, the image embedding at this size `[N, H, W, I]` -> `[N, H, W, C]`
    ///
    /// # Errors
    /// `InvalidArgument` for other shapes, or if what should join does not; `OutOfMemory`; `Cancelled`.
    pub(super) fn forward(
        &self,
        cx: &Context,
        x: &Tensor,
        skip: Option<&Tensor>,
        image: Option<(&Tensor, &FoldedImage)>,
        modulation: Option<&Tensor>,
    ) -> Result<Tensor> {
        let Inputs { channels, skip: skip_channels, image: image_width } = self.inputs;
        let joining = skip.map_or(0, |skip| skip.shape().channels());
        if joining != skip_channels {
            return Err(Error::argument("the skip of a block", format!("{skip_channels} channels"), joining));
        }
        if image.is_some() != (image_width > 0) {
            let (expected, found) = if image_width > 0 { ("one", "none") } else { ("none", "one") };
            return Err(Error::argument("the image embedding of a block", expected, found));
        }
        let mixed = self.mixing.forward(cx, x, None)?;
        let mut terms = vec![Term { x: &mixed, ..self.term() }];
        terms.extend(skip.map(|skip| Term { x: skip, first_input: channels, ..self.term() }));
        terms.extend(image.map(|(image, folded)| Term {
            x: image,
            weight: &folded.weight,
            layout: WeightLayout::RowsAreInputs,
            first_input: 0,
        }));
        let bias = image.map(|(_, folded)| &folded.bias).or(self.mlp.expand.bias());
        let hidden = self.mlp.expand(cx, &terms, bias)?;
        drop(mixed);
        self.mlp.contract(cx, &hidden, x, modulation)
    }

    /// Columns of the first layer's own weight, for the x and the inputs that are filled in.
    fn term(&self) -> Term<'_> {
        let weight = self.mlp.expand.weight();
        Term { x: weight, weight, layout: WeightLayout::RowsAreOutputs, first_input: 0 }
    }
}

/// The rows of Mᵀ, then m: a 1x1 convolution as [`InjectedResBlock::fold`] takes it.
///
/// # Shapes
/// weight `[O, I]`, bias `[O]` -> `[I + 1, O]`
///
/// # Errors
/// `OutOfMemory`.
pub(super) fn mapper_rows(cx: &Context, mapper: &Linear) -> Result<Tensor> {
    let [outputs, inputs] = mapper.weight().dims_of("an image mapper")?;
    let weight = widen(cx, mapper.weight())?;
    let mut rows = Tensor::zeros(cx, "an image mapper", &[inputs + 1, outputs], DType::F32)?;
    let out = rows.slice_mut::<f32>()?;
    for (o, weights) in weight.slice::<f32>()?.chunks_exact(inputs).enumerate() {
        for (i, weight) in weights.iter().enumerate() {
            out[i * outputs + o] = *weight;
        }
    }
    if let Some(bias) = mapper.bias() {
        out[inputs * outputs..].copy_from_slice(widen(cx, bias)?.slice()?);
    }
    Ok(rows)
}

/// x + Linear(GRN(GELU(Linear(LN(x))))): a ResBlock without its convolution.
#[derive(Debug, Clone)]
pub struct FeedForwardBlock {
    mlp: ResponseMlp,
}

impl FeedForwardBlock {
    /// # Errors
    /// `Format` for missing or misshapen weights.
    pub fn load(p: &Params, channels: usize) -> Result<Self> {
        Ok(FeedForwardBlock { mlp: ResponseMlp::load(p, channels, channels)? })
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

/// The spatial half of a block: LN(depthwise(concat(x, skip))).
#[derive(Debug, Clone)]
struct Mixing {
    weight: Tensor,
    bias: Tensor,
}

impl Mixing {
    fn load(p: &Params, channels: usize, per_group: usize, kernel: usize) -> Result<Self> {
        Ok(Mixing {
            weight: p.tensor("weight", &[channels, per_group, kernel, kernel])?,
            bias: p.tensor("bias", &[channels])?,
        })
    }

    fn forward(&self, cx: &Context, x: &Tensor, skip: Option<&Tensor>) -> Result<Tensor> {
        let conv = DepthwiseConv {
            weight: &self.weight,
            bias: Some(&self.bias),
            stride: 1,
            padding: Padding::Zero,
            then: Then::LayerNorm { eps: NORM_EPS },
        };
        depthwise_conv(cx, x, skip, &conv)
    }
}

/// The pointwise half of a block: Linear C -> 4C, GELU, global response normalisation, Linear 4C -> C.
#[derive(Debug, Clone)]
struct ResponseMlp {
    expand: Linear,
    gamma: Tensor,
    beta: Tensor,
    project: Linear,
}

/// How much wider the hidden layer of a block is.
const EXPANSION: usize = 4;

impl ResponseMlp {
    fn load(p: &Params, inputs: usize, channels: usize) -> Result<Self> {
        let hidden = EXPANSION * channels;
        let response = p.sub("response");
        Ok(ResponseMlp {
            expand: Linear::load(&p.sub("expand"), inputs, hidden)?,
            gamma: response.tensor("gamma", &[1, 1, 1, hidden])?,
            beta: response.tensor("beta", &[1, 1, 1, hidden])?,
            project: Linear::load(&p.sub("project"), hidden, channels)?,
        })
    }

    fn forward(
        &self,
        cx: &Context,
        x: Tensor,
        residual: &Tensor,
        modulation: Option<&Tensor>,
    ) -> Result<Tensor> {
        let weight = self.expand.weight();
        let term = Term { x: &x, weight, layout: WeightLayout::RowsAreOutputs, first_input: 0 };
        let hidden = self.expand(cx, &[term], self.expand.bias())?;
        drop(x);
        self.contract(cx, &hidden, residual, modulation)
    }

    /// All that comes before the last layer, of the sum of `terms`.
    fn expand(&self, cx: &Context, terms: &[Term], bias: Option<&Tensor>) -> Result<Tensor> {
        let (gamma, beta) = (&self.gamma, &self.beta);
        response_expand(cx, &ResponseExpand { terms, bias, gamma, beta })
    }

    /// The last layer. `modulation` is that of the TimestepBlock that comes next: it costs nothing
    /// where the sum is written.
    fn contract(
        &self,
        cx: &Context,
        hidden: &Tensor,
        residual: &Tensor,
        modulation: Option<&Tensor>,
    ) -> Result<Tensor> {
        let then = Epilogue { residual: Some(residual), modulation, ..Epilogue::default() };
        self.project.forward_then(cx, hidden, then)
    }
}
