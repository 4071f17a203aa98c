use super::*;
use crate::device::cuda::Precision;
use crate::device::simd::{Level, tests::at_level};
use crate::ops::check;

struct Case {
    x: Tensor,
    skip: Option<Tensor>,
    weight: Tensor,
    bias: Option<Tensor>,
    stride: usize,
    padding: Padding,
}

/// The definition, without what follows.
fn naive(case: &Case) -> (Vec<usize>, Vec<f64>) {
    let values: Vec<Vec<f64>> = inputs(case).iter().map(check::wide).collect();
    naive_of(case, &values)
}

/// x, and of the skip, the weight and the bias what there is.
fn inputs(case: &Case) -> Vec<Tensor> {
    let all = [Some(&case.x), case.skip.as_ref(), Some(&case.weight), case.bias.as_ref()];
    all.into_iter().flatten().cloned().collect()
}

/// The definition over the values of [`inputs`].
fn naive_of(case: &Case, values: &[Vec<f64>]) -> (Vec<usize>, Vec<f64>) {
    let [n, h, w, cx] = case.x.dims_of::<4>("x").unwrap();
    let [c, g, k, _] = case.weight.dims_of::<4>("w").unwrap();
    let cs = case.skip.as_ref().map_or(0, |s| s.shape().channels());
    let skips = usize::from(case.skip.is_some());
    let (x, skip, weight) = (&values[0], &values[skips], &values[1 + skips]);
    let bias = values.get(2 + skips);
    let at = |n: usize, y: isize, x_at: isize, channel: usize| -> f64 {
        let inside = y >= 0 && x_at >= 0 && y < h as isize && x_at < w as isize;
        if !inside && case.padding == Padding::Zero {
            return 0.0;
        }
        let y = y.clamp(0, h as isize - 1) as usize;
        let pixel = (n * h + y) * w + x_at.clamp(0, w as isize - 1) as usize;
        if channel < cx { x[pixel * cx + channel] } else { skip[pixel * cs + channel - cx] }
    };
    let pad = k / 2;
    let (oh, ow) = ((h + 2 * pad - k) / case.stride + 1, (w + 2 * pad - k) / case.stride + 1);
    let mut out = Vec::new();
    for i in 0..n * oh * ow * c {
        let (ch, ox, oy, b) = (i % c, i / c % ow, i / c / ow % oh, i / c / ow / oh);
        let mut sum = bias.as_ref().map_or(0.0, |b| b[ch]);
        for j in 0..g * k * k {
            let (v, u, group) = (j % k, j / k % k, j / k / k);
            let y = (oy * case.stride + u) as isize - pad as isize;
            let x = (ox * case.stride + v) as isize - pad as isize;
            sum += weight[ch * g * k * k + j] * at(b, y, x, ch * g + group);
        }
        out.push(sum);
    }
    (vec![n, oh, ow, c], out)
}

fn run(
    case: &Case,
    then: impl for<'a> Fn(usize, usize, &'a [Tensor]) -> Then<'a>,
    held: &[Tensor],
) -> Tensor {
    check::on_batch(&case.x, |cx, x, first, count| {
        let skip = case.skip.as_ref().map(|s| s.narrow(first, count).unwrap());
        let held: Vec<Tensor> = held
            .iter()
            .map(|t| if t.dims().len() == 4 { t.narrow(first, count).unwrap() } else { t.clone() })
            .collect();
        let p = DepthwiseConv {
            weight: &case.weight,
            bias: case.bias.as_ref(),
            stride: case.stride,
            padding: case.padding,
            then: then(first, count, &held),
        };
        depthwise_conv(cx, x, skip.as_ref(), &p)
    })
}

fn case(dims: [usize; 4], skip: usize, channels: usize, k: usize, stride: usize, padding: Padding) -> Case {
    let [n, h, w, cx] = dims;
    Case {
        x: check::random(&dims, 1),
        skip: (skip > 0).then(|| check::random(&[n, h, w, skip], 2)),
        weight: check::random(&[channels, (cx + skip) / channels, k, k], 3),
        bias: (channels != 7).then(|| check::cast(&check::random(&[channels], 4), DType::F16)),
        stride,
        padding,
    }
}

fn cases() -> Vec<Case> {
    use Padding::{Replicate, Zero};
    let mut half = case([2, 9, 11, 40], 0, 40, 3, 1, Zero);
    half.weight = check::cast(&half.weight, DType::F16);
    let mut brain = case([2, 6, 5, 72], 0, 72, 3, 1, Replicate);
    brain.weight = check::cast(&brain.weight, DType::BF16);
    vec![
        half,
        brain,
        case([1, 1, 1, 1], 0, 1, 1, 1, Zero),
        case([2, 1, 1, 5], 0, 5, 3, 1, Replicate),
        case([2, 2, 3, 7], 0, 7, 5, 1, Zero),
        case([3, 12, 13, 33], 0, 33, 3, 2, Zero),
        case([1, 16, 21, 8], 0, 8, 5, 2, Replicate),
        case([2, 5, 8, 33], 33, 33, 3, 1, Zero),
        case([1, 4, 9, 10], 20, 10, 3, 1, Replicate),
        case([1, 4, 9, 10], 5, 5, 3, 1, Zero),
        case([2, 4, 3, 9], 0, 3, 3, 1, Zero),
        case([1, 3, 30, 9], 0, 9, 7, 3, Zero),
        case([2, 40, 40, 16], 0, 16, 3, 1, Zero),
    ]
}

