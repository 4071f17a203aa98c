//! A folder of pictures, each with its caption beside it or in a list of captions.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::io::ErrorKind;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;

use super::filter::from_json;
use super::names::{Names, push};
use super::record::{Part, is_picture};
use crate::device::Buffer;
use crate::error::{Error, Result};
use crate::files;

/// Names of lists of captions, the first that is there counts.
const LISTS: [&str; 2] = ["captions.jsonl", "metadata.jsonl"];

/// The largest list of captions.
const LIST_MAX_BYTES: usize = 4 << 30;

/// The pictures of a folder.
#[derive(Debug)]
pub(super) struct Folder {
    root: PathBuf,
    listing: Listing,
}

#[derive(Debug)]
enum Listing {
    /// Paths within the folder, sorted.
    Files(Names),
    /// The text of a list, and where its lines lie.
    Lines { path: PathBuf, text: Buffer, lines: Vec<(usize, usize)> },
}

/// One line of a list.
#[derive(Debug, Deserialize)]
struct Line {
    file_name: String,
    text: Option<String>,
}

impl Folder {
    /// Lists the folder.
    ///
    /// # Errors
    /// `Io`; `OutOfMemory`.
    pub(super) fn open(root: &Path) -> Result<Self> {
        let list = LISTS.map(|name| root.join(name)).into_iter().find(|path| path.exists());
        let listing = match list {
            Some(path) => read_list(path)?,
            None => Listing::Files(pictures_below(root)?),
        };
        Ok(Folder { root: root.to_owned(), listing })
    }

    /// Whether a list of captions lies in the folder.
    pub(super) fn has_list(root: &Path) -> bool {
        LISTS.iter().any(|name| root.join(name).exists())
    }

    pub(super) fn len(&self) -> usize {
        match &self.listing {
            Listing::Files(names) => names.len(),
            Listing::Lines { lines, .. } => lines.len(),
        }
    }

    /// What tells this list of records from another, wherever the folder lies.
    pub(super) fn identify(&self, hear: &mut dyn FnMut(&[u8])) {
        match &self.listing {
            Listing::Files(names) => (0..names.len()).for_each(|i| hear(names.get(i))),
            Listing::Lines { text, .. } => hear(text.bytes()),
        }
    }

    /// The name of record `i`.
    pub(super) fn key(&self, i: usize) -> String {
        match &self.listing {
            Listing::Files(names) => String::from_utf8_lossy(names.get(i)).into_owned(),
            Listing::Lines { path, .. } => match self.line(i) {
                Ok(line) => line.file_name,
                Err(_) => format!("{}:{}", path.file_name().unwrap_or_default().display(), i + 1),
            },
        }
    }

    /// The file of record `i`.
    ///
    /// # Errors
    /// `Format` for a line that names none in this folder.
    pub(super) fn path(&self, i: usize) -> Result<PathBuf> {
        match &self.listing {
            Listing::Files(names) => Ok(self.root.join(OsStr::from_bytes(names.get(i)))),
            Listing::Lines { .. } => {
                let line = self.line(i)?;
                let inside = |part| matches!(part, Component::Normal(_) | Component::CurDir);
                if line.file_name.is_empty() || !Path::new(&line.file_name).components().all(inside) {
                    let found = format!("file_name {:?}", line.file_name);
                    return Err(Error::format(self.place(i), "a file of this folder", found));
                }
                Ok(self.root.join(line.file_name))
            }
        }
    }

    /// A part of record `i`; nothing if there is none.
    ///
    /// # Errors
    /// `Io`; `Format` if it is too large, or the line cannot be read; `OutOfMemory`.
    pub(super) fn part(&self, i: usize, part: Part) -> Result<Option<Buffer>> {
        let path = match (&self.listing, part) {
            (Listing::Lines { .. }, Part::Metadata) => return copied(self.line_bytes(i)).map(Some),
            (Listing::Lines { .. }, Part::Caption) => {
                return self.line(i)?.text.map(|text| copied(text.as_bytes())).transpose();
            }
            (_, Part::Picture) => return files::read(&self.path(i)?, part.max_bytes()).map(Some),
            (_, Part::Caption) => self.path(i)?.with_extension("txt"),
            (_, Part::Metadata) => self.path(i)?.with_extension("json"),
        };
        match files::read(&path, part.max_bytes()) {
            Err(Error::Io { source, .. }) if source.kind() == ErrorKind::NotFound => Ok(None),
            read => read.map(Some),
        }
    }

