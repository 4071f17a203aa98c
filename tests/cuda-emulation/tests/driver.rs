//! The driver: what is queued runs late, what is wrong is refused, and nothing is lost.

#![allow(clippy::unwrap_used)]

mod common;

use std::ffi::c_void;

use common::{ADD, alone, module, shape};
use cudarc::driver::sys::CUresult::{self, *};
use cudarc::driver::{CudaContext, DriverError, PushKernelArg, result, sys};

const NON_BLOCKING: u32 = 1;

/// A context that is current, below the safe layer: streams and memory are plain handles.
struct Raw {
    _context: std::sync::Arc<CudaContext>,
    stream: sys::CUstream,
}

impl Raw {
    fn new() -> Self {
        let context = CudaContext::new(0).unwrap();
        Raw { _context: context, stream: stream() }
    }

    fn wait(&self) -> CUresult {
        // SAFETY: the stream is alive.
        unsafe { sys::cuStreamSynchronize(self.stream) }
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // SAFETY: the stream is alive.
        unsafe { sys::cuStreamDestroy_v2(self.stream) }.result().unwrap();
    }
}

fn stream() -> sys::CUstream {
    let mut stream = std::ptr::null_mut();
    // SAFETY: `stream` outlives the call.
    unsafe { sys::cuStreamCreate(&mut stream, NON_BLOCKING) }.result().unwrap();
    stream
}

fn pinned(bytes: usize) -> *mut u8 {
    let mut memory = std::ptr::null_mut();
    // SAFETY: `memory` outlives the call.
    unsafe { sys::cuMemHostAlloc(&mut memory, bytes, 0) }.result().unwrap();
    memory.cast()
}

fn allocate(bytes: usize) -> Result<sys::CUdeviceptr, CUresult> {
    let mut memory = 0;
    // SAFETY: `memory` outlives the call.
    match unsafe { sys::cuMemAlloc_v2(&mut memory, bytes) } {
        CUDA_SUCCESS => Ok(memory),
        error => Err(error),
    }
}

fn free(memory: sys::CUdeviceptr) -> CUresult {
    // SAFETY: the emulation checks the address.
    unsafe { sys::cuMemFree_v2(memory) }
}

#[test]
fn work_runs_when_somebody_waits() {
    let _alone = alone();
    let raw = Raw::new();
    let (memory, host) = (allocate(4).unwrap(), pinned(4));
    // SAFETY: all memory is 4 bytes.
    unsafe {
        host.write_bytes(7, 4);
        sys::cuMemsetD8Async(memory, 1, 4, raw.stream).result().unwrap();
        sys::cuMemcpyDtoHAsync_v2(host.cast(), memory, 4, raw.stream).result().unwrap();
        assert_eq!(*host, 7, "the copy was not waited for");
        assert_eq!(sys::cuStreamQuery(raw.stream), CUDA_ERROR_NOT_READY);
        assert_eq!(raw.wait(), CUDA_SUCCESS);
        assert_eq!(*host, 1);
        assert_eq!(sys::cuStreamQuery(raw.stream), CUDA_SUCCESS);

        // Pinned memory is read when the copy runs, pageable memory when it is asked for.
        let mut pageable = [2u8; 4];
        sys::cuMemcpyHtoDAsync_v2(memory, pageable.as_ptr().cast(), 4, raw.stream).result().unwrap();
        pageable.fill(3);
        sys::cuMemcpyDtoHAsync_v2(pageable.as_mut_ptr().cast(), memory, 4, raw.stream).result().unwrap();
        assert_eq!(pageable, [2; 4]);
        sys::cuMemcpyHtoDAsync_v2(memory, host.cast(), 4, raw.stream).result().unwrap();
        host.write_bytes(9, 4);
        sys::cuMemcpyDtoHAsync_v2(pageable.as_mut_ptr().cast(), memory, 4, raw.stream).result().unwrap();
        assert_eq!(pageable, [9; 4]);
        assert_eq!(free(memory), CUDA_SUCCESS);
        sys::cuMemFreeHost(host.cast()).result().unwrap();
    }
}

