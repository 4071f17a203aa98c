//! One record: its parts read, judged, and made into a picture of the wanted size.

use std::path::PathBuf;
use std::sync::Arc;

use super::options::{Crop, DataOptions};
use super::shards::Index;
use super::source::Source;
use super::{Reason, Skip};
use crate::device::{Buffer, Context, reserve};
use crate::error::{Error, Result};
use crate::image::{Along, Flip, Image, Square};

/// More pixels than a photograph has. A file of a few bytes may claim more, and several are decoded at a time.
const MAX_PIXELS: u64 = 1 << 26;

/// What the parsers of a record's texts may hold.
const TEXTS_BYTES: usize = 4 << 20;

/// What is kept of the memory of earlier pictures.
const IDLE_BYTES: usize = 64 << 20;

/// A part of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    Picture,
    Caption,
    Metadata,
}

impl Part {
    /// The most that is read of it.
    pub(super) fn max_bytes(self) -> usize {
        match self {
            Part::Picture => 256 << 20,
            Part::Caption => 64 << 10,
            Part::Metadata => 1 << 20,
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Part::Picture => "picture",
            Part::Caption => "caption",
            Part::Metadata => "metadata file",
        }
    }
}

/// Whether files of this ending are pictures.
pub(super) fn is_picture(extension: &[u8]) -> bool {
    const PICTURES: [&str; 4] = ["jpg", "jpeg", "png", "webp"];
    PICTURES.iter().any(|known| extension.eq_ignore_ascii_case(known.as_bytes()))
}

/// Where a record is to be found.
#[derive(Debug, Clone)]
pub(super) enum Record {
    InFolder { folder: usize, number: usize },
    InShard { index: Arc<Index>, number: usize },
}

/// A picture ready for a batch.
#[derive(Debug)]
pub(super) struct Example {
    pub(super) key: String,
    pub(super) caption: String,
    pub(super) image: Image,
}

/// Random words of a record.
pub(super) type Draw = [u32; 4];

impl Record {
    /// Its name.
    pub(super) fn key(&self, source: &Source) -> String {
        match (self, source) {
            (Record::InShard { index, number }, _) => index.key(*number),
            (Record::InFolder { folder, number }, Source::Folders(folders)) => {
                folders.get(*folder).map(|folder| folder.key(*number)).unwrap_or_default()
            }
            _ => String::new(),
        }
    }

    /// Reads and decodes it. A record that cannot be used is a [`Skip`], not an error.
    ///
    /// # Errors
    /// `OutOfMemory`; `Internal`.
    pub(super) fn load(
        &self,
        cx: &Context,
        source: &Source,
        options: &DataOptions,
        draw: Draw,
    ) -> Result<std::result::Result<Example, Skip>> {
        let loaded = self.try_load(cx, source, options, draw);
        if cx.device().pool().idle_bytes() > IDLE_BYTES {
            cx.device().pool().trim();
        }
        let (reason, message) = match loaded {
            Ok(Ok(example)) => return Ok(Ok(example)),
            Ok(Err(refusal)) => refusal,
            Err(error @ (Error::Io { .. } | Error::Format { .. })) => (Reason::Unreadable, error.to_string()),
            Err(error) => return Err(error),
        };
        Ok(Err(Skip { key: self.key(source), reason, message }))
    }

    fn try_load(
        &self,
        cx: &Context,
        source: &Source,
        options: &DataOptions,
        draw: Draw,
    ) -> Result<std::result::Result<Example, (Reason, String)>> {
        let caption = match reserve::with("a caption", TEXTS_BYTES, || self.caption(source, options))? {
            Ok(caption) => caption,
            Err(refusal) => return Ok(Err(refusal)),
        };
        let key = self.key(source);
        let Some(content) = self.part(source, Part::Picture)? else {
            return Err(Error::format(key, "a picture", "none"));
        };
        let decoded = Image::decode(&self.place(source)?, content.bytes(), MAX_PIXELS)?;
        drop(content);
        let image = decoded.square(cx, &square(options, draw))?;
        Ok(Ok(Example { key, caption, image }))
    }

    /// The caption of a record that passes the filter.
    fn caption(
        &self,
        source: &Source,
        options: &DataOptions,
    ) -> Result<std::result::Result<String, (Reason, String)>> {
        if options.filter.is_on() {
            let metadata = self.part(source, Part::Metadata);
            let refusal = match metadata {
                Ok(metadata) => options.filter.refuses(metadata.as_ref().map(Buffer::bytes)),
                Err(error @ (Error::Io { .. } | Error::Format { .. })) => Some(error.to_string()),
                Err(error) => return Err(error),
            };
            if let Some(message) = refusal {
                return Ok(Err((Reason::Filtered, message)));
            }
        }
        let Some(content) = self.part(source, Part::Caption)? else {
            return Ok(Err((Reason::NoCaption, "it has no caption".into())));
        };
        let bytes = content.bytes().strip_prefix(b"\xEF\xBB\xBF").unwrap_or(content.bytes());
        match std::str::from_utf8(bytes) {
            Ok(caption) => Ok(Ok(caption.trim().to_owned())),
            Err(error) => {
                let message = format!("its caption is not UTF-8 at byte {}", error.valid_up_to());
                Ok(Err((Reason::Unreadable, message)))
            }
        }
    }

    fn part(&self, source: &Source, part: Part) -> Result<Option<Buffer>> {
        match (self, source) {
            (Record::InShard { index, number }, _) => index.part(*number, part),
            (Record::InFolder { folder, number }, Source::Folders(folders)) => match folders.get(*folder) {
                Some(folder) => folder.part(*number, part),
                None => Ok(None),
            },
            _ => Ok(None),
        }
    }

    /// What errors of a decoder name.
    fn place(&self, source: &Source) -> Result<PathBuf> {
        match (self, source) {
            (Record::InFolder { folder, number }, Source::Folders(folders)) if *folder < folders.len() => {
                folders[*folder].path(*number)
            }
            (Record::InShard { index, number }, _) => Ok(index.path().with_file_name(index.key(*number))),
            _ => Ok(PathBuf::new()),
        }
    }
}

/// The square that a record's random words stand for.
fn square(options: &DataOptions, draw: Draw) -> Square {
    const TWO_POW_MINUS_32: f64 = 1.0 / 4_294_967_296.0;
    let [along, flip, ..] = draw.map(|word| f64::from(word) * TWO_POW_MINUS_32);
    Square {
        side: options.side,
        along: match options.crop {
            Crop::Centre => Along::Middle,
            Crop::Random => Along::Share(along),
        },
        flip: if flip < f64::from(options.flip) { Flip::Horizontal } else { Flip::None },
    }
}
