//! Picture files: PNG, JPEG and WebP in, PNG out.

use std::fs::{File, OpenOptions};
use std::io::{BufWriter, Cursor, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use image::codecs::jpeg::JpegDecoder;
use image::codecs::png::{PngDecoder, PngEncoder};
use image::codecs::webp::WebPDecoder;
use image::{ColorType, ExtendedColorType, ImageDecoder, ImageEncoder, ImageError, Limits};

use super::{Image, MAX_SIDE_PX, RGB};
use crate::device::{Buffer, reserve, threads};
use crate::error::{Error, Result};
use crate::files;

/// The largest picture file.
const FILE_MAX_BYTES: usize = 1 << 30;

/// What a decoder may allocate besides the pixels: tables, rows, colour profiles.
const DECODER_MAX_BYTES: u64 = 64 << 20;

/// The first bytes of a PNG file.
const PNG_MAGIC: &[u8] = b"\x89PNG\r\n\x1a\n";

/// The first bytes of a JPEG file: start of image, then a marker.
const JPEG_MAGIC: &[u8] = &[0xFF, 0xD8, 0xFF];

/// JPEG's markers of the beginning of a scan and the end of the picture.
const JPEG_SCAN: [u8; 2] = [0xFF, 0xDA];
const JPEG_END: [u8; 2] = [0xFF, 0xD9];

/// WebP's container: its name, the number of bytes after these eight, the name of the content.
const WEBP_RIFF: &[u8] = b"RIFF";
const WEBP_MAGIC: &[u8] = b"WEBP";

const EXPECTED: &str = "a whole PNG, JPEG or WebP picture";

impl Image {
    /// Reads a PNG, JPEG or WebP file. 16-bit and grey pictures are converted, transparent ones laid over white;
    /// an orientation in the file's metadata is ignored.
    ///
    /// # Errors
    /// `Io`; `Format` if it is damaged, of another format, animated, or larger than [`MAX_SIDE_PX`] on a side;
    /// `OutOfMemory`.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let content = files::read(path, FILE_MAX_BYTES)?;
        Self::decode(path, content.bytes(), u64::from(MAX_SIDE_PX).pow(2))
    }

    /// The picture that the content of a PNG, JPEG or WebP file holds, as [`Image::read`] reads it. `place` names it
    /// in errors.
    ///
    /// # Errors
    /// `Format` if it is damaged, of another format, animated, larger than [`MAX_SIDE_PX`] on a side or than
    /// `max_pixels` pixels in all; `OutOfMemory`.
    pub fn decode(place: &Path, content: &[u8], max_pixels: u64) -> Result<Self> {
        // The decoders copy the file.
        let bytes = content.len().saturating_mul(2).saturating_add(DECODER_MAX_BYTES as usize);
        files::guarded(place, EXPECTED, bytes, || decode(place, content, max_pixels))
    }

    /// Writes a PNG file. The file appears under its name only when it is complete.
    ///
    /// # Errors
    /// `Io`, and no file is left behind; `OutOfMemory`.
    pub fn write_png(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        // Pipes and devices are written to, links are followed: renaming would replace them.
        let target = match std::fs::metadata(path) {
            Ok(metadata) if !metadata.is_file() => {
                let file =
                    OpenOptions::new().write(true).open(path).map_err(|source| Error::io(path, source))?;
                return self.encode(path, file).map(drop);
            }
            Ok(_) => path.canonicalize().map_err(|source| Error::io(path, source))?,
            Err(error) if error.kind() == ErrorKind::NotFound => path.to_owned(),
            Err(error) => return Err(Error::io(path, error)),
        };
        let (temporary, file) = create_beside(&target).map_err(|source| Error::io(path, source))?;
        let written = self.encode(path, file).and_then(|file| {
            file.sync_all()
                .and_then(|()| std::fs::rename(&temporary, &target))
                .map_err(|e| Error::io(path, e))
        });
        if written.is_err() {
            // The first error is the one to report.
            drop(std::fs::remove_file(&temporary));
        }
        written
    }

    fn encode(&self, path: &Path, file: File) -> Result<File> {
        // The encoder holds filtered and compressed rows.
        let bytes = self.data().len() * 2;
        threads::run_apart_with_reserve("an encoded picture", bytes, || {
            let mut writer = BufWriter::new(file);
            PngEncoder::new(&mut writer)
                .write_image(self.data(), self.width, self.height, ExtendedColorType::Rgb8)
                .map_err(|error| match error {
                    ImageError::IoError(source) => Error::io(path, source),
                    error => Error::io(path, std::io::Error::other(error)),
                })?;
            writer.flush().map_err(|source| Error::io(path, source))?;
            writer.into_inner().map_err(|error| Error::io(path, error.into_error()))
        })
    }
}