#[test]
fn agrees_with_the_definition() {
    for case in cases() {
        let (dims, expected) = naive(&case);
        check::close(&run(&case, |_, _, _| Then::None, &[]), &dims, &expected, 1e-6);
    }
}

#[test]
fn what_follows_agrees_with_the_definition() {
    for case in cases() {
        let (dims, conv) = naive(&case);
        let c = dims[3];
        let y = run(&case, |_, _, _| Then::LayerNorm { eps: 1e-3 }, &[]);
        let expected: Vec<f64> = conv
            .chunks(c)
            .flat_map(|row| {
                let mean = row.iter().sum::<f64>() / c as f64;
                let var = row.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / c as f64;
                row.iter().map(move |v| (v - mean) / (var + f64::from(1e-3f32)).sqrt())
            })
            .collect();
        check::close(&y, &dims, &expected, 1e-5);

        let residual = check::random(&dims, 9);
        let y = run(
            &case,
            |_, _, held| Then::ScaledResidual { gain: &held[1], residual: &held[0] },
            &[residual.clone(), Tensor::from_slice(&[1], &[0.3f32]).unwrap()],
        );
        let expected: Vec<f64> =
            conv.iter().zip(check::wide(&residual)).map(|(v, r)| v * f64::from(0.3f32) + r).collect();
        check::close(&y, &dims, &expected, 1e-6);

        let held = [check::cast(&check::random(&[c], 10), DType::BF16), check::random(&[c], 11)];
        let y = run(
            &case,
            |_, _, held| Then::ChannelAffine {
                scale: &held[0],
                shift: &held[1],
                activation: Activation::Silu,
            },
            &held,
        );
        let (scale, shift) = (check::wide(&held[0]), check::wide(&held[1]));
        let expected: Vec<f64> = conv
            .iter()
            .enumerate()
            .map(|(i, v)| check::activation(Activation::Silu, v * scale[i % c] + shift[i % c]))
            .collect();
        check::close(&y, &dims, &expected, 2e-6);
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let (x, even) = (check::random(&[1, 4, 4, 6], 1), check::random(&[6, 1, 2, 2], 2));
    let three = check::random(&[6, 1, 3, 3], 2);
    let p = |weight, stride| DepthwiseConv {
        weight,
        bias: None,
        stride,
        padding: Padding::Zero,
        then: Then::None,
    };
    let cx = check::cx();
    assert!(depthwise_conv(&cx, &x, None, &p(&even, 1)).is_err());
    assert!(depthwise_conv(&cx, &x, None, &p(&three, 0)).is_err());
    assert!(depthwise_conv(&cx, &x, Some(&x), &p(&three, 1)).is_err());
    assert!(depthwise_conv(&cx, &x, Some(&check::random(&[1, 4, 3, 6], 1)), &p(&three, 1)).is_err());
    assert!(depthwise_conv(&cx, &x, None, &p(&three, 1)).is_ok());
}

/// The convolution of `t`, tensors as [`inputs`] has them.
fn of_all(cx: &Context, case: &Case, t: &[Tensor], then: Then) -> Result<Tensor> {
    let skips = usize::from(case.skip.is_some());
    let p = DepthwiseConv {
        weight: &t[1 + skips],
        bias: case.bias.as_ref().map(|_| &t[2 + skips]),
        stride: case.stride,
        padding: case.padding,
        then,
    };
    depthwise_conv(cx, &t[0], (skips > 0).then(|| &t[1]), &p)
}

#[test]
fn gradients() {
    use Padding::{Replicate, Zero};
    let mut brain = case([1, 4, 5, 18], 0, 18, 3, 1, Replicate);
    brain.weight = check::cast(&brain.weight, DType::BF16);
    for case in [
        brain,
        case([1, 1, 1, 1], 0, 1, 1, 1, Zero),
        case([2, 1, 1, 3], 0, 3, 3, 1, Replicate),
        case([1, 2, 3, 7], 0, 7, 5, 1, Zero),
        case([1, 3, 2, 2], 0, 2, 7, 1, Replicate),
        case([1, 9, 8, 1], 0, 1, 7, 1, Replicate),
        case([1, 2, 14, 2], 0, 2, 5, 1, Replicate),
        case([2, 5, 6, 3], 0, 3, 3, 2, Zero),
        case([1, 4, 9, 2], 0, 2, 3, 2, Replicate),
        case([1, 7, 6, 2], 0, 2, 5, 2, Replicate),
        case([1, 2, 8, 3], 3, 3, 3, 1, Zero),
        case([1, 3, 4, 2], 4, 2, 3, 1, Replicate),
        case([1, 3, 4, 4], 2, 3, 3, 1, Zero),
        case([1, 3, 3, 6], 0, 2, 3, 2, Zero),
        case([1, 2, 9, 2], 0, 2, 7, 3, Zero),
        case([1, 2, 6, 19], 0, 19, 3, 1, Zero),
    ] {
        let op = |cx: &Context, t: &[Tensor]| of_all(cx, &case, t, Then::None);
        for level in Level::available() {
            at_level(level, || check::gradients(&inputs(&case), op, |t| naive_of(&case, t).1));
        }
    }
}

#[test]
fn an_input_twice_and_what_follows_have_gradients() {
    let case = case([1, 3, 4, 3], 3, 3, 3, 1, Padding::Zero);
    let twice = |cx: &Context, t: &[Tensor]| {
        of_all(cx, &case, &[&t[..1], t].concat(), Then::ScaledResidual { gain: &t[3], residual: &t[0] })
    };
    let all = [case.x.clone(), case.weight.clone(), case.bias.clone().unwrap(), check::random(&[1], 8)];
    check::gradients(&all, twice, |t| {
        let conv = naive_of(&case, &[&t[..1], &t[..3]].concat()).1;
        conv.iter().zip(&t[0]).map(|(y, x)| x + t[3][0] * y).collect()
    });
    let normed = |cx: &Context, t: &[Tensor]| of_all(cx, &case, t, Then::LayerNorm { eps: 1e-3 });
    check::gradients(&inputs(&case), normed, |t| {
        let conv = naive_of(&case, t).1;
        let rows = conv.chunks(3).flat_map(|row| {
            let mean = row.iter().sum::<f64>() / 3.0;
            let var = row.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / 3.0;
            row.iter().map(move |v| (v - mean) / (var + f64::from(1e-3f32)).sqrt())
        });
        rows.collect()
    });
}

#[test]
fn the_bits_of_gradients_do_not_depend_on_threads() {
    for case in [
        case([2, 40, 41, 16], 0, 16, 3, 1, Padding::Replicate),
        case([1, 20, 30, 300], 300, 300, 3, 1, Padding::Zero),
        case([2, 20, 30, 270], 0, 270, 5, 2, Padding::Zero),
    ] {
        check::gradients_on_threads(&inputs(&case), |cx, t| of_all(cx, &case, t, Then::None));
    }
}

/// Cases for every kernel of a GPU: packs of channels or not, pairs, and more channels than a block holds.
fn cases_of_packs() -> Vec<Case> {
    use Padding::{Replicate, Zero};
    vec![
        case([2, 3, 7, 40], 0, 40, 3, 1, Zero),
        case([1, 5, 4, 264], 0, 264, 3, 1, Replicate),
        case([2, 2, 9, 48], 48, 48, 3, 1, Zero),
        case([1, 3, 5, 16], 48, 32, 3, 1, Replicate),
        case([1, 1, 5, 2064], 0, 2064, 3, 1, Zero),
        case([1, 1, 3, 1032], 1032, 1032, 3, 1, Zero),
        case([1, 1, 1, 8], 0, 8, 3, 1, Zero),
        case([1, 5, 6, 33], 33, 33, 3, 1, Replicate),
        case([1, 6, 9, 200], 0, 200, 5, 2, Zero),
        case([1, 4, 9, 10], 20, 10, 7, 1, Replicate),
    ]
}

#[test]
fn a_gpu_agrees() {
    const TOLERANCES: [(Precision, f64); 3] =
        [(Precision::F32, 2e-6), (Precision::BF16, 2e-2), (Precision::F16, 3e-3)];
    for case in cases_of_packs() {
        let all = inputs(&case);
        let mut with = all.clone();
        let dims = naive(&case).0;
        with.extend([check::random(&dims, 5), check::random(&[1], 6)]);
        with.extend([check::random(&[dims[3]], 7), check::random(&[dims[3]], 8)]);
        let count = all.len();
        let with: Vec<&Tensor> = with.iter().collect();
        check::on_device(&with[..count], &TOLERANCES, |cx, t| of_all(cx, &case, t, Then::None));
        check::on_device(&with[..count], &TOLERANCES, |cx, t| {
            of_all(cx, &case, t, Then::LayerNorm { eps: 1e-3 })
        });
        check::on_device(&with, &TOLERANCES, |cx, t| {
            of_all(cx, &case, t, Then::ScaledResidual { gain: &t[count + 1], residual: &t[count] })
        });
        check::on_device(&with, &TOLERANCES, |cx, t| {
            let (scale, shift) = (&t[count + 2], &t[count + 3]);
            of_all(cx, &case, t, Then::ChannelAffine { scale, shift, activation: Activation::Silu })
        });
        if dims[3] < 1000 {
            check::gradients_on_device(&all, |cx, t| of_all(cx, &case, t, Then::LayerNorm { eps: 1e-3 }));
        }
    }
}