#[test]
fn streams_wait_for_events_only() {
    let _alone = alone();
    let (raw, other) = (Raw::new(), stream());
    let (memory, host) = (allocate(4).unwrap(), pinned(4));
    let mut event = std::ptr::null_mut();
    // SAFETY: all memory is 4 bytes; handles live until the end.
    unsafe {
        sys::cuEventCreate(&mut event, 0).result().unwrap();
        sys::cuMemsetD8Async(memory, 1, 4, raw.stream).result().unwrap();
        sys::cuMemcpyDtoHAsync_v2(host.cast(), memory, 4, other).result().unwrap();
        sys::cuStreamSynchronize(other).result().unwrap();
        assert_eq!(*host, 0xff, "fresh memory, since nothing made the second stream wait");
        sys::cuEventRecord(event, raw.stream).result().unwrap();
        assert_eq!(sys::cuEventQuery(event), CUDA_ERROR_NOT_READY);
        sys::cuStreamWaitEvent(other, event, 0).result().unwrap();
        sys::cuMemcpyDtoHAsync_v2(host.cast(), memory, 4, other).result().unwrap();
        sys::cuStreamSynchronize(other).result().unwrap();
        assert_eq!(*host, 1);
        assert_eq!(sys::cuEventQuery(event), CUDA_SUCCESS);
        sys::cuEventDestroy_v2(event).result().unwrap();
        sys::cuStreamDestroy_v2(other).result().unwrap();
        sys::cuMemFreeHost(host.cast()).result().unwrap();
    }
    assert_eq!(free(memory), CUDA_SUCCESS);
}

#[test]
fn memory_has_bounds_and_a_limit() {
    let _alone = alone();
    let raw = Raw::new();
    let memory = allocate(16).unwrap();
    // SAFETY: the emulation checks device addresses before it uses them; the array is 16 bytes.
    unsafe {
        assert_eq!(sys::cuMemsetD8Async(memory, 0, 17, raw.stream), CUDA_ERROR_INVALID_VALUE);
        let mut host = [0u8; 16];
        sys::cuMemcpyDtoHAsync_v2(host.as_mut_ptr().cast(), memory, 16, raw.stream).result().unwrap();
        assert_eq!(host, [0xff; 16]);
        assert_eq!(free(memory + 1), CUDA_ERROR_INVALID_VALUE);
        assert_eq!(free(memory), CUDA_SUCCESS);
        assert_eq!(free(memory), CUDA_ERROR_INVALID_VALUE);
        let copied = sys::cuMemcpyDtoHAsync_v2(host.as_mut_ptr().cast(), memory, 1, raw.stream);
        assert_eq!(copied, CUDA_ERROR_INVALID_VALUE);
    }
    let before = cuda_emulation::live(Some("bytes"));
    cuda_emulation::set_memory(1000);
    let memory = allocate(600).unwrap();
    assert_eq!(allocate(600), Err(CUDA_ERROR_OUT_OF_MEMORY));
    assert_eq!(result::mem_get_info().unwrap(), (400, 1000));
    // What a stream has yet to free is there for the next.
    // SAFETY: the memory is alive.
    unsafe { sys::cuMemFreeAsync(memory, raw.stream) }.result().unwrap();
    assert_eq!(cuda_emulation::live(Some("bytes")), before);
    assert_eq!(free(allocate(600).unwrap()), CUDA_SUCCESS);
    cuda_emulation::set_memory(4 << 30);
}

