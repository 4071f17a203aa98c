//! Walks on a GPU: what the CPU gives, bit for bit, and nothing is read back on the way.

use super::latents::{Kept, LatentSampling, Prediction, Sampler};
use super::noise::{Draw, NoiseSource, SeededNoise};
use super::schedule::{CosineSchedule, linspace};
use super::tokens::{Choice, TokenSampling};
use crate::device::Context;
use crate::device::cuda::Precision;
use crate::ops::check;
use crate::tensor::{DType, Tensor};

/// What `walk` gives on the CPU and on a GPU must be the same.
fn agrees(walk: impl Fn(&Context) -> Tensor) {
    let expected = walk(&check::cx());
    let Some(cx) = check::cuda(Precision::F32) else { return };
    let stream = cx.cuda().unwrap().unwrap().clone();
    let found = walk(&cx);
    assert_eq!(stream.downloads(), 0, "the host read from the device");
    assert!(found.bytes().unwrap() == expected.bytes().unwrap());
}

#[test]
fn a_walk_over_latents() {
    let dims = [2, 3, 5, 4];
    let kept = || Kept { latents: check::random(&dims, 1), mask: check::random(&[2, 3, 5, 1], 2) };
    let other = check::random(&dims, 3);
    for (sampler, kept) in [(Sampler::Ddpm, None), (Sampler::Ddim, None), (Sampler::Ddpm, Some(kept()))] {
        let sampling = LatentSampling {
            schedule: CosineSchedule::default(),
            times: linspace(1.0, 0.0, 5),
            sampler,
            fresh: Draw::LatentStep,
            kept,
        };
        agrees(|cx| {
            let mut noise = SeededNoise::new(vec![3, 4]);
            let mut x = Tensor::new(cx, "x", &dims, DType::F32).unwrap();
            noise.normal(Draw::LatentStart, 0, &mut x).unwrap();
            // A network that finds the sample itself; of its twin always the same.
            let predict = |x: &Tensor, _| {
                Ok(Prediction { conditional: x.clone(), unconditional: Some((other.clone(), 1.5)) })
            };
            sampling.run(cx, x, &mut noise, predict, |_| Ok(())).unwrap()
        });
    }
}

#[test]
fn a_walk_over_tokens() {
    agrees(|cx| {
        let mut noise = SeededNoise::new(vec![3, 4]);
        let mut start = Tensor::new(cx, "start", &[2, 5, 7], DType::I64).unwrap();
        noise.below(Draw::TokenStart, 0, 1000, &mut start).unwrap();
        let mut other = Tensor::new(cx, "other", &[2, 5, 7], DType::I64).unwrap();
        noise.below(Draw::TokenStart, 1, 1000, &mut other).unwrap();
        let sampling = TokenSampling::new(4, 2.0, Choice::Multinomial);
        let choose = |_: &Tensor, _, uniforms: Option<&Tensor>| {
            assert_eq!(uniforms.unwrap().dims(), [2, 5, 7]);
            Ok(other.clone())
        };
        let mut steps = 0;
        let after = |done, _: &Tensor| {
            steps = done;
            Ok(())
        };
        let tokens = sampling.run(cx, &start, start.clone(), &mut noise, choose, after).unwrap();
        assert_eq!(steps, 4);
        tokens
    });
}
