//! Safetensors files out.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fs::{self, File};
use std::path::Path;

use half::{bf16, f16};
use safetensors::tensor::{Dtype, SafeTensorError, View, serialize_to_file};

use crate::error::{Error, Result};
use crate::tensor::{DType, Tensor};

/// Writes tensors under their names, in any order.
///
/// # Errors
/// `Io`; `InvalidArgument` for names that are not told apart; those of bringing a tensor to the host.
pub fn write_safetensors<'a>(
    path: &Path,
    tensors: impl IntoIterator<Item = (String, &'a Tensor)>,
) -> Result<()> {
    let whole = |(name, tensor): (String, &'a Tensor)| Ok((name, Whole { tensor, bytes: tensor.bytes()? }));
    let tensors = tensors.into_iter().map(whole).collect::<Result<Vec<_>>>()?;
    // The format's crate makes files for their owner alone; what the system gives to others is theirs too.
    let created = File::create(path).and_then(|file| file.metadata());
    let permissions = created.map_err(|source| Error::io(path, source))?.permissions();
    // Readers of the Hugging Face libraries want to know whose tensors these are.
    let notes = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    serialize_to_file(tensors, Some(notes), path).map_err(|error| match error {
        SafeTensorError::IoError(source) => Error::io(path, source),
        other => Error::io(path, std::io::Error::other(other.to_string())),
    })?;
    fs::set_permissions(path, permissions).map_err(|source| Error::io(path, source))
}

/// The numbers in another float type, rounded to the nearest; others as they are.
///
/// # Errors
/// `OutOfMemory`.
pub fn stored_as(tensor: &Tensor, dtype: DType) -> Result<Tensor> {
    if tensor.dtype() != DType::F32 || dtype == DType::F32 {
        return Ok(tensor.clone());
    }
    let values = tensor.slice::<f32>()?;
    match dtype {
        DType::F16 => {
            Tensor::from_slice(tensor.dims(), &values.iter().map(|&x| f16::from_f32(x)).collect::<Vec<_>>())
        }
        _ => {
            Tensor::from_slice(tensor.dims(), &values.iter().map(|&x| bf16::from_f32(x)).collect::<Vec<_>>())
        }
    }
}

/// A tensor as the format's crate asks for it.
struct Whole<'a> {
    tensor: &'a Tensor,
    bytes: &'a [u8],
}

impl View for Whole<'_> {
    fn dtype(&self) -> Dtype {
        match self.tensor.dtype() {
            DType::F32 => Dtype::F32,
            DType::F16 => Dtype::F16,
            DType::BF16 => Dtype::BF16,
            DType::I64 => Dtype::I64,
            DType::U8 => Dtype::U8,
            DType::I8 => Dtype::I8,
        }
    }

    fn shape(&self) -> &[usize] {
        self.tensor.dims()
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(self.bytes)
    }

    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}
