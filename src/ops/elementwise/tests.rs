use super::*;
use crate::device::cuda::Precision;
use crate::ops::check;

const SHAPES: [[usize; 4]; 4] = [[1, 1, 1, 1], [3, 5, 7, 33], [2, 1, 90, 200], [2, 130, 130, 3]];

#[test]
fn add_and_activate() {
    for dims in SHAPES {
        let (a, b) = (check::random(&dims, 1), check::random(&dims, 2));
        let sum = check::on_batch(&a, |cx, a, first, count| add(cx, a, &b.narrow(first, count)?));
        let expected: Vec<f64> = check::wide(&a).iter().zip(check::wide(&b)).map(|(a, b)| a + b).collect();
        check::close(&sum, &dims, &expected, 1e-7);
        // `add` of a tensor to itself reads it twice.
        let twice: Vec<f64> = check::wide(&a).iter().map(|a| 2.0 * a).collect();
        check::close(&add(&check::cx(), &a, &a).unwrap(), &dims, &twice, 1e-7);
        let relu = check::on_batch(&a, |cx, a, _, _| activate(cx, a.clone(), Activation::LeakyRelu(0.2)));
        let expected: Vec<f64> =
            check::wide(&a).iter().map(|&v| check::activation(Activation::LeakyRelu(0.2), v)).collect();
        check::close(&relu, &dims, &expected, 1e-7);
    }
    let cx = check::cx();
    assert!(add(&cx, &check::random(&[2, 3], 1), &check::random(&[3, 2], 1)).is_err());
}

#[test]
fn channels() {
    for dims in SHAPES {
        let [n, _, _, c] = dims;
        let (x, s) = (check::random(&dims, 1), check::random(&[n, c], 2));
        let b = check::cast(&check::random(&[n, c], 3), DType::F16);
        let (wx, ws, wb) = (check::wide(&x), check::wide(&s), check::wide(&b));
        let of = |i: usize| i / (wx.len() / n) * c + i % c;
        let scaled = check::on_batch(&x, |cx, x, first, count| {
            scale_channels(cx, x.clone(), &s.narrow(first, count)?)
        });
        let expected: Vec<f64> = wx.iter().enumerate().map(|(i, v)| v * ws[of(i)]).collect();
        check::close(&scaled, &dims, &expected, 1e-7);
        let affine = check::on_threads(|cx| affine_channels(cx, x.clone(), &s, &b));
        let expected: Vec<f64> = wx.iter().enumerate().map(|(i, v)| v * ws[of(i)] + wb[of(i)]).collect();
        check::close(&affine, &dims, &expected, 2e-7);
        let (s, b) = (s.narrow(0, 1).unwrap(), b.narrow(0, 1).unwrap());
        let affine = check::on_batch(&x, |cx, x, _, _| affine_channels(cx, x.clone(), &s, &b));
        let expected: Vec<f64> = wx.iter().enumerate().map(|(i, v)| v * ws[i % c] + wb[i % c]).collect();
        check::close(&affine, &dims, &expected, 2e-7);
    }
    let (cx, x) = (check::cx(), check::random(&[2, 3, 4], 1));
    assert!(scale_channels(&cx, x.clone(), &check::random(&[4], 1)).is_err());
    let address = x.bytes().unwrap().as_ptr();
    let y = scale_channels(&cx, x, &check::random(&[2, 4], 1)).unwrap();
    assert_eq!(y.bytes().unwrap().as_ptr(), address);
}

const HALVES: [(Precision, f64); 3] =
    [(Precision::F32, 1e-6), (Precision::BF16, 1e-2), (Precision::F16, 2e-3)];

#[test]
fn on_a_gpu() {
    for dims in [[1usize, 1, 1, 1], [3, 5, 7, 33], [2, 3, 90, 200], [5, 1, 1, 8], [2, 60, 30, 3]] {
        let [n, h, w, c] = dims;
        let x = check::random(&dims, 1);
        check::on_device(&[&x, &check::random(&dims, 2)], &HALVES, |cx, t| add(cx, &t[0], &t[1]));
        for activation in [Activation::Relu, Activation::LeakyRelu(0.2), Activation::Gelu, Activation::Silu] {
            check::on_device(&[&x], &HALVES, |cx, t| activate(cx, t[0].clone(), activation));
        }
        let by = Rescale { summand: 1.0, factor: -3.0, divisor: 42.0 };
        check::on_device(&[&x], &HALVES, |cx, t| rescale(cx, t[0].clone(), by));
        for entries in [n, 1] {
            let [s, b, m] = [(c, 3), (c, 4), (2 * c, 5)].map(|(c, seed)| check::random(&[entries, c], seed));
            let inputs = [&x, &s, &b];
            check::on_device(&inputs, &HALVES, |cx, t| affine_channels(cx, t[0].clone(), &t[1], &t[2]));
            check::on_device(&[&x, &m], &HALVES, |cx, t| modulate(cx, t[0].clone(), &t[1]));
        }
        let s = check::random(&[n, c], 6);
        check::on_device(&[&x, &s], &HALVES, |cx, t| scale_channels(cx, t[0].clone(), &t[1]));
        let table = check::random(&[h, w, c], 7);
        check::on_device(&[&x, &table], &HALVES, |cx, t| add_rows(cx, t[0].clone(), &t[1]));
        // Views that do not begin where 16 bytes do.
        let all = check::random(&[1 + n * h * w * c], 8);
        check::on_device(&[&all, &s], &HALVES, |cx, t| {
            let x = t[0].narrow(1, n * h * w * c)?.reshape(&dims)?;
            scale_channels(cx, add(cx, &activate(cx, x.clone(), Activation::Silu)?, &x)?, &t[1])
        });
    }
}

