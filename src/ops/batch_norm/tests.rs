use std::sync::{Barrier, Mutex};

use super::*;
use crate::device::cuda::Precision;
use crate::ops::check;
use crate::tensor::DType;
use crate::tensor::autograd::{Gradients, Tape, leaf};

/// The result, the means and the variances.
fn definition(x: &[f64], weight: &[f64], bias: &[f64], eps: f64) -> [Vec<f64>; 3] {
    let channels = weight.len();
    let count = (x.len() / channels) as f64;
    let of = |c: usize| x.iter().skip(c).step_by(channels);
    let mean: Vec<f64> = (0..channels).map(|c| of(c).sum::<f64>() / count).collect();
    let variance: Vec<f64> =
        (0..channels).map(|c| of(c).map(|x| (x - mean[c]).powi(2)).sum::<f64>() / count).collect();
    let normal = |(i, x): (usize, &f64)| {
        let c = i % channels;
        (x - mean[c]) / (variance[c] + eps).sqrt() * weight[c] + bias[c]
    };
    [x.iter().enumerate().map(normal).collect(), mean, variance]
}

#[test]
fn agrees_with_the_definition() {
    for (dims, dtype) in [
        ([1usize, 1, 1, 1], DType::F32),
        ([3, 5, 7, 33], DType::F16),
        ([2, 40, 30, 5], DType::BF16),
        ([1, 2, 2, 600], DType::F32),
    ] {
        let x = check::random(&dims, 1);
        let [weight, bias] = [2, 3].map(|seed| check::cast(&check::random(&dims[3..], seed), dtype));
        let p = BatchNorm { weight: &weight, bias: &bias, eps: 1e-5 };
        let [y, mean, variance] =
            definition(&check::wide(&x), &check::wide(&weight), &check::wide(&bias), 1e-5);
        check::close(&check::on_threads(|cx| Ok(batch_norm(cx, &x, &p, None)?.0)), &dims, &y, 1e-6);
        let found = batch_norm(&check::cx(), &x, &p, None).unwrap().1;
        check::close(&found.mean, &dims[3..], &mean, 1e-7);
        check::close(&found.variance, &dims[3..], &variance, 1e-7);
        assert_eq!(found.count, (dims[0] * dims[1] * dims[2]) as u64);
        let tolerances = [(Precision::F32, 1e-6), (Precision::BF16, 2e-2), (Precision::F16, 4e-3)];
        check::on_device(&[&x, &weight, &bias], &tolerances, |cx, t| {
            Ok(batch_norm(cx, &t[0], &BatchNorm { weight: &t[1], bias: &t[2], eps: 1e-5 }, None)?.0)
        });
    }
    let (cx, ones) = (check::cx(), check::random(&[3], 1));
    let p = BatchNorm { weight: &ones, bias: &ones, eps: 1e-5 };
    assert!(batch_norm(&cx, &check::random(&[2, 3, 3], 1), &p, None).is_err());
    assert!(batch_norm(&cx, &check::random(&[2, 3, 3, 2], 1), &p, None).is_err());
    assert!(batch_norm(&cx, &check::random(&[0, 3, 3, 3], 1), &p, None).is_err());
}

#[test]
fn a_mean_far_from_zero_costs_no_digits() {
    let values: Vec<f32> =
        check::wide(&check::random(&[2000], 1)).iter().map(|v| (v * 0.1 + 1000.0) as f32).collect();
    let x = Tensor::from_slice(&[20, 10, 5, 2], &values).unwrap();
    let (one, zero) =
        (Tensor::from_slice(&[2], &[1f32; 2]).unwrap(), Tensor::from_slice(&[2], &[0f32; 2]).unwrap());
    let p = BatchNorm { weight: &one, bias: &zero, eps: 1e-5 };
    let [expected, _, variance] = definition(&check::wide(&x), &[1.0; 2], &[0.0; 2], 1e-5);
    for cx in [Some(check::cx()), check::cuda(Precision::F32)].into_iter().flatten() {
        let (y, found) = batch_norm(&cx, &x, &p, None).unwrap();
        check::close(&y, x.dims(), &expected, 1e-6);
        for (found, variance) in check::wide(&found.variance).iter().zip(&variance) {
            assert!((found / variance - 1.0).abs() < 1e-6);
        }
    }
}

#[test]
fn gradients_are_those_of_the_definition() {
    for (dims, dtype) in
        [([1usize, 1, 1, 1], DType::F32), ([2, 3, 5, 3], DType::F16), ([3, 1, 2, 4], DType::BF16)]
    {
        let x = check::random(&dims, 1);
        let [weight, bias] = [2, 3].map(|seed| check::cast(&check::random(&dims[3..], seed), dtype));
        let eps = f64::from(0.1f32);
        check::gradients(
            &[x.clone(), weight.clone(), bias.clone()],
            |cx, x| Ok(batch_norm(cx, &x[0], &BatchNorm { weight: &x[1], bias: &x[2], eps: 0.1 }, None)?.0),
            |x| definition(&x[0], &x[1], &x[2], eps)[0].clone(),
        );
        check::gradients_on_device(&[x.clone(), weight.clone(), bias.clone()], |cx, x| {
            Ok(batch_norm(cx, &x[0], &BatchNorm { weight: &x[1], bias: &x[2], eps: 0.1 }, None)?.0)
        });
        // Beside the result also its input, as in a residual block, and constant parameters.
        let p = BatchNorm { weight: &weight, bias: &bias, eps: 0.1 };
        check::gradients(
            &[x],
            |cx, x| crate::ops::elementwise::add(cx, &x[0], &batch_norm(cx, &x[0], &p, None)?.0),
            |x| {
                let [y, ..] = definition(&x[0], &check::wide(&weight), &check::wide(&bias), eps);
                y.iter().zip(&x[0]).map(|(y, x)| x + y).collect()
            },
        );
    }
}

