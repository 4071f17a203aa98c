use half::{bf16, f16};

use super::*;
use crate::device::Device;
use crate::device::simd::{Level, tests::at_level};

fn numbers(count: usize, seed: usize) -> Vec<f32> {
    (0..count).map(|i| ((i * 7919 + seed * 104_729) % 251) as f32 / 128.0 - 0.98).collect()
}

fn tensor(dims: &[usize], seed: usize) -> Tensor {
    Tensor::from_slice(dims, &numbers(dims.iter().product(), seed)).unwrap()
}

fn as_type(t: &Tensor, dtype: DType) -> Tensor {
    let v = t.slice::<f32>().unwrap();
    match dtype {
        DType::F16 => Tensor::from_slice(t.dims(), &v.iter().map(|&v| f16::from_f32(v)).collect::<Vec<_>>()),
        DType::BF16 => {
            Tensor::from_slice(t.dims(), &v.iter().map(|&v| bf16::from_f32(v)).collect::<Vec<_>>())
        }
        _ => Ok(t.clone()),
    }
    .unwrap()
}

fn wide(t: &Tensor) -> Vec<f64> {
    let v = values(t, "test").unwrap();
    (0..v.len()).map(|i| v.get(i) as f64).collect()
}

fn activation(a: Activation, x: f64) -> f64 {
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    match a {
        Activation::None => x,
        // Simpson's rule for erf.
        Activation::Gelu => {
            let (z, n) = (x / 2f64.sqrt(), 2000);
            let f =
                |i: usize| (-(z * i as f64 / n as f64).powi(2)).exp() * if i % 2 == 1 { 4.0 } else { 2.0 };
            let sum: f64 = (1..n).map(f).sum::<f64>() + 1.0 + (-z * z).exp();
            0.5 * x * (1.0 + sum * z / n as f64 / 3.0 * std::f64::consts::FRAC_2_SQRT_PI)
        }
        Activation::QuickGelu => x * sigmoid(1.702 * x),
        Activation::Silu => x * sigmoid(x),
        Activation::Sigmoid => sigmoid(x),
        Activation::Relu => x.max(0.0),
        Activation::LeakyRelu(slope) => {
            if x > 0.0 {
                x
            } else {
                slope as f64 * x
            }
        }
    }
}

/// The definition, in f64. `w(o, i)` is a weight.
fn reference(x: &Tensor, outputs: usize, w: impl Fn(usize, usize) -> f64, e: &Epilogue) -> Vec<f64> {
    let inputs = x.shape().channels();
    let (x, samples) = (wide(x), if x.dims().len() > 1 { x.dims()[0] } else { 1 });
    let rows = x.len().checked_div(inputs).unwrap_or(0);
    let [scale, bias, residual, modulation] =
        [e.channel_scale, e.bias, e.residual, e.modulation].map(|t| t.map(wide));
    let get = |t: &Option<Vec<f64>>, i: usize, otherwise: f64| t.as_ref().map_or(otherwise, |t| t[i]);
    let mut y = Vec::new();
    for r in 0..rows {
        for o in 0..outputs {
            let acc: f64 = (0..inputs).map(|i| x[r * inputs + i] * w(o, i)).sum();
            let v = acc * get(&scale, o, 1.0) + get(&bias, o, 0.0);
            let v = activation(e.activation, v) * e.gain as f64 + get(&residual, r * outputs + o, 0.0);
            let n = if e.modulation.is_some_and(|m| m.dims()[0] == 1) { 0 } else { r / (rows / samples) };
            let at = n * 2 * outputs + o;
            y.push(v * (1.0 + get(&modulation, at, 0.0)) + get(&modulation, at + outputs, 0.0));
        }
    }
    y
}

fn check(cx: &Context, x: &Tensor, w: &Tensor, e: &Epilogue) {
    let inputs = x.shape().channels();
    let outputs = w.elements() / inputs;
    let stored = wide(w);
    let plain = linear(cx, x, &w.reshape(&[outputs, inputs]).unwrap(), e).unwrap();
    let turned = linear_transposed(cx, x, &w.reshape(&[inputs, outputs]).unwrap(), e).unwrap();
    let mut dims = x.dims().to_vec();
    *dims.last_mut().unwrap() = outputs;
    assert_eq!(plain.dims(), dims);
    let wants = [
        (plain, reference(x, outputs, |o, i| stored[o * inputs + i], e)),
        (turned, reference(x, outputs, |o, i| stored[i * outputs + o], e)),
    ];
    for (got, want) in wants {
        for (i, (got, want)) in got.slice::<f32>().unwrap().iter().zip(want).enumerate() {
            let bound = 1e-5 * (1.0 + want.abs());
            assert!((*got as f64 - want).abs() < bound, "{e:?} {:?} {i}: {got} for {want}", x.dims());
        }
    }
}

