use super::*;
use crate::ops::check;

fn naive(x: &[f64], c: usize, p: &LayerNorm) -> Vec<f64> {
    let affine = p.affine.map(|(w, b)| (check::wide(w), check::wide(b)));
    let scalar = |t: Option<&Tensor>| t.map_or(0.0, |t| check::wide(t)[0]);
    let (eps, scale, shift) = (f64::from(p.eps), 1.0 + scalar(p.scale), scalar(p.shift));
    x.chunks(c)
        .flat_map(|row| {
            let mean = row.iter().sum::<f64>() / c as f64;
            let var = row.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / c as f64;
            let normal = move |v: &f64| (v - mean) / (var + eps).sqrt();
            let affine = &affine;
            row.iter()
                .enumerate()
                .map(move |(i, v)| {
                    let (w, b) = affine.as_ref().map_or((1.0, 0.0), |(w, b)| (w[i], b[i]));
                    (normal(v) * w + b) * scale + shift
                })
                .collect::<Vec<_>>()
        })
        .collect()
}

#[test]
fn agrees_with_the_definition() {
    for (dims, dtype) in [
        (&[1usize, 1, 1, 1][..], DType::F32),
        (&[3, 5, 7, 33], DType::F16),
        (&[2, 9, 1, 640], DType::BF16),
        (&[3, 40, 100], DType::F32),
    ] {
        let c = dims[dims.len() - 1];
        let x = check::random(dims, 1);
        let w = check::cast(&check::random(&[c], 2), dtype);
        let b = check::cast(&check::random(&[c], 3), dtype);
        let scalars = check::cast(&Tensor::from_slice(&[2], &[0.5f32, -0.25]).unwrap(), dtype);
        let (scale, shift) = (scalars.narrow(0, 1).unwrap(), scalars.narrow(1, 1).unwrap());
        for affine in [None, Some((&w, &b))] {
            let p = LayerNorm { eps: 1e-5, affine, scale: Some(&scale), shift: Some(&shift) };
            let y = check::on_batch(&x, |cx, x, _, _| layer_norm(cx, x, &p));
            check::close(&y, dims, &naive(&check::wide(&x), c, &p), 2e-6);
            let in_place = |x: Tensor| layer_norm_in_place(&check::cx(), x, &p).unwrap();
            let apart = layer_norm(&check::cx(), &x, &p).unwrap();
            // Shared memory is not overwritten, that of one owner is.
            let before = check::wide(&x);
            assert_eq!(check::wide(&in_place(x.clone())), check::wide(&apart));
            assert_eq!(check::wide(&x), before);
            let own = check::random(dims, 1);
            let address = own.slice::<f32>().unwrap().as_ptr();
            let y = in_place(own);
            assert_eq!(y.slice::<f32>().unwrap().as_ptr(), address);
            assert_eq!(check::wide(&y), check::wide(&apart));
        }
    }
}

#[test]
fn a_large_mean_does_not_drown_the_variance() {
    let values: Vec<f32> = (0..100).map(|i| 1000.0 + i as f32 / 64.0).collect();
    let x = Tensor::from_slice(&[1, 100], &values).unwrap();
    let p = LayerNorm::default();
    let y = layer_norm(&check::cx(), &x, &p).unwrap();
    check::close(&y, &[1, 100], &naive(&check::wide(&x), 100, &p), 1e-3);
}

#[test]
fn a_wrong_weight_is_named() {
    let (x, w) = (check::random(&[2, 4], 1), check::random(&[3], 2));
    let p = LayerNorm { affine: Some((&w, &w)), ..LayerNorm::default() };
    let error = layer_norm(&check::cx(), &x, &p).unwrap_err().to_string();
    assert!(error.contains("layer norm weight") && error.contains('4'), "{error}");
    let p = LayerNorm { scale: Some(&w), ..LayerNorm::default() };
    let error = layer_norm(&check::cx(), &x, &p).unwrap_err().to_string();
    assert!(error.contains("layer norm scale") && error.contains('1'), "{error}");
}

