//! What the tests of v2 share: its small reference model, latents and noise that follow no rule, recorded steps.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used)]

use wuerstchen::diffusion::noise::{Draw, NoiseSource};
use wuerstchen::{GenerateOptions, Image, Model, Result, Stage, Tensor};

use super::folder::{Folder, open, picture, reports, short, v2};

pub fn model() -> Model {
    open(&v2("model")).unwrap()
}

/// Changed options, and the picture that they make.
pub fn made(model: &Model, change: impl FnOnce(&mut GenerateOptions)) -> Image {
    let mut options = short(model, "a cat");
    change(&mut options);
    picture(model, &options)
}

/// Numbers between -2 and 2 that follow no rule.
pub fn numbers(count: usize, salt: usize) -> Vec<f32> {
    (0..count).map(|i| ((i * 29 + salt * 13 + i * i % 7) % 81) as f32 / 20.0 - 2.0).collect()
}

/// Latents of a 128 x 128 picture: `[n, 3, 3, 8]`.
pub fn some_latents(n: usize) -> Tensor {
    Tensor::from_slice(&[n, 3, 3, 8], &numbers(n * 72, 5)).unwrap()
}

pub fn joined(path: &Folder, key: &str, other: &std::path::Path) -> Model {
    let mut options = super::folder::options();
    options.set(key, other.to_str().unwrap()).unwrap();
    Model::open(path.path(), &options).unwrap()
}

/// How many steps a stage reports.
pub fn steps(model: &Model, options: &GenerateOptions, stage: Stage) -> Vec<(u32, u32)> {
    let heard = reports(model, options.clone());
    heard.iter().filter(|p| p.stage == stage).map(|p| (p.step, p.steps)).collect()
}

pub fn all_of(count: u32) -> Vec<(u32, u32)> {
    (1..=count).map(|step| (step, count)).collect()
}

/// diffusers' DEFAULT_STAGE_C_TIMESTEPS: linspace(1, 2/3, 20), then linspace(2/3, 0, 11) without its first.
pub fn published_times() -> Vec<f32> {
    let early = (0..20).map(|i| f64::from(57 - i) / 57.0);
    let late = (1..11).map(|i| f64::from(2 * (10 - i)) / 30.0);
    early.chain(late).map(|t| t as f32).collect()
}

/// Noise that a test knows.
pub struct Known;

impl Known {
    pub fn values(draw: Draw, step: usize, count: usize) -> Vec<f32> {
        numbers(count, step + if matches!(draw, Draw::LatentStart | Draw::DecoderStart) { 40 } else { 1 })
    }
}

impl NoiseSource for Known {
    fn normal(&mut self, draw: Draw, step: usize, out: &mut Tensor) -> Result<()> {
        let values = Known::values(draw, step, out.elements());
        out.slice_mut::<f32>()?.copy_from_slice(&values);
        Ok(())
    }

    fn uniform(&mut self, draw: Draw, _: usize, _: &mut Tensor) -> Result<()> {
        panic!("v2 draws no {draw:?}");
    }

    fn below(&mut self, draw: Draw, _: usize, _: u32, _: &mut Tensor) -> Result<()> {
        panic!("v2 draws no {draw:?}");
    }
}
