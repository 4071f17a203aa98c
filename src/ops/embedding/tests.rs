use super::*;
use crate::device::cuda::Precision;
use crate::ops::check;
use crate::tensor::autograd::{Gradients, Tape, leaf};

#[test]
fn agrees_with_the_definition() {
    for (dims, [v, c], dtype) in [
        (&[1usize][..], [1usize, 1], DType::F32),
        (&[3, 7, 5], [11, 33], DType::F16),
        (&[2, 300], [9, 257], DType::BF16),
    ] {
        let table = check::cast(&check::random(&[v, c], 1), dtype);
        let numbers: Vec<i64> = (0..dims.iter().product::<usize>()).map(|i| (i * 7 % v) as i64).collect();
        let ids = Tensor::from_slice(dims, &numbers).unwrap();
        let wide = check::wide(&table);
        let expected: Vec<f64> =
            numbers.iter().flat_map(|&id| wide[id as usize * c..][..c].to_vec()).collect();
        let out = [dims, &[c]].concat();
        check::close(
            &check::on_batch(&ids, |cx, ids, _, _| embedding(cx, ids, &table)),
            &out,
            &expected,
            0.0,
        );
    }
}

#[test]
fn gradients_are_those_of_the_definition() {
    for (dims, [v, c], dtype) in [
        (&[1usize][..], [1usize, 1], DType::F32),
        (&[3, 5], [11, 3], DType::F16),
        (&[40], [7, 2], DType::BF16),
    ] {
        let numbers: Vec<i64> = (0..dims.iter().product::<usize>()).map(|i| (i * i * 3 % v) as i64).collect();
        let ids = Tensor::from_slice(dims, &numbers).unwrap();
        check::gradients(
            &[check::cast(&check::random(&[v, c], 1), dtype)],
            |cx, x| embedding(cx, &ids, &x[0]),
            |x| numbers.iter().flat_map(|&id| x[0][id as usize * c..][..c].to_vec()).collect(),
        );
    }
    let ids: Vec<i64> = (0..5000).map(|i| i * i % 999).collect();
    let ids = Tensor::from_slice(&[5000], &ids).unwrap();
    let g = check::random(&[5000, 65], 1);
    check::on_threads(|cx| table_gradient(cx, &g, &ids, [999, 65]));
}

#[test]
fn an_id_outside_the_table_is_named() {
    let table = check::random(&[5, 2], 1);
    for id in [5i64, -1, i64::MIN] {
        let ids = Tensor::from_slice(&[2], &[0, id]).unwrap();
        let error = embedding(&check::cx(), &ids, &table).unwrap_err();
        assert!(matches!(error, Error::InvalidArgument { .. }));
        let text = error.to_string();
        assert!(text.contains(&id.to_string()) && text.contains("0 .. 5"), "{text}");
    }
}

#[test]
fn a_gpu_looks_up_in_every_type() {
    for [rows, v, c] in [[1usize, 1, 1], [37, 11, 33], [300, 9, 64]] {
        let numbers: Vec<i64> = (0..rows).map(|i| (i * 7 % v) as i64).collect();
        let ids = Tensor::from_slice(&[rows], &numbers).unwrap();
        let tolerances = [(Precision::F32, 1e-7), (Precision::BF16, 4e-3), (Precision::F16, 5e-4)];
        check::on_device(&[&ids, &check::random(&[v, c], 1)], &tolerances, |cx, t| {
            embedding(cx, &t[0], &t[1])
        });
    }
}

#[test]
fn a_gpu_sums_gradients_without_asking_the_host() {
    let Some(cx) = check::cuda(Precision::F32) else { return };
    let stream = cx.cuda().unwrap().unwrap().clone();
    let ids = moved_to(&cx, &Tensor::from_slice(&[5], &[2i64, 0, 2, 7, -1]).unwrap());
    let table = leaf(&moved_to(&cx, &check::random(&[3, 2], 1)), 0);
    let (tape, mut found) = (Tape::new(), Gradients::default());
    let out = embedding(&tape.attach(&cx), &ids, &table).unwrap();
    let g = moved_to(&cx, &check::random(&[5, 2], 2));
    tape.backward(&cx, &[(&out, g.clone())], &mut found).unwrap();
    assert_eq!(stream.downloads(), 0);
    // Ids outside are rows of NaN, and have no gradient.
    let (out, g) = (check::wide(&out), check::wide(&g));
    assert!(out[6..].iter().all(|v| v.is_nan()) && out[..6].iter().all(|v| v.is_finite()));
    check::close(found.get(0).unwrap(), &[3, 2], &[g[2], g[3], 0.0, 0.0, g[0] + g[4], g[1] + g[5]], 1e-7);
}

/// Where only the device knows the numbers.
fn moved_to(cx: &Context, x: &Tensor) -> Tensor {
    let moved = check::moved(cx, x);
    assert!(!moved.is_on_host());
    moved
}
