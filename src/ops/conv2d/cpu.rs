//! Gathering for the dense convolution.

use super::Sizes;

/// The patches `[kh, kw, I]` of the output pixels from number `first` of the batch on.
pub fn gather(sizes: &Sizes, input: &[f32], first: usize, patches: &mut [f32]) {
    let Sizes { height, width, inputs, out_height, out_width, stride, padding, .. } = *sizes;
    let [kh, kw] = sizes.kernel;
    for (pixel, patch) in (first..).zip(patches.chunks_exact_mut(sizes.patch())) {
        let (n, y, x) = (pixel / out_width / out_height, pixel / out_width % out_height, pixel % out_width);
        for (u, line) in (0..kh).zip(patch.chunks_exact_mut(kw * inputs)) {
            // Above or left of the image the difference wraps to a huge number.
            let row = (y * stride + u).wrapping_sub(padding);
            if row >= height {
                line.fill(0.0);
                continue;
            }
            let row = &input[(n * height + row) * width * inputs..][..width * inputs];
            for (v, vector) in (0..kw).zip(line.chunks_exact_mut(inputs)) {
                let column = (x * stride + v).wrapping_sub(padding);
                if column < width {
                    vector.copy_from_slice(&row[column * inputs..][..inputs]);
                } else {
                    vector.fill(0.0);
                }
            }
        }
    }
}

/// A filter `[I, taps]` as `[taps, I]`.
pub fn transpose(filter: &[f32], taps: usize, out: &mut [f32]) {
    let inputs = filter.len() / taps;
    for (tap, vector) in out.chunks_exact_mut(inputs).enumerate() {
        for (value, of_input) in vector.iter_mut().zip(filter.chunks_exact(taps)) {
            *value = of_input[tap];
        }
    }
}
