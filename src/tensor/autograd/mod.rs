//! Reverse-mode differentiation: the tape that ops record on, and the only place where gradients are summed.
//!
//! A [`Tape`] is attached to the [`Context`] that a forward pass runs with. Every op whose inputs are tracked calls
//! [`record`] with what its backward pass needs; without a tape, or without a tracked input, that costs one look. A
//! parameter is a leaf: [`leaf`] numbers it, for all tapes alike. [`Tape::backward`] walks what was recorded from its
//! end and fills [`Gradients`], which may go on summing over several tapes.
//!
//! What must not happen is that a gradient silently goes missing. An op without a gradient refuses tracked inputs
//! ([`refuse`]), a tensor of another tape is an error, and [`Gradients::expect_all`] names a parameter that nothing
//! reached.

mod cuda;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{DType, Shape, Tensor};
use crate::device::Context;
use crate::error::{Error, Result};

/// The tape number of leaves, which belong to all tapes.
const LEAVES: u64 = 0;

/// Numbers that one task of a sum adds.
const CHUNK: usize = 64 << 10;

/// Where a tensor's gradient is summed: some elements in a row of what an op gave, or of a leaf.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tracked {
    tape: u64,
    node: usize,
    /// Elements of the whole node.
    whole: usize,
    start: usize,
    len: usize,
}

impl Tracked {
    /// `len` elements from element `start` of this part on.
    pub(super) fn part(self, start: usize, len: usize) -> Self {
        Tracked { start: self.start + start, len, ..self }
    }

    /// The number of the leaf that this is a part of, if it is one.
    pub fn leaf(&self) -> Option<usize> {
        (self.tape == LEAVES).then_some(self.node)
    }
}

/// The same tensor as leaf number `number`: what a backward pass computes the gradient of.
#[must_use]
pub fn leaf(tensor: &Tensor, number: usize) -> Tensor {
    let whole = tensor.elements();
    let tracked = Some(Tracked { tape: LEAVES, node: number, whole, start: 0, len: whole });
    Tensor { tracked, ..tensor.clone() }
}

/// What an op gives the tape: called with the gradient of its result.
type Backward = Box<dyn FnOnce(&Context, &mut Flow) -> Result<()> + Send>;

/// What was done, in order. Recorded on by ops, walked back once.
pub struct Tape {
    number: u64,
    keeping: Keeping,
    state: Mutex<State>,
}

impl std::fmt::Debug for Tape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tape {}", self.number)
    }
}

/// What a tape keeps of an op.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Keeping {
    /// Everything that its backward pass needs.
    All,
    /// Everything, and blocks that can be run again only what goes into them: see [`recompute`].
    BlockInputs,
    /// Nothing but which leaves were used: the block is run again.
    Uses,
}

#[derive(Default)]
struct State {
    nodes: Vec<Node>,
    /// How many recorded ops use each leaf.
    uses: HashMap<usize, usize>,
}

struct Node {
    shape: Shape,
    /// Leaves among the inputs, once per use.
    leaves: Vec<usize>,
    backward: Option<Backward>,
}

impl Tape {
    /// An empty tape. Ops keep what their backward pass needs.
    pub fn new() -> Arc<Self> {
        Self::keeping(Keeping::All)
    }

    /// An empty tape on which blocks keep only their inputs and are run again in the backward pass: about a third
    /// more arithmetic for a fraction of the memory (Chen et al. 2016, arXiv:1604.06174).
    pub fn recomputing() -> Arc<Self> {
        Self::keeping(Keeping::BlockInputs)
    }

    fn keeping(keeping: Keeping) -> Arc<Self> {
        static NUMBER: AtomicU64 = AtomicU64::new(LEAVES + 1);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        Arc::new(Tape { number, keeping, state: Mutex::default() })
    }

    /// `cx` with this tape: what runs with it is recorded.
    pub fn attach(self: &Arc<Self>, cx: &Context) -> Context {
        cx.attached(Some(Arc::new(self.clone())))
    }

    fn of(cx: &Context) -> Option<&Arc<Tape>> {
        cx.attachment::<Arc<Tape>>()
    }

