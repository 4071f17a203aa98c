//! Classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598).

/// conditional = unconditional + weight (conditional - unconditional), in place. From weight 0.5 on it is
/// computed from the conditional side, as PyTorch's `lerp` does.
pub fn guide(conditional: &mut [f32], unconditional: &[f32], weight: f32) {
    for (c, u) in conditional.iter_mut().zip(unconditional) {
        let difference = *c - u;
        *c = if weight < 0.5 { u + weight * difference } else { *c - difference * (1.0 - weight) };
    }
}

/// `steps` values from `start` to `end`, for weights and temperatures that change over the steps.
pub fn ramp(start: f32, end: f32, steps: usize) -> Vec<f32> {
    match steps {
        0 => Vec::new(),
        _ => super::schedule::linspace(start, end, steps - 1),
    }
}
