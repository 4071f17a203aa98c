//! Host tensors, for the stage-level calls.

use std::ffi::c_void;

use super::boundary::{Handle, HandleOut, boundary, enum_in, get, release, slice_in};
use super::error::{wst_error, wst_status};
use crate::device::{Context, Device};
use crate::error::{Error, Result};
use crate::tensor::{DType, Element, MAX_RANK, Tensor};

/// The type of a tensor's elements.
pub type wst_dtype = i32;

/// 32-bit IEEE float.
pub const WST_F32: wst_dtype = 0;
/// 16-bit IEEE float.
pub const WST_F16: wst_dtype = 1;
/// 16-bit brain float.
pub const WST_BF16: wst_dtype = 2;
/// 64-bit signed integer.
pub const WST_I64: wst_dtype = 3;
/// Byte.
pub const WST_U8: wst_dtype = 4;
/// 8-bit signed integer.
pub const WST_I8: wst_dtype = 5;

/// In the order of the numbers above.
pub(super) const DTYPES: &[(&str, DType)] = &[
    ("WST_F32", DType::F32),
    ("WST_F16", DType::F16),
    ("WST_BF16", DType::BF16),
    ("WST_I64", DType::I64),
    ("WST_U8", DType::U8),
    ("WST_I8", DType::I8),
];

/// A contiguous block of numbers in host memory, outermost dimension first: images are [N, C, H, W]. Immutable.
pub struct wst_tensor {
    pub(super) tensor: Tensor,
    shape: [i64; MAX_RANK],
}

impl wst_tensor {
    pub(super) fn new(tensor: Tensor) -> Self {
        let mut shape = [0; MAX_RANK];
        for (to, &from) in shape.iter_mut().zip(tensor.dims()) {
            // Shapes are bounded by `isize::MAX` bytes.
            *to = from as i64;
        }
        wst_tensor { tensor, shape }
    }
}

impl Handle for wst_tensor {}

/// A context for memory of the tensor's own, which goes back to the system with it. It starts no thread.
pub(super) fn host() -> Result<Context> {
    Ok(Context::new(&Device::cpu(1)?))
}

/// A tensor with a copy of `data`: the elements in the machine's byte order, at any address. `rank` is 0 (one
/// element, `shape` may be NULL) to 6. `data` may be NULL only if there are no elements.
///
/// Owner: the caller frees `*out` with wst_tensor_free.
/// Threads: any.
/// Errors: WST_INVALID_ARGUMENT, WST_OUT_OF_MEMORY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_tensor_new(
    dtype: wst_dtype,
    shape: *const i64,
    rank: usize,
    data: *const c_void,
    out: *mut *mut wst_tensor,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks; `data` has the bytes that the shape tells.
    unsafe {
        boundary("wst_tensor_new", error, HandleOut("out", out), |_| {
            let dtype = enum_in("dtype", dtype, DTYPES)?;
            if rank > MAX_RANK {
                return Err(Error::argument("rank", format!("0 to {MAX_RANK}"), rank));
            }
            let shape = slice_in(("shape", shape), ("rank", rank))?;
            let mut dims = [0usize; MAX_RANK];
            for (i, &dim) in shape.iter().enumerate() {
                dims[i] = usize::try_from(dim)
                    .map_err(|_| Error::argument(format!("shape[{i}]"), "0 or more", dim))?;
            }
            let dims = &dims[..rank];
            let empty = dims.contains(&0);
            if data.is_null() && !empty {
                return Err(Error::argument("data", "a pointer", "NULL"));
            }
            let data = data.cast::<u8>();
            match dtype {
                DType::F32 => copy::<f32>(dims, data),
                DType::F16 => copy::<half::f16>(dims, data),
                DType::BF16 => copy::<half::bf16>(dims, data),
                DType::I64 => copy::<i64>(dims, data),
                DType::U8 => copy::<u8>(dims, data),
                DType::I8 => copy::<i8>(dims, data),
            }
            .map(wst_tensor::new)
        })
    }
}

/// # Safety
/// `data` has the elements that `dims` tells, at any alignment; it may be NULL if there are none.
unsafe fn copy<T: Element>(dims: &[usize], data: *const u8) -> Result<Tensor> {
    let mut tensor = Tensor::new(&host()?, "a tensor", dims, T::DTYPE)?;
    let to = tensor.slice_mut::<T>()?;
    if !to.is_empty() {
        let bytes = std::mem::size_of_val(to);
        // SAFETY: as the caller of this function promises; the target is our own fresh memory.
        unsafe { std::ptr::copy_nonoverlapping(data, to.as_mut_ptr().cast::<u8>(), bytes) };
    }
    Ok(tensor)
}

/// The type of the elements; -1 for NULL.
///
/// Owner: nothing changes hands.
/// Threads: any.
/// Errors: none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_tensor_dtype(tensor: *const wst_tensor) -> wst_dtype {
    let number = |tensor: &wst_tensor| match tensor.tensor.dtype() {
        DType::F32 => WST_F32,
        DType::F16 => WST_F16,
        DType::BF16 => WST_BF16,
        DType::I64 => WST_I64,
        DType::U8 => WST_U8,
        DType::I8 => WST_I8,
    };
    // SAFETY: NULL or a live tensor, as the header asks.
    unsafe { get(tensor, -1, number) }
}

/// The number of dimensions; 0 for NULL.
///
/// Owner: nothing changes hands.
/// Threads: any.
/// Errors: none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_tensor_rank(tensor: *const wst_tensor) -> usize {
    // SAFETY: NULL or a live tensor, as the header asks.
    unsafe { get(tensor, 0, |tensor| tensor.tensor.dims().len()) }
}

/// The dimensions, outermost first; wst_tensor_rank of them. NULL for NULL.
///
/// Owner: the numbers belong to the tensor and end with it.
/// Threads: any.
/// Errors: none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_tensor_shape(tensor: *const wst_tensor) -> *const i64 {
    // SAFETY: NULL or a live tensor, as the header asks.
    unsafe { get(tensor, std::ptr::null(), |tensor| tensor.shape.as_ptr()) }
}

/// The elements, contiguous, aligned to 64 bytes; wst_tensor_nbytes bytes. NULL for NULL.
///
/// Owner: the bytes belong to the tensor and end with it.
/// Threads: any.
/// Errors: none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_tensor_data(tensor: *const wst_tensor) -> *const c_void {
    // SAFETY: NULL or a live tensor, as the header asks.
    unsafe {
        get(tensor, std::ptr::null(), |tensor| {
            tensor.tensor.bytes().map_or(std::ptr::null(), |bytes| bytes.as_ptr().cast())
        })
    }
}

/// The size of the elements in bytes; 0 for NULL.
///
/// Owner: nothing changes hands.
/// Threads: any.
/// Errors: none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_tensor_nbytes(tensor: *const wst_tensor) -> usize {
    // SAFETY: NULL or a live tensor, as the header asks.
    unsafe { get(tensor, 0, |tensor| tensor.tensor.elements() * tensor.tensor.dtype().size()) }
}

/// Frees a tensor. NULL is a no-op.
///
/// Owner: takes the tensor from the caller.
/// Threads: any.
/// Errors: none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_tensor_free(tensor: *mut wst_tensor) {
    // SAFETY: NULL or a live tensor, as the header asks.
    unsafe { release(tensor) }
}
