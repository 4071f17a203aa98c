//! WebDataset shards: which records a tar archive holds, and where. Only headers are read to know that; pictures are
//! read by their place, each when its turn comes.

use std::cell::Cell;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::names::{Names, push};
use super::record::{Part, is_picture};
use crate::device::Buffer;
use crate::error::{Error, Result};
use crate::files;

/// What may be read before a member's own content: its header, and extended ones with long names.
const HEADERS_MAX_BYTES: u64 = 1 << 20;

/// The longest key of a record. Members with longer names are passed over.
const KEY_MAX_BYTES: usize = 4096;

/// What is read at a time: the small members beside a picture come with its header.
const READ_BYTES: usize = 16 << 10;

/// What the parser may hold besides our lists: copies of extended headers.
const PARSER_BYTES: usize = 8 << 20;

/// A tar archive.
#[derive(Debug)]
pub(super) struct Shard {
    pub(super) path: PathBuf,
    pub(super) bytes: u64,
}

/// Where something lies in an archive.
#[derive(Debug, Clone, Copy)]
struct Extent {
    offset: u64,
    len: u64,
}

/// The parts of a record.
#[derive(Debug, Clone, Copy)]
struct Parts {
    picture: Extent,
    caption: Option<Extent>,
    metadata: Option<Extent>,
}

/// The records of an archive.
#[derive(Debug)]
pub(super) struct Index {
    path: PathBuf,
    keys: Names,
    parts: Vec<Parts>,
    /// What ended the reading before the end of the archive.
    pub(super) damage: Option<String>,
}

impl Shard {
    /// Looks at an archive without reading it.
    ///
    /// # Errors
    /// `Io`.
    pub(super) fn open(path: PathBuf) -> Result<Self> {
        let (_, bytes) = files::open(&path)?;
        Ok(Shard { path, bytes: bytes as u64 })
    }

    /// Its name without its folder.
    pub(super) fn name(&self) -> String {
        self.path.file_name().unwrap_or_default().display().to_string()
    }

    /// Reads the headers of the archive. One that is damaged has the records before the damage.
    ///
    /// # Errors
    /// `Io`; `OutOfMemory`.
    pub(super) fn index(&self) -> Result<Index> {
        let scanned = files::guarded(&self.path, "a tar archive", PARSER_BYTES, || scan(&self.path));
        scanned.or_else(|error| match error {
            // The parser panicked.
            error @ Error::Format { .. } => {
                Ok(Index { damage: Some(error.to_string()), ..Index::of(&self.path) })
            }
            error => Err(error),
        })
    }
}

impl Index {
    fn of(path: &Path) -> Self {
        Index { path: path.to_owned(), keys: Names::default(), parts: Vec::new(), damage: None }
    }

