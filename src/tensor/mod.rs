//! What a tensor is: shape, element type, storage. Always contiguous, channels last. Names no op.

pub mod autograd;
mod cuda;
mod dtype;
pub mod replay;
pub mod rng;
mod shape;
mod storage;

use std::sync::Arc;

pub use dtype::{DType, Element};
pub use shape::{MAX_RANK, Shape};

use crate::device::{Buffer, Context};
use crate::error::{Error, Result};
use storage::Storage;

/// A contiguous block of numbers. Clones and views share storage.
///
/// Images are `[N, H, W, C]`, token sequences `[N, T, C]`. Activations are `F32`; weights keep the type
/// of their file.
#[derive(Clone, Debug)]
pub struct Tensor {
    shape: Shape,
    dtype: DType,
    storage: Storage,
    /// First byte within the storage.
    offset: usize,
    /// Where on a tape its gradient is summed, if it has one. Shapes do not matter there.
    tracked: Option<autograd::Tracked>,
}

impl Tensor {
    /// A tensor over pooled memory, to be filled by [`Tensor::slice_mut`]. Content is arbitrary.
    ///
    /// # Errors
    /// `OutOfMemory`, naming `what`; `InvalidArgument` if the shape is absurd.
    pub fn new(cx: &Context, what: &'static str, dims: &[usize], dtype: DType) -> Result<Self> {
        let shape = Shape::new(dims)?;
        let storage = Storage::new(cx, what, shape.elements() * dtype.size())?;
        Ok(Tensor { shape, dtype, storage, offset: 0, tracked: None })
    }

    /// A pooled tensor of zeros.
    ///
    /// # Errors
    /// As [`Tensor::new`].
    pub fn zeros(cx: &Context, what: &'static str, dims: &[usize], dtype: DType) -> Result<Self> {
        let mut tensor = Self::new(cx, what, dims, dtype)?;
        match &mut tensor.storage {
            Storage::Mirrored(mirrored) => match Arc::get_mut(mirrored) {
                Some(mirrored) => mirrored.clear()?,
                None => return Err(Error::internal("a tensor", "new and shared")),
            },
            _ => tensor.bytes_mut()?.fill(0),
        }
        Ok(tensor)
    }

    /// A copy of `values` in memory of its own, outside any pool.
    ///
    /// # Errors
    /// `InvalidArgument` if the count does not match the shape; `OutOfMemory`.
    pub fn from_slice<T: Element>(dims: &[usize], values: &[T]) -> Result<Self> {
        let shape = Shape::new(dims)?;
        if shape.elements() != values.len() {
            let expected = format!("{} values for shape {shape}", shape.elements());
            return Err(Error::argument("values", expected, values.len()));
        }
        let buffer = Buffer::new("a tensor", std::mem::size_of_val(values))?;
        let mut tensor = Tensor {
            shape,
            dtype: T::DTYPE,
            storage: Storage::Host(Arc::new(buffer)),
            offset: 0,
            tracked: None,
        };
        tensor.slice_mut::<T>()?.copy_from_slice(values);
        Ok(tensor)
    }

    /// The elements of `parts`, one after the other, under a shape that holds them all.
    ///
    /// # Errors
    /// `InvalidArgument` if the parts have no common type or do not fill the shape; `OutOfMemory`.
    pub fn from_parts(cx: &Context, what: &'static str, dims: &[usize], parts: &[&Tensor]) -> Result<Self> {
        let dtype = parts.first().map_or(DType::F32, |part| part.dtype);
        let mut joined = Self::new(cx, what, dims, dtype)?;
        let bytes: usize = parts.iter().map(|part| part.elements() * part.dtype.size()).sum();
        let whole = joined.elements() * dtype.size();
        if bytes != whole || parts.iter().any(|part| part.dtype != dtype) {
            return Err(Error::argument(what, format!("{whole} bytes of {dtype}"), bytes));
        }
        if let Some(stream) = cx.cuda()? {
            let mut to = joined.on_mut(stream)?;
            for part in parts {
                let (from, bytes) = (part.on(cx, stream)?, part.elements() * dtype.size());
                // SAFETY: the part has this many bytes, and the whole room for all parts, as was checked.
                unsafe { stream.copy(from.address(), to, bytes)? };
                to += bytes as u64;
            }
            return Ok(joined);
        }
        let mut rest = joined.bytes_mut()?;
        for part in parts {
            let (head, tail) = rest.split_at_mut(part.bytes()?.len());
            head.copy_from_slice(part.bytes()?);
            rest = tail;
        }
        Ok(joined)
    }

