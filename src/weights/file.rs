//! One safetensors file, mapped: its header is parsed when it is opened, its weights are read when they are used.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use half::{bf16, f16};
use memmap2::{Mmap, MmapOptions, UncheckedAdvice};
use safetensors::tensor::{Dtype, Metadata, SafeTensors, TensorInfo};

use crate::device::reserve;
use crate::error::{Error, Result};
use crate::files;
use crate::tensor::{DType, Tensor};

/// What a header may take in memory per byte of its text, at worst: a shape of many zeros, parsed and buffered.
const HEADER_BLOW_UP: usize = 48;

/// The largest header, as the safetensors format defines it.
const HEADER_MAX_BYTES: u64 = 100_000_000;

/// Bytes of the header's length, which come before it.
const LENGTH_BYTES: usize = 8;

/// An open weight file. Tensors keep the mapping alive.
///
/// The file must not be shortened while it is mapped; the operating system would end the process.
#[derive(Debug)]
pub struct WeightFile {
    path: PathBuf,
    map: Arc<Mmap>,
    metadata: Metadata,
    /// Where the tensors' offsets count from.
    data_start: usize,
}

impl WeightFile {
    /// Maps a file and reads its header. No page of a weight is touched.
    ///
    /// # Errors
    /// `Io`; `Format` if the file is not a whole safetensors file; `OutOfMemory`.
    pub fn open(path: &Path) -> Result<Self> {
        let (file, size) = files::open(path)?;
        if size < LENGTH_BYTES {
            return Err(wrong(path, format!("{size} bytes")));
        }
        // SAFETY: the mapping is private and read-only. Someone else's writing to the file can change weights
        // but no memory that Rust believes constant in a typed way: elements are plain numbers.
        let map = unsafe { MmapOptions::new().map_copy_read_only(&file) }
            .map_err(|source| Error::io(path, source))?;
        let header_bytes = check_header_length(path, &map)?;
        let what = format!("the header of {}", path.display());
        let (header, metadata) = reserve::with(&what, header_bytes * HEADER_BLOW_UP, || {
            SafeTensors::read_metadata(&map).map_err(|error| wrong(path, error))
        })?;
        Ok(WeightFile {
            path: path.to_owned(),
            map: Arc::new(map),
            metadata,
            data_start: LENGTH_BYTES + header,
        })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A note in the header, which is text beside the tensors.
    pub fn note(&self, key: &str) -> Option<&str> {
        self.metadata.metadata().as_ref().and_then(|notes| notes.get(key)).map(String::as_str)
    }

    /// The size of the mapping.
    pub fn bytes_mapped(&self) -> usize {
        self.map.len()
    }

    /// What a list of all tensors may take in memory, at worst.
    pub(super) fn list_bytes(&self) -> usize {
        self.data_start * HEADER_BLOW_UP
    }

    /// Where the file is mapped.
    pub fn address_range(&self) -> std::ops::Range<usize> {
        let start = self.map.as_ptr() as usize;
        start..start + self.map.len()
    }

    /// The names of all tensors, in the order of the file.
    pub fn names(&self) -> Vec<String> {
        self.metadata.offset_keys()
    }

    /// Whether the file has a tensor `name`.
    pub fn has(&self, name: &str) -> bool {
        self.metadata.info(name).is_some()
    }

    /// The shape of a tensor.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.metadata.info(name).map(|info| info.shape.as_slice())
    }

    /// The element type of a tensor, if it is one that [`WeightFile::tensor`] can give.
    pub fn dtype(&self, name: &str) -> Option<DType> {
        self.metadata.info(name).and_then(|info| dtype_of(info.dtype))
    }

