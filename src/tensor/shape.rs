//! Shapes: up to six dimensions, held inline so that making a tensor allocates nothing for them.

use crate::error::{Error, Result};

/// The most dimensions that a tensor may have.
pub const MAX_RANK: usize = 6;

/// Dimensions, outermost first. Images are `[N, H, W, C]`, sequences `[N, T, C]`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    dims: [usize; MAX_RANK],
    rank: usize,
}

impl Shape {
    /// A shape with these dimensions.
    ///
    /// # Errors
    /// `InvalidArgument` for more than [`MAX_RANK`] dimensions or more elements than memory can address.
    pub fn new(dims: &[usize]) -> Result<Self> {
        if dims.len() > MAX_RANK {
            return Err(Error::argument("shape", format!("at most {MAX_RANK} dimensions"), dims.len()));
        }
        let elements = dims.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
        // 16 bytes is more than any element takes: byte counts cannot overflow either.
        if elements.and_then(|n| n.checked_mul(16)).is_none_or(|bytes| bytes > isize::MAX as usize) {
            return Err(Error::argument("shape", "a size that memory can address", format!("{dims:?}")));
        }
        let mut held = [1; MAX_RANK];
        held[..dims.len()].copy_from_slice(dims);
        Ok(Shape { dims: held, rank: dims.len() })
    }

    /// The dimensions.
    pub fn dims(&self) -> &[usize] {
        &self.dims[..self.rank]
    }

    /// The number of elements.
    pub fn elements(&self) -> usize {
        self.dims().iter().product()
    }

    /// The last dimension: channels. 1 for a scalar.
    pub fn channels(&self) -> usize {
        self.dims().last().copied().unwrap_or(1)
    }

    /// The number of channel vectors: the product of all dimensions but the last.
    pub fn rows(&self) -> usize {
        self.dims().split_last().map_or(1, |(_, outer)| outer.iter().product())
    }
}

impl std::fmt::Debug for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", self.dims())
    }
}

impl std::fmt::Display for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", self.dims())
    }
}
