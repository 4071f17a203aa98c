//! Reference data of the parity tests: computed by the authors' own code, see `tests/fixtures/NOTES.md`.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used)]

pub mod devices;
pub mod ranks;
pub mod training;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

#[allow(unused_imports)]
pub use devices::{context, options};
use wuerstchen::{Result, Tensor};

/// Largest ‖out − ref‖ / ‖ref‖ of a network's output in f32.
pub const NETWORK_TOLERANCE: f64 = 2e-5;

pub fn fixtures() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

enum Values {
    Floats(Vec<f32>),
    Integers(Vec<i64>),
}

/// One recorded case: its tensors by name, in the reference's axis order.
pub struct Case {
    name: String,
    tensors: HashMap<String, (Vec<usize>, Values)>,
    pub settings: serde_json::Value,
    /// All that the case says of itself.
    pub record: serde_json::Value,
}

impl Case {
    pub fn read(name: &str) -> Self {
        Self::read_at(name, &fixtures().join("cases").join(name))
    }

    /// The case whose two files are called `path`, but for their endings.
    pub fn read_at(name: &str, path: &Path) -> Self {
        let bytes = std::fs::read(path.with_extension("safetensors")).unwrap();
        let parsed = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let tensors = parsed.iter().map(|(name, view)| {
            let data = view.data();
            let values = match view.dtype() {
                safetensors::Dtype::F32 => {
                    let numbers = data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
                    Values::Floats(numbers.collect())
                }
                safetensors::Dtype::I32 => {
                    let numbers = data.chunks_exact(4).map(|b| i32::from_le_bytes(b.try_into().unwrap()));
                    Values::Integers(numbers.map(i64::from).collect())
                }
                safetensors::Dtype::I64 => {
                    let numbers = data.chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()));
                    Values::Integers(numbers.collect())
                }
                safetensors::Dtype::U8 => Values::Integers(data.iter().map(|&b| b.into()).collect()),
                other => panic!("{name}: {other:?}"),
            };
            (name.to_owned(), (view.shape().to_vec(), values))
        });
        let json = std::fs::read_to_string(path.with_extension("json")).unwrap();
        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        let settings = json["settings"].clone();
        Case { name: name.into(), tensors: tensors.collect(), settings, record: json }
    }

    fn entry(&self, name: &str) -> &(Vec<usize>, Values) {
        self.tensors.get(name).unwrap_or_else(|| panic!("{}: no tensor {name}", self.name))
    }

    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    pub fn shape(&self, name: &str) -> &[usize] {
        &self.entry(name).0
    }

    /// Floats in the reference's order.
    pub fn floats(&self, name: &str) -> &[f32] {
        match &self.entry(name).1 {
            Values::Floats(values) => values,
            Values::Integers(_) => panic!("{}: {name} holds integers", self.name),
        }
    }

    /// Integers in the reference's order.
    pub fn integers(&self, name: &str) -> &[i64] {
        match &self.entry(name).1 {
            Values::Integers(values) => values,
            Values::Floats(_) => panic!("{}: {name} holds floats", self.name),
        }
    }

    /// A float tensor as it is: sequences `[N, T, C]`, vectors.
    pub fn tensor(&self, name: &str) -> Tensor {
        Tensor::from_slice(self.shape(name), self.floats(name)).unwrap()
    }

    /// An integer tensor.
    pub fn tokens(&self, name: &str) -> Tensor {
        Tensor::from_slice(self.shape(name), self.integers(name)).unwrap()
    }

    /// An image-like tensor `[N, C, H, W]`, turned to channels last.
    pub fn image(&self, name: &str) -> Tensor {
        let (dims, values) = channels_last(self.shape(name), self.floats(name));
        Tensor::from_slice(&dims, &values).unwrap()
    }

    /// # Panics
    /// If `found` (channels last) is farther from the recorded `[N, C, H, W]` tensor than `tolerance`.
    pub fn assert_image(&self, name: &str, found: &Tensor, tolerance: f64) {
        let (dims, expected) = channels_last(self.shape(name), self.floats(name));
        assert_eq!(found.dims(), dims, "{}: shape of {name}", self.name);
        self.assert_close(name, found.slice().unwrap(), &expected, tolerance);
    }

    /// The same for a tensor whose order needs no turning.
    pub fn assert_tensor(&self, name: &str, found: &Tensor, tolerance: f64) {
        assert_eq!(found.dims(), self.shape(name), "{}: shape of {name}", self.name);
        self.assert_close(name, found.slice().unwrap(), self.floats(name), tolerance);
    }

    /// The same for integers, which must be equal.
    pub fn assert_tokens(&self, name: &str, found: &Tensor) {
        assert_eq!(found.dims(), self.shape(name), "{}: shape of {name}", self.name);
        let (found, expected) = (found.slice::<i64>().unwrap(), self.integers(name));
        let differing = found.iter().zip(expected).filter(|(f, e)| f != e).count();
        assert_eq!(differing, 0, "{}: {name}: tokens that differ", self.name);
    }

    fn assert_close(&self, name: &str, found: &[f32], expected: &[f32], tolerance: f64) {
        let error = relative_error(found, expected);
        println!("{}: {name}: relative error {error:.2e}", self.name);
        assert!(error <= tolerance, "{}: {name}: relative error {error:.2e} > {tolerance:.0e}", self.name);
    }
}

