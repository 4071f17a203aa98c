//! Data sets for tests of the loader: folders and shards of pictures whose colours say which they are.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used)]

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use image::codecs::jpeg::JpegEncoder;
use image::codecs::png::PngEncoder;
use image::codecs::webp::WebPEncoder;
use image::{ExtendedColorType, ImageEncoder};
use wuerstchen::training::data::{Batch, Crop, DataOptions, Loader, Passes, Shuffle, Skip, Skipped};
use wuerstchen::{Error, Result};

/// A folder that is removed at the end of a test.
pub struct Folder(pub PathBuf);

impl Folder {
    pub fn new() -> Self {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("wst-data-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }

    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.0.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, content).unwrap();
        path
    }

    /// `count` pictures with captions.
    pub fn pictures(count: u8) -> Self {
        let folder = Self::new();
        for i in 0..count {
            folder.write(&format!("{i:03}.png"), png(i));
            folder.write(&format!("{i:03}.txt"), format!("picture {i}\n"));
        }
        folder
    }

    /// Shards `0.tar`, `1.tar`, … with pictures of consecutive numbers.
    pub fn shards(counts: &[u8]) -> Self {
        let folder = Self::new();
        let mut number = 0;
        for (i, &count) in counts.iter().enumerate() {
            let mut shard = Tar::new();
            for _ in 0..count {
                shard.record(number);
                number += 1;
            }
            folder.write(&format!("{i}.tar"), shard.end());
        }
        folder
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        drop(std::fs::remove_dir_all(&self.0));
    }
}

/// An archive that is being written.
pub struct Tar(pub tar::Builder<Vec<u8>>);

impl Tar {
    pub fn new() -> Self {
        Tar(tar::Builder::new(Vec::new()))
    }

    pub fn add(&mut self, name: &str, content: impl AsRef<[u8]>) -> &mut Self {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.as_ref().len() as u64);
        header.set_mode(0o644);
        self.0.append_data(&mut header, name, content.as_ref()).unwrap();
        self
    }

    pub fn record(&mut self, number: u8) -> &mut Self {
        self.add(&format!("{number:04}.png"), png(number))
            .add(&format!("{number:04}.txt"), format!("picture {number}"))
    }

    pub fn end(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }

    /// Up to here, without the mark of the end.
    pub fn cut(self) -> Vec<u8> {
        let bytes = self.end();
        bytes[..bytes.len() - 1024].to_vec()
    }
}

/// A picture whose colours say which it is, wider than high; its columns differ a little.
pub fn pixels(number: u8) -> Vec<u8> {
    (0..20 * 12).flat_map(|i| [number, 255 - number, (i % 20) as u8 * 8]).collect()
}

pub fn png(number: u8) -> Vec<u8> {
    let mut bytes = Vec::new();
    PngEncoder::new(&mut bytes).write_image(&pixels(number), 20, 12, ExtendedColorType::Rgb8).unwrap();
    bytes
}

pub fn jpeg(number: u8) -> Vec<u8> {
    let mut bytes = Vec::new();
    let encoder = JpegEncoder::new_with_quality(&mut bytes, 95);
    encoder.write_image(&pixels(number), 20, 12, ExtendedColorType::Rgb8).unwrap();
    bytes
}

pub fn webp(number: u8) -> Vec<u8> {
    let mut bytes = Vec::new();
    let encoder = WebPEncoder::new_lossless(&mut bytes);
    encoder.write_image(&pixels(number), 20, 12, ExtendedColorType::Rgb8).unwrap();
    bytes
}

/// One pass in order, small squares, batches of 4.
pub fn plain(path: impl AsRef<Path>) -> DataOptions {
    let mut options = DataOptions::new(path.as_ref());
    options.set_side(8).unwrap();
    options.set_batch_size(4).unwrap();
    options.set_shuffle(Shuffle::Off);
    options.set_crop(Crop::Centre);
    options.set_passes(Passes::One);
    options
}

pub fn shuffled(path: impl AsRef<Path>, seed: u64) -> DataOptions {
    let mut options = plain(path);
    options.set_shuffle(Shuffle::On);
    options.set_seed(seed);
    options.set_crop(Crop::Random);
    options.set_flip(0.5).unwrap();
    options
}

pub fn batches(options: &DataOptions, count: usize) -> Vec<Batch> {
    take(&mut Loader::new(options).unwrap(), count)
}

/// At most `count` batches.
pub fn take(loader: &mut Loader, count: usize) -> Vec<Batch> {
    std::iter::from_fn(|| loader.next_batch().unwrap()).take(count).collect()
}

/// The numbers of all pictures of one pass, by caption; the pictures agree.
pub fn numbers(options: &DataOptions) -> Vec<u8> {
    numbers_of(&batches(options, usize::MAX))
}

pub fn numbers_of(batches: &[Batch]) -> Vec<u8> {
    let mut numbers = Vec::new();
    for batch in batches {
        assert!(batch.images.len() == batch.captions.len() && batch.images.len() == batch.keys.len());
        for (image, caption) in batch.images.iter().zip(&batch.captions) {
            let number: u8 = caption.strip_prefix("picture ").unwrap().parse().unwrap();
            assert_eq!(image.width(), image.height());
            assert!(image.data()[0].abs_diff(number) <= 2 && image.data()[1].abs_diff(255 - number) <= 2);
            numbers.push(number);
        }
    }
    numbers
}

/// Everything of some batches, to compare them to the bit.
pub fn content(batches: &[Batch]) -> Vec<(String, String, Vec<u8>)> {
    let of = |batch: &Batch| {
        let parts = batch.keys.iter().zip(&batch.captions).zip(&batch.images);
        parts
            .map(|((key, caption), image)| (key.clone(), caption.clone(), image.data().to_vec()))
            .collect::<Vec<_>>()
    };
    batches.iter().flat_map(of).collect()
}

/// All pictures of one pass, what was skipped, and what the log heard.
pub fn with_log(mut options: DataOptions) -> (Vec<String>, Skipped, Vec<Skip>) {
    let heard = Arc::new(Mutex::new(Vec::new()));
    let ear = heard.clone();
    options.set_log(Some(Arc::new(move |skip: &Skip| ear.lock().unwrap().push(skip.clone()))));
    let mut loader = Loader::new(&options).unwrap();
    let keys = take(&mut loader, usize::MAX).into_iter().flat_map(|batch| batch.keys).collect();
    let heard = std::mem::take(&mut *heard.lock().unwrap());
    (keys, loader.skipped(), heard)
}

pub fn error(result: Result<Loader>) -> Error {
    result.err().expect("an error")
}