#[test]
fn a_free_comes_in_its_streams_order() {
    let _alone = alone();
    let (raw, other) = (Raw::new(), stream());
    let memory = allocate(4).unwrap();
    // SAFETY: the emulation checks addresses when work runs.
    unsafe {
        sys::cuMemsetD8Async(memory, 1, 4, raw.stream).result().unwrap();
        sys::cuMemsetD8Async(memory, 1, 4, other).result().unwrap();
        sys::cuMemFreeAsync(memory, raw.stream).result().unwrap();
        assert_eq!(raw.wait(), CUDA_SUCCESS, "used before it was freed");
        assert_eq!(sys::cuStreamSynchronize(other), CUDA_ERROR_ILLEGAL_ADDRESS, "used after it was freed");
        // Sticky, as on a device: only a new context helps.
        assert_eq!(allocate(4), Err(CUDA_ERROR_ILLEGAL_ADDRESS));
        sys::cuStreamDestroy_v2(other).result().unwrap();
    }
}

#[test]
fn contexts_are_a_stack_of_the_thread() {
    let _alone = alone();
    let context = CudaContext::new(0).unwrap();
    std::thread::spawn(move || {
        // SAFETY: the context is retained; out-parameters outlive the calls.
        unsafe {
            assert_eq!(allocate(4), Err(CUDA_ERROR_INVALID_CONTEXT));
            let mut top = std::ptr::null_mut();
            assert_eq!(sys::cuCtxPopCurrent_v2(&mut top), CUDA_ERROR_INVALID_CONTEXT);
            sys::cuCtxPushCurrent_v2(context.cu_ctx()).result().unwrap();
            assert_eq!(free(allocate(4).unwrap()), CUDA_SUCCESS);
            sys::cuCtxPopCurrent_v2(&mut top).result().unwrap();
            assert_eq!(top, context.cu_ctx());
            assert_eq!(allocate(4), Err(CUDA_ERROR_INVALID_CONTEXT));
            sys::cuCtxPushCurrent_v2(top).result().unwrap();
            drop(context);
            assert_eq!(allocate(4), Err(CUDA_ERROR_CONTEXT_IS_DESTROYED));
        }
    })
    .join()
    .unwrap();
}

#[test]
fn graphs_replay_what_was_captured() {
    let _alone = alone();
    let context = CudaContext::new(0).unwrap();
    // SAFETY: one stream only.
    unsafe { context.disable_event_tracking() };
    let stream = context.new_stream().unwrap();
    let increment = module(&context, ADD).load_function("increment").unwrap();
    let mut x = stream.clone_htod(&[1.0f32, 2.0]).unwrap();
    let launch = |x: &mut cudarc::driver::CudaSlice<f32>| {
        let n = 2i32;
        let mut launch = stream.launch_builder(&increment);
        launch.arg(x).arg(&n);
        // SAFETY: the arguments are the kernel's.
        unsafe { launch.launch(shape(1, 32)) }.unwrap();
    };
    let local = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    stream.begin_capture(local).unwrap();
    launch(&mut x);
    launch(&mut x);
    let graph = stream.end_capture(sys::CUgraphInstantiate_flags(0)).unwrap().unwrap();
    let before = cuda_emulation::launches();
    graph.launch().unwrap();
    graph.launch().unwrap();
    assert_eq!(cuda_emulation::launches(), before, "not before somebody waits");
    assert_eq!(stream.clone_dtoh(&x).unwrap(), [5.0, 6.0]);
    assert_eq!(cuda_emulation::launches(), before + 4);

    // An allocation breaks a capture.
    stream.begin_capture(local).unwrap();
    let refused = stream.alloc_zeros::<f32>(1).err();
    assert_eq!(refused, Some(DriverError(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED)));
    let ended = stream.end_capture(sys::CUgraphInstantiate_flags(0)).err();
    assert_eq!(ended, Some(DriverError(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED)));
    launch(&mut x);
    assert_eq!(stream.clone_dtoh(&x).unwrap(), [6.0, 7.0]);
}

