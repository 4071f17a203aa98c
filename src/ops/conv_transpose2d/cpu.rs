//! Gathering and scattering for the transposed convolution.

use super::{Phase, Sizes};

/// The patches `[taps, taps, I]` of line `row` of a phase. Tap t of pixel q reads input pixel q - t.
pub fn gather(sizes: &Sizes, at: &Phase, input: &[f32], row: usize, patches: &mut [f32]) {
    let Sizes { height, width, inputs, .. } = *sizes;
    let patch = at.taps[0] * at.taps[1] * inputs;
    for (column, patch) in patches.chunks_exact_mut(patch).enumerate() {
        for (tap, vector) in patch.chunks_exact_mut(inputs).enumerate() {
            // Above or left of the image the difference wraps to a huge number.
            let y = (at.source[0] + row).wrapping_sub(tap / at.taps[1]);
            let x = (at.source[1] + column).wrapping_sub(tap % at.taps[1]);
            if y < height && x < width {
                vector.copy_from_slice(&input[(y * width + x) * inputs..][..inputs]);
            } else {
                vector.fill(0.0);
            }
        }
    }
}

/// Pixels of a phase go to columns `first`, `first + stride`, .. of an output line.
pub fn scatter(pixels: &[f32], channels: usize, first: usize, stride: usize, line: &mut [f32]) {
    for (i, pixel) in pixels.chunks_exact(channels).enumerate() {
        line[(first + i * stride) * channels..][..channels].copy_from_slice(pixel);
    }
}
