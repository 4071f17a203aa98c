use super::*;
use crate::device::{Context, Device};
use crate::image::{Fit, Normalisation, preprocess, to_image};
use crate::ops::resize::{Corners, Filter, resize};
use crate::tensor::Tensor;
use crate::weights::WeightFile;

const CASE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/cases/image_preprocess.safetensors");

/// A folder that is removed at the end of a test.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("wst-image-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }

    fn file(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.0.join(name);
        std::fs::write(&path, content).unwrap();
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).unwrap();
    }
}

fn gradient(width: u32, height: u32) -> Image {
    Image::build(width, height, |bytes| {
        for (i, byte) in bytes.iter_mut().enumerate() {
            *byte = (i * 7 % 251) as u8;
        }
    })
    .unwrap()
}

fn jpeg(image: &Image) -> Vec<u8> {
    let mut bytes = Vec::new();
    image::codecs::jpeg::JpegEncoder::new_with_quality(&mut bytes, 95)
        .write_image(image.data(), image.width(), image.height(), ExtendedColorType::Rgb8)
        .unwrap();
    bytes
}

fn png(data: &[u8], colour: ExtendedColorType, width: u32, height: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    PngEncoder::new(&mut bytes).write_image(data, width, height, colour).unwrap();
    bytes
}

/// The largest difference to an NCHW reference, relative to its root mean square.
fn relative_error(got: &Tensor, want: &Tensor) -> f64 {
    let [n, h, w, c] = got.dims_of("got").unwrap();
    assert_eq!(want.dims(), [n, c, h, w]);
    let (got, want) = (got.slice::<f32>().unwrap(), want.slice::<f32>().unwrap());
    let (mut difference, mut norm) = (0f64, 0f64);
    for (i, &want) in want.iter().enumerate() {
        let (x, y, channel, image) = (i % w, i / w % h, i / (w * h) % c, i / (w * h * c));
        let got = got[((image * h + y) * w + x) * c + channel];
        difference += f64::from(got - want).powi(2);
        norm += f64::from(want).powi(2);
    }
    (difference / norm).sqrt()
}

#[test]
fn preprocessing_is_the_references() {
    let file = WeightFile::open(Path::new(CASE)).unwrap();
    let normal = Normalisation { mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225] };
    for threads in [1, 3] {
        let cx = Context::new(&Device::cpu(threads).unwrap());
        for i in 0..2 {
            let raw = file.tensor(&format!("image{i}")).unwrap();
            let [h, w, _] = raw.dims_of("raw").unwrap();
            let image = Image::from_rgb(w as u32, h as u32, raw.slice().unwrap(), 0).unwrap();
            for (fit, name) in [(Fit::Stretch, "bicubic"), (Fit::Crop, "bilinear")] {
                let got = preprocess(&cx, std::slice::from_ref(&image), [48, 48], fit, &normal).unwrap();
                let want = file.tensor(&format!("{name}{i}.out")).unwrap();
                let error = relative_error(&got, &want);
                assert!(error < 2e-5, "{name}{i}: {error:e}");
            }
            let values: Vec<f32> = raw.slice::<u8>().unwrap().iter().map(|&b| f32::from(b) / 255.0).collect();
            let input = Tensor::from_slice(&[1, h, w, 3], &values).unwrap();
            let got = resize(&cx, &input, [48, 48], Filter::Bicubic, Corners::Edges).unwrap();
            let error = relative_error(&got, &file.tensor(&format!("bicubic{i}.resized")).unwrap());
            assert!(error < 2e-5, "resized{i}: {error:e}");
        }
    }
}