    /// Makes a node of `out`.
    fn push(&self, mut out: Tensor, leaves: Vec<usize>, backward: Option<Backward>) -> Tensor {
        let whole = out.elements();
        let mut state = self.state();
        for &leaf in &leaves {
            *state.uses.entry(leaf).or_default() += 1;
        }
        let node = state.nodes.len();
        state.nodes.push(Node { shape: out.shape, leaves, backward });
        out.tracked = Some(Tracked { tape: self.number, node, whole, start: 0, len: whole });
        out
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Walks back from `seeds`, pairs of a recorded tensor and the gradient of the loss by it, and adds what it finds
    /// to `gradients`. What was kept is freed on the way.
    ///
    /// # Errors
    /// `Internal` for a seed that this tape did not record; `OutOfMemory`; `Cancelled`.
    pub fn backward(
        &self,
        cx: &Context,
        seeds: &[(&Tensor, Tensor)],
        gradients: &mut Gradients,
    ) -> Result<()> {
        self.backward_watched(cx, seeds, gradients, &mut |_, _| Ok(()))
    }

    /// As [`Tape::backward`]. `complete` is told of each leaf as soon as no op is left that could add to it: its
    /// number, and its gradient, which may be sent away while the walk goes on.
    ///
    /// # Errors
    /// As [`Tape::backward`], and those of `complete`.
    pub fn backward_watched(
        &self,
        cx: &Context,
        seeds: &[(&Tensor, Tensor)],
        gradients: &mut Gradients,
        complete: &mut dyn FnMut(usize, &Tensor) -> Result<()>,
    ) -> Result<()> {
        let State { nodes, mut uses } = std::mem::take(&mut *self.state());
        let cx = &cx.attached(None);
        let mut sums = Sums { tape: self.number, ops: HashMap::new(), leaves: gradients };
        for (tensor, gradient) in seeds {
            let Some(to) = tensor.tracked else {
                return Err(Error::internal("backward", "the loss depends on no tracked tensor"));
            };
            sums.add(cx, to, gradient.constant())?;
        }
        for (i, node) in nodes.into_iter().enumerate().rev() {
            if let (Some(gradient), Some(backward)) = (sums.ops.remove(&i), node.backward) {
                cx.check()?;
                backward(cx, &mut Flow { gradient: gradient.reshape(node.shape.dims())?, sums: &mut sums })?;
            }
            for leaf in node.leaves {
                let left = uses.entry(leaf).or_insert(1);
                *left -= 1;
                if *left == 0
                    && let Some(gradient) = sums.leaves.get(leaf)
                {
                    complete(leaf, gradient)?;
                }
            }
        }
        Ok(())
    }

    /// As [`Tape::backward`] from a scalar, whose gradient is `scale`.
    ///
    /// # Errors
    /// As [`Tape::backward`].
    pub fn backward_from(
        &self,
        cx: &Context,
        loss: &Tensor,
        scale: f32,
        gradients: &mut Gradients,
    ) -> Result<()> {
        self.backward(cx, &[(loss, Tensor::from_slice(loss.dims(), &[scale])?)], gradients)
    }
}

/// Whether an op over these inputs must keep what its backward pass needs. A fused op then runs as its composed
/// definition, whose parts record themselves.
pub fn records(cx: &Context, inputs: &[Option<&Tensor>]) -> bool {
    Tape::of(cx).is_some() && inputs.iter().flatten().any(|input| input.tracked.is_some())
}

/// Gives `out`, the result of an op over `inputs`, back tracked, if [`records`] says so. `backward` is then called
/// once, at once: it takes clones of what is needed (they share memory) into the closure that the walk back will
/// call, which gives each input its gradient with [`Flow::give`].
///
/// # Errors
/// `Internal` if an input belongs to another tape.
pub fn record<F>(
    cx: &Context,
    mut out: Tensor,
    inputs: &[Option<&Tensor>],
    backward: impl FnOnce() -> F,
) -> Result<Tensor>
where
    F: FnOnce(&Context, &mut Flow) -> Result<()> + Send + 'static,
{
    let Some(tape) = Tape::of(cx).filter(|_| records(cx, inputs)) else {
        out.tracked = None;
        return Ok(out);
    };
    let tracked = inputs.iter().flatten().filter_map(|input| input.tracked);
    if tracked.clone().any(|t| t.tape != LEAVES && t.tape != tape.number) {
        return Err(Error::internal("autograd", "an input was recorded on another tape"));
    }
    let leaves = tracked.filter_map(|t| t.leaf()).collect();
    let backward: Option<Backward> =
        (tape.keeping != Keeping::Uses).then(|| Box::new(backward()) as Backward);
    Ok(tape.push(out, leaves, backward))
}

/// For an op that has no gradient.
///
/// # Errors
/// `Internal`, naming the op, if an input is tracked while a tape records.
pub fn refuse(cx: &Context, op: &'static str, inputs: &[&Tensor]) -> Result<()> {
    if Tape::of(cx).is_some() && inputs.iter().any(|input| input.tracked.is_some()) {
        return Err(Error::internal(op, "no gradient passes through it: make its inputs constant"));
    }
    Ok(())
}

/// Whether [`recompute`] would keep only inputs.
pub fn recomputes(cx: &Context) -> bool {
    Tape::of(cx).is_some_and(|tape| tape.keeping == Keeping::BlockInputs)
}

/// Runs `block` over `inputs`. On a [`Tape::recomputing`] only the inputs are kept, and the block is run again when
/// its gradient is needed; it must then give the same again.
///
/// # Errors
/// Those of the block.
pub fn recompute<F>(cx: &Context, inputs: &[Option<&Tensor>], block: F) -> Result<Tensor>
where
    F: Fn(&Context, &[Option<Tensor>]) -> Result<Tensor> + Send + 'static,
{
    let kept: Vec<Option<Tensor>> = inputs.iter().map(|input| input.cloned()).collect();
    let Some(tape) = Tape::of(cx).filter(|tape| tape.keeping == Keeping::BlockInputs) else {
        return block(cx, &kept);
    };
    // Inside, the inputs are leaves of their own, numbered from the top so that they meet no parameter.
    let inner: Vec<Option<Tensor>> = kept
        .iter()
        .enumerate()
        .map(|(i, input)| {
            input.as_ref().map(|t| if t.tracked.is_some() { leaf(t, usize::MAX - i) } else { t.clone() })
        })
        .collect();
    let probe = Tape::keeping(Keeping::Uses);
    let out = block(&probe.attach(cx), &inner)?;
    let mut leaves: Vec<usize> = probe.state().uses.keys().copied().collect();
    leaves.retain(|&leaf| leaf <= usize::MAX - kept.len());
    // Gradients are complete in the order of this list, which must be that of all ranks.
    leaves.sort_unstable();
    let places: Vec<Option<Tracked>> =
        kept.iter().map(|input| input.as_ref().and_then(|t| t.tracked)).collect();
    if out.tracked.is_none() {
        return Ok(out);
    }
    leaves.extend(places.iter().flatten().filter_map(Tracked::leaf));
    let backward = move |cx: &Context, flow: &mut Flow| {
        let again = Tape::new();
        let out = block(&again.attach(cx), &inner)?;
        let mut found = Gradients::default();
        again.backward(cx, &[(&out, flow.gradient.clone())], &mut found)?;
        for (i, place) in places.iter().enumerate() {
            if let Some(gradient) = found.take(usize::MAX - i) {
                flow.give(cx, *place, |_| Ok(gradient))?;
            }
        }
        flow.sums.leaves.add_all(cx, found)
    };
    Ok(tape.push(out, leaves, Some(Box::new(backward))))
}

/// One op's part of the walk back: the gradient of its result, and where those of its inputs go.
pub struct Flow<'a, 'b> {
    gradient: Tensor,
    sums: &'a mut Sums<'b>,
}

impl Flow<'_, '_> {
    /// The gradient of the loss by the op's result, `F32` of its shape.
    pub fn gradient(&self) -> &Tensor {
        &self.gradient
    }