#[test]
fn on_a_gpu_in_place_where_the_memory_is_their_own() {
    let Some(cx) = check::cuda(Precision::BF16) else { return };
    let stream = cx.cuda().unwrap().unwrap().clone();
    let x = check::moved(&cx, &check::cast(&check::random(&[2, 3, 4], 1), DType::BF16));
    let address = x.on(&cx, &stream).unwrap().address();
    let x = activate(&cx, x, Activation::Silu).unwrap();
    let x = scale_channels(&cx, x, &check::random(&[2, 4], 3)).unwrap();
    assert_eq!(x.on(&cx, &stream).unwrap().address(), address);
    let other = rescale(&cx, x.clone(), Rescale::default()).unwrap();
    assert_ne!(other.on(&cx, &stream).unwrap().address(), address);
    // What lies on the host goes to memory of its own.
    let y = rescale(&cx, check::random(&[5], 1), Rescale::default()).unwrap();
    check::close(&y, &[5], &check::wide(&check::random(&[5], 1)), 0.0);
    let empty = Tensor::zeros(&cx, "nothing", &[0, 3, 4], DType::F32).unwrap();
    assert_eq!(scale_channels(&cx, empty, &check::random(&[0, 4], 3)).unwrap().elements(), 0);
}

#[test]
fn gradients_on_a_gpu_stay_there() {
    let x = check::random(&[3, 40, 5], 1);
    let of = |dims: &[usize], seed| check::random(dims, seed);
    check::gradients_on_device(&[x.clone(), of(&[3, 40, 5], 2)], |cx, t| add(cx, &t[0], &t[1]));
    for activation in [Activation::Relu, Activation::Gelu] {
        check::gradients_on_device(std::slice::from_ref(&x), |cx, t| activate(cx, t[0].clone(), activation));
    }
    check::gradients_on_device(std::slice::from_ref(&x), |cx, t| {
        rescale(cx, t[0].clone(), Rescale::default())
    });
    check::gradients_on_device(&[x.clone(), of(&[40, 5], 3)], |cx, t| add_rows(cx, t[0].clone(), &t[1]));
    check::gradients_on_device(&[x.clone(), of(&[3, 5], 4)], |cx, t| scale_channels(cx, t[0].clone(), &t[1]));
    for entries in [3, 1] {
        let [s, b, m] = [5, 5, 10].map(|c| of(&[entries, c], 5));
        check::gradients_on_device(&[x.clone(), s.clone(), b.clone()], |cx, t| {
            affine_channels(cx, t[0].clone(), &t[1], &t[2])
        });
        check::gradients_on_device(&[x.clone(), b], |cx, t| affine_channels(cx, t[0].clone(), &s, &t[1]));
        check::gradients_on_device(&[x.clone(), m], |cx, t| modulate(cx, t[0].clone(), &t[1]));
    }
}

#[test]
fn rescaled() {
    let x = check::random(&[3, 70, 100], 1);
    let by = Rescale { summand: 1.0, factor: 3.0, divisor: 42.0 };
    let y = check::on_batch(&x, |cx, x, _, _| rescale(cx, x.clone(), by));
    let expected: Vec<f64> = check::wide(&x).iter().map(|v| (v + 1.0) * 3.0 / 42.0).collect();
    check::close(&y, x.dims(), &expected, 1e-6);
    check::gradients(
        &[check::random(&[2, 3], 1)],
        |cx, t| rescale(cx, t[0].clone(), by),
        |t| t[0].iter().map(|v| (v + 1.0) * 3.0 / 42.0).collect(),
    );
}

#[test]
fn gradients_of_sums() {
    for dims in [&[1usize, 1][..], &[2, 3, 5], &[17]] {
        let inputs = [check::random(dims, 1), check::random(dims, 2)];
        check::gradients(
            &inputs,
            |cx, x| add(cx, &x[0], &x[1]),
            |x| x[0].iter().zip(&x[1]).map(|(a, b)| a + b).collect(),
        );
        check::gradients(
            &inputs[..1],
            |cx, x| add(cx, &x[0], &x[0]),
            |x| x[0].iter().map(|a| 2.0 * a).collect(),
        );
    }
    for [n, t, c] in [[1usize, 1usize, 1usize], [3, 4, 5]] {
        check::gradients(
            &[check::random(&[n, t, c], 1), check::random(&[t, c], 2)],
            |cx, x| add_rows(cx, x[0].clone(), &x[1]),
            |x| x[0].iter().enumerate().map(|(i, v)| v + x[1][i % (t * c)]).collect(),
        );
    }
}

