//! Model folders with one damaged tensor.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::Path;

use safetensors::Dtype;
use wuerstchen::{Model, Result};

use super::errors::{Kind, assert_error, kind};
use super::folder::{Folder, Stored, open, weights_of};

/// # Panics
/// Unless a model without this tensor, or with one of another shape or type, is refused by the tensor's name.
pub fn check_refused(model: &Path, part: &str, tensor: &Stored) {
    let (file, name) = (weights_of(model, part), tensor.name.as_str());
    let changed = |change: &dyn Fn(&mut Vec<Stored>, usize)| {
        let folder = Folder::of(model);
        folder.edit_weights(part, |tensors| {
            let place = tensors.iter().position(|t| t.name == name).unwrap();
            change(tensors, place);
        });
        open(folder.path())
    };
    let what = format!("{part}: {name}");
    let missing = changed(&|tensors, i| drop(tensors.remove(i)));
    assert_error(&what, missing, Kind::Format, &[&file, name, "none of this name"]);
    let shape = format!("found {:?}", [&tensor.shape[..], &[1]].concat());
    let reshaped = changed(&|tensors, i| tensors[i].shape.push(1));
    assert_error(&what, reshaped, Kind::Format, &[&file, name, "expected shape", &shape]);
    for (dtype, written) in [(Dtype::I64, "I64"), (Dtype::F64, "F64")] {
        let typed = changed(&|tensors, i| {
            let elements = tensors[i].data.len() / 4;
            tensors[i].dtype = dtype;
            tensors[i].data = vec![0; elements * 8];
        });
        assert_error(&what, typed, Kind::Format, &[&file, name, "F32, F16 or BF16", written]);
    }
}

/// What is wrong with the answer of a model whose i-th tensor of a part is `value` throughout; nothing if the error
/// names the tensor and how many numbers are not finite.
pub fn complaint<T>(
    model: &Path,
    part: &str,
    (i, tensor): (usize, &Stored),
    value: f32,
    use_all: impl FnOnce(&Model) -> Result<T>,
) -> Option<String> {
    let (file, name) = (weights_of(model, part), tensor.name.as_str());
    let folder = Folder::of(model);
    folder.edit_weights(part, |tensors| tensors[i].fill(value));
    let count = format!("{} that are not", tensor.floats().len());
    let named = |text: &str| [&file, name, "finite weights", &count].iter().all(|p| text.contains(p));
    match open(folder.path()).and_then(|model| use_all(&model)) {
        Err(error) if kind(&error) == Some(Kind::Format) && named(&error.to_string()) => None,
        Err(error) => Some(format!("{part}: {name} = {value}: {error}")),
        Ok(_) => Some(format!("{part}: {name} = {value}: a picture")),
    }
}
