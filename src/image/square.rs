//! Squares of pictures, as training wants them: the shorter side made to fit, the longer one cut.

use super::{Image, RGB, to_image};
use crate::device::Context;
use crate::error::{Error, Result};
use crate::ops::resize::{Axis, Corners, Filter, over_rows, resize_axes};
use crate::tensor::{DType, Tensor};

/// Pixels that are widened to floats at a time: a photograph as a whole would take four times its bytes.
const STRIP_PIXELS: usize = 1 << 20;

/// Where along the longer side a square lies.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Along {
    /// In the middle, as torchvision's `CenterCrop`.
    Middle,
    /// At this share of all places that it can have, from 0 (left or top) to below 1.
    Share(f64),
}

/// Whether a picture is mirrored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flip {
    /// As it is.
    None,
    /// Left and right change places.
    Horizontal,
}

/// The square that is made of a picture.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Square {
    /// Its side in pixels.
    pub side: u32,
    /// Where it lies.
    pub along: Along,
    /// Whether it is mirrored.
    pub flip: Flip,
}

impl Image {
    /// A square of the picture: resized, bicubic and antialiased, so that the shorter side fits, then cut.
    ///
    /// The longer side becomes `side * longer / shorter` pixels, rounded down as torchvision's `Resize` does.
    ///
    /// # Errors
    /// `InvalidArgument` for a side of 0 or too large; `OutOfMemory`; `Cancelled`.
    pub fn square(&self, cx: &Context, square: &Square) -> Result<Image> {
        let (w, h, side) = (self.width as usize, self.height as usize, square.side as usize);
        if side == 0 || square.side > super::MAX_SIDE_PX {
            return Err(Error::argument("side", format!("1 to {} pixels", super::MAX_SIDE_PX), side));
        }
        let [vertical, horizontal] = [h, w].map(|length| cut(length, h.min(w), side, square.along));
        let mut wide = Tensor::new(cx, "a resized picture", &[1, h, side, RGB], DType::F32)?;
        let rows = (STRIP_PIXELS / w).clamp(1, h);
        let strips = wide.slice_mut::<f32>()?.chunks_mut(rows * side * RGB);
        for (out, bytes) in strips.zip(self.data().chunks(rows * w * RGB)) {
            let strip = widened(cx, bytes, w)?;
            let height = bytes.len() / (w * RGB);
            // At one size the filter is 1 at the pixel itself: the other axis stays as it is, to the bit.
            let axes = [Axis::whole(height, height), horizontal];
            let resized = resize_axes(cx, &strip, axes, Filter::Bicubic, Corners::Edges)?;
            out.copy_from_slice(resized.slice()?);
        }
        let axes = [vertical, Axis::whole(side, side)];
        let mut resized = resize_axes(cx, &wide, axes, Filter::Bicubic, Corners::Edges)?;
        if square.flip == Flip::Horizontal {
            resized.slice_mut::<f32>()?.chunks_exact_mut(side * RGB).for_each(mirror);
        }
        to_image(square.side, square.side, resized.slice()?)
    }
}

/// Rows of pixels as floats in 0..1: `[1, rows, width, 3]`.
fn widened(cx: &Context, bytes: &[u8], width: usize) -> Result<Tensor> {
    let row = width * RGB;
    let mut strip = Tensor::new(cx, "a part of a picture", &[1, bytes.len() / row, width, RGB], DType::F32)?;
    over_rows(cx, strip.slice_mut()?, row, &|i, out| {
        let line = &bytes[i * row..][..row];
        out.iter_mut().zip(line).for_each(|(out, &byte)| *out = f32::from(byte) / 255.0);
    })?;
    Ok(strip)
}

/// One side of a picture, resized so that `shorter` becomes `side`, of which `side` pixels are kept.
fn cut(length: usize, shorter: usize, side: usize, along: Along) -> Axis {
    let grid = side * length / shorter;
    let room = grid - side;
    let start = match along {
        // torchvision rounds halves to the even number.
        Along::Middle => (room as f64 / 2.0).round_ties_even() as usize,
        Along::Share(share) => ((share * (room + 1) as f64) as usize).min(room),
    };
    Axis { input: length, grid, start, output: side }
}

fn mirror(row: &mut [f32]) {
    row.reverse();
    // Now the colours stand from blue to red.
    row.as_chunks_mut::<RGB>().0.iter_mut().for_each(|pixel| pixel.reverse());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;

    fn picture(width: u32, height: u32) -> Image {
        Image::build(width, height, |bytes| {
            for (i, byte) in bytes.iter_mut().enumerate() {
                *byte = (i * 31 % 253) as u8;
            }
        })
        .unwrap()
    }

    fn part(image: &Image, left: usize, top: usize, side: usize) -> Vec<u8> {
        let row = image.width() as usize * RGB;
        (top..top + side).flat_map(|y| image.data()[y * row + left * RGB..][..side * RGB].to_vec()).collect()
    }

    /// A square is the part of the whole resized picture, to the bit, on any number of threads.
    #[test]
    fn a_square_is_a_part_of_the_resized_picture() {
        for threads in [1, 3] {
            let cx = Context::new(&Device::cpu(threads).unwrap());
            // The last is made in several strips.
            for (w, h, side) in [(40, 20, 10), (17, 31, 24), (9, 9, 9), (1, 50, 3), (1500, 900, 32)] {
                let image = picture(w, h);
                let shorter = w.min(h);
                let (grid_w, grid_h) = (side * w / shorter, side * h / shorter);
                let whole = image.resized(&cx, grid_w, grid_h).unwrap();
                let room = (grid_w.max(grid_h) - side) as usize;
                let last = 1.0 - f64::EPSILON;
                let middle = (room as f64 / 2.0).round_ties_even() as usize;
                for (along, start) in
                    [(Along::Middle, middle), (Along::Share(0.0), 0), (Along::Share(last), room)]
                {
                    let square = Square { side, along, flip: Flip::None };
                    let got = image.square(&cx, &square).unwrap();
                    let (left, top) = if w > h { (start, 0) } else { (0, start) };
                    assert_eq!(got.data(), part(&whole, left, top, side as usize), "{w} x {h} {along:?}");
                }
            }
        }
    }

    #[test]
    fn flipping_changes_left_and_right() {
        let cx = Context::new(&Device::cpu(1).unwrap());
        let image = Image::from_rgb(2, 2, &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], 0).unwrap();
        let square = Square { side: 2, along: Along::Middle, flip: Flip::Horizontal };
        assert_eq!(image.square(&cx, &square).unwrap().data(), [4, 5, 6, 1, 2, 3, 10, 11, 12, 7, 8, 9]);
        for side in [0, super::super::MAX_SIDE_PX + 1] {
            assert!(image.square(&cx, &Square { side, ..square }).is_err());
        }
    }
}
