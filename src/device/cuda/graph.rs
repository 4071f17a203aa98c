//! A step that is run many times: recorded once as a CUDA graph, then launched as a whole.

use std::sync::Arc;

use cudarc::driver::sys;

use super::memory::{Arena, Handle, Taken};
use super::stream::Stream;
use crate::error::Result;

/// Memory of a step's own. Nothing else uses it, so that addresses in a recording stay what they are.
#[derive(Debug)]
pub struct StepMemory {
    arena: Arc<Arena>,
}

impl StepMemory {
    /// None yet: the first run takes what a step needs.
    pub fn new(stream: &Stream) -> Self {
        StepMemory { arena: Arena::new(stream.handle()) }
    }

    /// Runs `step`, which takes memory from here.
    ///
    /// # Errors
    /// Those of `step`.
    pub fn within<T>(&self, stream: &Stream, step: impl FnOnce() -> Result<T>) -> Result<T> {
        let _back = Restored { stream, before: Some(stream.exchange_arena(self.arena.clone())) };
        step()
    }
}

/// Puts the stream's own arena back, also after a panic.
struct Restored<'a> {
    stream: &'a Stream,
    before: Option<Arc<Arena>>,
}

impl Drop for Restored<'_> {
    fn drop(&mut self) {
        if let Some(before) = self.before.take() {
            self.stream.exchange_arena(before);
        }
    }
}

/// A recorded step. It keeps what it uses.
pub struct Graph {
    raw: sys::CUgraphExec,
    stream: Arc<Handle>,
    _memory: Arc<Arena>,
    _used: Vec<Taken>,
}

// SAFETY: the driver takes the handle from any thread, one at a time: launching needs `&mut self`.
unsafe impl Send for Graph {}

impl Graph {
    /// Records `step` without running it. It must have run with this memory before, so that it takes no more.
    ///
    /// # Errors
    /// Those of `step`; `Internal` if it waits, reads from or writes to the host; `Device`.
    pub fn record<T>(
        stream: &Arc<Stream>,
        memory: &StepMemory,
        step: impl FnOnce() -> Result<T>,
    ) -> Result<(Self, T)> {
        let gpu = stream.gpu();
        let handle = stream.handle();
        let _bound = gpu.bind()?;
        memory.arena.keep();
        handle.set_capturing(true);
        let mut ending = Ending { stream, begun: false, graph: None };
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is alive and is not recording: one thread at a time uses it.
        gpu.check("cuStreamBeginCapture", unsafe { sys::cuStreamBeginCapture_v2(handle.raw, mode) })?;
        ending.begun = true;
        stream.start_recording();
        let out = memory.within(stream, step);
        let used = ending.end();
        // Where the step failed, that is why the recording did.
        let (out, used) = (out?, used?);
        let mut raw = std::ptr::null_mut();
        let graph = ending.graph.unwrap_or(std::ptr::null_mut());
        // SAFETY: the graph was just recorded; `raw` outlives the call.
        let result = unsafe { sys::cuGraphInstantiateWithFlags(&mut raw, graph, 0) };
        gpu.check("cuGraphInstantiate", result)?;
        let recorded = Graph { raw, stream: handle.clone(), _memory: memory.arena.clone(), _used: used };
        Ok((recorded, out))
    }

    /// Runs the step once more, in its stream.
    ///
    /// # Errors
    /// `Device`.
    pub fn launch(&mut self) -> Result<()> {
        let gpu = &self.stream.gpu;
        let _bound = gpu.bind()?;
        // SAFETY: both handles are alive, and so is all memory that was recorded.
        gpu.check("cuGraphLaunch", unsafe { sys::cuGraphLaunch(self.raw, self.stream.raw) })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if let Some(_bound) = self.stream.gpu.bind_to_free() {
            // SAFETY: made in `record`; a launch that is under way goes on (CUDA's promise). What it uses is given
            // back only to later work of the same stream.
            let _ = unsafe { sys::cuGraphExecDestroy(self.raw) };
        }
    }
}

/// Ends the recording, also when the step fails or panics.
struct Ending<'a> {
    stream: &'a Stream,
    begun: bool,
    graph: Option<sys::CUgraph>,
}

