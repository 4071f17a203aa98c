//! Kernels: compiled, launched, and what CUDA C++ has built in.

#![allow(clippy::unwrap_used)]

mod common;

use common::{ADD, alone, compile, module, shape};
use cuda_emulation::Order;
use cudarc::driver::{CudaContext, LaunchConfig, PushKernelArg};

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

/// Launches one kernel over a float output, and gives that.
fn run(source: &str, outputs: usize, shape: LaunchConfig) -> Vec<f32> {
    let context = CudaContext::new(0).unwrap();
    let stream = context.new_stream().unwrap();
    let kernel = module(&context, source).load_function("kernel").unwrap();
    let mut out = stream.alloc_zeros::<f32>(outputs).unwrap();
    let mut launch = stream.launch_builder(&kernel);
    launch.arg(&mut out);
    // SAFETY: the argument is the kernel's.
    unsafe { launch.launch(shape) }.unwrap();
    stream.clone_dtoh(&out).unwrap()
}

#[test]
fn lanes_see_each_other() {
    let _alone = alone();
    let source = r#"
    extern "C" __global__ void kernel(float *out) {
        int i = threadIdx.x;
        float x = i;
        double wide = i * 0.5;
        out[i] = __shfl_xor_sync(0xffffffffu, x, 1);
        out[32 + i] = __shfl_down_sync(0xffffffffu, i, 3, 8);
        out[64 + i] = (float)__shfl_up_sync(0xffffffffu, wide, 1);
        out[96 + i] = __shfl_sync(0xffffffffu, (unsigned)i, 5, 16);
        out[128 + i] = __popc(__ballot_sync(0xffffffffu, i % 3 == 0));
        out[160 + i] = __any_sync(0xffffffffu, i == 7) + 2 * __all_sync(0xffffffffu, i < 31);
        if (i < 4) out[192 + i] = __shfl_xor_sync(0xfu, (long long)i, 3);
        __syncwarp();
        int count = __syncthreads_count(i < 9), any = __syncthreads_or(i == 9), all = __syncthreads_and(i != 9);
        if (i == 0) out[192 + 4] = count;
        if (i == 1) out[192 + 5] = any + 2 * all;
    }
    CU_KERNEL(kernel)
    "#;
    for order in [Order::Ascending, Order::Descending, Order::Random(1)] {
        cuda_emulation::set_order(order);
        let out = run(source, 198, shape(1, 32));
        for i in 0..32 {
            assert_eq!(out[i], (i ^ 1) as f32);
            assert_eq!(out[32 + i], if i % 8 < 5 { i + 3 } else { i } as f32);
            assert_eq!(out[64 + i], i.saturating_sub(1) as f32 * 0.5);
            assert_eq!(out[96 + i], (i / 16 * 16 + 5) as f32);
            assert_eq!((out[128 + i], out[160 + i]), (11.0, 1.0));
        }
        assert_eq!(out[192..], [3.0, 2.0, 1.0, 0.0, 9.0, 1.0]);
    }
    cuda_emulation::set_order(Order::Ascending);
}

#[test]
fn the_order_of_blocks_and_threads_is_the_tests() {
    let _alone = alone();
    let source = r#"
    extern "C" __global__ void kernel(float *out) {
        out[1 + (int)atomicAdd(out, 1.0f)] = blockIdx.x * 64 + threadIdx.x;
    }
    CU_KERNEL(kernel)
    "#;
    let ascending = run(source, 129, shape(2, 64));
    assert!(ascending[1..].is_sorted());
    cuda_emulation::set_order(Order::Descending);
    let descending = run(source, 129, shape(2, 64));
    assert!(descending[1..].iter().rev().is_sorted());
    cuda_emulation::set_order(Order::Random(3));
    let mut random = run(source, 129, shape(2, 64));
    assert!(random[1..] != ascending[1..] && random[1..] != descending[1..]);
    random[1..].sort_by(f32::total_cmp);
    assert_eq!(random, ascending);
    cuda_emulation::set_order(Order::Ascending);
}

#[test]
fn a_missing_barrier_or_wait_shows() {
    let _alone = alone();
    // Each thread reads what its neighbour in the next warp wrote.
    let source = |barrier| {
        format!(
            r#"
    extern "C" __global__ void kernel(float *out) {{
        __shared__ float shared[64];
        shared[threadIdx.x] = threadIdx.x;
        {barrier}
        out[threadIdx.x] = shared[(threadIdx.x + 32) % 64];
    }}
    CU_KERNEL(kernel)
    "#
        )
    };
    let right: Vec<f32> = (0..64).map(|i| ((i + 32) % 64) as f32).collect();
    assert_eq!(run(&source("__syncthreads();"), 64, shape(1, 64)), right);
    let wrong = run(&source(""), 64, shape(1, 64));
    assert!(wrong[0].is_nan() && wrong[32] == 0.0, "shared memory starts as NaN");

    let source = |wait| {
        format!(
            r#"
    extern "C" __global__ void kernel(float *out) {{
        float *shared = cuemu::dyn_shared<float>();
        out[threadIdx.x] = threadIdx.x;
        __syncwarp();
        if (threadIdx.x == 0) {{
            cuemu_cp_async16(shared, out);
            cuemu_cp_async_commit();
            {wait}
            out[32] = shared[0];
        }}
    }}
    CU_KERNEL(kernel)
    "#
        )
    };
    let dynamic = LaunchConfig { shared_mem_bytes: 16, ..shape(1, 32) };
    assert_eq!(run(&source("cuemu_cp_async_wait<0>();"), 33, dynamic)[32], 0.0);
    assert!(run(&source("cuemu_cp_async_wait<1>();"), 33, dynamic)[32].is_nan());
}

