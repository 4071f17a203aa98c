//! Mistakes that end the process, each tried in a process of its own.

#![allow(clippy::unwrap_used)]

mod common;

use std::process::{Command, Output};

use common::{alone, module, shape};
use cudarc::driver::{CudaContext, LaunchConfig, PushKernelArg};

/// Kernels with a mistake, and what is said of it. Each gets 40 floats and is launched with 64 threads.
const MISTAKES: [(&str, &str, &str); 8] = [
    (
        "exited",
        "if (threadIdx.x >= n) return; __syncthreads(); x[0] = 0;",
        "some threads exited before a __syncthreads",
    ),
    ("different", "if (threadIdx.x < 32) __syncthreads();\nelse __syncthreads();", "different __syncthreads"),
    (
        "mask",
        "x[0] = threadIdx.x < 20 ? __shfl_xor_sync(~0u, 1, 1) : 0;",
        "a lane that a warp mask names has exited",
    ),
    ("deadlock", "threadIdx.x % 2 ? (void)__syncthreads() : __syncwarp();", "deadlock"),
    // An address on no page.
    ("shared", "cuemu::dyn_shared<float>()[threadIdx.x] = 0;", ""),
    (
        "past",
        "if (threadIdx.x < 41) x[threadIdx.x] = 0;",
        "something wrote past the end of device memory of 160 bytes",
    ),
    ("before", "x[(int)threadIdx.x - 1] = 0;", "something wrote before the start of device memory"),
    // Only a sanitizer sees that all threads write one number.
    ("race", "x[0] = 1;", ""),
];

/// In a child, a mistake.
#[test]
fn a_right_kernel_runs() {
    let _alone = alone();
    let name = std::env::var("CUEMU_TEST_MISTAKE").unwrap_or_default();
    let mistake = MISTAKES.into_iter().find(|(each, ..)| *each == name);
    let body =
        mistake.map_or("__syncthreads(); if (threadIdx.x < n) x[threadIdx.x] = 0;", |(_, body, _)| body);
    launch(body, shape(1, if name == "before" { 40 } else { 64 }));
}

fn launch(body: &str, shape: LaunchConfig) {
    let source =
        format!("extern \"C\" __global__ void kernel(float *x, int n) {{ {body} }}\nCU_KERNEL(kernel)\n");
    let context = CudaContext::new(0).unwrap();
    let stream = context.new_stream().unwrap();
    let kernel = module(&context, &source).load_function("kernel").unwrap();
    let mut x = stream.alloc_zeros::<f32>(40).unwrap();
    let mut launch = stream.launch_builder(&kernel);
    launch.arg(&mut x).arg(&40i32);
    // SAFETY: the arguments are the kernel's; what it does wrong is the test's subject.
    unsafe { launch.launch(shape) }.unwrap();
    drop(x);
    stream.synchronize().unwrap();
}

fn child(name: &str, environment: &[(&str, String)]) -> Output {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "a_right_kernel_runs", "--nocapture"]).env("CUEMU_TEST_MISTAKE", name);
    command.envs(environment.iter().map(|(name, value)| (name, value))).output().unwrap()
}

#[test]
fn mistakes_are_named() {
    for (name, _, message) in MISTAKES {
        if message.is_empty() {
            continue;
        }
        let output = child(name, &[]);
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && text.contains(message), "{name}: {text}");
    }
}

#[test]
fn shared_memory_that_the_launch_did_not_ask_for_is_a_fault() {
    use std::os::unix::process::ExitStatusExt;
    assert!(child("shared", &[]).status.signal().is_some());
}

/// The sanitizer's library must be in the process before all others. Without one beside the compiler: nothing.
fn sanitized(name: &str, flags: &str, libraries: [&str; 2]) -> Option<Output> {
    let path = |name: &str| {
        let output = Command::new("gcc").arg(format!("-print-file-name={name}")).output().ok()?;
        let path = String::from_utf8(output.stdout).ok()?.trim().to_owned();
        path.starts_with('/').then_some(path)
    };
    let [first, second] = libraries.map(path);
    let environment = [
        ("CUEMU_CXXFLAGS", flags.to_owned()),
        ("LD_PRELOAD", format!("{} {}", first?, second?)),
        ("ASAN_OPTIONS", "detect_leaks=0:detect_stack_use_after_return=0".to_owned()),
        ("TSAN_OPTIONS", "halt_on_error=1:ignore_noninstrumented_modules=1".to_owned()),
    ];
    Some(child(name, &environment))
}

fn tells(output: Option<Output>, message: &str) {
    let Some(output) = output else {
        println!("skipped: no sanitizers beside gcc");
        return;
    };
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && text.contains(message) && text.contains("test.cu:1"), "{text}");
}

#[test]
fn the_address_sanitizer_watches_kernels() {
    let run = |name| {
        let flags = "-fsanitize=address,undefined -fno-sanitize-recover=undefined";
        sanitized(name, flags, ["libasan.so", "libubsan.so"])
    };
    tells(run("past"), "heap-buffer-overflow");
    assert!(run("right").is_none_or(|output| output.status.success()));
}

#[test]
fn the_thread_sanitizer_finds_races() {
    let run = |name| sanitized(name, "-fsanitize=thread", ["libtsan.so", "libtsan.so"]);
    tells(run("race"), "data race");
    assert!(run("right").is_none_or(|output| output.status.success()));
}