#[test]
fn resizing_odd_sizes() {
    let cx = Context::new(&Device::cpu(2).unwrap());
    let input: Vec<f32> = (0..2 * 5 * 3).map(|i| i as f32).collect();
    let input = Tensor::from_slice(&[2, 5, 3, 1], &input).unwrap();
    for (filter, corners) in [(Filter::Bicubic, Corners::Edges), (Filter::Bilinear, Corners::Centres)] {
        let same = resize(&cx, &input, [5, 3], filter, corners).unwrap();
        assert_eq!(same.slice::<f32>().unwrap(), input.slice::<f32>().unwrap());
        for size in [[1, 1], [9, 1], [1, 40], [2, 2]] {
            let got = resize(&cx, &input, size, filter, corners).unwrap();
            assert_eq!(got.dims(), [2, size[0], size[1], 1]);
            assert!(got.slice::<f32>().unwrap().iter().all(|v| (-10.0..40.0).contains(v)));
        }
        assert!(resize(&cx, &input, [0, 3], filter, corners).is_err());
    }
    // A constant stays constant, and a very thin picture is cropped without making the whole of it.
    let thin = Image::build(1, 16_384, |bytes| bytes.fill(51)).unwrap();
    let plain = Normalisation { mean: [0.0; 3], std: [1.0; 3] };
    let got = preprocess(&cx, &[thin.clone(), thin], [384, 384], Fit::Crop, &plain).unwrap();
    assert!(got.slice::<f32>().unwrap().iter().all(|v| (v - 0.2).abs() < 1e-5));
    assert!(preprocess(&cx, &[], [8, 8], Fit::Crop, &plain).is_err());
    assert!(preprocess(&cx, &[gradient(4, 4)], [8, 9], Fit::Crop, &plain).is_err());
    assert!(preprocess(&cx, &[gradient(4, 4)], [0, 0], Fit::Stretch, &plain).is_err());
}

#[test]
fn pixels_are_rounded_and_clamped() {
    let values = [-1.0, 0.0, 0.5 / 255.0, 1.0, 2.0, f32::NAN];
    assert_eq!(to_image(2, 1, &values).unwrap().data(), [0, 0, 1, 255, 255, 0]);
    assert!(to_image(2, 2, &values).is_err());
    assert!(to_image(u32::MAX, u32::MAX, &values).is_err());
}

#[test]
fn rows_may_be_padded() {
    let padded = [1, 2, 3, 0, 4, 5, 6];
    assert_eq!(Image::from_rgb(1, 2, &padded, 4).unwrap().data(), [1, 2, 3, 4, 5, 6]);
    assert!(Image::from_rgb(1, 3, &padded, 4).is_err());
    assert!(Image::from_rgb(1, 2, &padded, 2).is_err());
    assert!(Image::from_rgb(1, u32::MAX, &padded, usize::MAX).is_err());
    assert!(Image::from_rgb(0, 0, &[], 0).is_err());
}

#[test]
fn files_come_back() {
    let folder = Folder::new("files");
    let image = gradient(37, 21);
    let path = folder.0.join("picture.png");
    image.write_png(&path).unwrap();
    image.write_png(&path).unwrap();
    assert_eq!(Image::read(&path).unwrap().data(), image.data());
    assert_eq!(std::fs::read_dir(&folder.0).unwrap().count(), 1, "a temporary file was left");
    let flat = Image::build(20, 30, |bytes| bytes.fill(77)).unwrap();
    let read = Image::read(folder.file("a.jpg", &jpeg(&flat))).unwrap();
    assert_eq!((read.width(), read.height()), (20, 30));
    assert!(read.data().iter().all(|&b| b.abs_diff(77) <= 1));
}

#[test]
fn every_kind_of_png_becomes_rgb() {
    let folder = Folder::new("kinds");
    let half = 0x8000u16.to_be_bytes();
    let wide = |values: &[u16]| values.iter().flat_map(|v| v.to_ne_bytes()).collect::<Vec<u8>>();
    assert_eq!(half, [0x80, 0]);
    for (colour, data, want) in [
        (ExtendedColorType::L8, vec![9], [9, 9, 9]),
        (ExtendedColorType::La8, vec![0, 0], [255, 255, 255]),
        (ExtendedColorType::La8, vec![100, 255], [100, 100, 100]),
        (ExtendedColorType::Rgba8, vec![255, 0, 0, 128], [255, 127, 127]),
        (ExtendedColorType::L16, wide(&[0xFFFF]), [255, 255, 255]),
        (ExtendedColorType::Rgb16, wide(&[0, 0x8000, 0xFFFF]), [0, 128, 255]),
        (ExtendedColorType::Rgba16, wide(&[0, 0, 0, 0x8000]), [127, 127, 127]),
    ] {
        let path = folder.file("one.png", &png(&data, colour, 1, 1));
        assert_eq!(Image::read(&path).unwrap().data(), want, "{colour:?} {data:?}");
    }
}