    /// A tensor that lies in the mapping; one whose data is not aligned for its type is copied out.
    ///
    /// # Errors
    /// `Format` if it is missing or of a type that the library does not read; `OutOfMemory`.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        let info = self
            .metadata
            .info(name)
            .ok_or_else(|| Error::format(self.place(name), "a tensor", "none of this name"))?;
        let dtype = dtype_of(info.dtype).ok_or_else(|| {
            Error::format(self.place(name), "elements of type F32, F16, BF16, I64 or U8", self.found(info))
        })?;
        let offset = self.data_start + info.data_offsets.0;
        let misaligned = !(self.map.as_ptr() as usize + offset).is_multiple_of(dtype.size());
        let tensor = if misaligned {
            copied(&self.map[offset..self.data_start + info.data_offsets.1], &info.shape, dtype)
        } else {
            Tensor::mapped(&self.map, offset, &info.shape, dtype)
        };
        tensor.map_err(|error| match error {
            Error::InvalidArgument { expected, found, .. } => {
                Error::format(self.place(name), expected, found)
            }
            error => error,
        })
    }

    /// Gives the pages of the weights back to the system. They are read again when they are used.
    pub fn advise_dont_need(&self) {
        // SAFETY: the mapping is private and was never written, so that its pages come back as they were.
        let advised = unsafe { self.map.unchecked_advise(UncheckedAdvice::DontNeed) };
        // Only a hint: memory that stays in use is no failure.
        drop(advised);
    }

    /// How errors name a tensor of this file.
    pub(super) fn place(&self, name: &str) -> String {
        format!("{}: {name}", self.path.display())
    }

    /// The element type as the file spells it.
    pub(super) fn stored_dtype(&self, name: &str) -> String {
        self.metadata.info(name).map(|info| self.found(info)).unwrap_or_default()
    }

    fn found(&self, info: &TensorInfo) -> String {
        format!("{:?}", info.dtype)
    }
}

fn wrong(path: &Path, found: impl std::fmt::Display) -> Error {
    Error::format(path.display().to_string(), "a whole safetensors file", found)
}

/// Looks at the announced length of the header before anything is allocated for it.
fn check_header_length(path: &Path, map: &Mmap) -> Result<usize> {
    let length = map.first_chunk::<LENGTH_BYTES>().map_or(0, |bytes| u64::from_le_bytes(*bytes));
    let present = (map.len() - LENGTH_BYTES) as u64;
    if length > HEADER_MAX_BYTES || length > present {
        let found = format!("a header of {length} bytes in a file of {} bytes", map.len());
        return Err(wrong(path, found));
    }
    Ok(length as usize)
}

fn dtype_of(dtype: Dtype) -> Option<DType> {
    match dtype {
        Dtype::F32 => Some(DType::F32),
        Dtype::F16 => Some(DType::F16),
        Dtype::BF16 => Some(DType::BF16),
        Dtype::I64 => Some(DType::I64),
        Dtype::U8 => Some(DType::U8),
        _ => None,
    }
}

/// The same elements in memory of their own.
fn copied(bytes: &[u8], dims: &[usize], dtype: DType) -> Result<Tensor> {
    match dtype {
        DType::F32 => Tensor::from_slice(dims, &parse(bytes, f32::from_le_bytes)?),
        DType::F16 => Tensor::from_slice(dims, &parse(bytes, f16::from_le_bytes)?),
        DType::BF16 => Tensor::from_slice(dims, &parse(bytes, bf16::from_le_bytes)?),
        DType::I64 => Tensor::from_slice(dims, &parse(bytes, i64::from_le_bytes)?),
        DType::U8 => Tensor::from_slice(dims, bytes),
        DType::I8 => Tensor::from_slice(dims, &parse(bytes, i8::from_le_bytes)?),
    }
}

fn parse<T, const N: usize>(bytes: &[u8], element: fn([u8; N]) -> T) -> Result<Vec<T>> {
    let mut values = Vec::new();
    values
        .try_reserve_exact(bytes.len() / N)
        .map_err(|_| Error::out_of_memory("a tensor whose data is not aligned", bytes.len()))?;
    values.extend(bytes.as_chunks::<N>().0.iter().map(|&chunk| element(chunk)));
    Ok(values)
}
