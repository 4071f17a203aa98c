//! Pictures with several captions each, read once through the library's loader.

use std::path::Path;

use wuerstchen::Image;
use wuerstchen::training::data::{Crop, DataOptions, Loader, Passes, Shuffle};

use crate::Outcome;

/// Pictures that are decoded at a time.
const READ_AT_ONCE: usize = 64;

/// What captions may begin with, and how often one does.
const PREFIXES: [&str; 4] = ["an emoji of ", "a picture of ", "a ", "3d "];
const PREFIXED: f64 = 0.15;

/// How often the first caption is taken, where there are several.
const FIRST: f64 = 0.6;

/// A data set that fits in memory.
pub struct Dataset {
    pub images: Vec<Image>,
    /// Per picture, its captions.
    captions: Vec<Vec<String>>,
}

impl Dataset {
    pub fn read(folder: &Path, side: u32) -> Outcome<Self> {
        let mut data = Dataset { images: Vec::new(), captions: Vec::new() };
        let mut loader = open(folder, side)?;
        while let Some(batch) = loader.next_batch()? {
            data.images.extend(batch.images);
            data.captions.extend(batch.captions.iter().map(|text| lines(text)));
        }
        let skipped = loader.skipped();
        let unusable = skipped.unreadable + skipped.no_caption;
        if unusable > 0 {
            eprintln!("{unusable} pictures could not be used");
        }
        Ok(data)
    }

    /// All captions of a folder, without keeping the pictures.
    // The evaluation needs none.
    #[allow(dead_code)]
    pub fn captions_of(folder: &Path) -> Outcome<Vec<String>> {
        let mut captions = Vec::new();
        let mut loader = open(folder, 32)?;
        while let Some(batch) = loader.next_batch()? {
            captions.extend(batch.captions.iter().flat_map(|text| lines(text)));
        }
        captions.extend(PREFIXES.map(str::to_owned));
        Ok(captions)
    }

    pub fn len(&self) -> usize {
        self.images.len()
    }

    /// A caption for picture `i`, as `draw`, a number in [0, 1), decides.
    pub fn caption(&self, i: usize, draw: f64) -> String {
        let captions = &self.captions[i];
        // One draw serves three times, digit by digit.
        let (first, rest) = (draw < FIRST, (draw * 1e3).fract());
        let place = if first { 0 } else { (rest * captions.len() as f64) as usize };
        let caption = &captions[place.min(captions.len() - 1)];
        let rest = (draw * 1e6).fract();
        if rest < PREFIXED {
            let prefix = PREFIXES[(rest / PREFIXED * PREFIXES.len() as f64) as usize % PREFIXES.len()];
            return format!("{prefix}{caption}");
        }
        caption.clone()
    }
}

fn open(folder: &Path, side: u32) -> Outcome<Loader> {
    let mut options = DataOptions::new(folder);
    options.set_side(side)?;
    options.set_crop(Crop::Centre);
    options.set_shuffle(Shuffle::Off);
    options.set_passes(Passes::One);
    options.set_batch_size(READ_AT_ONCE)?;
    Ok(Loader::new(&options)?)
}

fn lines(text: &str) -> Vec<String> {
    text.lines().map(|line| line.trim().to_owned()).filter(|line| !line.is_empty()).collect()
}
