//! What the tests of the ops share.

use crate::device::cuda::{Accelerator, Gpu, Precision};
use crate::device::{Context, Device};
use crate::error::Result;
use crate::ops::activation::Activation;
use crate::ops::kernels;
use crate::tensor::autograd::{self, Tape};
use crate::tensor::rng::Philox;
use crate::tensor::{DType, Tensor};

/// A context on one thread.
pub fn cx() -> Context {
    Context::new(&Device::cpu(1).unwrap())
}

/// A context on a GPU that computes in `precision`: an emulated one, unless the environment asks for the real one
/// (`WST_TEST_CUDA=real`). None where neither is to be had: no C++ compiler, or `WST_TEST_CUDA=none`.
pub fn cuda(precision: Precision) -> Option<Context> {
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
    let accelerator = Accelerator::new(Gpu::open(0).unwrap(), precision);
    Some(Context::new(&Device::cuda(accelerator, 1).unwrap()))
}

/// The same elements in memory of a context's device.
pub fn moved(cx: &Context, x: &Tensor) -> Tensor {
    let copy = Tensor::from_parts(cx, "a copy", x.dims(), &[x]).unwrap();
    match (x.tracked(), copy) {
        (None, copy) => copy,
        (Some(_), copy) => copy.tracked_as(x),
    }
}

/// Panics unless `op` gives about the same on a GPU, where it must launch kernels, and read nothing back: `inputs` are
/// there before. In half precision the inputs are rounded, and the result may differ by `tolerance` of the largest.
pub fn on_device(
    inputs: &[&Tensor],
    tolerances: &[(Precision, f64)],
    op: impl Fn(&Context, &[Tensor]) -> Result<Tensor>,
) {
    let here: Vec<Tensor> = inputs.iter().map(|&x| x.clone()).collect();
    let expected = op(&cx(), &here).unwrap();
    for &(precision, tolerance) in tolerances {
        let Some(cx) = cuda(precision) else { return };
        let dtype = DType::of_activations(&cx);
        let there = inputs.iter().map(|x| match x.dtype() {
            DType::F32 => moved(&cx, &cast(x, dtype)),
            _ => moved(&cx, x),
        });
        let there: Vec<Tensor> = there.collect();
        let stream = cx.cuda().unwrap().unwrap().clone();
        let before = (stream.launches(), stream.downloads());
        let found = op(&cx, &there).unwrap();
        assert!(stream.launches() > before.0, "no kernel was launched");
        assert_eq!(stream.downloads(), before.1, "the host read from the device");
        match expected.dtype() {
            DType::F32 => close(&found, expected.dims(), &wide(&expected), tolerance),
            _ => similar(&found, &expected, "a GPU"),
        }
    }
}

/// Panics unless the gradients of `op` for every input are found on a GPU without reading anything back: `inputs` are
/// there before.
pub fn gradients_on_device(inputs: &[Tensor], op: impl Fn(&Context, &[Tensor]) -> Result<Tensor>) {
    let Some(cx) = cuda(Precision::F32) else { return };
    let leaves = inputs.iter().enumerate().map(|(i, x)| moved(&cx, &autograd::leaf(x, i)));
    let leaves: Vec<Tensor> = leaves.collect();
    let stream = cx.cuda().unwrap().unwrap().clone();
    let before = stream.downloads();
    let tape = Tape::new();
    let out = op(&tape.attach(&cx), &leaves).unwrap();
    let gradient = moved(&cx, &random(out.dims(), 4711));
    let mut found = autograd::Gradients::default();
    tape.backward(&cx, &[(&out, gradient)], &mut found).unwrap();
    assert_eq!(stream.downloads(), before, "the host read from the device");
    assert!((0..inputs.len()).all(|i| found.get(i).is_some()), "a gradient is missing");
}

/// Normal numbers.
pub fn random(dims: &[usize], seed: u64) -> Tensor {
    let mut values = vec![0f32; dims.iter().product()];
    Philox::new(seed, 0).fill_normal(&mut values, 0);
    Tensor::from_slice(dims, &values).unwrap()
}

