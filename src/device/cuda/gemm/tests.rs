//! Products against a plain loop in f64, by every engine.

use std::sync::Arc;

use half::{bf16, f16};

use super::*;
use crate::device::cuda::{Gpu, Memory, StepMemory, graph::Graph};
use crate::tensor::rng::Philox;

const ENGINES: [Engine; 3] = [Engine::Best, Engine::Own, Engine::Tiled];
const PRECISIONS: [Precision; 3] = [Precision::F32, Precision::F16, Precision::BF16];

fn stream() -> Option<Arc<Stream>> {
    match std::env::var("WST_TEST_CUDA").as_deref() {
        Ok("none") => return None,
        Ok("real") => {}
        _ => {
            if let Err(reason) = cuda_emulation::load() {
                eprintln!("without a GPU: {reason}");
                return None;
            }
        }
    }
    Some(Stream::new(&Gpu::open(0).unwrap()).unwrap())
}

fn rounded(value: f32, precision: Precision) -> f32 {
    match precision {
        Precision::F32 => value,
        Precision::F16 => f16::from_f32(value).to_f32(),
        Precision::BF16 => bf16::from_f32(value).to_f32(),
    }
}

fn random(count: usize, seed: u64, precision: Precision) -> Vec<f32> {
    let mut values = vec![0.0; count];
    Philox::new(seed, 0).fill_normal(&mut values, 0);
    values.into_iter().map(|value| rounded(value, precision)).collect()
}

fn up(stream: &Stream, values: &[f32], precision: Precision) -> Memory {
    let bytes: Vec<u8> = match precision {
        Precision::F32 => values.iter().flat_map(|v| v.to_ne_bytes()).collect(),
        Precision::F16 => values.iter().flat_map(|v| f16::from_f32(*v).to_ne_bytes()).collect(),
        Precision::BF16 => values.iter().flat_map(|v| bf16::from_f32(*v).to_ne_bytes()).collect(),
    };
    let memory = stream.take("numbers", bytes.len()).unwrap();
    stream.upload(&bytes, &memory, 0).unwrap();
    memory
}

fn down(stream: &Stream, memory: &Memory, precision: Precision) -> Vec<f32> {
    let mut bytes = vec![0; memory.bytes()];
    stream.download(memory, &mut bytes).unwrap();
    match precision {
        Precision::F32 => bytes.chunks(4).map(|b| f32::from_ne_bytes(b.try_into().unwrap())).collect(),
        Precision::F16 => {
            bytes.chunks(2).map(|b| f16::from_ne_bytes(b.try_into().unwrap()).to_f32()).collect()
        }
        Precision::BF16 => {
            bytes.chunks(2).map(|b| bf16::from_ne_bytes(b.try_into().unwrap()).to_f32()).collect()
        }
    }
}

/// Which product, and how its matrices lie.
#[derive(Debug, Clone, Copy)]
struct Case {
    sizes: [usize; 3],
    transposed: [bool; 2],
    precision: Precision,
    out: Precision,
    /// Elements between the rows of each matrix, and between those of a batch.
    gap: usize,
    batch: usize,
    alpha: f32,
    accumulate: bool,
    /// Which parts of a tail there are: scale, bias, activation, gain, residual, modulation.
    tail: [bool; 6],
    bias: Precision,
}

const PLAIN: Case = Case {
    sizes: [1, 1, 1],
    transposed: [false; 2],
    precision: Precision::F32,
    out: Precision::F32,
    gap: 0,
    batch: 1,
    alpha: 1.0,
    accumulate: false,
    tail: [false; 6],
    bias: Precision::F32,
};

/// A row-major matrix on the host.
struct Host {
    values: Vec<f32>,
    leading: usize,
    stride: usize,
    transposed: bool,
}