/// A new file in the folder of `target`, under a name that nobody uses.
fn create_beside(target: &Path) -> std::io::Result<(PathBuf, File)> {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let folder = target.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if target.file_name().is_none() {
        return Err(ErrorKind::InvalidInput.into());
    }
    loop {
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let temporary = folder.join(format!(".wuerstchen-{}-{number}.png.part", std::process::id()));
        match OpenOptions::new().write(true).create_new(true).open(&temporary) {
            Ok(file) => return Ok((temporary, file)),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
}

fn decode(path: &Path, content: &[u8], max_pixels: u64) -> Result<Image> {
    let wrong = |error: ImageError| Error::format(path.display().to_string(), EXPECTED, error);
    if content.starts_with(PNG_MAGIC) {
        let mut limits = Limits::no_limits();
        limits.max_alloc = Some(DECODER_MAX_BYTES);
        let decoder = PngDecoder::with_limits(Cursor::new(content), limits).map_err(wrong)?;
        return convert(path, decoder, max_pixels);
    }
    if content.starts_with(JPEG_MAGIC) {
        check_jpeg_is_whole(path, content)?;
        return convert(path, JpegDecoder::new(Cursor::new(content)).map_err(wrong)?, max_pixels);
    }
    if content.starts_with(WEBP_RIFF) && content.get(8..12) == Some(WEBP_MAGIC) {
        check_webp_is_whole(path, content)?;
        let decoder = WebPDecoder::new(Cursor::new(content)).map_err(wrong)?;
        if decoder.has_animation() {
            return Err(Error::format(path.display().to_string(), EXPECTED, "an animation"));
        }
        return convert(path, decoder, max_pixels);
    }
    let start: Vec<u8> = content.iter().take(PNG_MAGIC.len()).copied().collect();
    Err(Error::format(path.display().to_string(), EXPECTED, format!("a file that starts with {start:02X?}")))
}

/// The decoder fills what is missing with grey; a picture that was cut off must not pass for a whole one.
fn check_jpeg_is_whole(path: &Path, content: &[u8]) -> Result<()> {
    let last = |marker: [u8; 2]| content.windows(2).rposition(|pair| pair == marker);
    if last(JPEG_END) > last(JPEG_SCAN) && last(JPEG_SCAN).is_some() {
        return Ok(());
    }
    Err(Error::format(path.display().to_string(), EXPECTED, "a JPEG picture without its end"))
}

/// A file that was cut off in its last chunk may decode to something.
fn check_webp_is_whole(path: &Path, content: &[u8]) -> Result<()> {
    let bytes = content.get(4..8).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_le_bytes);
    if content.len() - 8 >= bytes as usize {
        return Ok(());
    }
    let found = format!("{} of {} bytes", content.len(), u64::from(bytes) + 8);
    Err(Error::format(path.display().to_string(), EXPECTED, found))
}

/// Decodes to RGB.
fn convert(path: &Path, decoder: impl ImageDecoder, max_pixels: u64) -> Result<Image> {
    let place = path.display().to_string();
    let (width, height) = decoder.dimensions();
    if width == 0 || height == 0 || width > MAX_SIDE_PX || height > MAX_SIDE_PX {
        let expected = format!("a picture of 1 to {MAX_SIDE_PX} pixels on each side");
        return Err(Error::format(place, expected, format!("{width} x {height}")));
    }
    if u64::from(width) * u64::from(height) > max_pixels {
        let expected = format!("a picture of at most {max_pixels} pixels");
        return Err(Error::format(place, expected, format!("{width} x {height}")));
    }
    let colour = decoder.color_type();
    let bytes =
        usize::try_from(decoder.total_bytes()).map_err(|_| Error::out_of_memory(&place, usize::MAX))?;
    let mut raw = Buffer::new(&place, bytes)?;
    // JPEG decoders keep coefficients, four bytes each, besides the pixels; WebP's less.
    reserve::with(&place, bytes.saturating_mul(4), || {
        decoder.read_image(raw.bytes_mut()).map_err(|error| Error::format(&place, EXPECTED, error))
    })?;
    let (channels, sample) = match colour {
        ColorType::L8 => (1, 1),
        ColorType::La8 => (2, 1),
        ColorType::Rgb8 => (3, 1),
        ColorType::Rgba8 => (4, 1),
        ColorType::L16 => (1, 2),
        ColorType::La16 => (2, 2),
        ColorType::Rgb16 => (3, 2),
        ColorType::Rgba16 => (4, 2),
        other => return Err(Error::format(place, "8 or 16 bits per channel", format!("{other:?}"))),
    };
    Image::build(width, height, |pixels| {
        let raw = raw.bytes().chunks_exact(channels * sample);
        for (to, from) in pixels.as_chunks_mut::<RGB>().0.iter_mut().zip(raw) {
            *to = if sample == 1 {
                to_rgb(from.len(), |i| u32::from(from[i]), 0xFF)
            } else {
                to_rgb(
                    from.len() / 2,
                    |i| u32::from(u16::from_ne_bytes([from[2 * i], from[2 * i + 1]])),
                    0xFFFF,
                )
            };
        }
    })
}

/// One pixel of 1 to 4 channels, each up to `full`, over white.
fn to_rgb(channels: usize, sample: impl Fn(usize) -> u32, full: u32) -> [u8; RGB] {
    let colours = if channels < RGB { 1 } else { RGB };
    let alpha = if channels > colours { sample(colours) } else { full };
    std::array::from_fn(|i| {
        let colour = sample(i.min(colours - 1));
        // Both factors have up to 16 bits; rounded to the nearest of 256 levels.
        let over_white = u64::from(colour) * u64::from(alpha) + u64::from(full) * u64::from(full - alpha);
        let scale = u64::from(full) * u64::from(full);
        ((over_white * 255 + scale / 2) / scale) as u8
    })
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
