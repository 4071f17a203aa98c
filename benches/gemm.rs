//! GFLOP/s of matrix products against the multiply-add peak of the processor, measured in the same run.
//!
//! `cargo bench --bench gemm [-- THREADS [avx512|avx2|baseline [M]]]`

use std::time::{Duration, Instant};

use half::f16;
use wuerstchen::device::gemm::{Gemm, Layout, MatrixB, Values, gemm};
use wuerstchen::device::simd::{self, Level};
use wuerstchen::{Context, Device, Result};

/// (M, K, N) of the models' products.
const SHAPES: &[(usize, usize, usize)] = &[
    (288, 1536, 6144),
    (288, 6144, 1536),
    (288, 1536, 4608),
    (16384, 384, 1536),
    (16384, 1536, 384),
    (8192, 640, 2560),
    (2048, 1280, 5120),
    (154, 1024, 1536),
    (32768, 256, 8192),
    (2, 1536, 6144),
];

/// How long one measurement may repeat.
const TIME: Duration = Duration::from_millis(600);

/// Rounds of 384 multiply-adds per thread.
const PEAK_STEPS: usize = 2_000_000;

/// The best of several runs, in seconds: what others on the machine disturb least.
fn best(limit: Duration, mut body: impl FnMut() -> Result<()>) -> Result<f64> {
    let (start, mut least) = (Instant::now(), f64::INFINITY);
    for run in 0..100 {
        let begin = Instant::now();
        body()?;
        least = least.min(begin.elapsed().as_secs_f64());
        if run > 1 && start.elapsed() > limit {
            break;
        }
    }
    Ok(least)
}

/// The multiply-add peak of all threads.
fn peak(cx: &Context) -> Result<f64> {
    let threads = cx.device().threads();
    let seconds =
        best(Duration::from_millis(200), || cx.parallel(threads, |_| simd::multiply_add_rounds(PEAK_STEPS)))?;
    Ok((threads * PEAK_STEPS * 384 * 2) as f64 / seconds / 1e9)
}

fn product(cx: &Context, (m, k, n): (usize, usize, usize), kind: &str) -> Result<f64> {
    let a: Vec<f32> = (0..m * k).map(|i| (i % 17) as f32 * 0.1 - 0.8).collect();
    let b: Vec<f32> = (0..n * k).map(|i| (i % 13) as f32 * 0.1 - 0.6).collect();
    let half: Vec<f16> = b.iter().map(|&v| f16::from_f32(v)).collect();
    let mut out = vec![0.0; m * n];
    let (values, layout, leading) = match kind {
        "f16" => (Values::F16(&half), Layout::RowsAreOutputs, k),
        "f32 [K,N]" => (Values::F32(&b), Layout::RowsAreInputs, n),
        _ => (Values::F32(&b), Layout::RowsAreOutputs, k),
    };
    let product = Gemm { m, n, k, a: &a, lda: k, b: MatrixB { values, layout, leading } };
    let seconds = best(TIME, || gemm(cx, &product, &mut out, n, |_, _, _| ()))?;
    std::hint::black_box(&out);
    Ok(2.0 * (m * n) as f64 * k as f64 / seconds / 1e9)
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with("--")).collect();
    let threads = arguments.first().and_then(|a| a.parse().ok()).unwrap_or(0);
    match arguments.get(1).map(String::as_str) {
        Some("avx2") => simd::limit(Level::Avx2),
        Some("baseline") => simd::limit(Level::Baseline),
        _ => {}
    }
    let cx = Context::new(&Device::cpu(threads)?);
    println!("{:?}, {} threads", simd::level(), cx.device().threads());
    println!("GFLOP/s and share of the multiply-add peak");
    let wanted = arguments.get(2).and_then(|a| a.parse::<usize>().ok());
    for &shape in SHAPES.iter().filter(|s| wanted.is_none_or(|m| m == s.0)) {
        let (m, k, n) = shape;
        let peak = peak(&cx)?;
        print!("peak {peak:5.1} | M {m:5} K {k:4} N {n:4}");
        for kind in ["f32", "f16", "f32 [K,N]"] {
            let speed = product(&cx, shape, kind)?;
            print!(" | {kind} {speed:6.1} {:3.0}%", speed / peak * 100.0);
        }
        println!();
    }
    Ok(())
}