impl Host {
    fn new(
        seed: u64,
        [rows, columns]: [usize; 2],
        transposed: bool,
        precision: Precision,
        case: &Case,
    ) -> Self {
        let [rows, columns] = if transposed { [columns, rows] } else { [rows, columns] };
        let leading = columns + case.gap;
        let stride = rows * leading + case.gap;
        Host { values: random(stride * case.batch, seed, precision), leading, stride, transposed }
    }

    fn index(&self, batch: usize, row: usize, column: usize) -> usize {
        let (row, column) = if self.transposed { (column, row) } else { (row, column) };
        batch * self.stride + row * self.leading + column
    }

    fn at(&self, batch: usize, row: usize, column: usize) -> f64 {
        f64::from(self.values[self.index(batch, row, column)])
    }

    fn matrix(&self, memory: &Memory, precision: Precision) -> Matrix {
        Matrix { address: memory.address(), precision, leading: self.leading, transposed: self.transposed }
    }
}

/// Rows of the result that share a row of the modulation.
const PER_SAMPLE: usize = 3;
const GAIN: f32 = 0.7;
const SILU: i32 = 5;

impl Case {
    /// Computes it with an engine, and panics unless it is close to the definition and nothing else was written.
    fn check(&self, stream: &Stream, engine: Engine) {
        let [m, n, k] = self.sizes;
        let [at, bt] = self.transposed;
        let a = Host::new(1, [m, k], at, self.precision, self);
        let b = Host::new(2, [k, n], bt, self.precision, self);
        let out = Host::new(3, [m, n], false, self.out, self);
        let residual = Host::new(4, [m, n], false, self.out, self);
        let scale = random(n, 5, Precision::F32);
        let bias = random(n, 6, self.bias);
        let modulation = random(m.div_ceil(PER_SAMPLE) * 2 * n, 7, Precision::F32);
        let [a_memory, b_memory] = [&a, &b].map(|host| up(stream, &host.values, self.precision));
        let [out_memory, residual_memory] = [&out, &residual].map(|host| up(stream, &host.values, self.out));
        let [scale_memory, modulation_memory] =
            [&scale, &modulation].map(|values| up(stream, values, Precision::F32));
        let bias_memory = up(stream, &bias, self.bias);
        let address = |which: usize, memory: &Memory| if self.tail[which] { memory.address() } else { 0 };
        let product = Product {
            m,
            n,
            k,
            a: a.matrix(&a_memory, self.precision),
            b: b.matrix(&b_memory, self.precision),
            out: out.matrix(&out_memory, self.out),
            alpha: self.alpha,
            accumulate: self.accumulate,
            batch: (self.batch > 1)
                .then_some(Batch { count: self.batch, strides: [a.stride, b.stride, out.stride] }),
            tail: Tail {
                scale: address(0, &scale_memory),
                bias: self.tail[1].then_some((bias_memory.address(), self.bias)),
                activation: (if self.tail[2] { SILU } else { 0 }, 0.0),
                gain: if self.tail[3] { GAIN } else { 1.0 },
                residual: address(4, &residual_memory),
                modulation: address(5, &modulation_memory),
                rows_per_sample: PER_SAMPLE,
            },
        };
        stream.prefer(engine);
        // SAFETY: all is on the device, until the result was read.
        unsafe { stream.multiply(&product).unwrap() };
        let found = down(stream, &out_memory, self.out);
        let mut expected: Vec<f64> = out.values.iter().map(|&v| f64::from(v)).collect();
        let mut inside = vec![false; expected.len()];
        let mut largest = 1f64;
        for (batch, row, column) in
            (0..self.batch).flat_map(|z| (0..m).flat_map(move |i| (0..n).map(move |j| (z, i, j))))
        {
            let sum: f64 = (0..k).map(|l| a.at(batch, row, l) * b.at(batch, l, column)).sum();
            let mut v = f64::from(self.alpha) * sum;
            v += if self.accumulate { out.at(batch, row, column) } else { 0.0 };
            v *= if self.tail[0] { f64::from(scale[column]) } else { 1.0 };
            v += if self.tail[1] { f64::from(bias[column]) } else { 0.0 };
            v = if self.tail[2] { v / (1.0 + (-v).exp()) } else { v };
            v *= if self.tail[3] { f64::from(GAIN) } else { 1.0 };
            v += if self.tail[4] { residual.at(batch, row, column) } else { 0.0 };
            if self.tail[5] {
                let of_row = &modulation[row / PER_SAMPLE * 2 * n..];
                v = v * (1.0 + f64::from(of_row[column])) + f64::from(of_row[n + column]);
            }
            let index = out.index(batch, row, column);
            (expected[index], inside[index]) = (v, true);
            largest = largest.max(v.abs());
        }
        let tolerance = match self.out {
            Precision::F32 => 1e-5,
            Precision::F16 => 4e-3,
            Precision::BF16 => 2e-2,
        };
        for (i, (&found, &expected)) in found.iter().zip(&expected).enumerate() {
            let most = if inside[i] { tolerance * largest } else { 0.0 };
            let close = (f64::from(found) - expected).abs() <= most;
            assert!(close, "{engine:?}, {self:?}: {found} at {i} instead of {expected}");
        }
    }
}

