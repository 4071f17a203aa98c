//! A computation that is done many times over inputs of the same shapes: a step of a denoising walk.
//!
//! On a GPU it is run once as it stands, which takes the memory that it needs; then it is recorded as a graph, and from
//! there on launched as a whole. Its inputs and its result are copied in and out of the recorded addresses.

use std::sync::{Arc, Mutex, PoisonError};

use super::{DType, Shape, Tensor};
use crate::device::Context;
use crate::device::cuda::{Copy, Graph, StepMemory, Stream};
use crate::error::{Error, Result};

/// A step, and what is known of it. It belongs to one context.
#[derive(Default)]
pub struct Replay {
    state: Mutex<State>,
}

#[derive(Default)]
enum State {
    /// It has not run.
    #[default]
    New,
    /// It has run once, in memory of its own.
    Run(StepMemory),
    /// It is launched as a whole.
    Recorded(Box<Recorded>),
    /// It cannot be recorded, and runs as it stands each time.
    Plain,
}

struct Recorded {
    /// The step's inputs in the recording.
    inputs: Vec<Place>,
    out: Place,
    graph: Graph,
    /// Holds the addresses.
    _held: Vec<Tensor>,
}

/// Where a tensor of a recording lies.
#[derive(Debug, Clone, Copy)]
struct Place {
    shape: Shape,
    dtype: DType,
    address: u64,
}

impl Place {
    fn bytes(&self) -> usize {
        self.shape.elements() * self.dtype.size()
    }

    fn fits(&self, tensor: &Tensor) -> bool {
        self.shape == tensor.shape && self.dtype == tensor.dtype
    }
}

impl std::fmt::Debug for Replay {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Replay (recorded: {})", self.is_recorded())
    }
}

impl Replay {
    /// A step that has not run.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether the step is launched as a whole from now on.
    pub fn is_recorded(&self) -> bool {
        matches!(*self.state.lock().unwrap_or_else(PoisonError::into_inner), State::Recorded(_))
    }

    /// What `step` makes of `inputs`. It must always be the same step: a function of the inputs alone, and of tensors
    /// that do not change.
    ///
    /// # Errors
    /// Those of the step; `OutOfMemory`; `Device`.
    pub fn run(
        &self,
        cx: &Context,
        inputs: &[&Tensor],
        step: impl Fn(&Context, &[Tensor]) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let plain = |cx| {
            let inputs: Vec<Tensor> = inputs.iter().map(|&input| input.clone()).collect();
            step(cx, &inputs)
        };
        let Some(stream) = cx.cuda()? else { return plain(cx) };
        cx.check()?;
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let State::Recorded(recorded) = &*state
            && !recorded.fits(inputs)
        {
            *state = State::New;
        }
        match std::mem::take(&mut *state) {
            State::Plain => {
                *state = State::Plain;
                plain(cx)
            }
            State::New => {
                let memory = StepMemory::new(stream);
                let out = memory.within(stream, || plain(cx))?;
                let out = Tensor::from_parts(cx, "a step's result", out.dims(), &[&out])?;
                *state = State::Run(memory);
                Ok(out)
            }
            State::Run(memory) => match Recorded::new(cx, stream, &memory, inputs, &step) {
                Ok(mut recorded) => {
                    let out = recorded.run(cx, stream, inputs)?;
                    *state = State::Recorded(Box::new(recorded));
                    Ok(out)
                }
                // Something in it needs the host.
                Err(Error::Internal { .. }) => {
                    *state = State::Plain;
                    plain(cx)
                }
                Err(error) => Err(error),
            },
            State::Recorded(mut recorded) => {
                let out = recorded.run(cx, stream, inputs)?;
                *state = State::Recorded(recorded);
                Ok(out)
            }
        }
    }
}

impl Recorded {
    fn new(
        cx: &Context,
        stream: &Arc<Stream>,
        memory: &StepMemory,
        inputs: &[&Tensor],
        step: &impl Fn(&Context, &[Tensor]) -> Result<Tensor>,
    ) -> Result<Self> {
        let mut held = Vec::with_capacity(inputs.len() + 1);
        let mut places = Vec::with_capacity(inputs.len());
        for input in inputs {
            let mut copy = Tensor::new(cx, "a step's input", input.dims(), input.dtype)?;
            let address = copy.on_mut(stream)?;
            places.push(Place { shape: input.shape, dtype: input.dtype, address });
            held.push(copy);
        }
        let (graph, out) = Graph::record(stream, memory, || {
            let out = step(cx, &held)?;
            let address = out.on(cx, stream)?.address();
            Ok((Place { shape: out.shape, dtype: out.dtype, address }, out))
        })?;
        held.push(out.1);
        Ok(Recorded { inputs: places, out: out.0, graph, _held: held })
    }