#[test]
fn a_warp_multiplies_matrices() {
    let _alone = alone();
    // D = A B with A (16 x 16) and B (16 x 8) laid out in shared memory by rows: B needs the transposing load.
    let source = |kind: &str, convert: &str| {
        format!(
            r#"
    extern "C" __global__ void kernel(float *out) {{
        __shared__ __align__(16) unsigned short a[16][16], b[16][8];
        int lane = threadIdx.x;
        for (int i = lane; i < 256; i += 32) a[i / 16][i % 16] = {convert}((float)(i % 7)).x;
        for (int i = lane; i < 128; i += 32) b[i / 8][i % 8] = {convert}((float)(i % 5)).x;
        __syncwarp();
        unsigned fa[4], fb[2];
        float d[4] = {{1, 1, 1, 1}};
        cuemu_ldmatrix_x4(fa, &a[lane % 16][lane / 16 * 8]);
        cuemu_ldmatrix_x2_trans(fb, &b[lane % 16][0]);
        cuemu_mma_{kind}_16816(d, fa, fb);
        for (int i = 0; i < 4; i++) out[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
    }}
    CU_KERNEL(kernel)
    "#
        )
    };
    for source in [source("f16", "__float2half"), source("bf16", "__float2bfloat16")] {
        let out = run(&source, 128, shape(1, 32));
        for (i, found) in out.iter().enumerate() {
            let (row, column) = (i / 8, i % 8);
            let sum: usize = (0..16).map(|k| (row * 16 + k) % 7 * ((k * 8 + column) % 5)).sum();
            assert_eq!(*found, 1.0 + sum as f32);
        }
    }
}

#[test]
fn half_precision_rounds_as_it_should() {
    let _alone = alone();
    let source = r#"
    extern "C" __global__ void kernel(float *out) {
        unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
        unsigned bits = i * 0x10007u;
        float x = __uint_as_float(bits);
        out[i] = __uint_as_float((unsigned)__float2half(x).x << 16 | __float2bfloat16(x).x);
        __half back = __float2half(__half2float(__half{(unsigned short)i}));
        if (back.x != i && !(i & 0x3ff && (i & 0x7c00) == 0x7c00)) out[i] = -1.0f;
    }
    CU_KERNEL(kernel)
    "#;
    let out = run(source, 65536, shape(256, 256));
    for (i, found) in out.iter().enumerate() {
        let x = f32::from_bits((i as u32).wrapping_mul(0x10007));
        if x.is_nan() {
            continue;
        }
        let expected =
            u32::from(half::f16::from_f32(x).to_bits()) << 16 | u32::from(half::bf16::from_f32(x).to_bits());
        assert_eq!(found.to_bits(), expected, "of {x:e}");
    }
}

#[test]
fn a_cached_kernel_is_not_compiled_again() {
    let _alone = alone();
    let source = format!("{ADD}// {:?}", std::time::SystemTime::now());
    let library = |options: &[&str]| {
        let image = String::from_utf8(compile(&source, options).unwrap()).unwrap();
        let path = std::path::PathBuf::from(image.lines().nth(1).unwrap());
        (std::fs::metadata(&path).unwrap().modified().unwrap(), path)
    };
    let (first, again, other) = (library(&[]), library(&[]), library(&["-DX=1"]));
    assert_eq!(first, again);
    assert_ne!(first.1, other.1);
    for (_, path) in [first, other] {
        std::fs::remove_file(path).unwrap();
    }
}

#[test]
fn host_headers_are_out_of_reach() {
    let _alone = alone();
    for wrong in ["uint32_t x = 0;", "float x = INFINITY;", "float x = std::sqrt(2.0f);"] {
        let source = format!("extern \"C\" __global__ void f(float *y) {{ {wrong} *y = x; }}");
        assert!(compile(&source, &[]).is_err(), "{wrong}");
    }
    compile("typedef unsigned int uint32_t; __device__ uint32_t f() { return warpSize; }", &[]).unwrap();
    let log = compile("", &["--no-such-option"]).unwrap_err();
    assert!(log.contains("unrecognized option"), "{log}");
}

#[test]
fn what_does_not_compile_is_said() {
    let _alone = alone();
    let log = compile("extern \"C\" __global__ void f() { nonsense; }", &[]).unwrap_err();
    assert!(log.contains("test.cu:1:") && log.contains("nonsense"), "{log}");
}