#[test]
fn every_field_of_the_epilogue() {
    let cx = Context::new(&Device::cpu(1).unwrap());
    let (x, w) = (tensor(&[3, 2, 5, 19], 1), tensor(&[37, 19], 2));
    let (scale, bias, residual) = (tensor(&[37], 3), tensor(&[37], 4), tensor(&[3, 2, 5, 37], 5));
    let (each, shared) = (tensor(&[3, 74], 6), tensor(&[1, 74], 7));
    let none = Epilogue::default();
    let activations = [
        Activation::Gelu,
        Activation::QuickGelu,
        Activation::Silu,
        Activation::Sigmoid,
        Activation::Relu,
        Activation::LeakyRelu(0.2),
    ];
    for level in Level::available() {
        at_level(level, || {
            for dtype in [DType::F32, DType::F16, DType::BF16] {
                let (w, scale, bias) = (as_type(&w, dtype), as_type(&scale, dtype), as_type(&bias, dtype));
                let each = as_type(&each, dtype);
                let some = Epilogue { channel_scale: Some(&scale), bias: Some(&bias), ..none };
                check(&cx, &x, &w, &none);
                check(&cx, &x, &w, &Epilogue { channel_scale: None, ..some });
                check(&cx, &x, &w, &Epilogue { bias: None, ..some });
                check(&cx, &x, &w, &Epilogue { gain: 0.3, ..none });
                check(&cx, &x, &w, &Epilogue { residual: Some(&residual), ..none });
                check(&cx, &x, &w, &Epilogue { modulation: Some(&each), ..none });
                check(&cx, &x, &w, &Epilogue { modulation: Some(&shared), ..none });
                for activation in activations {
                    let residual = Some(&residual);
                    let all = Epilogue { activation, gain: 0.7, residual, modulation: Some(&each), ..some };
                    check(&cx, &x, &w, &all);
                }
            }
        });
    }
}

#[test]
fn odd_shapes() {
    let cx = Context::new(&Device::cpu(2).unwrap());
    let shapes: &[(&[usize], usize)] = &[
        (&[1], 1),
        (&[7], 3),
        (&[1, 1], 5),
        (&[2, 1], 40),
        (&[5, 300], 33),
        (&[2, 600, 9], 50),
        (&[0, 4], 3),
    ];
    for &(dims, outputs) in shapes {
        let (x, w) = (tensor(dims, 1), tensor(&[outputs, dims[dims.len() - 1]], 2));
        let bias = tensor(&[outputs], 3);
        check(&cx, &x, &w, &Epilogue { bias: Some(&bias), ..Default::default() });
    }
    let (x, w) = (tensor(&[2, 3, 8], 1), tensor(&[6, 8, 1, 1], 2));
    assert_eq!(linear(&cx, &x, &w, &Epilogue::default()).unwrap().dims(), [2, 3, 6]);
}

#[test]
fn bits_depend_on_neither_threads_nor_batch() {
    let (x, w) = (tensor(&[4, 130, 300], 1), tensor(&[300, 300], 2));
    let (bias, modulation) = (tensor(&[300], 3), tensor(&[4, 600], 4));
    let run = |threads, first, count| {
        let cx = Context::new(&Device::cpu(threads).unwrap());
        let modulation = modulation.narrow(first, count).unwrap();
        let activation = Activation::Gelu;
        let e =
            Epilogue { bias: Some(&bias), activation, modulation: Some(&modulation), ..Default::default() };
        let y = linear(&cx, &x.narrow(first, count).unwrap(), &w, &e).unwrap();
        y.slice::<f32>().unwrap().to_vec()
    };
    let whole = run(1, 0, 4);
    assert_eq!(run(2, 0, 4), whole);
    assert_eq!(run(5, 0, 4), whole);
    for n in 0..4 {
        assert_eq!(run(2, n, 1), whole[n * 130 * 300..][..130 * 300]);
    }
}

#[test]
fn misfits_are_named() {
    let cx = Context::new(&Device::cpu(1).unwrap());
    let (x, w, odd) = (tensor(&[2, 4], 1), tensor(&[3, 4], 2), tensor(&[5], 3));
    let e = Epilogue::default();
    let named = |e: &Epilogue, w: &Tensor, name: &str| {
        let error = linear(&cx, &x, w, e).unwrap_err().to_string();
        assert!(error.starts_with(name), "{error}");
    };
    named(&e, &odd, "linear: weight: expected [O, 4], found [5]");
    named(&e, &Tensor::from_slice(&[3, 4], &[0u8; 12]).unwrap(), "linear: weight");
    named(&Epilogue { bias: Some(&odd), ..e }, &w, "linear: bias");
    named(&Epilogue { channel_scale: Some(&odd), ..e }, &w, "linear: channel_scale");
    named(&Epilogue { residual: Some(&odd), ..e }, &w, "linear: residual");
    named(&Epilogue { modulation: Some(&odd), ..e }, &w, "linear: modulation");
    assert!(linear_transposed(&cx, &x, &w, &e).is_err());
}