/// ‖found − expected‖ / ‖expected‖; infinite if anything is not a number.
pub fn relative_error(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let difference: f64 =
        found.iter().zip(expected).map(|(f, e)| (f64::from(*f) - f64::from(*e)).powi(2)).sum();
    let norm: f64 = expected.iter().map(|e| f64::from(*e).powi(2)).sum();
    let error = (difference / norm.max(f64::MIN_POSITIVE)).sqrt();
    if error.is_nan() { f64::INFINITY } else { error }
}

/// `[N, C, H, W]` to `[N, H, W, C]`.
pub fn channels_last(shape: &[usize], values: &[f32]) -> (Vec<usize>, Vec<f32>) {
    let [n, c, h, w] = shape.try_into().unwrap();
    let mut turned = Vec::with_capacity(values.len());
    for i in 0..n {
        for pixel in 0..h * w {
            turned.extend((0..c).map(|k| values[(i * c + k) * h * w + pixel]));
        }
    }
    (vec![n, h, w, c], turned)
}

/// The numbers that the reference drew, instead of a generator's.
pub struct RecordedNoise<'a> {
    pub case: &'a Case,
    /// Names of tensors by use; `{}` stands for the step.
    pub names: &'a [(wuerstchen::diffusion::noise::Draw, &'a str)],
}

impl RecordedNoise<'_> {
    fn name(&self, draw: wuerstchen::diffusion::noise::Draw, step: usize) -> String {
        let name = self.names.iter().find(|(d, _)| *d == draw).unwrap_or_else(|| panic!("{draw:?}")).1;
        name.replace("{}", &step.to_string())
    }
}

impl wuerstchen::diffusion::noise::NoiseSource for RecordedNoise<'_> {
    fn normal(
        &mut self,
        draw: wuerstchen::diffusion::noise::Draw,
        step: usize,
        out: &mut Tensor,
    ) -> Result<()> {
        let recorded = self.case.image(&self.name(draw, step));
        out.slice_mut::<f32>()?.copy_from_slice(recorded.slice()?);
        Ok(())
    }

    fn uniform(
        &mut self,
        draw: wuerstchen::diffusion::noise::Draw,
        step: usize,
        out: &mut Tensor,
    ) -> Result<()> {
        let recorded = self.case.floats(&self.name(draw, step));
        out.slice_mut::<f32>()?.copy_from_slice(recorded);
        Ok(())
    }

    fn below(
        &mut self,
        draw: wuerstchen::diffusion::noise::Draw,
        step: usize,
        _bound: u32,
        out: &mut Tensor,
    ) -> Result<()> {
        let recorded = self.case.integers(&self.name(draw, step));
        out.slice_mut::<i64>()?.copy_from_slice(recorded);
        Ok(())
    }
}
