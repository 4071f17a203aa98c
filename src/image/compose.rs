//! Pictures as tensors and back, resized whole, masked, and laid over each other.

use super::{Image, RGB, to_image};
use crate::device::Context;
use crate::error::{Error, Result};
use crate::ops::resize::{Corners, Filter, resize};
use crate::tensor::{DType, Tensor};

/// Pictures of one size as they are.
///
/// # Shapes
/// N pictures -> `F32 [N, H, W, 3]` in 0..1
///
/// # Errors
/// `InvalidArgument` for no pictures or different sizes; `OutOfMemory`.
pub fn to_pixels(cx: &Context, images: &[&Image]) -> Result<Tensor> {
    let Some(first) = images.first() else {
        return Err(Error::argument("images", "at least one", 0));
    };
    let (h, w) = (first.height as usize, first.width as usize);
    let mut batch = Tensor::new(cx, "pictures", &[images.len(), h, w, RGB], DType::F32)?;
    for (out, image) in batch.slice_mut::<f32>()?.chunks_exact_mut(h * w * RGB).zip(images) {
        if (image.width, image.height) != (first.width, first.height) {
            let expected = format!("pictures of one size, {w} x {h}");
            return Err(Error::argument("images", expected, format!("{} x {}", image.width, image.height)));
        }
        out.iter_mut().zip(image.data()).for_each(|(out, &byte)| *out = f32::from(byte) / 255.0);
    }
    Ok(batch)
}

/// The only picture of a batch.
///
/// # Shapes
/// pixels `[1, H, W, 3]`, clamped to 0..1
///
/// # Errors
/// `InvalidArgument` for another shape; `OutOfMemory`.
pub fn from_pixels(pixels: &Tensor) -> Result<Image> {
    let [_, h, w, _] = pixels.dims_of("pixels")?;
    let side = |side: usize| u32::try_from(side).unwrap_or(u32::MAX);
    to_image(side(w), side(h), pixels.slice()?)
}

/// A mask at the resolution of a grid: 1 where it is white, 0 where it is black.
///
/// # Shapes
/// -> `F32 [1, height, width, 1]`
///
/// # Errors
/// `OutOfMemory`; `Cancelled`.
pub fn to_mask(cx: &Context, mask: &Image, height: usize, width: usize) -> Result<Tensor> {
    let small = resize(cx, &to_pixels(cx, &[mask])?, [height, width], Filter::Bilinear, Corners::Edges)?;
    let mut grey = Tensor::new(cx, "a mask", &[1, height, width, 1], DType::F32)?;
    for (out, rgb) in grey.slice_mut::<f32>()?.iter_mut().zip(small.slice::<f32>()?.chunks_exact(RGB)) {
        *out = (rgb.iter().sum::<f32>() / RGB as f32).clamp(0.0, 1.0);
    }
    Ok(grey)
}

impl Image {
    /// The picture at another size: bicubic, antialiased.
    ///
    /// # Errors
    /// `InvalidArgument` for a side of 0 or too large; `OutOfMemory`; `Cancelled`.
    pub fn resized(&self, cx: &Context, width: u32, height: u32) -> Result<Image> {
        if (width, height) == (self.width, self.height) {
            return Ok(self.clone());
        }
        let size = [height as usize, width as usize];
        from_pixels(&resize(cx, &to_pixels(cx, &[self])?, size, Filter::Bicubic, Corners::Edges)?)
    }

    /// This picture where `mask` is white, `below` where it is black; all of one size.
    ///
    /// # Errors
    /// `InvalidArgument` for different sizes; `OutOfMemory`.
    pub fn over(&self, below: &Image, mask: &Image) -> Result<Image> {
        for other in [below, mask] {
            if (other.width, other.height) != (self.width, self.height) {
                let expected = format!("{} x {} pixels", self.width, self.height);
                return Err(Error::argument(
                    "pictures",
                    expected,
                    format!("{} x {}", other.width, other.height),
                ));
            }
        }
        Image::build(self.width, self.height, |out| {
            let inputs = self.data().iter().zip(below.data()).zip(mask.data());
            for (out, ((above, below), mask)) in out.iter_mut().zip(inputs) {
                let [above, below, mask] = [above, below, mask].map(|v| u32::from(*v));
                // Rounded to the nearest.
                *out = ((above * mask + below * (255 - mask) + 127) / 255) as u8;
            }
        })
    }
}
