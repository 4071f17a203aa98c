//! Pictures in memory: RGB, 8 bits per channel, rows top to bottom.

use std::sync::Arc;

use crate::device::Buffer;
use crate::error::{Error, Result};

/// The largest side of a picture that the library reads or makes, in pixels.
pub const MAX_SIDE_PX: u32 = 16_384;

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
        let mut pixels = Buffer::new("a picture", width as usize * height as usize * 3)?;
        fill(pixels.bytes_mut());
        Ok(Image { width, height, pixels: Arc::new(pixels) })
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