    /// A copy on the context's device, to be kept: on the CPU in memory outside any pool.
    ///
    /// # Errors
    /// `OutOfMemory`.
    pub fn copied(&self, cx: &Context) -> Result<Self> {
        match cx.cuda()? {
            Some(_) => Self::from_parts(cx, "a kept tensor", self.dims(), &[self]),
            None => self.detached(),
        }
    }

    /// A copy in host memory of its own, so that the original's can go back to its pool.
    ///
    /// # Errors
    /// `OutOfMemory`.
    pub fn detached(&self) -> Result<Self> {
        let bytes = self.bytes()?;
        let mut buffer = Buffer::new("a tensor", bytes.len())?;
        buffer.bytes_mut().copy_from_slice(bytes);
        Ok(Tensor { storage: Storage::Host(Arc::new(buffer)), offset: 0, tracked: None, ..*self })
    }

    /// A tensor inside a mapped file, from byte `offset` on.
    ///
    /// # Errors
    /// `InvalidArgument` if the bytes are not there or not aligned for the element type.
    pub fn mapped(map: &Arc<memmap2::Mmap>, offset: usize, dims: &[usize], dtype: DType) -> Result<Self> {
        let shape = Shape::new(dims)?;
        let bytes = shape.elements() * dtype.size();
        if offset.checked_add(bytes).is_none_or(|end| end > map.len()) {
            let expected = format!("{bytes} bytes from byte {offset}");
            return Err(Error::argument("a mapped tensor", expected, format!("{} bytes", map.len())));
        }
        if !(map.as_ptr() as usize + offset).is_multiple_of(dtype.size()) {
            let expected = format!("data aligned to {} bytes", dtype.size());
            return Err(Error::argument("a mapped tensor", expected, format!("offset {offset}")));
        }
        Ok(Tensor { shape, dtype, storage: Storage::Mapped(map.clone()), offset, tracked: None })
    }

    /// The shape.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// The dimensions, outermost first.
    pub fn dims(&self) -> &[usize] {
        self.shape.dims()
    }