#[test]
fn gradients_of_activations() {
    for activation in [
        Activation::None,
        Activation::Relu,
        Activation::LeakyRelu(0.2),
        Activation::LeakyRelu(-0.2),
        Activation::Gelu,
        Activation::QuickGelu,
        Activation::Silu,
        Activation::Sigmoid,
    ] {
        check::gradients(
            &[check::random(&[3, 33], 5)],
            |cx, x| activate(cx, x[0].clone(), activation),
            |x| x[0].iter().map(|&v| check::activation(activation, v)).collect(),
        );
        // In place, where the input is nobody else's: the next op's gradient needs its own input all the same.
        check::gradients(
            &[check::random(&[2, 5], 6), check::random(&[2, 5], 7)],
            |cx, x| activate(cx, activate(cx, add(cx, &x[0], &x[1])?, activation)?, Activation::Silu),
            |x| {
                let sums = x[0].iter().zip(&x[1]).map(|(a, b)| a + b);
                sums.map(|v| check::activation(Activation::Silu, check::activation(activation, v))).collect()
            },
        );
    }
}

#[test]
fn gradients_of_channels() {
    for [n, p, c] in [[1usize, 1usize, 1usize], [3, 4, 5], [2, 70, 2], [1, 3, 4]] {
        let x = check::random(&[n, p, c], 1);
        let of = |i: usize| i / (p * c) * c + i % c;
        check::gradients(
            &[x.clone(), check::random(&[n, c], 2)],
            |cx, x| scale_channels(cx, x[0].clone(), &x[1]),
            |x| x[0].iter().enumerate().map(|(i, v)| v * x[1][of(i)]).collect(),
        );
        for entries in [n, 1] {
            let [scale, shift] = [3, 4].map(|seed| check::random(&[entries, c], seed));
            let at = |i: usize| if entries == 1 { i % c } else { of(i) };
            check::gradients(
                &[x.clone(), check::cast(&scale, DType::F16), check::cast(&shift, DType::BF16)],
                |cx, x| affine_channels(cx, x[0].clone(), &x[1], &x[2]),
                |x| x[0].iter().enumerate().map(|(i, v)| v * x[1][at(i)] + x[2][at(i)]).collect(),
            );
            check::gradients(
                &[x.clone(), shift.clone()],
                |cx, x| affine_channels(cx, x[0].clone(), &scale, &x[1]),
                |x| {
                    let scale = check::wide(&scale);
                    x[0].iter().enumerate().map(|(i, v)| v * scale[at(i)] + x[1][at(i)]).collect()
                },
            );
            check::gradients(
                &[x.clone(), check::random(&[entries, 2 * c], 5)],
                |cx, x| modulate(cx, x[0].clone(), &x[1]),
                |x| {
                    let place = |i: usize| (at(i) / c * 2 * c) + i % c;
                    let of = |(i, v): (usize, &f64)| v * (1.0 + x[1][place(i)]) + x[1][place(i) + c];
                    x[0].iter().enumerate().map(of).collect()
                },
            );
        }
    }
    // x as its own scale.
    check::gradients(
        &[check::random(&[3, 1, 4], 1)],
        |cx, x| scale_channels(cx, x[0].clone(), &x[0]),
        |x| x[0].iter().map(|v| v * v).collect(),
    );
}

#[test]
fn channel_gradients_do_not_depend_on_threads() {
    let (x, m) = (check::random(&[3, 200, 40], 1), check::random(&[3, 80], 2));
    for input in [0, 1] {
        check::on_threads(|cx| {
            let tape = crate::tensor::autograd::Tape::new();
            let leaves = [&x, &m].map(|t| crate::tensor::autograd::leaf(t, 0));
            let inputs = [0, 1].map(|i| if i == input { leaves[i].clone() } else { leaves[i].constant() });
            let out = modulate(&tape.attach(cx), inputs[0].clone(), &inputs[1])?;
            let mut found = crate::tensor::autograd::Gradients::default();
            tape.backward(cx, &[(&out, check::random(out.dims(), 3))], &mut found)?;
            Ok(found.take(0).unwrap())
        });
    }
}

#[test]
fn what_is_not_tracked_is_not_kept() {
    let cx = check::cx();
    let tape = crate::tensor::autograd::Tape::new();
    let recording = tape.attach(&cx);
    let x = add(
        &recording,
        &crate::tensor::autograd::leaf(&check::random(&[2, 3, 4], 1), 0),
        &check::random(&[2, 3, 4], 2),
    );
    let x = x.unwrap();
    let address = x.bytes().unwrap().as_ptr();
    let x = scale_channels(&recording, x, &check::random(&[2, 4], 3)).unwrap();
    let x = modulate(&recording, x, &check::random(&[1, 8], 4)).unwrap();
    let x = activate(&recording, x, Activation::Relu).unwrap();
    assert_eq!(x.bytes().unwrap().as_ptr(), address, "copied though nothing needs the input");
    assert!(x.tracked().is_some());
}
