//! Kernels: compiled, launched, and what CUDA C++ has built in.

mod common;

use common::{ADD, alone, compile, module, shape};
use cudarc::driver::{CudaContext, PushKernelArg};

#[test]
fn a_kernel_adds() {
    let _alone = alone();
    let context = CudaContext::new(0).unwrap();
    assert_eq!(context.name().unwrap(), "Emulated GPU");
    assert_eq!(context.compute_capability().unwrap(), (9, 0));
    let stream = context.new_stream().unwrap();
    let add = module(&context, ADD).load_function("add").unwrap();
    let a = stream.clone_htod(&[1.0f32, 2.0, 3.0]).unwrap();
    let b = stream.clone_htod(&[10.0f32, 20.0, 30.0]).unwrap();
    let mut c = stream.alloc_zeros::<f32>(3).unwrap();
    let mut launch = stream.launch_builder(&add);
    launch.arg(&a).arg(&b).arg(&mut c).arg(&3i32);
    // SAFETY: the arguments are the kernel's.
    unsafe { launch.launch(shape(1, 32)) }.unwrap();
    assert_eq!(stream.clone_dtoh(&c).unwrap(), [11.0, 22.0, 33.0]);
}

#[test]
fn what_does_not_compile_is_said() {
    let _alone = alone();
    let log = compile("extern \"C\" __global__ void f() { nonsense; }", &[]).unwrap_err();
    assert!(log.contains("test.cu:1:") && log.contains("nonsense"), "{log}");
}