/// Inputs x, weight, bias and two scalars, of which a view each is the scale and the shift.
fn inputs(dims: &[usize], dtype: DType) -> Vec<Tensor> {
    let c = dims[dims.len() - 1];
    let parameters =
        [[c, 2], [c, 3], [2, 4]].map(|[n, seed]| check::cast(&check::random(&[n], seed as u64), dtype));
    [vec![check::random(dims, 1)], parameters.to_vec()].concat()
}

/// [`layer_norm`] of the first of the tensors with the others as [`inputs`] has them.
fn of_all(cx: &Context, t: &[Tensor]) -> Result<Tensor> {
    let (scale, shift) = (t[3].narrow(0, 1)?, t[3].narrow(1, 1)?);
    let affine = Some((&t[1], &t[2]));
    layer_norm(cx, &t[0], &LayerNorm { eps: 1e-3, affine, scale: Some(&scale), shift: Some(&shift) })
}

/// The definition with parameters in f64.
fn definition(
    t: &[Vec<f64>],
    affine: Option<(&[f64], &[f64])>,
    scale: f64,
    shift: f64,
    c: usize,
) -> Vec<f64> {
    let plain = LayerNorm { eps: 1e-3, ..LayerNorm::default() };
    let y = naive(&t[0], c, &plain).into_iter().enumerate();
    y.map(|(i, n)| affine.map_or(n, |(w, b)| n * w[i % c] + b[i % c]) * (1.0 + scale) + shift).collect()
}

#[test]
fn gradients() {
    for (dims, dtype) in [
        (&[1usize, 1][..], DType::F32),
        (&[3, 2, 5], DType::BF16),
        (&[37, 3], DType::F32),
        (&[2, 70], DType::F16),
    ] {
        let (c, all) = (dims[dims.len() - 1], inputs(dims, dtype));
        check::gradients(&all, of_all, |t| definition(t, Some((&t[1], &t[2])), t[3][0], t[3][1], c));
        let affine = |cx: &Context, t: &[Tensor]| {
            layer_norm(
                cx,
                &t[0],
                &LayerNorm { eps: 1e-3, affine: Some((&t[1], &t[2])), ..LayerNorm::default() },
            )
        };
        check::gradients(&all[..3], affine, |t| definition(t, Some((&t[1], &t[2])), 0.0, 0.0, c));
        let scalars = |cx: &Context, t: &[Tensor]| {
            let (scale, shift) = (t[1].narrow(0, 1)?, t[1].narrow(1, 1)?);
            let p = LayerNorm { eps: 1e-3, affine: None, scale: Some(&scale), shift: Some(&shift) };
            layer_norm(cx, &t[0], &p)
        };
        check::gradients(&[all[0].clone(), all[3].clone()], scalars, |t| {
            definition(t, None, t[1][0], t[1][1], c)
        });
        let plain = |cx: &Context, t: &[Tensor]| {
            layer_norm(cx, &t[0], &LayerNorm { eps: 1e-3, ..LayerNorm::default() })
        };
        check::gradients(&all[..1], plain, |t| definition(t, None, 0.0, 0.0, c));
        let in_place = |cx: &Context, t: &[Tensor]| {
            layer_norm_in_place(cx, t[0].clone(), &LayerNorm { eps: 1e-3, ..LayerNorm::default() })
        };
        check::gradients(&all[..1], in_place, |t| definition(t, None, 0.0, 0.0, c));
        // A constant x: only what the rows share has a gradient.
        let constant = |cx: &Context, t: &[Tensor]| of_all(cx, &[&[all[0].constant()], t].concat());
        let x = check::wide(&all[0]);
        check::gradients(&all[1..], constant, |t| {
            definition(std::slice::from_ref(&x), Some((&t[0], &t[1])), t[2][0], t[2][1], c)
        });
    }
    check::gradients_on_threads(&inputs(&[3, 150, 130], DType::F32), of_all);
}