#[test]
fn damaged_files_are_errors() {
    let folder = Folder::new("damaged");
    let good = [png(gradient(9, 9).data(), ExtendedColorType::Rgb8, 9, 9), jpeg(&gradient(40, 40))];
    for good in &good {
        Image::read(folder.file("good", good)).unwrap();
        for len in 0..good.len() {
            let error = Image::read(folder.file("cut", &good[..len]));
            // The last bytes of a PNG carry no pixels.
            assert!(error.is_err() || len > good.len() - 13, "{len} of {} bytes", good.len());
        }
    }
    let message = Image::read(folder.file("cut.png", &good[0][..40])).unwrap_err().to_string();
    assert!(message.contains("cut.png"), "{message}");
    assert!(Image::read(&folder.0).unwrap_err().to_string().contains("folder"));
    assert!(matches!(Image::read(folder.0.join("none")), Err(Error::Io { .. })));
    let mut huge = good[0].clone();
    huge[16..24].copy_from_slice(&[0, 0, 0x40, 1, 0, 0, 0x40, 1]);
    let crc = png_crc(&huge[12..29]);
    huge[29..33].copy_from_slice(&crc.to_be_bytes());
    let message = Image::read(folder.file("huge.png", &huge)).unwrap_err().to_string();
    assert!(message.contains("16384"), "{message}");
}

fn png_crc(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| (crc >> 1) ^ (0xEDB8_8320 * (crc & 1)))
    })
}

#[test]
fn a_failed_write_leaves_nothing() {
    let folder = Folder::new("full");
    let image = gradient(64, 64);
    let error = image.write_png(folder.0.join("no/such/folder.png")).unwrap_err();
    assert!(matches!(error, Error::Io { .. }), "{error}");
    assert!(image.write_png(&folder.0).is_err());
    assert!(image.write_png("").is_err());
    let error = image.write_png("/dev/full").unwrap_err();
    assert!(matches!(error, Error::Io { .. }), "{error}");
    assert!(Path::new("/dev/full").exists());
    assert_eq!(std::fs::read_dir(&folder.0).unwrap().count(), 0);
}

/// Files that libwebp wrote: 24 x 16 pixels, red 10 x, green 15 y, blue 128; `alpha` half transparent.
const PICTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/pictures");

#[test]
fn webp_is_read() {
    for (name, alpha) in [("lossy.webp", 1.0), ("alpha.webp", 128.0 / 255.0)] {
        let image = Image::read(Path::new(PICTURES).join(name)).unwrap();
        assert_eq!((image.width(), image.height()), (24, 16), "{name}");
        let mut sum = 0.0;
        for (i, pixel) in image.data().chunks_exact(RGB).enumerate() {
            let want = [i % 24 * 10, i / 24 * 15, 128].map(|v| v as f64 * alpha + 255.0 * (1.0 - alpha));
            sum += pixel.iter().zip(want).map(|(&got, want)| (f64::from(got) - want).abs()).sum::<f64>();
        }
        assert!(sum / (24.0 * 16.0 * 3.0) < 6.0, "{name}: {sum}");
    }
    let folder = Folder::new("webp");
    let image = gradient(19, 11);
    let mut lossless = Vec::new();
    image::codecs::webp::WebPEncoder::new_lossless(&mut lossless)
        .write_image(image.data(), 19, 11, ExtendedColorType::Rgb8)
        .unwrap();
    assert_eq!(Image::read(folder.file("a.webp", &lossless)).unwrap().data(), image.data());
    let message = Image::read(Path::new(PICTURES).join("animation.webp")).unwrap_err().to_string();
    assert!(message.contains("animation"), "{message}");
    let lossy = std::fs::read(Path::new(PICTURES).join("lossy.webp")).unwrap();
    for good in [&lossless, &lossy] {
        for len in 0..good.len() {
            Image::read(folder.file("cut.webp", &good[..len])).unwrap_err();
        }
        // Damage may go unnoticed, but not end the process.
        for bit in 0..good.len() * 8 {
            let mut bytes = good.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            drop(Image::decode(Path::new("damaged"), &bytes, 1 << 20));
        }
    }
}

#[test]
fn pictures_of_too_many_pixels_are_refused_before_they_are_decoded() {
    let bytes = png(gradient(9, 8).data(), ExtendedColorType::Rgb8, 9, 8);
    assert!(Image::decode(Path::new("a"), &bytes, 72).is_ok());
    let message = Image::decode(Path::new("a"), &bytes, 71).unwrap_err().to_string();
    assert!(message.contains("at most 71 pixels, found 9 x 8"), "{message}");
}
