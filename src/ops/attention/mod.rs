//! Multi-head attention: softmax(q k^T / sqrt(D)) v ("Attention Is All You Need", equation 1).

mod cpu;
mod cuda;
mod gradient;
#[cfg(test)]
mod tests;

use crate::device::Context;
use crate::device::profile::Work;
use crate::error::{Error, Result};
use crate::tensor::autograd::{record, records};
use crate::tensor::{DType, Tensor};

/// Some columns of a token sequence: q, k or v inside a fused projection.
///
/// # Shapes
/// `[N, T, S]` F32, on a GPU of any float type; the columns of all heads, head after head, lie from `start` on.
#[derive(Debug, Clone, Copy)]
pub struct Columns<'a> {
    /// The sequence.
    pub tensor: &'a Tensor,
    /// The first column.
    pub start: usize,
}

/// A run of keys and values that queries attend to.
#[derive(Debug, Clone, Copy)]
pub struct KeyValues<'a> {
    /// The keys.
    pub keys: Columns<'a>,
    /// The values: as many tokens as keys.
    pub values: Columns<'a>,
    /// Which entry of the first dimension query sample n attends to; `None`: n.
    pub index: Option<&'a [usize]>,
}

/// Which keys a query may see.
#[derive(Debug, Clone, Copy)]
pub enum Mask<'a> {
    /// All.
    None,
    /// Query t sees keys 0 to t.
    Causal,
    /// Query t of sample n sees keys 0 to t that are below `lengths[n]`, which is at least 1.
    CausalWithLengths(&'a [usize]),
}

/// y\[n, t\] = sum over j of softmax over j (q\[n, t\] . k\[n, j\] / sqrt(D)) v\[n, j\], for each head apart; keys j
/// run through all segments in order.
///
/// # Shapes
/// q `[N, T, S]` with `width` columns from its start on; D = width / heads; result `[N, T, width]` of q's type.
///
/// # Errors
/// `InvalidArgument` naming what does not fit (a causal mask needs as many keys as queries); `Unsupported` on a GPU
/// for D above 256 or more than 8 segments; `OutOfMemory`; `Cancelled`.
pub fn attention(
    cx: &Context,
    q: Columns,
    width: usize,
    heads: usize,
    segments: &[KeyValues],
    mask: Mask,
) -> Result<Tensor> {
    let span = cx.op("attention");
    if heads == 0 || !width.is_multiple_of(heads) || width == 0 {
        return Err(Error::argument("attention: heads", format!("a divisor of {width}"), heads));
    }
    let [samples, queries, _] = q.check(cx, "attention: q", width)?;
    let mut keys = 0;
    for segment in segments {
        keys += segment.check(cx, width, samples)?;
    }
    if keys == 0 && queries > 0 {
        return Err(Error::argument("attention: keys", "at least one", 0));
    }
    mask.check(samples, queries, keys)?;
    let _span = span.working(|| work(&mask, [samples, queries, keys, width], q.tensor));
    let job = cpu::Job { q, width, heads, segments, mask, samples, queries, keys };
    let inputs: Vec<Option<&Tensor>> = std::iter::once(&q)
        .chain(segments.iter().flat_map(|segment| [&segment.keys, &segment.values]))
        .map(|columns| Some(columns.tensor))
        .collect();
    let mut y = Tensor::new(cx, "attention: result", &[samples, queries, width], q.tensor.dtype())?;
    let mut kept = None;
    match cx.cuda()? {
        None => job.run(cx, y.slice_mut()?)?,
        Some(stream) => {
            let new = || Tensor::new(cx, "attention: sums", &[samples, heads, queries], DType::F32);
            let mut logs = records(cx, &inputs).then(new).transpose()?;
            cuda::attend(cx, stream, &job, &mut y, logs.as_mut())?;
            kept = logs.map(|logs| gradient::Kept { y: y.clone(), logs });
        }
    }
    record(cx, y, &inputs, || {
        let backward = gradient::Backward::new(&job, kept);
        move |cx, flow| backward.run(cx, flow)
    })
}

/// Both products. Keys that are shared by samples are read for each.
fn work(mask: &Mask, [samples, queries, keys, width]: [usize; 4], q: &Tensor) -> Work {
    let seen: usize =
        (0..samples).map(|n| (0..queries).map(|t| mask.visible(n, t, keys)).sum::<usize>()).sum();
    let rows = samples * (2 * queries + 2 * keys);
    Work { flops: (4 * seen * width) as u64, bytes: (rows * width * q.dtype().size()) as u64 }
}

impl<'a> Columns<'a> {
    fn check(&self, cx: &Context, what: &str, width: usize) -> Result<[usize; 3]> {
        let dims @ [_, _, columns] = self.tensor.dims_of(what)?;
        if self.start.checked_add(width).is_none_or(|end| end > columns) {
            let expected = format!("{width} columns from column {}", self.start);
            return Err(Error::argument(what, expected, self.tensor.shape()));
        }
        match cx.cuda()? {
            None => self.tensor.slice::<f32>().map(|_| dims),
            Some(_) => self.tensor.precision(what).map(|_| dims),
        }
    }

    /// Entry `n` from column `start + offset` on, and the distance between tokens.
    fn entry(&self, n: usize, offset: usize) -> Result<(&'a [f32], usize)> {
        let [_, tokens, stride] = self.tensor.dims_of("attention")?;
        let first = n * tokens * stride + self.start + offset;
        Ok((self.tensor.slice()?.get(first..).unwrap_or(&[]), stride))
    }
}

impl KeyValues<'_> {
    fn check(&self, cx: &Context, width: usize, samples: usize) -> Result<usize> {
        let [n, tokens, _] = self.keys.check(cx, "attention: keys", width)?;
        let values = self.values.check(cx, "attention: values", width)?;
        if values[..2] != [n, tokens] {
            let found = self.values.tensor.shape();
            return Err(Error::argument("attention: values", format!("[{n}, {tokens}, ..]"), found));
        }
        match self.index {
            None if n != samples => {
                let found = self.keys.tensor.shape();
                Err(Error::argument("attention: keys", format!("{samples} samples"), found))
            }
            Some(index) if index.len() != samples || index.iter().any(|&i| i >= n) => {
                let expected = format!("{samples} numbers below {n}");
                Err(Error::argument("attention: index", expected, format!("{index:?}")))
            }
            _ => Ok(tokens),
        }
    }
}

impl Mask<'_> {
    fn check(&self, samples: usize, queries: usize, keys: usize) -> Result<()> {
        if !matches!(self, Mask::None) && queries != keys {
            let expected = format!("{queries} keys for a causal mask");
            return Err(Error::argument("attention: keys", expected, keys));
        }
        match self {
            Mask::CausalWithLengths(l) if l.len() != samples || l.iter().any(|l| !(1..=keys).contains(l)) => {
                let expected = format!("{samples} numbers from 1 to {keys}");
                Err(Error::argument("attention: lengths", expected, format!("{l:?}")))
            }
            _ => Ok(()),
        }
    }

    /// How many keys query `t` of sample `n` sees.
    fn visible(&self, n: usize, t: usize, keys: usize) -> usize {
        match self {
            Mask::None => keys,
            Mask::Causal => t + 1,
            Mask::CausalWithLengths(lengths) => (t + 1).min(lengths[n]),
        }
    }
}
