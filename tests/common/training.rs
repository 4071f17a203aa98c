//! What the tests of training share: gradients and scalars beside recorded ones.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used)]

use super::Case;
use wuerstchen::Tensor;
use wuerstchen::pipeline::load::Keys;
use wuerstchen::tensor::autograd::Gradients;
use wuerstchen::training::parameters::Parameters;

/// Largest error of a gradient against the largest element of its tensor.
const GRADIENT_TOLERANCE: f64 = 1e-4;
/// What rounding may leave where nothing should be, against the largest gradient of the case.
const ZERO_TOLERANCE: f64 = 1e-5;

/// A part of the model in training, with the names of the recorded tensors.
pub struct Trained<'a> {
    /// Below which the parameters lie.
    pub prefix: &'static str,
    pub keys: &'a Keys,
    /// What the case puts before the checkpoint's names.
    pub recorded: &'static str,
}

impl Trained<'_> {
    /// The name of a parameter in the checkpoint, and which elements of that tensor it is.
    pub fn place(&self, name: &str, elements: usize) -> Option<(String, usize)> {
        let name = name.strip_prefix(self.prefix)?.strip_prefix('.')?;
        let key = self.keys.key(name);
        Some((format!("{}{}", self.recorded, key.name), key.part.map_or(0, |(part, _)| part * elements)))
    }
}

/// Whether element `i` of a tensor is listed as noise.
pub fn is_noise(list: &serde_json::Value, tensor: &str, i: usize) -> bool {
    let entries = list.as_array().into_iter().flatten().filter(|entry| entry[0] == tensor);
    entries.flat_map(|entry| entry[1].as_array().unwrap()).any(|range| {
        let bound = |n: usize| range[n].as_u64().unwrap() as usize;
        (bound(0)..bound(1)).contains(&i)
    })
}

/// Compares every trained parameter's gradient with `PREFIX + name` of the case.
pub fn assert_gradients(
    case: &Case,
    prefix: &str,
    parameters: &Parameters,
    found: &Gradients,
    of: &[Trained],
) {
    let zero = &case.record["zero_gradient"]["items"];
    let mut compared = 0;
    let recorded = |name: &str, elements| of.iter().find_map(|part| part.place(name, elements));
    let each = || {
        parameters.trained().map(|place| {
            let name = &parameters.list()[place].name;
            let gradient = found.get(place).unwrap_or_else(|| panic!("no gradient reached {name}"));
            let (name, first) = recorded(name, gradient.elements()).unwrap();
            (format!("{prefix}{name}"), first, gradient)
        })
    };
    let largest = each()
        .filter(|(name, ..)| case.has(name))
        .flat_map(|(name, ..)| case.floats(&name).to_vec())
        .fold(0f64, |m, g| m.max(f64::from(g).abs()));
    for (name, first, gradient) in each().filter(|(name, ..)| case.has(name)) {
        let expected = &case.floats(&name)[first..][..gradient.elements()];
        let scale = expected.iter().fold(0f64, |m, g| m.max(f64::from(*g).abs()));
        for (i, (got, want)) in gradient.slice::<f32>().unwrap().iter().zip(expected).enumerate() {
            let error = (f64::from(*got) - f64::from(*want)).abs();
            let allowed = if is_noise(zero, &name, first + i) {
                ZERO_TOLERANCE * largest
            } else {
                GRADIENT_TOLERANCE * scale + 1e-7 * largest
            };
            assert!(error <= allowed, "{name}[{}]: {got} instead of {want} (largest {scale})", first + i);
        }
        compared += 1;
    }
    assert!(compared > 0, "no gradient was recorded");
}

pub fn assert_scalar(what: &str, found: f64, expected: f32, tolerance: f64) {
    let expected = f64::from(expected);
    let error = (found - expected).abs() / expected.abs();
    assert!(error <= tolerance, "{what}: {found} instead of {expected}");
}

/// Compares the gradient of an input, in the recorded order of axes, with the recorded one.
pub fn assert_input_gradient(case: &Case, name: &str, found: &[f32]) {
    let expected = case.floats(name);
    assert_eq!(found.len(), expected.len(), "{name}");
    let scale = expected.iter().fold(0f64, |m, g| m.max(f64::from(*g).abs()));
    for (i, (got, want)) in found.iter().zip(expected).enumerate() {
        let error = (f64::from(*got) - f64::from(*want)).abs();
        assert!(
            error <= GRADIENT_TOLERANCE * scale,
            "{name}[{i}]: {got} instead of {want} (largest {scale})"
        );
    }
}

/// `[N, H, W, C]` to `[N, C, H, W]`.
pub fn channels_first(x: &Tensor) -> Vec<f32> {
    let [n, h, w, c] = x.dims().try_into().unwrap();
    let (values, pixels) = (x.slice::<f32>().unwrap(), h * w);
    let at = |i: usize| values[(i / pixels / c * pixels + i % pixels) * c + i / pixels % c];
    (0..n * c * pixels).map(at).collect()
}
