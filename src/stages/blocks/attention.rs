//! AttnBlock, and the keys and values of what it is conditioned on.

use super::channel_norm;
use crate::device::Context;
use crate::error::Result;
use crate::nn::{AdaptedLinear, Linear, Params};
use crate::ops::attention::{Columns, KeyValues, Mask, attention};
use crate::ops::linear::Epilogue;
use crate::tensor::Tensor;

/// x + attention(LN(x), keys and values of x itself and of the conditioning).
#[derive(Debug, Clone)]
pub struct AttnBlock {
    condition_mapper: Linear,
    query: AdaptedLinear,
    key: AdaptedLinear,
    value: AdaptedLinear,
    output: AdaptedLinear,
    heads: usize,
    self_attention: bool,
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

impl AttnBlock {
    /// # Errors
    /// `Format` for missing or misshapen weights.
    pub fn load(p: &Params, config: &AttnConfig) -> Result<Self> {
        let channels = config.channels;
        let projection = |name: &str| AdaptedLinear::load(&p.sub(name), channels, channels);
        Ok(AttnBlock {
            condition_mapper: Linear::load(&p.sub("condition_mapper"), config.condition_width, channels)?,
            query: projection("query")?,
            key: projection("key")?,
            value: projection("value")?,
            output: projection("output")?,
            heads: config.heads,
            self_attention: config.self_attention,
        })
    }

    /// Keys and values of conditioning tokens: Linear(SiLU(condition)) through this block's projections.
    ///
    /// # Shapes
    /// `[N, T, condition_width] -> [N, T, C]` both
    ///
    /// # Errors
    /// `InvalidArgument` for another width; `OutOfMemory`; `Cancelled`.
    pub fn keys_and_values(&self, cx: &Context, activated_condition: &Tensor) -> Result<KeysAndValues> {
        self.project(cx, &self.condition_mapper.forward(cx, activated_condition)?)
    }

    fn project(&self, cx: &Context, tokens: &Tensor) -> Result<KeysAndValues> {
        Ok(KeysAndValues { keys: self.key.forward(cx, tokens)?, values: self.value.forward(cx, tokens)? })
    }

    /// `condition` says for each group of conditioning tokens to which entry each sample attends.
    pub(super) fn forward<'a>(
        &self,
        cx: &Context,
        x: &Tensor,
        condition: impl Iterator<Item = (&'a KeysAndValues, &'a [usize])>,
        modulation: Option<&Tensor>,
    ) -> Result<Tensor> {
        let [n, h, w, c] = x.dims_of("attention block input")?;
        let normed = channel_norm(cx, x)?.reshape(&[n, h * w, c])?;
        let query = self.query.forward(cx, &normed)?;
        let own = if self.self_attention { Some(self.project(cx, &normed)?) } else { None };
        drop(normed);

        let segments: Vec<KeyValues> = own
            .iter()
            .map(|own| own.segment(None))
            .chain(condition.map(|(tokens, index)| tokens.segment(Some(index))))
            .collect();
        let attended = attention(cx, whole(&query), c, self.heads, &segments, Mask::None)?;
        let then = Epilogue { residual: Some(x), modulation, ..Epilogue::default() };
        self.output.forward_then(cx, &attended.reshape(&[n, h, w, c])?, then)
    }
}

/// What tokens are attended by and what they give, `[N, T, C]` both.
#[derive(Debug, Clone)]
pub struct KeysAndValues {
    keys: Tensor,
    values: Tensor,
}

impl KeysAndValues {
    pub(super) fn both(&self) -> [&Tensor; 2] {
        [&self.keys, &self.values]
    }

    pub(super) fn of(keys: &Option<Tensor>, values: &Option<Tensor>) -> Option<Self> {
        Some(KeysAndValues { keys: keys.clone()?, values: values.clone()? })
    }

    fn segment<'a>(&'a self, index: Option<&'a [usize]>) -> KeyValues<'a> {
        KeyValues { keys: whole(&self.keys), values: whole(&self.values), index }
    }
}

fn whole(tensor: &Tensor) -> Columns<'_> {
    Columns { tensor, start: 0 }
}

/// Conditioning tokens as every AttnBlock of a network needs them, and which of them each sample attends to.
#[derive(Debug, Clone)]
pub struct Attended {
    /// Per AttnBlock, those of `[entries, T, C]`.
    pub(super) keys_and_values: Vec<KeysAndValues>,
    /// Per sample, an entry.
    pub(super) index: Vec<usize>,
}

impl Attended {
    /// The same tokens, attended to by other samples: `index` names an entry for each.
    #[must_use]
    pub fn with_index(&self, index: Vec<usize>) -> Self {
        Attended { keys_and_values: self.keys_and_values.clone(), index }
    }
}