#[test]
fn launches_have_limits() {
    let _alone = alone();
    let raw = Raw::new();
    let image = common::compile(ADD, &[]).unwrap();
    // SAFETY: parameters are not read, since the launches are refused; handles live until the end.
    unsafe {
        let module = result::module::load_data(image.as_ptr().cast()).unwrap();
        assert_eq!(
            result::module::get_function(module, c"nothing".to_owned()),
            Err(DriverError(CUDA_ERROR_NOT_FOUND))
        );
        let add = result::module::get_function(module, c"add".to_owned()).unwrap();
        let launch = |grid, block, shared| {
            let parameters = [0u64; 4];
            let mut pointers =
                parameters.each_ref().map(|p| std::ptr::from_ref(p).cast_mut().cast::<c_void>());
            result::launch_kernel(add, grid, block, shared, raw.stream, &mut pointers)
                .map_err(|error| error.0)
        };
        assert_eq!(launch((1, 1, 1), (1025, 1, 1), 0), Err(CUDA_ERROR_INVALID_VALUE));
        assert_eq!(launch((1, 1, 1), (32, 32, 2), 0), Err(CUDA_ERROR_INVALID_VALUE));
        assert_eq!(launch((0, 1, 1), (32, 1, 1), 0), Err(CUDA_ERROR_INVALID_VALUE));
        assert_eq!(launch((1, 65536, 1), (32, 1, 1), 0), Err(CUDA_ERROR_INVALID_VALUE));
        assert_eq!(launch((1, 1, 1), (32, 1, 1), 48 * 1024 + 1), Err(CUDA_ERROR_INVALID_VALUE));
        let dynamic = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        let too_much = sys::cuFuncSetAttribute(add, dynamic, 228 * 1024);
        assert_eq!(too_much, CUDA_ERROR_INVALID_VALUE);
        sys::cuFuncSetAttribute(add, dynamic, 100 * 1024).result().unwrap();
        launch((1, 1, 1), (32, 1, 1), 100 * 1024).unwrap();
        let (mut offset, mut bytes) = (0, 0);
        sys::cuFuncGetParamInfo(add, 3, &mut offset, &mut bytes).result().unwrap();
        assert_eq!((offset, bytes), (24, 4));
        result::module::unload(module).unwrap();
        for damaged in [&b"\0"[..], b"CUEMU1\n", b"CUEMU1\n/nowhere.so\nsm_90\n", &image[1..]] {
            let damaged = [damaged, b"\0"].concat();
            let loaded = result::module::load_data(damaged.as_ptr().cast()).err();
            assert_eq!(loaded, Some(DriverError(CUDA_ERROR_INVALID_IMAGE)));
        }
    }
}

#[test]
fn a_capture_spans_streams_that_events_join() {
    let _alone = alone();
    let (raw, other) = (Raw::new(), stream());
    let memory = allocate(4).unwrap();
    let (mut forth, mut back) = (std::ptr::null_mut(), std::ptr::null_mut());
    let (mut graph, mut executable) = (std::ptr::null_mut(), std::ptr::null_mut());
    let local = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    let mut host = [0u8; 4];
    // SAFETY: all handles live until the end, the memory is 4 bytes.
    unsafe {
        for event in [&mut forth, &mut back] {
            sys::cuEventCreate(event, 2).result().unwrap();
        }
        for joined in [true, false] {
            sys::cuStreamBeginCapture_v2(raw.stream, local).result().unwrap();
            sys::cuEventRecord(forth, raw.stream).result().unwrap();
            sys::cuStreamWaitEvent(other, forth, 0).result().unwrap();
            sys::cuMemsetD8Async(memory, 5, 4, other).result().unwrap();
            sys::cuEventRecord(back, other).result().unwrap();
            if joined {
                sys::cuStreamWaitEvent(raw.stream, back, 0).result().unwrap();
            }
            let ended = sys::cuStreamEndCapture(raw.stream, &mut graph);
            assert_eq!(ended == CUDA_SUCCESS, joined);
            assert_eq!(ended == CUDA_ERROR_STREAM_CAPTURE_UNJOINED, !joined);
            if joined {
                sys::cuGraphInstantiateWithFlags(&mut executable, graph, 0).result().unwrap();
                sys::cuGraphDestroy(graph).result().unwrap();
            }
        }
        sys::cuGraphLaunch(executable, raw.stream).result().unwrap();
        sys::cuMemcpyDtoHAsync_v2(host.as_mut_ptr().cast(), memory, 4, raw.stream).result().unwrap();
        assert_eq!(host, [5; 4]);
        sys::cuGraphExecDestroy(executable).result().unwrap();
        for event in [forth, back] {
            sys::cuEventDestroy_v2(event).result().unwrap();
        }
        sys::cuStreamDestroy_v2(other).result().unwrap();
    }
    assert_eq!(free(memory), CUDA_SUCCESS);
}

