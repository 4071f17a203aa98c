use super::*;
use crate::device::cuda::Precision;
use crate::ops::check;

fn logits(images: &[f64], texts: &[f64], log: f64, count: usize) -> Vec<f64> {
    let width = images.len() / count;
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let cosine = |a: &[f64], b: &[f64]| dot(a, b) / (dot(a, a) * dot(b, b)).sqrt();
    let rows = images.chunks(width).flat_map(|i| texts.chunks(width).map(move |t| (i, t)));
    rows.map(|(i, t)| log.exp() * cosine(i, t)).collect()
}

fn definition(logits: &[f64], count: usize) -> f64 {
    let entropy = |at: &dyn Fn(usize, usize) -> f64| -> f64 {
        let row = |n: usize| (0..count).map(|i| at(n, i).exp()).sum::<f64>().ln() - at(n, n);
        (0..count).map(row).sum::<f64>() / count as f64
    };
    (entropy(&|n, i| logits[n * count + i]) + entropy(&|n, i| logits[i * count + n])) / 2.0
}

#[test]
fn agrees_with_the_definition() {
    for ([count, width], log) in [([1usize, 1usize], 0f32), ([7, 5], 1.5), ([70, 33], 4.6)] {
        let (images, texts) = (check::random(&[count, width], 1), check::random(&[count, width], 2));
        let log_temperature = Tensor::from_slice(&[1], &[log]).unwrap();
        let loss = check::on_threads(|cx| Ok(contrastive_loss(cx, &images, &texts, &log_temperature)?.loss));
        let logits = logits(&check::wide(&images), &check::wide(&texts), f64::from(log), count);
        check::close(&loss, &[1], &[definition(&logits, count)], 1e-5);
        let found = contrastive_loss(&check::cx(), &images, &texts, &log_temperature).unwrap();
        let best = |row: &[f64]| (0..count).fold(0, |best, i| if row[i] > row[best] { i } else { best });
        let right = logits.chunks(count).enumerate().filter(|(n, row)| best(row) == *n).count();
        assert_eq!(check::wide(&found.accuracy), [f64::from(right as f32 / count as f32)]);
        let same = contrastive_loss(&check::cx(), &images, &images, &log_temperature).unwrap();
        assert_eq!(check::wide(&same.accuracy), [1.0]);
    }
    let (cx, x) = (check::cx(), check::random(&[2, 3], 1));
    assert!(contrastive_loss(&cx, &x, &check::random(&[3, 2], 1), &check::random(&[1], 1)).is_err());
    assert!(contrastive_loss(&cx, &x, &x, &check::random(&[2], 1)).is_err());
}

#[test]
fn gradients_are_those_of_the_definition() {
    for ([count, width], log) in [([1usize, 3usize], 0f32), ([5, 4], 1.0), ([3, 7], 2.5)] {
        let inputs = [
            check::random(&[count, width], 1),
            check::random(&[count, width], 2),
            Tensor::from_slice(&[1], &[log]).unwrap(),
        ];
        check::gradients(
            &inputs,
            |cx, x| Ok(contrastive_loss(cx, &x[0], &x[1], &x[2])?.loss),
            |x| vec![definition(&logits(&x[0], &x[1], x[2][0], count), count)],
        );
        check::gradients_on_device(&inputs, |cx, x| Ok(contrastive_loss(cx, &x[0], &x[1], &x[2])?.loss));
    }
}

#[test]
fn a_gpu_finds_the_same() {
    for [count, width] in [[1usize, 1usize], [7, 5], [70, 33]] {
        let inputs = [
            &check::random(&[count, width], 1),
            &check::random(&[count, width], 2),
            &Tensor::from_slice(&[1], &[1.5f32]).unwrap(),
        ];
        for accuracy in [false, true] {
            check::on_device(&inputs, &[(Precision::F32, 1e-5)], |cx, x| {
                let found = contrastive_loss(cx, &x[0], &x[1], &x[2])?;
                Ok(if accuracy { found.accuracy } else { found.loss })
            });
        }
    }
}

#[test]
fn zeros_are_numbers_too() {
    let cx = check::cx();
    let zeros = Tensor::from_slice(&[2, 3], &[0f32; 6]).unwrap();
    let found = contrastive_loss(&cx, &zeros, &check::random(&[2, 3], 1), &check::random(&[1], 1)).unwrap();
    check::close(&found.loss, &[1], &[2f64.ln()], 1e-6);
}