/// As much as a thread has to do with: every transposition and type.
fn each(cases: &[Case]) {
    let Some(stream) = stream() else { return };
    for case in cases {
        for engine in ENGINES {
            for precision in PRECISIONS {
                let out = if case.out == Precision::F32 { Precision::F32 } else { precision };
                let bias = if case.bias == Precision::F32 { Precision::F32 } else { precision };
                Case { precision, out, bias, ..*case }.check(&stream, engine);
            }
        }
    }
}

fn transpositions(case: Case) -> [Case; 4] {
    [[false, false], [false, true], [true, false], [true, true]].map(|transposed| Case { transposed, ..case })
}

#[test]
fn sizes_at_the_edges_of_tiles() {
    for sizes in [[1, 1, 1], [3, 5, 7], [64, 64, 32], [65, 72, 33], [70, 200, 96]] {
        each(&transpositions(Case { sizes, out: Precision::F16, ..PLAIN }));
    }
}

#[test]
fn large_tiles() {
    each(&[
        Case { sizes: [130, 264, 72], out: Precision::F16, ..PLAIN },
        Case { sizes: [257, 129, 31], transposed: [false, true], out: Precision::F16, ..PLAIN },
        Case { sizes: [140, 256, 40], transposed: [true, false], ..PLAIN },
    ]);
}

#[test]
fn long_sums_of_few_elements_are_cut() {
    each(&transpositions(Case { sizes: [20, 30, 1100], ..PLAIN }));
    each(&[Case { sizes: [1, 70, 600], out: Precision::F16, tail: [true; 6], batch: 2, ..PLAIN }]);
}

#[test]
fn rows_apart_batches_factors_and_sums() {
    let case = Case { sizes: [9, 11, 40], gap: 3, batch: 3, alpha: -0.3, accumulate: true, ..PLAIN };
    each(&transpositions(case));
    each(&transpositions(Case { gap: 8, sizes: [24, 16, 48], out: Precision::F16, ..case }));
    each(&[Case { sizes: [4, 5, 0], ..case }, Case { sizes: [4, 5, 0], accumulate: false, ..case }]);
}

#[test]
fn what_follows() {
    let case = Case { sizes: [7, 24, 16], out: Precision::F16, ..PLAIN };
    // All parts, each alone, and each pair that may be done together.
    let mut tails =
        vec![[true; 6], [false, true, false, false, true, false], [false, false, false, true, true, false]];
    tails.push([false, true, false, true, true, false]);
    tails.push([false, true, true, false, false, false]);
    tails.push([false, false, true, true, true, true]);
    tails.extend((0..6).map(|one| std::array::from_fn(|i| i == one)));
    for tail in tails {
        for sizes in [case.sizes, [7, 13, 16]] {
            each(&[Case { sizes, tail, ..case }, Case { sizes, tail, bias: Precision::BF16, ..case }]);
            each(&[Case { sizes, tail, accumulate: true, alpha: 2.0, out: Precision::F32, ..case }]);
        }
    }
}