#[test]
fn machine_code_is_of_one_architecture() {
    let _alone = alone();
    let _raw = Raw::new();
    let source =
        "#if __CUDA_ARCH__ != 750\n#error\n#endif\nextern \"C\" __global__ void k() {}\nCU_KERNEL(k)";
    let image = common::compile_for("sm_75", source, &[]).unwrap();
    // SAFETY: images end with a NUL.
    unsafe {
        let loaded = result::module::load_data(image.as_ptr().cast()).err();
        assert_eq!(loaded, Some(DriverError(CUDA_ERROR_NO_BINARY_FOR_GPU)));
        let image = common::compile(ADD, &[]).unwrap();
        result::module::unload(result::module::load_data(image.as_ptr().cast()).unwrap()).unwrap();
    }
    let log = common::compile_for("sm_76", source, &[]).unwrap_err();
    assert!(log.contains("invalid value for --gpu-architecture"), "{log}");
}

/// Copies 4 bytes to the device and back. Frees what it got so far wherever it fails.
unsafe fn there_and_back() -> Result<[u8; 4], CUresult> {
    let (mut context, mut stream, mut memory) = (std::ptr::null_mut(), std::ptr::null_mut(), 0);
    let mut data = [1u8, 2, 3, 4];
    let step = |result: CUresult| if result == CUDA_SUCCESS { Ok(()) } else { Err(result) };
    // SAFETY: all outlive the calls; what was not made is not freed.
    unsafe {
        step(sys::cuInit(0))?;
        step(sys::cuDevicePrimaryCtxRetain(&mut context, 0))?;
        let done = (|| {
            step(sys::cuCtxPushCurrent_v2(context))?;
            let done = (|| {
                step(sys::cuStreamCreate(&mut stream, NON_BLOCKING))?;
                step(sys::cuMemAllocAsync(&mut memory, 4, stream))?;
                step(sys::cuMemcpyHtoDAsync_v2(memory, data.as_ptr().cast(), 4, stream))?;
                step(sys::cuMemcpyDtoHAsync_v2(data.as_mut_ptr().cast(), memory, 4, stream))?;
                step(sys::cuStreamSynchronize(stream))
            })();
            if memory != 0 {
                step(sys::cuMemFreeAsync(memory, stream)).unwrap();
            }
            if !stream.is_null() {
                step(sys::cuStreamDestroy_v2(stream)).unwrap();
            }
            step(sys::cuCtxPopCurrent_v2(&mut context)).unwrap();
            done
        })();
        step(sys::cuDevicePrimaryCtxRelease_v2(0)).unwrap();
        done.map(|()| data)
    }
}

#[test]
fn each_call_can_fail() {
    let _alone = alone();
    let (calls, live) = (cuda_emulation::calls(), cuda_emulation::live(None));
    // SAFETY: the emulation is loaded.
    assert_eq!(unsafe { there_and_back() }, Ok([1, 2, 3, 4]));
    let calls = cuda_emulation::calls() - calls;
    assert_eq!(calls, 8);
    for n in 1..=8 {
        cuda_emulation::fail_call(n, CUDA_ERROR_UNKNOWN as i32);
        // SAFETY: as above.
        assert_eq!(unsafe { there_and_back() }, Err(CUDA_ERROR_UNKNOWN), "call {n}");
        assert_eq!(cuda_emulation::live(None), live, "call {n}");
    }
}