/// The same numbers, rounded to another float type.
pub fn cast(x: &Tensor, dtype: DType) -> Tensor {
    let values = x.slice::<f32>().unwrap();
    match dtype {
        DType::F16 => {
            let cast: Vec<_> = values.iter().map(|&v| half::f16::from_f32(v)).collect();
            Tensor::from_slice(x.dims(), &cast).unwrap()
        }
        DType::BF16 => {
            let cast: Vec<_> = values.iter().map(|&v| half::bf16::from_f32(v)).collect();
            Tensor::from_slice(x.dims(), &cast).unwrap()
        }
        _ => x.clone(),
    }
}

/// The numbers of a float tensor, exactly.
pub fn wide(x: &Tensor) -> Vec<f64> {
    let mut values = vec![0f32; x.elements()];
    kernels::widen(x, 0, &mut values).unwrap();
    values.into_iter().map(f64::from).collect()
}

/// Panics unless `actual` has the shape and, to within `tolerance` of the largest, the numbers.
pub fn close(actual: &Tensor, dims: &[usize], expected: &[f64], tolerance: f64) {
    assert_eq!(actual.dims(), dims);
    let scale = expected.iter().fold(1f64, |m, v| m.max(v.abs()));
    for (i, (a, &e)) in wide(actual).into_iter().zip(expected).enumerate() {
        assert!((a - e).abs() <= tolerance * scale, "element {i}: {a}, expected {e}");
    }
}

/// Panics unless two results are close, as those of different instruction sets and devices are.
fn similar(a: &Tensor, b: &Tensor, level: impl std::fmt::Debug) {
    assert_eq!(a.dims(), b.dims());
    if let (Ok(a), Ok(b)) = (a.slice::<f32>(), b.slice::<f32>()) {
        let scale = a.iter().fold(1f32, |m, v| m.max(v.abs()));
        let same = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-5 * scale;
        assert!(a.iter().zip(b).all(same), "{level:?} differs");
    }
    if let (Ok(a), Ok(b)) = (a.slice::<i64>(), b.slice::<i64>()) {
        let differing = a.iter().zip(b).filter(|(a, b)| a != b).count();
        assert!(differing * 50 <= a.len(), "{level:?} chooses {differing} of {} otherwise", a.len());
    }
}

/// The result of `op`, after checking that 1, 2 and 5 threads give the same bits, and poorer instruction sets
/// about the same numbers.
pub fn on_threads(op: impl Fn(&Context) -> Result<Tensor>) -> Tensor {
    let mut results =
        [1, 2, 5].map(|threads| op(&Context::new(&Device::cpu(threads).unwrap())).unwrap()).to_vec();
    let first = results.remove(0);
    for other in results {
        assert_eq!(first.dims(), other.dims());
        assert!(first.bytes().unwrap() == other.bytes().unwrap(), "the bits depend on the thread count");
    }
    kernels::at_poorer_levels(|level| similar(&first, &op(&cx()).unwrap(), level));
    if let Some(cx) = cuda(Precision::F32) {
        similar(&first, &op(&cx).unwrap(), "a GPU");
    }
    first
}

/// [`on_threads`] for an op over a batch, after checking that each sample alone gives the same bits.
pub fn on_batch(x: &Tensor, op: impl Fn(&Context, &Tensor, usize, usize) -> Result<Tensor>) -> Tensor {
    let samples = x.dims()[0];
    let whole = on_threads(|cx| op(cx, x, 0, samples));
    for n in 0..samples {
        let alone = op(&cx(), &x.narrow(n, 1).unwrap(), n, 1).unwrap();
        assert!(
            alone.bytes().unwrap() == whole.narrow(n, 1).unwrap().bytes().unwrap(),
            "the bits depend on the batch"
        );
    }
    whole
}

/// The definitions of the activations, in f64.
pub fn activation(activation: Activation, x: f64) -> f64 {
    match activation {
        Activation::None => x,
        Activation::Relu => x.max(0.0),
        Activation::LeakyRelu(slope) => x.max(0.0) + f64::from(slope) * x.min(0.0),
        Activation::QuickGelu => x / (1.0 + (-1.702 * x).exp()),
        Activation::Sigmoid => 1.0 / (1.0 + (-x).exp()),
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::Gelu => {
            // Phi by Simpson's rule over the density from 0.
            let (steps, density) = (200, |t: f64| (-t * t / 2.0).exp());
            let h = x / f64::from(steps);
            let sum: f64 = (0..steps)
                .map(|i| {
                    let t = f64::from(i) * h;
                    density(t) + 4.0 * density(t + h / 2.0) + density(t + h)
                })
                .sum();
            x * (0.5 + sum * h / 6.0 / std::f64::consts::TAU.sqrt())
        }
    }
}

