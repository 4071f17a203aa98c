//! The gradient of attention. For each head of a sample, with P = softmax(q k^T / sqrt(D)): dv = P^T dy,
//! dP = dy v^T, dS = P (dP - sum over j of P dP), dq = dS k / sqrt(D) and dk = dS^T q / sqrt(D).

mod cpu;

use super::{Columns, KeyValues, Mask, cpu::Job, cuda};
use crate::device::Context;
use crate::error::Result;
use crate::ops::kernels;
use crate::tensor::autograd::Flow;
use crate::tensor::{DType, Tensor};

/// What the backward pass needs: the arguments of a call.
pub struct Backward {
    q: Held,
    width: usize,
    heads: usize,
    segments: Vec<Segment>,
    mask: HeldMask,
    queries: usize,
    keys: usize,
    kept: Option<Kept>,
}

/// What the forward pass found on a GPU.
pub struct Kept {
    /// The result.
    pub y: Tensor,
    /// Of each query of each head, log2 of the sum of e^score over its keys: `[N, heads, T]`.
    pub logs: Tensor,
}

/// [`Columns`].
struct Held {
    tensor: Tensor,
    start: usize,
}

/// [`KeyValues`].
struct Segment {
    keys: Held,
    values: Held,
    index: Option<Vec<usize>>,
}

/// [`Mask`].
enum HeldMask {
    None,
    Causal,
    CausalWithLengths(Vec<usize>),
}

impl Held {
    fn new(columns: &Columns) -> Self {
        Held { tensor: columns.tensor.clone(), start: columns.start }
    }

    fn borrow(&self) -> Columns<'_> {
        Columns { tensor: &self.tensor, start: self.start }
    }

    /// Room for the gradient of these columns for each sample apart, if anybody asks for it.
    fn room(&self, cx: &Context, samples: usize, width: usize) -> Result<Option<Tensor>> {
        let dims = [samples, self.tensor.dims()[1], width];
        let new = |_| Tensor::new(cx, "attention gradient", &dims, DType::F32);
        self.tensor.tracked().map(new).transpose()
    }

    /// The gradient of the whole tensor from that of each sample's columns: entries that several samples attend to
    /// get the sum, what nobody reads 0.
    fn whole(&self, cx: &Context, samples: &Tensor, index: Option<&[usize]>) -> Result<Tensor> {
        let [entries, tokens, stride] = self.tensor.dims_of("attention")?;
        let [n, _, width] = samples.dims_of("attention gradient")?;
        let in_order = index.is_none_or(|index| index.iter().copied().eq(0..entries));
        if in_order && stride == width {
            return Ok(samples.clone());
        }
        let values = samples.slice::<f32>()?;
        let mut out = Tensor::new(cx, "attention gradient", self.tensor.dims(), DType::F32)?;
        let rows = kernels::rows_per_task(stride);
        kernels::parallel_chunks(cx, out.slice_mut()?, rows * stride, |i, part| {
            part.fill(0.0);
            for (row, part) in (i * rows..).zip(part.chunks_exact_mut(stride)) {
                let (entry, token) = (row / tokens, row % tokens);
                let part = &mut part[self.start..][..width];
                for sample in (0..n).filter(|&n| index.map_or(n, |index| index[n]) == entry) {
                    let from = &values[(sample * tokens + token) * width..][..width];
                    part.iter_mut().zip(from).for_each(|(sum, v)| *sum += v);
                }
            }
        })?;
        Ok(out)
    }
}

impl Backward {
    pub fn new(job: &Job, kept: Option<Kept>) -> Self {
        let segment = |s: &KeyValues| Segment {
            keys: Held::new(&s.keys),
            values: Held::new(&s.values),
            index: s.index.map(<[usize]>::to_vec),
        };
        Backward {
            q: Held::new(&job.q),
            width: job.width,
            heads: job.heads,
            segments: job.segments.iter().map(segment).collect(),
            mask: match job.mask {
                Mask::None => HeldMask::None,
                Mask::Causal => HeldMask::Causal,
                Mask::CausalWithLengths(lengths) => HeldMask::CausalWithLengths(lengths.to_vec()),
            },
            queries: job.queries,
            keys: job.keys,
            kept,
        }
    }

    pub fn run(self, cx: &Context, flow: &mut Flow) -> Result<()> {
        let segments: Vec<KeyValues> = self.segments.iter().map(Segment::borrow).collect();
        let job = self.job(&segments);
        if let (Some(stream), Some(kept)) = (cx.cuda()?, &self.kept) {
            let found = cuda::gradient::gradients(cx, stream, &job, kept, flow.gradient())?;
            return self.give(cx, flow, found.q, found.segments, |_, whole, _| Ok(whole));
        }
        let samples = self.q.tensor.dims()[0];
        let room = |held: &Held| held.room(cx, samples, self.width);
        let mut of_q = room(&self.q)?;
        let mut of_segments = Vec::with_capacity(self.segments.len());
        for segment in &self.segments {
            of_segments.push([room(&segment.keys)?, room(&segment.values)?]);
        }
        let mut outputs =
            cpu::Outputs { q: numbers(&mut of_q)?, segments: Vec::with_capacity(segments.len()) };
        for [keys, values] in &mut of_segments {
            outputs.segments.push([numbers(keys)?, numbers(values)?]);
        }
        cpu::run(cx, &job, flow.gradient().slice()?, outputs)?;
        self.give(cx, flow, of_q, of_segments, |held, samples, index| held.whole(cx, &samples, index))
    }

    /// Gives each input the gradient of the whole tensor that `whole` makes of what was found.
    fn give(
        &self,
        cx: &Context,
        flow: &mut Flow,
        of_q: Option<Tensor>,
        of_segments: Vec<[Option<Tensor>; 2]>,
        whole: impl Fn(&Held, Tensor, Option<&[usize]>) -> Result<Tensor>,
    ) -> Result<()> {
        if let Some(of_q) = of_q {
            flow.give(cx, self.q.tensor.tracked(), |_| whole(&self.q, of_q, None))?;
        }
        for (segment, of_segment) in self.segments.iter().zip(of_segments) {
            for (held, gradient) in [&segment.keys, &segment.values].into_iter().zip(of_segment) {
                let Some(gradient) = gradient else { continue };
                let index = segment.index.as_deref();
                flow.give(cx, held.tensor.tracked(), |_| whole(held, gradient, index))?;
            }
        }
        Ok(())
    }

    fn job<'a>(&'a self, segments: &'a [KeyValues<'a>]) -> Job<'a> {
        Job {
            q: self.q.borrow(),
            width: self.width,
            heads: self.heads,
            segments,
            mask: match &self.mask {
                HeldMask::None => Mask::None,
                HeldMask::Causal => Mask::Causal,
                HeldMask::CausalWithLengths(lengths) => Mask::CausalWithLengths(lengths),
            },
            samples: self.q.tensor.dims()[0],
            queries: self.queries,
            keys: self.keys,
        }
    }
}

impl Segment {
    fn borrow(&self) -> KeyValues<'_> {
        KeyValues { keys: self.keys.borrow(), values: self.values.borrow(), index: self.index.as_deref() }
    }
}

fn numbers(tensor: &mut Option<Tensor>) -> Result<Option<&mut [f32]>> {
    tensor.as_mut().map(Tensor::slice_mut).transpose()
}
