//! Model folders that a test may change: links to a real one, and files of the test's own in their place.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used)]

// A program may have `common` beside this.
#[allow(clippy::duplicate_mod)]
#[path = "devices.rs"]
pub mod devices;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

#[allow(unused_imports)]
pub use devices::options;
use half::{bf16, f16};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use wuerstchen::{GenerateOptions, Image, Model, Progress, Result};

/// The folders below a model's own, each with its weights.
pub const PARTS: [&str; 5] = ["text_encoder", "stage_c", "stage_b", "stage_a", "image_encoder"];

/// The same of a v2 model with both halves.
pub const V2_PARTS: [&str; 5] = ["prior_text_encoder", "prior_prior", "text_encoder", "decoder", "vqgan"];

/// The parts' weight files; diffusers has another name for its own networks'.
pub const WEIGHTS: &str = "model.safetensors";
pub const V2_WEIGHTS: &str = "diffusion_pytorch_model.safetensors";

/// The reference's model: random weights, the smallest sizes that have every kind of layer.
pub fn tiny() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/model")
}

/// The trained model that comes with the library.
pub fn emoji() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/models/emoji-v1")
}

/// The reference's v2 models: `model` with both halves, `prior` and `decoder` with one each.
pub fn v2(folder: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/v2").join(folder)
}

/// A part's weight file, seen from the model's folder.
pub fn weights_of(model: &Path, part: &str) -> String {
    let names = [WEIGHTS, V2_WEIGHTS].map(|name| format!("{part}/{name}"));
    names.into_iter().find(|name| model.join(name).exists()).unwrap()
}

/// A model on two threads.
pub fn open(path: &Path) -> Result<Model> {
    open_on(path, 2)
}

pub fn open_on(path: &Path, threads: u32) -> Result<Model> {
    let mut options = options();
    options.set_threads(threads)?;
    Model::open(path, &options)
}

/// Few steps, one prompt.
pub fn short(model: &Model, prompt: &str) -> GenerateOptions {
    let mut options = bare(model);
    options.add_prompt(prompt, None).unwrap();
    options
}

/// Few steps, no prompt yet.
pub fn bare(model: &Model) -> GenerateOptions {
    let mut options = GenerateOptions::new(model).unwrap();
    options.set_stage_c(3, 3.0).unwrap();
    options.set_stage_b(3, 2.0).unwrap();
    options.set_seed(11).unwrap();
    if model.info().generation == 2 || devices::on_gpu() {
        // Its smallest size, not its recommended one.
        options.set_size(128, 128).unwrap();
    }
    options
}

/// The only picture of a call.
pub fn picture(model: &Model, options: &GenerateOptions) -> Image {
    let images = model.generate(options).unwrap();
    assert_eq!(images.len(), 1);
    images.into_iter().next().unwrap()
}

/// All reports of a generation.
pub fn reports(model: &Model, mut options: GenerateOptions) -> Vec<Progress> {
    let heard = Arc::new(Mutex::new(Vec::new()));
    let ear = heard.clone();
    let caller = std::thread::current().id();
    options
        .set_progress(Some(Arc::new(move |progress: &Progress| {
            assert_eq!(std::thread::current().id(), caller, "reports come on the thread that called");
            ear.lock().unwrap().push(progress.clone());
        })))
        .unwrap();
    model.generate(&options).unwrap();
    std::mem::take(&mut *heard.lock().unwrap())
}

/// Mean absolute difference of two pictures of one size.
pub fn distance(a: &Image, b: &Image) -> f64 {
    assert_eq!((a.width(), a.height()), (b.width(), b.height()));
    let sum: f64 = a.data().iter().zip(b.data()).map(|(a, b)| f64::from(a.abs_diff(*b))).sum();
    sum / a.data().len() as f64
}

/// A tensor as a file has it.
#[derive(Debug, Clone)]
pub struct Stored {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub data: Vec<u8>,
}

impl Stored {
    /// The float elements, widened.
    pub fn floats(&self) -> Vec<f32> {
        let words = || self.data.chunks_exact(2).map(|b| u16::from_le_bytes(b.try_into().unwrap()));
        match self.dtype {
            Dtype::F32 => {
                self.data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
            }
            Dtype::F16 => words().map(|w| f16::from_bits(w).to_f32()).collect(),
            Dtype::BF16 => words().map(|w| bf16::from_bits(w).to_f32()).collect(),
            other => panic!("{}: {other:?}", self.name),
        }
    }

    pub fn is_float(&self) -> bool {
        matches!(self.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16)
    }

    /// Gives all elements one value.
    pub fn fill(&mut self, value: f32) {
        let elements = self.shape.iter().product();
        self.set(Dtype::F32, &vec![value; elements]);
    }

    /// Changes a side and fills in numbers, so that a part is whole again at another size.
    pub fn resize(&mut self, axis: usize, size: usize) {
        self.shape[axis] = size;
        self.fill(0.01);
    }