/// Two threads as two processes.
#[derive(Debug)]
struct Pair {
    rank: usize,
    sums: Arc<(Mutex<Vec<f64>>, Barrier)>,
}

impl Reduce for Pair {
    fn ranks(&self) -> usize {
        2
    }

    fn rank(&self) -> usize {
        self.rank
    }

    fn sum_f64(&self, values: &mut [f64]) -> Result<()> {
        let (sums, barrier) = &*self.sums;
        {
            let mut sums = sums.lock().unwrap();
            sums.resize(values.len(), 0.0);
            sums.iter_mut().zip(&*values).for_each(|(sum, value)| *sum += value);
        }
        barrier.wait();
        values.copy_from_slice(&sums.lock().unwrap());
        if barrier.wait().is_leader() {
            sums.lock().unwrap().clear();
        }
        barrier.wait();
        Ok(())
    }

    fn sum_f32(&self, values: &mut [f32]) -> Result<()> {
        let mut wide: Vec<f64> = values.iter().map(|&v| v.into()).collect();
        self.sum_f64(&mut wide)?;
        values.iter_mut().zip(wide).for_each(|(value, sum)| *value = sum as f32);
        Ok(())
    }
}

/// The result, the statistics and the gradients of x, weight and bias.
fn run(
    cx: &Context,
    [x, g]: [&Tensor; 2],
    parameters: [&Tensor; 2],
    reduce: Option<&Arc<dyn Reduce>>,
) -> (Tensor, Statistics, [Tensor; 3]) {
    let tape = Tape::new();
    let [weight, bias] = [leaf(parameters[0], 1), leaf(parameters[1], 2)];
    let p = BatchNorm { weight: &weight, bias: &bias, eps: 1e-3 };
    let (y, statistics) = batch_norm(&tape.attach(cx), &leaf(x, 0), &p, reduce).unwrap();
    let mut found = Gradients::default();
    tape.backward(cx, &[(&y, g.clone())], &mut found).unwrap();
    (y, statistics, [0, 1, 2].map(|i| found.take(i).unwrap()))
}

#[test]
fn two_processes_give_the_result_and_gradients_of_the_whole_batch() {
    two_processes(|| Some(check::cx()));
    two_processes(|| check::cuda(Precision::F32));
}

fn two_processes(device: fn() -> Option<Context>) {
    let Some(cx) = device() else { return };
    let dims = [5usize, 3, 4, 7];
    let (x, g) = (check::random(&dims, 1), check::random(&dims, 2));
    let [weight, bias] = [3, 4].map(|seed| check::random(&dims[3..], seed));
    let (y, statistics, [of_x, of_weight, of_bias]) = run(&cx, [&x, &g], [&weight, &bias], None);
    let shared = Arc::new((Mutex::new(Vec::new()), Barrier::new(2)));
    let halves = std::thread::scope(|scope| {
        let start = |rank: usize| {
            // Of unequal size: the mean over all is not the mean of both.
            let (first, count) = [(0, 2), (2, 3)][rank];
            let (x, g) = (x.narrow(first, count).unwrap(), g.narrow(first, count).unwrap());
            let reduce: Arc<dyn Reduce> = Arc::new(Pair { rank, sums: shared.clone() });
            let (weight, bias) = (&weight, &bias);
            scope.spawn(move || run(&device().unwrap(), [&x, &g], [weight, bias], Some(&reduce)))
        };
        [start(0), start(1)].map(|thread| thread.join().unwrap())
    });
    let joined = |part: fn(&(Tensor, Statistics, [Tensor; 3])) -> &Tensor| -> Vec<f64> {
        halves.iter().flat_map(|half| check::wide(part(half))).collect()
    };
    let added = |i: usize| -> Vec<f64> {
        let [a, b] = [0, 1].map(|rank| check::wide(&halves[rank].2[i]));
        a.iter().zip(&b).map(|(a, b)| a + b).collect()
    };
    check::close(&y, &dims, &joined(|half| &half.0), 1e-6);
    check::close(&of_x, &dims, &joined(|half| &half.2[0]), 1e-6);
    check::close(&of_weight, &dims[3..], &added(1), 1e-6);
    check::close(&of_bias, &dims[3..], &added(2), 1e-6);
    for (_, of_both, _) in &halves {
        assert_eq!(of_both.count, statistics.count);
        check::close(&of_both.mean, &dims[3..], &check::wide(&statistics.mean), 1e-7);
        check::close(&of_both.variance, &dims[3..], &check::wide(&statistics.variance), 1e-7);
    }
}
