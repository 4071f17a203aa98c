//! The CLIP text tower (Radford et al. 2021): a causal transformer over token ids.

use crate::device::Context;
use crate::error::{Error, Result};
use crate::nn::{LayerNorm, Linear, Params};
use crate::ops::attention::{Columns, KeyValues, Mask, attention};
use crate::ops::elementwise::add_rows;
use crate::ops::embedding::embedding;
use crate::ops::linear::{Activation, Epilogue};
use crate::tensor::Tensor;

/// The sizes of a text tower.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TextEncoderConfig {
    /// Tokens that have an embedding.
    pub vocabulary: usize,
    /// Channels.
    pub width: usize,
    /// Channels of the hidden layer of each MLP.
    pub hidden_width: usize,
    /// Transformer layers.
    pub layers: usize,
    /// Attention heads.
    pub heads: usize,
    /// Positions that have an embedding.
    pub max_length: usize,
    /// The MLP's activation: `Gelu` or `QuickGelu`.
    pub activation: Activation,
    /// Of every LayerNorm.
    pub norm_eps: f32,
}

/// Token ids to one vector per position, padding included.
#[derive(Debug)]
pub struct TextEncoder {
    config: TextEncoderConfig,
    tokens: Tensor,
    positions: Tensor,
    layers: Vec<Layer>,
    final_norm: LayerNorm,
}

#[derive(Debug)]
struct Layer {
    norm_attention: LayerNorm,
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    norm_mlp: LayerNorm,
    expand: Linear,
    project: Linear,
}

impl Layer {
    fn load(p: &Params, config: &TextEncoderConfig) -> Result<Self> {
        let (width, eps) = (config.width, config.norm_eps);
        let attention = p.sub("attention");
        let projection = |name: &str| Linear::load(&attention.sub(name), width, width);
        Ok(Layer {
            norm_attention: LayerNorm::load(&p.sub("norm_attention"), width, eps)?,
            query: projection("query")?,
            key: projection("key")?,
            value: projection("value")?,
            output: projection("output")?,
            norm_mlp: LayerNorm::load(&p.sub("norm_mlp"), width, eps)?,
            expand: Linear::load(&p.sub("expand"), width, config.hidden_width)?,
            project: Linear::load(&p.sub("project"), config.hidden_width, width)?,
        })
    }

    fn forward(&self, cx: &Context, x: &Tensor, config: &TextEncoderConfig, mask: Mask) -> Result<Tensor> {
        let normed = self.norm_attention.forward(cx, x)?;
        let query = self.query.forward(cx, &normed)?;
        let key = self.key.forward(cx, &normed)?;
        let value = self.value.forward(cx, &normed)?;
        drop(normed);
        let whole = |tensor| Columns { tensor, start: 0 };
        let segment = KeyValues { keys: whole(&key), values: whole(&value), index: None };
        let attended = attention(cx, whole(&query), config.width, config.heads, &[segment], mask)?;
        let x =
            self.output.forward_then(cx, &attended, Epilogue { residual: Some(x), ..Epilogue::default() })?;

        let then = Epilogue { activation: config.activation, ..Epilogue::default() };
        let hidden = self.expand.forward_then(cx, &self.norm_mlp.forward(cx, &x)?, then)?;
        self.project.forward_then(cx, &hidden, Epilogue { residual: Some(&x), ..Epilogue::default() })
    }
}

impl TextEncoder {
    /// # Errors
    /// `Format` for missing or misshapen weights.
    pub fn load(p: &Params, config: TextEncoderConfig) -> Result<Self> {
        let layers = (0..config.layers).map(|i| Layer::load(&p.sub("layers").sub(i), &config));
        Ok(TextEncoder {
            tokens: p.tensor("tokens.weight", &[config.vocabulary, config.width])?,
            positions: p.tensor("positions.weight", &[config.max_length, config.width])?,
            layers: layers.collect::<Result<_>>()?,
            final_norm: LayerNorm::load(&p.sub("final_norm"), config.width, config.norm_eps)?,
            config,
        })
    }

    /// The sizes.
    pub fn config(&self) -> &TextEncoderConfig {
        &self.config
    }

    /// The last hidden state after the final LayerNorm. With `lengths`, positions from a sample's length on are
    /// padding: nobody attends to them, but they have outputs, which are part of the conditioning.
    ///
    /// # Shapes
    /// ids `I64 [N, T]` -> `[N, T, width]`
    ///
    /// # Errors
    /// `InvalidArgument` for more positions than the tower has, or an id outside its vocabulary;
    /// `OutOfMemory`; `Cancelled`.
    pub fn forward(&self, cx: &Context, ids: &Tensor, lengths: Option<&[usize]>) -> Result<Tensor> {
        self.final_norm.forward(cx, &self.hidden(cx, ids, lengths, self.layers.len())?)
    }

    /// The hidden state after `layers` layers, without the final LayerNorm; 0 gives the embeddings.
    ///
    /// # Shapes
    /// ids `I64 [N, T]` -> `[N, T, width]`
    ///
    /// # Errors
    /// As [`TextEncoder::forward`].
    pub fn hidden(
        &self,
        cx: &Context,
        ids: &Tensor,
        lengths: Option<&[usize]>,
        layers: usize,
    ) -> Result<Tensor> {
        let [_, length] = ids.dims_of("token ids")?;
        if length > self.config.max_length {
            let expected = format!("at most {} positions", self.config.max_length);
            return Err(Error::argument("token ids", expected, length));
        }
        let mask = lengths.map_or(Mask::Causal, Mask::CausalWithLengths);
        let mut x = embedding(cx, ids, &self.tokens)?;
        x = add_rows(cx, x, &self.positions.narrow(0, length)?)?;
        for (i, layer) in self.layers.iter().take(layers).enumerate() {
            let _span = cx.span_of("layer", i);
            x = layer.forward(cx, &x, &self.config, mask)?;
        }
        Ok(x)
    }
}