    /// Replaces the elements, rounded to `dtype`.
    pub fn set(&mut self, dtype: Dtype, values: &[f32]) {
        self.data = match dtype {
            Dtype::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            Dtype::F16 => values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect(),
            Dtype::BF16 => values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
            other => panic!("{other:?}"),
        };
        self.dtype = dtype;
    }
}

/// All tensors of a file.
pub fn read_tensors(path: &Path) -> Vec<Stored> {
    let bytes = std::fs::read(path).unwrap();
    let parsed = SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors: Vec<Stored> = parsed
        .iter()
        .map(|(name, view)| Stored {
            name: name.to_owned(),
            dtype: view.dtype(),
            shape: view.shape().to_vec(),
            data: view.data().to_vec(),
        })
        .collect();
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    tensors
}

/// A file that holds these tensors.
pub fn file_of(tensors: &[Stored]) -> Vec<u8> {
    let views =
        tensors.iter().map(|t| (t.name.clone(), TensorView::new(t.dtype, t.shape.clone(), &t.data).unwrap()));
    safetensors::serialize(views, None).unwrap()
}

/// A model folder in a temporary place, removed at the end.
pub struct Folder(PathBuf);

impl Folder {
    /// An empty folder.
    pub fn empty() -> Self {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("wst-models-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }

    /// Links to all files of a model.
    pub fn of(model: &Path) -> Self {
        let folder = Self::empty();
        link_all(model, &folder.0);
        folder
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Puts a file of the test's own in the place of a link.
    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        self.remove(name);
        std::fs::write(self.0.join(name), content).unwrap();
    }

    /// Removes a file or folder, if it is there.
    pub fn remove(&self, name: &str) {
        let path = self.0.join(name);
        match std::fs::symlink_metadata(&path) {
            Ok(metadata) if metadata.is_dir() => std::fs::remove_dir_all(path).unwrap(),
            Ok(_) => std::fs::remove_file(path).unwrap(),
            Err(_) => {}
        }
    }

    pub fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.0.join(name)).unwrap()
    }

    /// Changes a JSON file.
    pub fn edit_json(&self, name: &str, edit: impl FnOnce(&mut Value)) {
        let mut json = serde_json::from_slice(&self.read(name)).unwrap();
        edit(&mut json);
        self.write(name, json.to_string());
    }

    /// Changes the weights of a part.
    pub fn edit_weights(&self, part: &str, edit: impl FnOnce(&mut Vec<Stored>)) {
        let name = weights_of(&self.0, part);
        let mut tensors = read_tensors(&self.0.join(&name));
        edit(&mut tensors);
        self.write(&name, file_of(&tensors));
    }

    /// Splits the weights of a part over two files and an index; returns the names of the two.
    pub fn shard(&self, part: &str) -> [String; 2] {
        let whole = weights_of(&self.0, part);
        let tensors = read_tensors(&self.0.join(&whole));
        let (first, second) = tensors.split_at(tensors.len() / 3);
        let stem = whole.strip_suffix(".safetensors").unwrap();
        let files = [1, 2].map(|i| format!("{stem}-0000{i}-of-00002.safetensors"));
        let mut map = serde_json::Map::new();
        for (tensors, file) in [first, second].into_iter().zip(&files) {
            self.write(file, file_of(tensors));
            let name = file.rsplit('/').next().unwrap();
            map.extend(tensors.iter().map(|t| (t.name.clone(), name.into())));
        }
        let index = serde_json::json!({"metadata": {"total_size": 1}, "weight_map": map});
        self.write(&format!("{whole}.index.json"), index.to_string());
        self.remove(&whole);
        files
    }

    /// Puts a link to a file or folder in the place of what is there.
    pub fn link(&self, name: &str, to: &Path) {
        self.remove(name);
        std::os::unix::fs::symlink(to, self.0.join(name)).unwrap();
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Copies of a model: its weights rounded to a type, and the rounded numbers widened to F32 again.
pub fn rounded(model: &Path, parts: &[&str], dtype: Dtype) -> (Folder, Folder) {
    let (stored, widened) = (Folder::of(model), Folder::of(model));
    for part in parts {
        stored.edit_weights(part, |tensors| {
            for tensor in tensors.iter_mut().filter(|t| t.is_float()) {
                let values = tensor.floats();
                tensor.set(dtype, &values);
            }
        });
        let name = weights_of(stored.path(), part);
        let mut tensors = read_tensors(&stored.path().join(&name));
        for tensor in tensors.iter_mut().filter(|t| t.is_float()) {
            let values = tensor.floats();
            tensor.set(Dtype::F32, &values);
        }
        widened.write(&name, file_of(&tensors));
    }
    (stored, widened)
}

fn link_all(from: &Path, to: &Path) {
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            std::fs::create_dir(&to).unwrap();
            link_all(&entry.path(), &to);
        } else {
            std::os::unix::fs::symlink(entry.path(), to).unwrap();
        }
    }
}
