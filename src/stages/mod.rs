//! The paper's networks, file by file. Written once, over ops and layers; they know no sampler and no file.

pub mod blocks;
pub mod diffnext;
pub mod discriminator;
pub mod image_encoder;
pub mod perceptual;
pub mod stage_a;
pub mod stage_b;
pub mod stage_c;
pub mod text_encoder;
pub mod unet;