    pub(super) fn len(&self) -> usize {
        self.parts.len()
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The name of record `i`, with that of the archive.
    pub(super) fn key(&self, i: usize) -> String {
        let shard = self.path.file_name().unwrap_or_default().display();
        format!("{shard}/{}", String::from_utf8_lossy(self.keys.get(i)))
    }

    /// A part of record `i`; nothing if there is none.
    ///
    /// # Errors
    /// `Io`; `Format` if it is too large; `OutOfMemory`.
    pub(super) fn part(&self, i: usize, part: Part) -> Result<Option<Buffer>> {
        let extent = self.parts.get(i).and_then(|parts| match part {
            Part::Picture => Some(parts.picture),
            Part::Caption => parts.caption,
            Part::Metadata => parts.metadata,
        });
        let Some(extent) = extent else { return Ok(None) };
        let len = usize::try_from(extent.len).unwrap_or(usize::MAX);
        if len > part.max_bytes() {
            let expected = format!("a {} of at most {} bytes", part.name(), part.max_bytes());
            return Err(Error::format(self.key(i), expected, format!("{len} bytes")));
        }
        // Opened for each part: a buffer may span more archives than a process may hold open.
        let (file, _) = files::open(&self.path)?;
        let mut content = Buffer::new("a record", len)?;
        file.read_exact_at(content.bytes_mut(), extent.offset)
            .map_err(|source| Error::io(&self.path, source))?;
        Ok(Some(content))
    }

    fn close(&mut self, record: &mut Open) -> Result<()> {
        let Open { key, picture, caption, metadata } = std::mem::take(record);
        // Members without a picture are files about the archive, such as a list of its sizes.
        let Some(picture) = picture else { return Ok(()) };
        self.keys.push(&key)?;
        push(&mut self.parts, Parts { picture, caption, metadata })
    }
}

/// The record whose members are being read.
#[derive(Debug, Default)]
struct Open {
    key: Vec<u8>,
    picture: Option<Extent>,
    caption: Option<Extent>,
    metadata: Option<Extent>,
}

/// Reads all headers.
fn scan(path: &Path) -> Result<Index> {
    let (file, bytes) = files::open(path)?;
    let (budget, ran_out) = (Cell::new(0), Cell::new(false));
    let file = BufReader::with_capacity(READ_BYTES, file);
    let headers = Headers { file, at: 0, size: bytes as u64, budget: &budget, ran_out: &ran_out };
    let mut archive = tar::Archive::new(headers);
    let mut index = Index::of(path);
    let mut open = Open::default();
    let mut entries = archive.entries_with_seek().map_err(|source| Error::io(path, source))?;
    loop {
        budget.set(HEADERS_MAX_BYTES);
        let entry = match entries.next() {
            None => {
                // Two blocks of zeros end an archive. Without them it was cut off between two members.
                if ran_out.get() {
                    index.damage = Some("it has no end".into());
                }
                break;
            }
            Some(Ok(entry)) => entry,
            // The system's own errors say nothing about the archive.
            Some(Err(source)) if source.raw_os_error().is_some() => return Err(Error::io(path, source)),
            Some(Err(error)) => {
                index.damage = Some(format!("after {} records: {error}", index.len()));
                // Its remaining members are lost; without a caption there is nothing to say about it.
                if open.caption.is_none() {
                    open = Open::default();
                }
                break;
            }
        };
        let extent = Extent { offset: entry.raw_file_position(), len: entry.size() };
        let inside = extent.offset.checked_add(extent.len).is_some_and(|end| end <= bytes as u64);
        let name = entry.path_bytes();
        let Some((key, kind)) = split(&name) else { continue };
        if !entry.header().entry_type().is_file() || key.len() > KEY_MAX_BYTES || !inside {
            continue;
        }
        if open.key != key {
            index.close(&mut open)?;
            open.key = key.to_vec();
        }
        let part = match kind {
            kind if is_picture(kind) => &mut open.picture,
            kind if kind.eq_ignore_ascii_case(b"txt") => &mut open.caption,
            kind if kind.eq_ignore_ascii_case(b"json") => &mut open.metadata,
            _ => continue,
        };
        part.get_or_insert(extent);
    }
    index.close(&mut open)?;
    Ok(index)
}

/// The key and the kind of a member: its name up to the first dot of its last part, and what follows the dot. Names
/// without a dot, or with one at their start, have none.
fn split(name: &[u8]) -> Option<(&[u8], &[u8])> {
    let base = name.iter().rposition(|&byte| byte == b'/').map_or(0, |slash| slash + 1);
    let dot = base + name[base..].iter().position(|&byte| byte == b'.')?;
    (dot > base).then(|| (&name[..dot], &name[dot + 1..]))
}

/// An archive whose members are passed over. What the parser reads is limited for each member, since it keeps the
/// extended headers that an archive claims to have; a member that ends behind the file is an error at once.
struct Headers<'a> {
    file: BufReader<File>,
    at: u64,
    size: u64,
    budget: &'a Cell<u64>,
    /// Whether the parser asked for more than there is.
    ran_out: &'a Cell<bool>,
}

impl Read for Headers<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read(into)?;
        self.ran_out.set(read == 0 && !into.is_empty());
        self.at += read as u64;
        let left = self.budget.get().checked_sub(read as u64);
        self.budget.set(left.ok_or_else(|| io::Error::other("extended headers of more than 1 MiB"))?);
        Ok(read)
    }
}

impl Seek for Headers<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let SeekFrom::Current(by) = to else { return Err(io::ErrorKind::Unsupported.into()) };
        let at = self.at.checked_add_signed(by).filter(|&at| at <= self.size);
        self.at = at.ok_or_else(|| io::Error::other("a member that ends behind the end of the file"))?;
        // Within what was read ahead this reads nothing again.
        self.file.seek_relative(by)?;
        Ok(self.at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_are_split_at_the_first_dot_of_their_last_part() {
        let split = |name: &'static str| {
            split(name.as_bytes()).map(|(a, b)| [a, b].map(|part| std::str::from_utf8(part).unwrap()))
        };
        assert_eq!(split("0001.jpg"), Some(["0001", "jpg"]));
        assert_eq!(split("a.b/c.seg.png"), Some(["a.b/c", "seg.png"]));
        assert_eq!(split("./x.txt"), Some(["./x", "txt"]));
        assert_eq!(split("x."), Some(["x", ""]));
        for none in ["", "x", "a.b/c", ".jpg", "a/._c.jpg", "a.b/"] {
            assert_eq!(split(none), None, "{none}");
        }
    }
}
