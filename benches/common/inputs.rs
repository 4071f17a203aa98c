//! Inputs of a model's stages, for benches that time them one by one.

use std::path::{Path, PathBuf};

use serde_json::Value;
use wuerstchen::Tensor;
use wuerstchen::pipeline::{Model, Stage};

use super::Outcome;

/// The rival's settings. v2's decoder has no guidance by default.
pub const STAGE_C_GUIDANCE: f32 = 4.0;
const STAGE_B_GUIDANCE: [f32; 2] = [2.0, 0.0];
/// v2: what the prior's latents are multiplied by, and how much wider Stage A's latents are.
const LATENT_MEAN: f32 = 42.0;
const LATENT_DIM_SCALE: f64 = 10.67;

/// An open model, and random inputs of its sizes.
pub struct Inputs {
    pub model: Model,
    path: PathBuf,
}

impl Inputs {
    /// Of the model that was opened at `path`.
    pub fn new(model: Model, path: &Path) -> Self {
        Inputs { model, path: path.into() }
    }

    pub fn is_v1(&self) -> bool {
        self.model.info().generation == 1
    }

    pub fn stage_b_guidance(&self) -> f32 {
        STAGE_B_GUIDANCE[usize::from(!self.is_v1())]
    }

    /// The folder of a text tower or of the two networks around Stage A's latents.
    fn folder(&self, stage: Stage) -> &'static str {
        match (self.is_v1(), stage) {
            (true, Stage::A) => "stage_a",
            (true, _) => "text_encoder",
            (false, Stage::A) => "vqgan",
            (false, Stage::B) => "text_encoder",
            (false, Stage::C) => "prior_text_encoder",
        }
    }

    /// Rows and columns of Stage B's grid.
    pub fn grid(&self) -> (usize, usize) {
        let info = self.model.info();
        match self.is_v1() {
            true => (info.default_height as usize / 4, info.default_width as usize / 4),
            false => {
                let side = |latents: u32| (f64::from(latents) * LATENT_DIM_SCALE) as usize;
                (side(info.latent_height), side(info.latent_width))
            }
        }
    }

    /// Random tokens `[1, H, W]` of Stage B's grid.
    pub fn tokens(&self, random: &mut Random) -> Outcome<Tensor> {
        let labels =
            config(&self.path, self.folder(Stage::A))?["codebook_size"].as_i64().ok_or("codebook_size")?;
        let (height, width) = self.grid();
        let tokens: Vec<i64> = (0..height * width).map(|_| random.below(labels)).collect();
        Ok(Tensor::from_slice(&[1, height, width], &tokens)?)
    }

    /// v2: random latents of Stage A, `[1, H, W, C]`.
    pub fn grid_latents(&self, random: &mut Random) -> Outcome<Tensor> {
        let channels = side(&config(&self.path, self.folder(Stage::A))?, "latent_channels")?;
        let (height, width) = self.grid();
        random.normal(&[1, height, width, channels])
    }

    /// A random text condition `[n, T, width]` of a stage's tower.
    pub fn text(&self, random: &mut Random, stage: Stage, n: usize) -> Outcome<Tensor> {
        let config = config(&self.path, self.folder(stage))?;
        random.normal(&[n, side(&config, "max_position_embeddings")?, side(&config, "hidden_size")?])
    }

    /// Random latents `[n, h, w, C]`.
    pub fn latents(&self, random: &mut Random, n: usize) -> Outcome<Tensor> {
        let info = self.model.info();
        random.normal(&[
            n,
            info.latent_height as usize,
            info.latent_width as usize,
            info.latent_channels as usize,
        ])
    }

    /// Random latents `[1, h, w, C]` as Stage B takes them.
    pub fn image_embedding(&self, random: &mut Random) -> Outcome<Tensor> {
        let mut latents = self.latents(random, 1)?;
        if !self.is_v1() {
            latents.slice_mut::<f32>()?.iter_mut().for_each(|x| *x = *x * LATENT_MEAN - 1.);
        }
        Ok(latents)
    }
}

fn config(model: &Path, part: &str) -> Outcome<Value> {
    Ok(serde_json::from_slice(&std::fs::read(model.join(part).join("config.json"))?)?)
}

/// A size in a part's config.
fn side(config: &Value, name: &str) -> Outcome<usize> {
    Ok(config[name].as_u64().ok_or_else(|| name.to_owned())? as usize)
}

/// SplitMix64 (Steele et al. 2014): input values, nothing more.
pub struct Random(pub u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: i64) -> i64 {
        (self.next() >> 1) as i64 % end
    }

    /// In (0, 1].
    fn uniform(&mut self) -> f64 {
        ((self.next() >> 11) + 1) as f64 / (1u64 << 53) as f64
    }

    /// Standard normal values (Box and Muller 1958).
    pub fn normal(&mut self, dims: &[usize]) -> Outcome<Tensor> {
        let values: Vec<f32> = (0..dims.iter().product())
            .map(|_| {
                let (radius, angle) = ((-2. * self.uniform().ln()).sqrt(), self.uniform());
                (radius * (std::f64::consts::TAU * angle).cos()) as f32
            })
            .collect();
        Ok(Tensor::from_slice(dims, &values)?)
    }
}