    fn fits(&self, inputs: &[&Tensor]) -> bool {
        self.inputs.len() == inputs.len()
            && self.inputs.iter().zip(inputs).all(|(place, input)| place.fits(input))
    }

    fn run(&mut self, cx: &Context, stream: &Arc<Stream>, inputs: &[&Tensor]) -> Result<Tensor> {
        let taken = inputs.iter().map(|input| input.on(cx, stream)).collect::<Result<Vec<_>>>()?;
        let copies: Vec<Copy> = taken
            .iter()
            .zip(&self.inputs)
            .map(|(from, place)| Copy { from: from.address(), to: place.address, bytes: place.bytes() })
            .collect();
        // SAFETY: each place has the size of its input, which was compared, and is held by the recording.
        unsafe { stream.copy_all(&copies)? };
        self.graph.launch()?;
        let mut out = Tensor::new(cx, "a step's result", self.out.shape.dims(), self.out.dtype)?;
        // SAFETY: the result has this many bytes in the recording, and the copy as many.
        unsafe { stream.copy(self.out.address, out.on_mut(stream)?, self.out.bytes())? };
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cuda::Precision;
    use crate::ops::check;
    use crate::ops::layer_norm::{LayerNorm, layer_norm};

    /// Several times, so that memory is given back and used again within the step.
    fn step(cx: &Context, inputs: &[Tensor]) -> Result<Tensor> {
        let norm = LayerNorm { scale: Some(&inputs[1]), ..LayerNorm::default() };
        let mut x = inputs[0].clone();
        for _ in 0..5 {
            x = layer_norm(cx, &x, &norm)?;
        }
        Ok(x)
    }

    #[test]
    fn a_recorded_step_gives_what_the_step_gives() {
        let Some(cx) = check::cuda(Precision::F32) else { return };
        let replay = Replay::new();
        let stream = cx.cuda().unwrap().unwrap();
        let mut outs = Vec::new();
        for seed in 0..5 {
            let x = check::random(&[3, 5, 40], seed);
            let scale = Tensor::from_slice(&[1], &[seed as f32]).unwrap();
            let there = [check::moved(&cx, &x), check::moved(&cx, &scale)];
            let before = stream.launches();
            let out = replay.run(&cx, &[&there[0], &there[1]], step).unwrap();
            if seed > 1 {
                // The copy of the inputs.
                assert_eq!(stream.launches() - before, 1);
                assert!(replay.is_recorded());
            }
            outs.push((step(&check::cx(), &[x, scale]).unwrap(), out));
        }
        // The results are looked at last: a step must not change an earlier one's.
        for (expected, out) in outs {
            check::close(&out, expected.dims(), &check::wide(&expected), 1e-5);
        }
    }

    #[test]
    fn other_shapes_are_recorded_anew() {
        let Some(cx) = check::cuda(Precision::F32) else { return };
        let (replay, scale) = (Replay::new(), Tensor::from_slice(&[1], &[0.5f32]).unwrap());
        for (i, rows) in [4, 4, 4, 7, 7, 7, 4].into_iter().enumerate() {
            let x = check::random(&[1, rows, 8], i as u64);
            let out = replay.run(&cx, &[&x, &scale], step).unwrap();
            let expected = step(&check::cx(), &[x, scale.clone()]).unwrap();
            check::close(&out, expected.dims(), &check::wide(&expected), 1e-5);
        }
    }

    #[test]
    fn a_step_that_needs_the_host_runs_as_it_stands() {
        let Some(cx) = check::cuda(Precision::F32) else { return };
        let replay = Replay::new();
        let on_host = |cx: &Context, inputs: &[Tensor]| {
            let mut out = Tensor::new(cx, "out", inputs[0].dims(), DType::F32)?;
            out.slice_mut::<f32>()?.copy_from_slice(inputs[0].slice()?);
            layer_norm(cx, &out, &LayerNorm::default())
        };
        for seed in 0..4 {
            let x = check::random(&[1, 3, 8], seed);
            let out = replay.run(&cx, &[&x], on_host).unwrap();
            let expected = on_host(&check::cx(), &[x]).unwrap();
            check::close(&out, expected.dims(), &check::wide(&expected), 1e-5);
        }
        assert!(!replay.is_recorded());
    }
}