    /// Adds to the gradient of an input what `gradient` computes from that of the result: as many elements, in any
    /// shape. An input that is not tracked computes nothing.
    ///
    /// # Errors
    /// Those of `gradient`; `Internal` for another number of elements; `OutOfMemory`.
    pub fn give(
        &mut self,
        cx: &Context,
        to: Option<Tracked>,
        gradient: impl FnOnce(&Tensor) -> Result<Tensor>,
    ) -> Result<()> {
        let Some(to) = to else { return Ok(()) };
        let gradient = gradient(&self.gradient)?;
        self.sums.add(cx, to, gradient)
    }
}

/// The gradients of one walk back.
struct Sums<'a> {
    tape: u64,
    ops: HashMap<usize, Tensor>,
    leaves: &'a mut Gradients,
}

impl Sums<'_> {
    fn add(&mut self, cx: &Context, to: Tracked, gradient: Tensor) -> Result<()> {
        match to.tape {
            LEAVES => add_to(cx, &mut self.leaves.of_leaves, to, gradient),
            tape if tape == self.tape => add_to(cx, &mut self.ops, to, gradient),
            _ => Err(Error::internal("autograd", "a gradient for another tape")),
        }
    }
}

/// Adds to the elements of a node: THE sum of gradients.
fn add_to(cx: &Context, sums: &mut HashMap<usize, Tensor>, to: Tracked, gradient: Tensor) -> Result<()> {
    if gradient.elements() != to.len || gradient.dtype() != DType::F32 {
        let found = format!("{} of {} for {} elements", gradient.shape(), gradient.dtype(), to.len);
        return Err(Error::internal("autograd: a gradient", found));
    }
    let Some(sum) = sums.get_mut(&to.node) else {
        let sum = if to.len == to.whole {
            gradient
        } else {
            let mut sum = Tensor::zeros(cx, "a gradient", &[to.whole], DType::F32)?;
            accumulate(cx, &mut sum, to, &gradient)?;
            sum
        };
        sums.insert(to.node, sum);
        return Ok(());
    };
    if !sum.is_own() {
        // Two inputs were given the same gradient: each needs its own from here on.
        *sum = Tensor::from_parts(cx, "a gradient", sum.dims(), &[sum])?;
    }
    accumulate(cx, sum, to, &gradient)
}

