//! From the size of a picture to the grids of the stages, by the rule of the model's generation.

use super::halves::{Decoder, Halves};
use crate::error::{Error, Result};
use crate::stages::image_encoder::ImageEncoderConfig;

/// How far EfficientNetV2 shrinks a picture, where no image encoder says so.
const ENCODER_FACTOR: usize = 32;

/// Beyond any picture that can be asked for, in pixels: where the search for a side that fits ends.
const SIDE_MAX_PX: usize = 16_384;

/// How a model's pictures, latents and Stage B's grid are sized.
#[derive(Debug, Clone)]
pub(super) struct Geometry {
    /// The recommended side in pixels, before it is brought to what fits.
    default_side: usize,
    /// What the picture's side is divided by to get Stage B's grid, and what that grid is a multiple of; nothing
    /// without the half that makes pictures.
    grid: Option<Grid>,
    rule: Rule,
}

#[derive(Debug, Clone, Copy)]
struct Grid {
    /// Pixels per position of Stage B's grid.
    factor: usize,
    /// Positions per side are a multiple of this.
    multiple: usize,
}

#[derive(Debug, Clone)]
enum Rule {
    /// v1: latents are what the image encoder gives for the picture; Stage B's grid follows the picture.
    Encoder { image_size: usize, encoder_size: usize, encoder: Option<ImageEncoderConfig> },
    /// v2: latents are ceil(pixels / resolution_multiple), Stage B's grid is floor(latents * latent_dim_scale).
    Ratios { resolution_multiple: f64, latent_dim_scale: f64, encoder_factor: usize },
}

impl Geometry {
    pub fn new(halves: &Halves) -> Self {
        let index = &halves.index;
        let grid = |decoder: &Decoder| Grid {
            factor: decoder.stage_a.network.config().factor(),
            multiple: decoder.stage_b.grid_multiple(),
        };
        let encoder = halves.image.as_ref().map(|image| image.encoder.network.config().clone());
        let rule = match index.pipeline.generation() {
            1 => Rule::Encoder {
                image_size: index.image_size,
                encoder_size: index.image_encoder_size,
                encoder,
            },
            _ => Rule::Ratios {
                resolution_multiple: index.v2.resolution_multiple,
                latent_dim_scale: index.v2.latent_dim_scale,
                encoder_factor: encoder.map_or(ENCODER_FACTOR, |encoder| encoder.factor()),
            },
        };
        Geometry { default_side: index.image_size, grid: halves.decoder.as_ref().map(grid), rule }
    }

    /// # Errors
    /// `InvalidArgument` unless the stages can make a picture with this side.
    pub fn check_side(&self, name: &str, side: u32) -> Result<()> {
        if self.fits(side as usize) {
            return Ok(());
        }
        let expected = match self.smallest_side() {
            Some(multiple) => format!("a positive multiple of {multiple}"),
            None => "a size that the stages of this model fit, which there is none of".into(),
        };
        Err(Error::argument(name, expected, side))
    }

    fn fits(&self, side: usize) -> bool {
        let Some(Grid { factor, multiple }) = self.grid else { return side > 0 };
        side > 0 && side.is_multiple_of(factor * multiple) && self.grid_side(side) * factor == side
    }

    /// Positions of Stage B's grid for a picture's side.
    fn grid_side(&self, side: usize) -> usize {
        match &self.rule {
            Rule::Encoder { .. } => side / self.grid.map_or(1, |grid| grid.factor),
            Rule::Ratios { .. } => self.decoded_side(self.latent_side(side)),
        }
    }

    /// v2: positions of Stage B's grid for a side of the latents. Truncated, as the reference does.
    fn decoded_side(&self, latent: usize) -> usize {
        match self.rule {
            Rule::Ratios { latent_dim_scale, .. } => (latent as f64 * latent_dim_scale) as usize,
            Rule::Encoder { .. } => latent,
        }
    }

    fn smallest_side(&self) -> Option<usize> {
        let step = self.grid.map_or(1, |grid| grid.factor * grid.multiple);
        (step..=SIDE_MAX_PX).step_by(step.max(1)).find(|&side| self.fits(side))
    }

    /// The recommended size in pixels, (width, height): the largest that fits within the model's own, or the smallest.
    pub fn default_size(&self) -> (u32, u32) {
        let below = (1..=self.default_side).rev().find(|&side| self.fits(side));
        let side = below.or_else(|| self.smallest_side()).unwrap_or(self.default_side);
        let side = u32::try_from(side).unwrap_or(u32::MAX);
        (side, side)
    }

    /// Height and width, in pixels, of what the image encoder sees of a picture.
    pub fn encoder_size(&self, width: u32, height: u32) -> (usize, usize) {
        (self.encoder_side(height as usize), self.encoder_side(width as usize))
    }

    fn encoder_side(&self, side: usize) -> usize {
        match &self.rule {
            // Rounded to the nearest pixel, in integers.
            Rule::Encoder { image_size, encoder_size, .. } => {
                ((side * encoder_size + image_size / 2) / image_size).max(1)
            }
            Rule::Ratios { encoder_factor, .. } => self.latent_side(side).saturating_mul(*encoder_factor),
        }
    }

    /// Height and width of the latents of a picture.
    pub fn latent_size(&self, width: u32, height: u32) -> (usize, usize) {
        (self.latent_side(height as usize), self.latent_side(width as usize))
    }

    fn latent_side(&self, side: usize) -> usize {
        match &self.rule {
            Rule::Encoder { encoder: Some(encoder), .. } => encoder.latent_side(self.encoder_side(side)),
            Rule::Encoder { encoder: None, .. } => self.encoder_side(side).div_ceil(ENCODER_FACTOR),
            Rule::Ratios { resolution_multiple, .. } => {
                ((side as f64 / resolution_multiple).ceil() as usize).max(1)
            }
        }
    }

    /// Height and width of Stage B's grid: in v1 those of the picture, in v2 those of the latents decide.
    ///
    /// # Errors
    /// `InvalidArgument` if the latents give a grid that Stage B cannot halve often enough.
    pub fn stage_b_grid(&self, width: u32, height: u32, latents: (usize, usize)) -> Result<(usize, usize)> {
        let Some(Grid { factor, multiple }) = self.grid else {
            return Err(Error::internal("geometry", "Stage B's grid without Stage B"));
        };
        if let Rule::Encoder { .. } = self.rule {
            return Ok((height as usize / factor, width as usize / factor));
        }
        let grid = (self.decoded_side(latents.0), self.decoded_side(latents.1));
        for (side, decoded) in [(latents.0, grid.0), (latents.1, grid.1)] {
            if decoded == 0 || !decoded.is_multiple_of(multiple) {
                let expected = format!("sides whose decoded grid is a multiple of {multiple}");
                return Err(Error::argument("latents", expected, format!("{side}, which gives {decoded}")));
            }
        }
        Ok(grid)
    }
}
