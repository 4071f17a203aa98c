//! Dropout (Srivastava et al. 2014): some elements are zero, the others grow, so that the expectation stays.
//!
//! Which ones is a function of the seed, the stream and the element's number, not a state: the backward pass decides
//! again instead of keeping a mask, and a batch may be split at will.

use crate::device::Context;
use crate::error::{Error, Result};
use crate::ops::kernels;
use crate::simd_dispatch;
use crate::tensor::Tensor;
use crate::tensor::autograd::record;
use crate::tensor::rng::Philox;

/// Numbers of one task.
const CHUNK: usize = 16 << 10;

/// Elements that are decided in one go.
const BLOCK: usize = 256;

/// Which elements are dropped.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dropout {
    /// How likely each one is, from 0 to less than 1.
    pub probability: f32,
    /// The seed of the run.
    pub seed: u64,
    /// The stream: another one for each layer and step.
    pub stream: u64,
    /// The place of the tensor's first element in the stream, for a part of a larger batch.
    pub first: u64,
}

/// `0` where element `first + i` of the stream's words lies below `probability * 2^32`, else `x[i] / (1 - probability)`.
///
/// # Shapes
/// any, `F32`
///
/// # Errors
/// `InvalidArgument` for a probability that is not from 0 to less than 1.
pub fn dropout(cx: &Context, x: Tensor, p: &Dropout) -> Result<Tensor> {
    if !(0.0..1.0).contains(&p.probability) {
        return Err(Error::argument("dropout probability", "a number from 0 to less than 1", p.probability));
    }
    if p.probability == 0.0 {
        return Ok(x);
    }
    let p = *p;
    let out = p.apply(cx, x)?;
    let place = out.clone();
    record(cx, out, &[Some(&place)], || {
        let to = place.tracked();
        move |cx, flow| flow.give(cx, to, |g| p.apply(cx, g.clone()))
    })
}

impl Dropout {
    fn apply(self, cx: &Context, x: Tensor) -> Result<Tensor> {
        let rng = Philox::new(self.seed, self.stream);
        let least = (f64::from(self.probability) * 2f64.powi(32)) as u32;
        let growth = 1.0 / (1.0 - self.probability);
        kernels::in_place(cx, "dropout", x, CHUNK, |i, part| {
            let mut words = [0; BLOCK];
            for (j, part) in part.chunks_mut(BLOCK).enumerate() {
                let words = &mut words[..part.len()];
                rng.fill_words(words, self.first + (i * CHUNK + j * BLOCK) as u64);
                drop_slice(part, words, least, growth);
            }
        })
    }
}

simd_dispatch! {
    fn drop_slice<const FMA: bool>(values: &mut [f32], words: &[u32], least: u32, growth: f32) {
        for (v, word) in values.iter_mut().zip(words) {
            *v = if *word < least { 0.0 } else { *v * growth };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check;

    const P: Dropout = Dropout { probability: 0.3, seed: 5, stream: 9, first: 0 };

    #[test]
    fn drops_what_the_stream_says() {
        for dims in [&[1usize][..], &[3, 5, 7], &[2, 100, 131]] {
            let x = check::random(dims, 1);
            let sample = x.elements() / dims[0];
            let y = check::on_batch(&x, |cx, x, first, _| {
                dropout(cx, x.clone(), &Dropout { first: (first * sample) as u64, ..P })
            });
            let rng = Philox::new(P.seed, P.stream);
            let kept = |i: usize| f64::from(u8::from(rng.uniform(i as u64) >= P.probability));
            let expected: Vec<f64> =
                check::wide(&x).iter().enumerate().map(|(i, x)| x * kept(i) / 0.7).collect();
            check::close(&y, dims, &expected, 2e-7);
        }
        let ones = Tensor::from_slice(&[100_000], &[1f32; 100_000]).unwrap();
        let y = dropout(&check::cx(), ones, &P).unwrap();
        let mean = check::wide(&y).iter().sum::<f64>() / 1e5;
        assert!((mean - 1.0).abs() < 0.01, "{mean}");
    }

    #[test]
    fn gradients_meet_the_same_mask() {
        for dims in [&[1usize][..], &[3, 5, 7]] {
            let x = check::random(dims, 1);
            let out = check::wide(&dropout(&check::cx(), x.clone(), &P).unwrap());
            let mask: Vec<f64> = out.iter().zip(check::wide(&x)).map(|(y, x)| y / x).collect();
            check::gradients(
                &[x],
                |cx, x| dropout(cx, x[0].clone(), &P),
                |x| x[0].iter().zip(&mask).map(|(x, m)| x * m).collect(),
            );
        }
    }

    #[test]
    fn without_a_probability_nothing_happens() {
        let (cx, x) = (check::cx(), check::random(&[7], 1));
        let same = dropout(&cx, x.clone(), &Dropout { probability: 0.0, ..P }).unwrap();
        assert_eq!(same.bytes().as_ptr(), x.bytes().as_ptr());
        for probability in [1.0, -0.1, f32::NAN] {
            assert!(dropout(&cx, x.clone(), &Dropout { probability, ..P }).is_err());
        }
    }
}
