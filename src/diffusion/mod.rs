//! The mathematics of diffusion: schedule, samplers, token resampling, guidance. No networks: they come in as
//! closures.

pub mod guidance;
pub mod latents;
pub mod noise;
pub mod schedule;
pub mod tokens;

#[cfg(test)]
mod tests;