/// Compares the gradients that the tape finds for every input of `op` with central differences of its `definition`
/// in f64, under a random gradient of the result.
///
/// # Panics
/// If one differs by more than 1e-4 of the largest, or is missing.
pub fn gradients(
    inputs: &[Tensor],
    op: impl Fn(&Context, &[Tensor]) -> Result<Tensor>,
    definition: impl Fn(&[Vec<f64>]) -> Vec<f64>,
) {
    let found = backward(&cx(), inputs, &op);
    let on_gpu = cuda(Precision::F32).map(|cx| backward(&cx, inputs, &op));
    let seed = wide(&random(op(&cx(), inputs).unwrap().dims(), 4711));
    let mut values: Vec<Vec<f64>> = inputs.iter().map(wide).collect();
    for i in 0..inputs.len() {
        let expected: Vec<f64> = (0..values[i].len())
            .map(|j| {
                let at = values[i][j];
                let mut loss = |x: f64| {
                    values[i][j] = x;
                    let y = definition(&values);
                    assert_eq!(y.len(), seed.len(), "elements of the definition");
                    y.iter().zip(&seed).map(|(y, s)| y * s).sum::<f64>()
                };
                let difference = loss(at + STEP) - loss(at - STEP);
                values[i][j] = at;
                difference / (2.0 * STEP)
            })
            .collect();
        let scale = expected.iter().fold(1e-3f64, |m, v| m.max(v.abs()));
        for (device, found) in [("CPU", Some(&found)), ("GPU", on_gpu.as_ref())] {
            let Some(found) = found else { continue };
            let gradient = found.get(i).unwrap_or_else(|| panic!("{device}: no gradient reached input {i}"));
            for (j, (got, want)) in wide(gradient).iter().zip(&expected).enumerate() {
                let close = (got - want).abs() <= 1e-4 * scale;
                assert!(close, "{device}: input {i}, element {j}: {got} instead of {want}");
            }
        }
    }
}

/// What the tape finds for every input of `op`, under a random gradient of the result.
fn backward(
    cx: &Context,
    inputs: &[Tensor],
    op: &impl Fn(&Context, &[Tensor]) -> Result<Tensor>,
) -> autograd::Gradients {
    let tape = Tape::new();
    let leaves: Vec<Tensor> = inputs.iter().enumerate().map(|(i, x)| autograd::leaf(x, i)).collect();
    let out = op(&tape.attach(cx), &leaves).unwrap();
    let mut found = autograd::Gradients::default();
    tape.backward(cx, &[(&out, random(out.dims(), 4711))], &mut found).unwrap();
    found
}

/// Panics unless 1, 2 and 5 threads find the same bits for the gradients of `op` for every input.
pub fn gradients_on_threads(inputs: &[Tensor], op: impl Fn(&Context, &[Tensor]) -> Result<Tensor>) {
    let leaves: Vec<Tensor> = inputs.iter().enumerate().map(|(i, x)| autograd::leaf(x, i)).collect();
    let results = [1, 2, 5].map(|threads| {
        let cx = Context::new(&Device::cpu(threads).unwrap());
        let tape = Tape::new();
        let out = op(&tape.attach(&cx), &leaves).unwrap();
        let mut found = autograd::Gradients::default();
        tape.backward(&cx, &[(&out, random(out.dims(), 4711))], &mut found).unwrap();
        (0..inputs.len()).map(|i| found.take(i).unwrap().bytes().unwrap().to_vec()).collect::<Vec<_>>()
    });
    assert!(results.iter().all(|other| *other == results[0]), "the bits depend on the thread count");
}

/// Of the central differences: their error is of the order of its square.
const STEP: f64 = 1e-4;
