//! The arithmetic of the samplers, number by number: its definition.

/// conditional = unconditional + weight (conditional - unconditional), in place. From weight 0.5 on it is
/// computed from the conditional side, as PyTorch's `lerp` does.
pub fn guide(conditional: &mut [f32], unconditional: &[f32], weight: f32) {
    for (c, u) in conditional.iter_mut().zip(unconditional) {
        let difference = *c - u;
        *c = if weight < 0.5 { u + weight * difference } else { *c - difference * (1.0 - weight) };
    }
}

/// x_t = sqrt(alpha_bar) x + sqrt(1 - alpha_bar) noise (paper, section 3.2), in place.
pub fn diffuse(x: &mut [f32], noise: &[f32], alpha_bar: f32) {
    let (signal, spread) = (alpha_bar.sqrt(), (1.0 - alpha_bar).sqrt());
    x.iter_mut().zip(noise).for_each(|(x, noise)| *x = *x * signal + noise * spread);
}

/// x = mask x + (1 - mask) kept, with a mask for each row of `channels` numbers.
pub fn keep(x: &mut [f32], kept: &[f32], mask: &[f32], channels: usize) {
    let rows = x.chunks_exact_mut(channels).zip(kept.chunks_exact(channels));
    for ((x, kept), mask) in rows.zip(mask) {
        x.iter_mut().zip(kept).for_each(|(x, kept)| *x = *x * mask + kept * (1.0 - mask));
    }
}

/// The numbers of a step of DDPM.
#[derive(Debug, Clone, Copy)]
pub struct Ddpm {
    /// 1 / sqrt(alpha), where alpha = alpha_bar / alpha_bar_next.
    pub root: f32,
    /// 1 - alpha.
    pub weight: f32,
    /// sqrt(1 - alpha_bar).
    pub spread: f32,
    /// Of the fresh noise.
    pub deviation: f32,
}

impl Ddpm {
    /// Of a step from one share of the signal's variance to the next.
    pub fn new(alpha_bar: f32, alpha_bar_next: f32) -> Self {
        let alpha = alpha_bar / alpha_bar_next;
        let weight = 1.0 - alpha;
        Ddpm {
            root: 1.0 / alpha.sqrt(),
            weight,
            spread: (1.0 - alpha_bar).sqrt(),
            deviation: (weight * (1.0 - alpha_bar_next) / (1.0 - alpha_bar)).sqrt(),
        }
    }
}

/// One step of DDPM, in place (paper, section 3.3): mean (x - (1 - alpha)/sqrt(1 - alpha_bar) predicted) /
/// sqrt(alpha), deviation sqrt((1 - alpha)(1 - alpha_bar_next)/(1 - alpha_bar)) times `noise`, where alpha =
/// alpha_bar / alpha_bar_next. Without noise the deviation is left out.
pub fn ddpm_step(
    x: &mut [f32],
    predicted: &[f32],
    noise: Option<&[f32]>,
    alpha_bar: f32,
    alpha_bar_next: f32,
) {
    let Ddpm { root, weight, spread, deviation } = Ddpm::new(alpha_bar, alpha_bar_next);
    for (x, predicted) in x.iter_mut().zip(predicted) {
        *x = root * (*x - weight * predicted / spread);
    }
    if let Some(noise) = noise {
        x.iter_mut().zip(noise).for_each(|(x, noise)| *x += deviation * noise);
    }
}

/// The clean sample that `x` and the predicted noise imply: (x - sqrt(1 - alpha_bar) predicted) / sqrt(alpha_bar).
pub fn implied_clean(x: f32, predicted: f32, alpha_bar: f32) -> f32 {
    (x - (1.0 - alpha_bar).sqrt() * predicted) / alpha_bar.sqrt()
}

/// One step of DDIM, in place: the implied clean sample, noised again to the next time with the same noise.
pub fn ddim_step(x: &mut [f32], predicted: &[f32], alpha_bar: f32, alpha_bar_next: f32) {
    let (signal, spread) = (alpha_bar_next.sqrt(), (1.0 - alpha_bar_next).sqrt());
    for (x, predicted) in x.iter_mut().zip(predicted) {
        *x = signal * implied_clean(*x, *predicted, alpha_bar) + spread * predicted;
    }
}
