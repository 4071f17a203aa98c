//! GFLOP/s of matrix products against the multiply-add peak of the processor, measured in the same run: with factors in
//! f32, from weights of several kinds, and rounded to bf16 (of weights in bf16) where the processor can.
//!
//! `cargo bench --bench gemm [-- THREADS [avx512|avx2|baseline [M]]]`

use std::time::{Duration, Instant};

use half::{bf16, f16};
use wuerstchen::device::gemm::{Factors, Gemm, Layout, MatrixA, MatrixB, Values, gemm, multiplies_bf16};
use wuerstchen::device::simd::{self, Level};
use wuerstchen::{Context, DType, Device, Result, Tensor};

/// (M, K of each term, N) of the models' products.
const SHAPES: &[(usize, &[usize], usize)] = &[
    (288, &[1536], 6144),
    (288, &[6144], 1536),
    (288, &[1536], 4608),
    (16384, &[384], 1536),
    (16384, &[1536], 384),
    (8192, &[640], 2560),
    (4096, &[640], 2560),
    (4096, &[640, 16], 2560),
    (2048, &[1280], 5120),
    (154, &[1024], 1536),
    (32768, &[256], 8192),
    (2, &[1536], 6144),
];

/// How long one measurement may repeat.
const TIME: Duration = Duration::from_millis(1000);

/// Rounds of 384 multiply-adds per thread, for one look at the peak: a fraction of a millisecond.
const PEAK_STEPS: usize = 200_000;

/// GFLOP/s of `body`, by the clock and by the processor time of its threads.
fn rates(cx: &Context, flops: f64, body: impl FnOnce() -> Result<()>) -> Result<[f64; 2]> {
    let (start, busy) = (Instant::now(), simd::processor_seconds());
    body()?;
    let busy = (simd::processor_seconds() - busy) / cx.device().threads() as f64;
    Ok([flops / start.elapsed().as_secs_f64() / 1e9, flops / busy / 1e9])
}

/// The multiply-add rates of all threads just now.
fn peak(cx: &Context) -> Result<[f64; 2]> {
    let threads = cx.device().threads();
    let (each, rounds): (_, fn(usize)) = if cx.device().rounds_factors() {
        (768, simd::multiply_add_bf16_rounds)
    } else {
        (384, simd::multiply_add_rounds)
    };
    let flops = (threads * PEAK_STEPS * each * 2) as f64;
    rates(cx, flops, || cx.parallel(threads, |_| rounds(PEAK_STEPS)))
}

/// The best rates of a product and of the peak, measured in turn: others on the machine disturb these least.
fn product(cx: &Context, (m, depths, n): (usize, &[usize], usize), kind: &str) -> Result<[[f64; 2]; 2]> {
    let k: usize = depths.iter().sum();
    let mut a = Tensor::new(cx, "a", &[m, k], DType::F32)?;
    a.slice_mut::<f32>()?.iter_mut().enumerate().for_each(|(i, v)| *v = (i % 17) as f32 * 0.1 - 0.8);
    let b: Vec<f32> = (0..n * k).map(|i| (i % 13) as f32 * 0.1 - 0.6).collect();
    let half: Vec<f16> = b.iter().map(|&v| f16::from_f32(v)).collect();
    let brain: Vec<bf16> = b.iter().map(|&v| bf16::from_f32(v)).collect();
    let mut out = Tensor::new(cx, "out", &[m, n], DType::F32)?;
    let out = out.slice_mut::<f32>()?;
    let a = a.slice()?;
    // Each term has matrices of its own, one behind the other.
    let mut before = 0;
    let factors = depths.iter().map(|&k| {
        let at = before;
        before += k;
        let (values, layout, leading) = match kind {
            "f16" => (Values::F16(&half), Layout::RowsAreOutputs, k),
            "bf16" => (Values::BF16(&brain), Layout::RowsAreOutputs, k),
            "f32 [K,N]" => (Values::F32(&b), Layout::RowsAreInputs, n),
            _ => (Values::F32(&b), Layout::RowsAreOutputs, k),
        };
        Factors {
            k,
            a: MatrixA::rows(&a[m * at..], k),
            b: MatrixB { values: values.skip(n * at), layout, leading },
        }
    });
    let terms: Vec<Factors> = factors.collect();
    let product = Gemm { m, n, terms: &terms, accumulate: false };
    let flops = 2.0 * (m * n) as f64 * k as f64;
    let (start, mut best) = (Instant::now(), [[0f64; 2]; 2]);
    while start.elapsed() < TIME {
        let speed = rates(cx, flops, || gemm(cx, &product, out, n, |_, _, _| ()))?;
        for (best, now) in best.iter_mut().zip([speed, peak(cx)?]) {
            *best = [best[0].max(now[0]), best[1].max(now[1])];
        }
    }
    Ok(best)
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
    let rounded = Context::new(&Device::cpu_in_bf16(threads)?);
    println!("{:?}, {} threads", simd::level(), cx.device().threads());
    println!(
        "GFLOP/s of those that multiply-adds reach, share by the clock (with one thread, by processor time too)"
    );
    let mut highest = 0f64;
    let wanted = arguments.get(2).and_then(|a| a.parse::<usize>().ok());
    for &shape in SHAPES.iter().filter(|s| wanted.is_none_or(|m| m == s.0)) {
        let (m, depths, n) = shape;
        let k = depths.iter().map(usize::to_string).collect::<Vec<_>>().join("+");
        print!("M {m:5} K {k:>6} N {n:4}");
        for kind in ["f32", "f16", "f32 [K,N]", "bf16"] {
            let cx = if kind == "bf16" { &rounded } else { &cx };
            if cx.device().rounds_factors() && !multiplies_bf16() {
                continue;
            }
            let [speed, peak] = product(cx, shape, kind)?;
            if kind != "bf16" {
                highest = highest.max(peak[0]);
            }
            print!(" | {kind} {:5.1} of {:5.1} {:3.0}%", speed[0], peak[0], speed[0] / peak[0] * 100.0);
            if threads == 1 {
                print!(" {:3.0}%", speed[1] / peak[1] * 100.0);
            }
        }
        println!();
    }
    println!("multiply-add peak: {highest:.0} GFLOP/s with {} threads", cx.device().threads());
    Ok(())
}