/// Adds numbers to a part of a sum.
fn accumulate(cx: &Context, sum: &mut Tensor, to: Tracked, added: &Tensor) -> Result<()> {
    if let Some(stream) = cx.cuda()? {
        return cuda::accumulate(cx, stream, (sum, to.start), added);
    }
    let added = added.slice::<f32>()?;
    cx.parallel_chunks(&mut sum.slice_mut::<f32>()?[to.start..][..to.len], CHUNK, |i, part| {
        part.iter_mut().zip(&added[i * CHUNK..]).for_each(|(sum, added)| *sum += added);
    })
}

/// The gradients of leaves by their numbers, each in the shape of the leaf's memory, `F32`.
#[derive(Debug, Default)]
pub struct Gradients {
    of_leaves: HashMap<usize, Tensor>,
}

impl Gradients {
    /// The gradient of a leaf, if anything reached it.
    pub fn get(&self, leaf: usize) -> Option<&Tensor> {
        self.of_leaves.get(&leaf)
    }

    /// Takes the gradient of a leaf out.
    pub fn take(&mut self, leaf: usize) -> Option<Tensor> {
        self.of_leaves.remove(&leaf)
    }

    /// Puts another gradient in the place of a leaf's: the sum over ranks.
    pub fn replace(&mut self, leaf: usize, gradient: Tensor) {
        self.of_leaves.insert(leaf, gradient);
    }

    /// Adds those of another.
    ///
    /// # Errors
    /// `Internal` for gradients of other sizes; `OutOfMemory`.
    pub fn add_all(&mut self, cx: &Context, others: Gradients) -> Result<()> {
        for (node, gradient) in others.of_leaves {
            let whole = gradient.elements();
            let to = Tracked { tape: LEAVES, node, whole, start: 0, len: whole };
            add_to(cx, &mut self.of_leaves, to, gradient)?;
        }
        Ok(())
    }

    /// # Errors
    /// `Internal`, naming the first of the leaves that no gradient reached.
    pub fn expect_all<'a>(&self, leaves: impl IntoIterator<Item = (usize, &'a str)>) -> Result<()> {
        match leaves.into_iter().find(|(leaf, _)| !self.of_leaves.contains_key(leaf)) {
            Some((_, name)) => Err(Error::internal("backward", format!("no gradient reached {name}"))),
            None => Ok(()),
        }
    }
}