    fn line_bytes(&self, i: usize) -> &[u8] {
        match &self.listing {
            Listing::Lines { text, lines, .. } => {
                lines.get(i).map_or(&[], |&(start, end)| &text.bytes()[start..end])
            }
            Listing::Files(_) => &[],
        }
    }

    fn line(&self, i: usize) -> Result<Line> {
        const EXPECTED: &str = "an object with file_name and text";
        let bytes = self.line_bytes(i);
        if bytes.len() > Part::Metadata.max_bytes() {
            return Err(Error::format(self.place(i), EXPECTED, format!("{} bytes", bytes.len())));
        }
        from_json(bytes).map_err(|error| Error::format(self.place(i), EXPECTED, error))
    }

    /// The file and the record's number in it, for errors.
    fn place(&self, i: usize) -> String {
        let path = match &self.listing {
            Listing::Lines { path, .. } => path,
            Listing::Files(_) => &self.root,
        };
        format!("{}, record {}", path.display(), i + 1)
    }
}

fn copied(bytes: &[u8]) -> Result<Buffer> {
    let mut buffer = Buffer::new("a record", bytes.len())?;
    buffer.bytes_mut().copy_from_slice(bytes);
    Ok(buffer)
}

/// Finds the lines of a list that hold anything.
fn read_list(path: PathBuf) -> Result<Listing> {
    let text = files::read(&path, LIST_MAX_BYTES)?;
    let bytes = text.bytes();
    let mut lines = Vec::new();
    // A mark of the byte order, which some editors write.
    let mut start = if bytes.starts_with(b"\xEF\xBB\xBF") { 3 } else { 0 };
    for line in bytes[start..].split(|&byte| byte == b'\n') {
        let end = start + line.len();
        if !line.trim_ascii().is_empty() {
            push(&mut lines, (start, end))?;
        }
        start = end + 1;
    }
    Ok(Listing::Lines { path, text, lines })
}

/// The paths of all pictures below a folder, sorted by bytes. A folder that links lead to a second time counts once.
fn pictures_below(root: &Path) -> Result<Names> {
    let mut pictures = Names::default();
    let mut seen = HashSet::new();
    let mut open = vec![PathBuf::new()];
    while let Some(folder) = open.pop() {
        let path = root.join(&folder);
        let metadata = std::fs::metadata(&path).map_err(|source| Error::io(&path, source))?;
        if !seen.insert((metadata.dev(), metadata.ino())) {
            continue;
        }
        let mut below = Vec::new();
        for entry in std::fs::read_dir(&path).map_err(|source| Error::io(&path, source))? {
            let entry = entry.map_err(|source| Error::io(&path, source))?;
            let name = entry.file_name();
            if name.as_bytes().starts_with(b".") {
                continue;
            }
            if is_folder(&entry) {
                below.push(folder.join(&name));
            } else if is_picture(Path::new(&name).extension().unwrap_or_default().as_bytes()) {
                pictures.push(folder.join(&name).as_os_str().as_bytes())?;
            }
        }
        // The last is next: of two ways to one folder always the same counts.
        below.sort_unstable_by(|a, b| b.cmp(a));
        open.append(&mut below);
    }
    pictures.sort();
    Ok(pictures)
}

/// Whether an entry is a folder or a link to one. What cannot be looked at is a file, whose reading will say why.
fn is_folder(entry: &std::fs::DirEntry) -> bool {
    match entry.file_type() {
        Ok(kind) if kind.is_symlink() => std::fs::metadata(entry.path()).is_ok_and(|target| target.is_dir()),
        Ok(kind) => kind.is_dir(),
        Err(_) => false,
    }
}