    /// The dimensions as an array, if there are `N`.
    ///
    /// # Errors
    /// `InvalidArgument`, naming `what`, for another rank.
    pub fn dims_of<const N: usize>(&self, what: &str) -> Result<[usize; N]> {
        self.dims().try_into().map_err(|_| Error::argument(what, format!("{N} dimensions"), self.shape))
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The number of elements.
    pub fn elements(&self) -> usize {
        self.shape.elements()
    }

    /// The bytes, in the machine's order. Those of a GPU are read once the work so far is done.
    ///
    /// # Errors
    /// `OutOfMemory` and `Device`, of tensors on a GPU alone.
    pub fn bytes(&self) -> Result<&[u8]> {
        Ok(&self.storage.bytes()?[self.offset..self.offset + self.elements() * self.dtype.size()])
    }

    fn bytes_mut(&mut self) -> Result<&mut [u8]> {
        let len = self.elements() * self.dtype.size();
        Ok(&mut self.storage.bytes_mut()?[self.offset..self.offset + len])
    }

    /// The mapped file that the elements are part of, if they are.
    pub(crate) fn file(&self) -> Option<Arc<dyn std::any::Any + Send + Sync>> {
        self.storage.file()
    }

    /// Gives the pages of a mapped file that the elements lie in back to the system. They are read again when they are
    /// used.
    pub(crate) fn advise_dont_need(&self) {
        if let Storage::Mapped(map) = &self.storage {
            let bytes = self.elements() * self.dtype.size();
            // SAFETY: mapped files are private and never written, so that their pages come back as they were.
            let advised =
                unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, self.offset, bytes) };
            // Only a hint: memory that stays in use is no failure.
            drop(advised);
        }
    }

    /// Whether nobody else owns the storage: only then the elements may be written.
    pub fn is_own(&mut self) -> bool {
        self.storage.is_own()
    }

    /// The elements.
    ///
    /// # Errors
    /// `InvalidArgument` if the tensor holds another type; those of [`Tensor::bytes`].
    pub fn slice<T: Element>(&self) -> Result<&[T]> {
        self.expect_dtype(T::DTYPE)?;
        let bytes = self.bytes()?;
        // SAFETY: buffers are 64-byte aligned and views start at whole elements; `mapped` checked its
        // alignment. Every bit pattern is a value of an `Element`.
        Ok(unsafe { std::slice::from_raw_parts(bytes.as_ptr().cast(), self.shape.elements()) })
    }

    /// The elements, to write. Only the sole owner of the storage may.
    ///
    /// # Errors
    /// `InvalidArgument` for another type; `Internal` if the storage is shared or a mapped file.
    pub fn slice_mut<T: Element>(&mut self) -> Result<&mut [T]> {
        self.expect_dtype(T::DTYPE)?;
        let elements = self.shape.elements();
        let bytes = self.bytes_mut()?;
        // SAFETY: as in `slice`; the borrow of `self` makes the access exclusive.
        Ok(unsafe { std::slice::from_raw_parts_mut(bytes.as_mut_ptr().cast(), elements) })
    }

    fn expect_dtype(&self, dtype: DType) -> Result<()> {
        if self.dtype == dtype {
            return Ok(());
        }
        Err(Error::argument("a tensor", format!("elements of type {dtype}"), self.dtype))
    }

    /// The same elements under another shape.
    ///
    /// # Errors
    /// `InvalidArgument` if the element counts differ.
    pub fn reshape(&self, dims: &[usize]) -> Result<Self> {
        let shape = Shape::new(dims)?;
        if shape.elements() != self.elements() {
            return Err(Error::argument("reshape", format!("a shape like {}", self.shape), shape));
        }
        Ok(Tensor { shape, ..self.clone() })
    }

    /// `count` entries of the first dimension from `start` on, as a view.
    ///
    /// # Errors
    /// `InvalidArgument` if they are not all there.
    pub fn narrow(&self, start: usize, count: usize) -> Result<Self> {
        let Some((&first, inner)) = self.dims().split_first() else {
            return Err(Error::argument("narrow", "at least one dimension", self.shape));
        };
        if start.checked_add(count).is_none_or(|end| end > first) {
            return Err(Error::argument("narrow", format!("a range within {first}"), start + count));
        }
        let entry: usize = inner.iter().product();
        let stride = entry * self.dtype.size();
        let mut dims = [1; MAX_RANK];
        dims[..self.dims().len()].copy_from_slice(self.dims());
        dims[0] = count;
        let shape = Shape::new(&dims[..self.dims().len()])?;
        let tracked = self.tracked.map(|whole| whole.part(start * entry, count * entry));
        Ok(Tensor { shape, offset: self.offset + start * stride, tracked, ..self.clone() })
    }

    /// Where on a tape this tensor's gradient is summed, if it has one.
    pub fn tracked(&self) -> Option<autograd::Tracked> {
        self.tracked
    }

    /// These numbers, of which the tape knows what it knows of `other`: the same in another type.
    #[must_use]
    pub fn tracked_as(self, other: &Tensor) -> Self {
        Tensor { tracked: other.tracked, ..self }
    }

    /// The same numbers, of which no tape knows: a constant.
    #[must_use]
    pub fn constant(&self) -> Self {
        Tensor { tracked: None, ..self.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn views_share_storage_and_forbid_writing() {
        let mut whole = Tensor::from_slice(&[3, 2], &[0f32, 1., 2., 3., 4., 5.]).unwrap();
        let part = whole.narrow(1, 2).unwrap();
        assert_eq!(part.slice::<f32>().unwrap(), [2., 3., 4., 5.]);
        assert!(whole.slice_mut::<f32>().is_err());
        drop(part);
        whole.slice_mut::<f32>().unwrap()[0] = 9.;
        assert!(whole.slice::<i64>().is_err());
        assert!(whole.narrow(2, 2).is_err());
    }
}
