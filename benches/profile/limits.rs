//! What the machine can do at most, with as many threads as the model has.

use std::time::{Duration, Instant};

use wuerstchen::device::profile::Work;
use wuerstchen::device::simd;
use wuerstchen::{Context, Device};

use super::Outcome;

/// Rounds of 384 multiply-adds per thread, for one look at the peak: a fraction of a millisecond.
const PEAK_STEPS: usize = 200_000;
/// How long each limit is looked for.
const TIME: Duration = Duration::from_millis(150);
/// How long the processor shows what it holds, not only reaches.
const LONG: Duration = Duration::from_secs(2);
/// Copies move from 2^16 to 2^28 bytes, written ones included: from a first cache to memory.
const SMALLEST: usize = 16;
const LARGEST: usize = 28;
/// Numbers that a task copies.
const TASK: usize = 16 << 10;

pub struct Limits {
    pub threads: usize,
    /// Of multiply-adds in f32, at best.
    pub flops_per_second: f64,
    /// Of the same, the mean of a longer time: a step's clock and neighbours are as likely these as the best ones.
    held_flops_per_second: f64,
    /// Of copies that move 2^`SMALLEST` bytes, twice as many, …, read and written ones counted.
    bytes_per_second: Vec<f64>,
}

impl Limits {
    pub fn measure(threads: usize) -> Outcome<Self> {
        let cx = Context::new(&Device::cpu(threads)?);
        let threads = cx.device().threads();
        let flops = (threads * PEAK_STEPS * 384 * 2) as f64;
        let rounds = || Ok(cx.parallel(threads, |_| simd::multiply_add_rounds(PEAK_STEPS))?);
        let flops_per_second = flops / shortest(rounds)?;
        let held_flops_per_second = flops / mean(rounds)?;

        let most = (1 << LARGEST) / 2 / size_of::<f32>();
        let (from, mut to) = (vec![1f32; most], vec![0f32; most]);
        let mut bytes_per_second = Vec::new();
        for power in SMALLEST..=LARGEST {
            let count = (1 << power) / 2 / size_of::<f32>();
            let copy = || {
                let (from, to) = (&from[..count], &mut to[..count]);
                cx.parallel_chunks(to, TASK, |i, part| {
                    part.copy_from_slice(&from[i * TASK..][..part.len()]);
                })?;
                std::hint::black_box(&to);
                Ok(())
            };
            bytes_per_second.push((1u64 << power) as f64 / shortest(copy)?);
        }
        Ok(Limits { threads, flops_per_second, held_flops_per_second, bytes_per_second })
    }

    /// The least seconds that `calls` calls with this work together could take.
    pub fn seconds(&self, work: Work, calls: u64) -> f64 {
        let of_call = work.bytes as f64 / calls.max(1) as f64;
        (work.flops as f64 / self.flops_per_second).max(work.bytes as f64 / self.copy_rate(of_call))
    }

    /// Bytes per second of a copy that moves so many, between the measured ones.
    fn copy_rate(&self, bytes: f64) -> f64 {
        let last = self.bytes_per_second.len() - 1;
        let place = (bytes.max(1.).log2() - SMALLEST as f64).clamp(0., last as f64);
        let (below, part) = (place as usize, place.fract());
        let above = (below + 1).min(last);
        self.bytes_per_second[below] * (1. - part) + self.bytes_per_second[above] * part
    }

    pub fn describe(&self) -> String {
        let gb = |power: usize| self.bytes_per_second[power - SMALLEST] / 1e9;
        format!(
            "{:?}, {} threads: {:.0} GFLOP/s of multiply-adds in f32, {:.0} held for {} s; copies {:.1} GB/s of 128 KiB, {:.1} of 4 MiB, {:.1} of 256 MiB",
            simd::level(),
            self.threads,
            self.flops_per_second / 1e9,
            self.held_flops_per_second / 1e9,
            LONG.as_secs(),
            gb(17),
            gb(22),
            gb(LARGEST)
        )
    }
}

/// The best of all runs within [`TIME`], in seconds.
fn shortest(mut run: impl FnMut() -> Outcome<()>) -> Outcome<f64> {
    let (begin, mut best) = (Instant::now(), f64::INFINITY);
    while begin.elapsed() < TIME {
        let start = Instant::now();
        run()?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(best)
}

/// The mean of all runs within [`LONG`], in seconds.
fn mean(run: impl Fn() -> Outcome<()>) -> Outcome<f64> {
    let (begin, mut runs) = (Instant::now(), 0);
    while begin.elapsed() < LONG {
        run()?;
        runs += 1;
    }
    Ok(begin.elapsed().as_secs_f64() / f64::from(runs))
}
