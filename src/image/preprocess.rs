//! Pictures into the image encoder, and pixels out of Stage A.

use super::{Image, RGB};
use crate::device::Context;
use crate::error::{Error, Result};
use crate::ops::resize::{Axis, Corners, Filter, over_rows, resize_axes};
use crate::tensor::{DType, Tensor};

/// How a picture is brought to the encoder's size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fit {
    /// Stretched, bicubic, clamped to 0..1: the paper's way.
    Stretch,
    /// Bilinear until the shorter side fits, then the middle of the longer: the way of the authors' `utils.py`.
    /// For square sizes only.
    Crop,
}

/// What is subtracted from each colour, and what it is then divided by.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Normalisation {
    /// Red, green, blue.
    pub mean: [f32; RGB],
    /// Red, green, blue.
    pub std: [f32; RGB],
}

/// Pictures as the image encoder takes them.
///
/// # Shapes
/// N pictures of any sizes to F32 `[N, height, width, 3]`.
///
/// # Errors
/// `InvalidArgument` if there is no picture, or for a size of 0 or one that `fit` cannot give; `OutOfMemory`;
/// `Cancelled`.
pub fn preprocess(
    cx: &Context,
    images: &[Image],
    [height, width]: [usize; 2],
    fit: Fit,
    normalisation: &Normalisation,
) -> Result<Tensor> {
    if images.is_empty() {
        return Err(Error::argument("images", "at least one", 0));
    }
    if fit == Fit::Crop && height != width {
        return Err(Error::argument("size", "a square, to crop to", format!("{height} x {width}")));
    }
    let mut batch = Tensor::new(cx, "pictures", &[images.len(), height, width, RGB], DType::F32)?;
    let out = batch.slice_mut::<f32>()?;
    let size = height * width * RGB;
    for (i, image) in images.iter().enumerate() {
        let resized = resize_image(cx, image, [height, width], fit)?;
        let resized = resized.slice::<f32>()?;
        over_rows(cx, &mut out[i * size..][..size], width * RGB, &|row, out| {
            let line = &resized[row * width * RGB..][..width * RGB];
            for (i, (out, &value)) in out.iter_mut().zip(line).enumerate() {
                let value = if fit == Fit::Stretch { value.clamp(0.0, 1.0) } else { value };
                *out = (value - normalisation.mean[i % RGB]) / normalisation.std[i % RGB];
            }
        })?;
    }
    Ok(batch)
}

/// One picture in 0..1 at the encoder's size: `[1, height, width, 3]`.
fn resize_image(cx: &Context, image: &Image, [height, width]: [usize; 2], fit: Fit) -> Result<Tensor> {
    let (w, h) = (image.width() as usize, image.height() as usize);
    let mut pixels = Tensor::new(cx, "a picture", &[1, h, w, RGB], DType::F32)?;
    over_rows(cx, pixels.slice_mut()?, w * RGB, &|row, out| {
        let line = &image.data()[row * w * RGB..][..w * RGB];
        out.iter_mut().zip(line).for_each(|(out, &byte)| *out = f32::from(byte) / 255.0);
    })?;
    let (axes, filter) = match fit {
        Fit::Stretch => ([Axis::whole(h, height), Axis::whole(w, width)], Filter::Bicubic),
        Fit::Crop => ([cropped(h, h.min(w), height), cropped(w, h.min(w), width)], Filter::Bilinear),
    };
    resize_axes(cx, &pixels, axes, filter, Corners::Edges)
}

/// The middle `size` pixels of a side that is resized so that `shorter` becomes `size`.
fn cropped(side: usize, shorter: usize, size: usize) -> Axis {
    let grid = size * side / shorter;
    // torchvision rounds halves to the even number.
    let start = ((grid - size) as f64 / 2.0).round_ties_even() as usize;
    Axis { input: side, grid, start, output: size }
}

/// A picture from `height * width * 3` numbers in 0..1, clamped and rounded as torchvision's `save_image` does:
/// `floor(x * 255 + 0.5)`. What is not a number becomes 0.
///
/// # Errors
/// `InvalidArgument` if a side or the amount of data is wrong; `OutOfMemory`.
pub fn to_image(width: u32, height: u32, pixels: &[f32]) -> Result<Image> {
    let needed = (width as usize).saturating_mul(height as usize).saturating_mul(RGB);
    if pixels.len() != needed {
        let expected = format!("{needed} numbers for {width} x {height} pixels");
        return Err(Error::argument("pixels", expected, pixels.len()));
    }
    Image::build(width, height, |bytes| {
        for (byte, &value) in bytes.iter_mut().zip(pixels) {
            *byte = (value.clamp(0.0, 1.0) * 255.0 + 0.5) as u8;
        }
    })
}
