//! Element types: what a tensor may hold, and which Rust type reads it.

use half::{bf16, f16};

/// The type of a tensor's elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DType {
    /// 32-bit IEEE float: all activations on the CPU.
    F32,
    /// 16-bit IEEE float, as stored weights.
    F16,
    /// 16-bit brain float, as stored weights.
    BF16,
    /// 64-bit integer: tokens.
    I64,
    /// Bytes: pixels and masks.
    U8,
    /// 8-bit integer: the factors of products on the CPU, if a model is opened so.
    I8,
}

impl DType {
    /// Bytes per element.
    pub const fn size(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::F16 | DType::BF16 => 2,
            DType::I64 => 8,
            DType::U8 | DType::I8 => 1,
        }
    }

    /// The name that safetensors files use.
    pub const fn name(self) -> &'static str {
        match self {
            DType::F32 => "F32",
            DType::F16 => "F16",
            DType::BF16 => "BF16",
            DType::I64 => "I64",
            DType::U8 => "U8",
            DType::I8 => "I8",
        }
    }

    /// Whether the elements are floating-point numbers.
    pub const fn is_float(self) -> bool {
        matches!(self, DType::F32 | DType::F16 | DType::BF16)
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// A Rust type that is the element of a [`DType`]. Every bit pattern of it is a value.
///
/// # Safety
/// `DTYPE.size()` must be the size of `Self`, and every bit pattern must be valid.
pub unsafe trait Element: Copy + Send + Sync + 'static {
    /// The matching element type.
    const DTYPE: DType;
}

macro_rules! element {
    ($($rust:ty => $dtype:ident),*) => {$(
        // SAFETY: a plain number of the size that `DType::size` gives; every bit pattern is a value.
        unsafe impl Element for $rust {
            const DTYPE: DType = DType::$dtype;
        }
    )*};
}

element!(f32 => F32, f16 => F16, bf16 => BF16, i64 => I64, u8 => U8, i8 => I8);
