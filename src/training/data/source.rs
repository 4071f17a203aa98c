//! What paths lead to: folders of pictures, or shards.

use std::path::{Path, PathBuf};

use super::braces;
use super::folder::Folder;
use super::shards::Shard;
use crate::error::{Error, Result};

/// All records of a data set, or the archives that hold them.
#[derive(Debug)]
pub(super) enum Source {
    Folders(Vec<Folder>),
    Shards(Vec<Shard>),
}

impl Source {
    /// Lists folders and looks at shards.
    ///
    /// # Errors
    /// `Io`, also for a shard that is not there; `InvalidArgument` for a pattern that is none, and for folders and
    /// shards together; `Format` if there is nothing to train with; `OutOfMemory`.
    pub(super) fn open(paths: &[PathBuf]) -> Result<Self> {
        let (mut folders, mut shards) = (Vec::new(), Vec::new());
        for path in paths {
            for path in expanded(path)? {
                let metadata = std::fs::metadata(&path).map_err(|source| Error::io(&path, source))?;
                let archives = if metadata.is_dir() { archives_of(&path)? } else { vec![path.clone()] };
                if archives.is_empty() {
                    folders.push(opened(&path)?);
                }
                for path in archives {
                    if !is_archive(&path) {
                        let expected = "a folder or a .tar file";
                        return Err(Error::argument("data path", expected, path.display()));
                    }
                    shards.push(Shard::open(path)?);
                }
            }
        }
        match (folders.is_empty(), shards.is_empty()) {
            (false, true) => Ok(Source::Folders(folders)),
            (true, false) => Ok(Source::Shards(shards)),
            (true, true) => Err(Error::argument("data path", "at least one", 0)),
            (false, false) => {
                let found = format!("{} folders and {} shards", folders.len(), shards.len());
                Err(Error::argument("data path", "either folders of pictures or shards", found))
            }
        }
    }

    /// A number that two data sets share only if they hold the same records, as far as names and sizes tell: FNV-1a.
    pub(super) fn fingerprint(&self) -> u64 {
        let mut hash = 0xCBF2_9CE4_8422_2325_u64;
        let mut hear = |bytes: &[u8]| {
            // Each piece ends with a byte that no name has.
            for byte in bytes.iter().chain(&[0]) {
                hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01B3);
            }
        };
        match self {
            Source::Folders(folders) => folders.iter().for_each(|folder| folder.identify(&mut hear)),
            Source::Shards(shards) => {
                for shard in shards {
                    hear(shard.name().as_bytes());
                    hear(&shard.bytes.to_le_bytes());
                }
            }
        }
        hash
    }
}

/// A folder that holds at least one record.
fn opened(path: &Path) -> Result<Folder> {
    let folder = Folder::open(path)?;
    if folder.len() == 0 {
        let expected = "pictures (.jpg, .jpeg, .png, .webp), captions.jsonl, metadata.jsonl or .tar files";
        return Err(Error::format(path.display().to_string(), expected, "none"));
    }
    Ok(folder)
}

/// The paths of a pattern; one that exists as it is written is none.
fn expanded(path: &Path) -> Result<Vec<PathBuf>> {
    match path.to_str() {
        Some(pattern) if pattern.contains(['{', '}']) && !path.exists() => {
            Ok(braces::expand(pattern)?.into_iter().map(PathBuf::from).collect())
        }
        _ => Ok(vec![path.to_owned()]),
    }
}

/// The archives at the top of a folder, by name; none if it has a list of captions.
fn archives_of(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut archives = Vec::new();
    if Folder::has_list(folder) {
        return Ok(archives);
    }
    for entry in std::fs::read_dir(folder).map_err(|source| Error::io(folder, source))? {
        let path = entry.map_err(|source| Error::io(folder, source))?.path();
        let hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        if is_archive(&path) && !hidden {
            archives.push(path);
        }
    }
    archives.sort_unstable();
    Ok(archives)
}

fn is_archive(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("tar"))
}
