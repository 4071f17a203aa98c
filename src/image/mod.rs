//! Pictures in memory: RGB, 8 bits per channel, rows top to bottom. Their files, and their way into the networks.

mod compose;
mod files;
mod preprocess;
mod square;

use std::sync::Arc;

pub use compose::{from_pixels, to_mask, to_pixels};
pub use preprocess::{Fit, Normalisation, preprocess, to_image};
pub use square::{Along, Flip, Square};

use crate::device::Buffer;
use crate::error::{Error, Result};

/// The largest side of a picture that the library reads or makes, in pixels.
pub const MAX_SIDE_PX: u32 = 16_384;

/// Bytes per pixel.
const RGB: usize = 3;

/// An immutable RGB picture. Clones share the pixels.
#[derive(Debug, Clone)]
pub struct Image {
    width: u32,
    height: u32,
    pixels: Arc<Buffer>,
}

impl Image {
    /// A picture filled by `fill`, which gets `height * width * 3` bytes, rows top to bottom, no padding.
    ///
    /// # Errors
    /// `InvalidArgument` for a side of 0 or above [`MAX_SIDE_PX`]; `OutOfMemory`.
    pub fn build(width: u32, height: u32, fill: impl FnOnce(&mut [u8])) -> Result<Self> {
        for (name, side) in [("width", width), ("height", height)] {
            if side == 0 || side > MAX_SIDE_PX {
                return Err(Error::argument(name, format!("1 to {MAX_SIDE_PX} pixels"), side));
            }
        }
        let mut pixels = Buffer::new("a picture", width as usize * height as usize * RGB)?;
        fill(pixels.bytes_mut());
        Ok(Image { width, height, pixels: Arc::new(pixels) })
    }

    /// A copy of `rgb`, whose rows begin every `row_stride` bytes; 0 stands for `width * 3`. The last row need
    /// not be filled up to the stride.
    ///
    /// # Errors
    /// `InvalidArgument` if a side, the stride or the amount of data is wrong; `OutOfMemory`.
    pub fn from_rgb(width: u32, height: u32, rgb: &[u8], row_stride: usize) -> Result<Self> {
        let row = width as usize * RGB;
        let stride = if row_stride == 0 { row } else { row_stride };
        if stride < row {
            return Err(Error::argument("row_stride", format!("at least {row} bytes"), row_stride));
        }
        let needed = stride.checked_mul((height as usize).saturating_sub(1)).and_then(|n| n.checked_add(row));
        if needed.is_none_or(|needed| rgb.len() < needed) {
            let expected = format!("{height} rows of {stride} bytes");
            return Err(Error::argument("rgb", expected, format!("{} bytes", rgb.len())));
        }
        Self::build(width, height, |pixels| {
            for (to, from) in pixels.chunks_exact_mut(row).zip(rgb.chunks(stride)) {
                to.copy_from_slice(&from[..row]);
            }
        })
    }

    /// Pixels per row.
    pub fn width(&self) -> u32 {
        self.width
    }

    /// Rows.
    pub fn height(&self) -> u32 {
        self.height
    }

    /// `height * width * 3` bytes: red, green, blue; rows top to bottom without padding.
    pub fn data(&self) -> &[u8] {
        self.pixels.bytes()
    }
}
