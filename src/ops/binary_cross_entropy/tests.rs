use super::*;
use crate::device::cuda::Precision;
use crate::ops::check;

fn definition(x: &[f64], targets: &[f32]) -> Vec<f64> {
    let per_sample = x.len() / targets.len();
    let term = |(i, x): (usize, &f64)| {
        let (p, t) = (1.0 / (1.0 + (-x).exp()), f64::from(targets[i / per_sample]));
        -t * p.ln() - (1.0 - t) * (1.0 - p).ln()
    };
    vec![x.iter().enumerate().map(term).sum::<f64>() / x.len() as f64]
}

#[test]
fn agrees_with_the_definition() {
    for dims in [&[1usize][..], &[3, 5, 7, 1]] {
        let (x, targets) = (check::random(dims, 1), [1.0, 0.0, 0.25]);
        let targets = &targets[..dims[0]];
        let found = check::on_threads(|cx| binary_cross_entropy(cx, &x, targets));
        check::close(&found, &[1], &definition(&check::wide(&x), targets), 1e-6);
        let op = |cx: &Context, x: &[Tensor]| binary_cross_entropy(cx, &x[0], targets);
        check::gradients(std::slice::from_ref(&x), op, |x| definition(&x[0], targets));
        check::on_device(&[&x], &[(Precision::F32, 1e-6), (Precision::BF16, 2e-2)], op);
        check::gradients_on_device(&[x], op);
    }
    let far = Tensor::from_slice(&[2], &[1000f32, -1000.0]).unwrap();
    let found = binary_cross_entropy(&check::cx(), &far, &[0.0, 1.0]).unwrap();
    assert_eq!(found.slice::<f32>().unwrap(), [1000.0]);
    assert!(binary_cross_entropy(&check::cx(), &far, &[1.0]).is_err());
    assert!(binary_cross_entropy(&check::cx(), &check::random(&[0], 1), &[]).is_err());
}