#[test]
fn the_library_is_used_where_it_is_installed() {
    let Some(stream) = stream() else { return };
    let case = Case { sizes: [8, 16, 24], tail: [false, true, false, false, true, false], ..PLAIN };
    let launches = |engine| {
        let before = stream.launches();
        case.check(&stream, engine);
        case.check(&stream, engine);
        stream.launches() - before
    };
    // A bias and a residual are part of the product.
    assert_eq!(ENGINES.map(launches), [2, 2, 2]);
    let state = lock(&stream.products().state);
    let Some(Some(blas)) = &state.blas else { panic!("the library was not found") };
    assert_eq!(blas.plans(), 1);
}

#[test]
fn empty_products_are_nothing() {
    let Some(stream) = stream() else { return };
    for sizes in [[0, 5, 3], [5, 0, 3], [0, 0, 0]] {
        for engine in ENGINES {
            let before = stream.launches();
            Case { sizes, ..PLAIN }.check(&stream, engine);
            assert_eq!(stream.launches(), before);
        }
    }
}

#[test]
fn types_that_do_not_go_together_are_refused() {
    let Some(stream) = stream() else { return };
    let memory = stream.take("numbers", 64).unwrap();
    let matrix = |precision| Matrix { address: memory.address(), precision, leading: 1, transposed: false };
    let of = |[a, b, out]: [Precision; 3]| Product {
        m: 1,
        n: 1,
        k: 1,
        a: matrix(a),
        b: matrix(b),
        out: matrix(out),
        alpha: 1.0,
        accumulate: false,
        batch: None,
        tail: Tail::default(),
    };
    for types in [
        [Precision::F32, Precision::F16, Precision::F32],
        [Precision::F32, Precision::F32, Precision::F16],
        [Precision::BF16, Precision::BF16, Precision::F16],
    ] {
        // SAFETY: nothing is launched.
        let error = unsafe { stream.multiply(&of(types)) }.unwrap_err().to_string();
        assert!(error.contains("types"), "{error}");
    }
}

#[test]
fn a_recorded_product_runs_again() {
    let Some(stream) = stream() else { return };
    for engine in ENGINES {
        stream.prefer(engine);
        // One that is cut into parts.
        let [m, n, k] = [5, 6, 700];
        let (a, b) = (random(m * k, 1, Precision::F32), random(k * n, 2, Precision::F32));
        let [a, b] = [a, b].map(|values| up(&stream, &values, Precision::F32));
        let out = up(&stream, &vec![0.0; m * n], Precision::F32);
        let matrix = |memory: &Memory, leading| Matrix {
            address: memory.address(),
            precision: Precision::F32,
            leading,
            transposed: false,
        };
        let product = Product {
            m,
            n,
            k,
            a: matrix(&a, k),
            b: matrix(&b, n),
            out: matrix(&out, n),
            alpha: 1.0,
            accumulate: true,
            batch: None,
            tail: Tail::default(),
        };
        let memory = StepMemory::new(&stream);
        // SAFETY: all is on the device until the end.
        let step = || unsafe { stream.multiply(&product) };
        memory.within(&stream, step).unwrap();
        let once = down(&stream, &out, Precision::F32);
        let (mut graph, ()) = Graph::record(&stream, &memory, step).unwrap();
        assert_eq!(down(&stream, &out, Precision::F32), once);
        graph.launch().unwrap();
        let twice = down(&stream, &out, Precision::F32);
        assert!(once.iter().zip(&twice).all(|(once, twice)| (2.0 * once - twice).abs() < 1e-3));
    }
}