impl Ending<'_> {
    fn end(&mut self) -> Result<Vec<Taken>> {
        let used = self.stream.end_recording();
        let mut graph = std::ptr::null_mut();
        // SAFETY: the recording was begun on this stream; `graph` outlives the call.
        let result = unsafe { sys::cuStreamEndCapture(self.stream.handle().raw, &mut graph) };
        self.graph = Some(graph);
        self.stream.handle().set_capturing(false);
        self.stream.gpu().check("cuStreamEndCapture", result)?;
        Ok(used)
    }
}

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        match (self.begun, self.graph) {
            (false, _) => self.stream.handle().set_capturing(false),
            (true, None) => drop(self.end()),
            (true, Some(_)) => {}
        }
        if let Some(graph) = self.graph.filter(|graph| !graph.is_null()) {
            // SAFETY: the graph is ours; what was instantiated of it is a copy.
            let _ = unsafe { sys::cuGraphDestroy(graph) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cuda::Precision;
    use crate::error::Error;
    use crate::ops::check;

    const BYTES: usize = 1024;

    /// Zeros, by way of memory that is given back within the step.
    fn step(stream: &Stream, out: u64) -> Result<()> {
        let between = stream.take("a value between", BYTES)?;
        stream.clear(&between)?;
        // SAFETY: both have as many bytes.
        unsafe { stream.copy(between.address(), out, BYTES) }
    }

    /// All bytes of `memory`.
    fn bytes(stream: &Stream, memory: &crate::device::cuda::Memory) -> Vec<u8> {
        let mut bytes = vec![1; BYTES];
        stream.download(memory, &mut bytes).unwrap();
        bytes
    }

    #[test]
    fn memory_of_a_recording_stays_when_memory_runs_out() {
        let Some(cx) = check::cuda(Precision::F32) else { return };
        let stream = cx.cuda().unwrap().unwrap();
        let out = stream.take("out", BYTES).unwrap();
        let memory = StepMemory::new(stream);
        memory.within(stream, || step(stream, out.address())).unwrap();
        let (mut graph, ()) = Graph::record(stream, &memory, || step(stream, out.address())).unwrap();
        stream.gpu().trim();
        graph.launch().unwrap();
        assert_eq!(bytes(stream, &out), [0; BYTES]);
    }

    #[test]
    fn others_may_free_memory_of_a_stream_that_is_recorded() {
        let Some(cx) = check::cuda(Precision::F32) else { return };
        let stream = cx.cuda().unwrap().unwrap();
        let out = stream.take("out", BYTES).unwrap();
        let (memory, other) = (StepMemory::new(stream), StepMemory::new(stream));
        memory.within(stream, || step(stream, out.address())).unwrap();
        other.within(stream, || step(stream, out.address())).unwrap();
        let mut other = Some(other);
        let recorded = Graph::record(stream, &memory, || {
            step(stream, out.address())?;
            std::thread::scope(|scope| scope.spawn(|| stream.gpu().trim()).join()).unwrap();
            // Its memory is freed when the recording has ended.
            drop(other.take());
            Ok(())
        });
        let (mut graph, ()) = recorded.unwrap();
        graph.launch().unwrap();
        assert_eq!(bytes(stream, &out), [0; BYTES]);
    }

    #[test]
    fn a_step_that_fails_says_why_and_leaves_the_stream_usable() {
        let Some(cx) = check::cuda(Precision::F32) else { return };
        let stream = cx.cuda().unwrap().unwrap();
        let memory = StepMemory::new(stream);
        let failed = Graph::record(stream, &memory, || stream.take("more", BYTES).map(drop));
        assert!(matches!(failed, Err(Error::Internal { .. })));
        let failed = Graph::record(stream, &memory, || Err::<(), _>(Error::Cancelled));
        assert!(matches!(failed, Err(Error::Cancelled)));
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            Graph::record(stream, &memory, || -> Result<()> { panic!("in a step") }).map(drop)
        }));
        assert!(panicked.is_err());
        let out = stream.take("out", BYTES).unwrap();
        step(stream, out.address()).unwrap();
        assert_eq!(bytes(stream, &out), [0; BYTES]);
    }
}
