//! Folders and files that are replaced as a whole: whoever looks, at any moment, finds the old one or the new one.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

use crate::error::{Error, Result};

/// What the folder is called while it is written, and while it waits to be removed.
const NEW: &str = "new";
const OLD: &str = "old";

/// Writes a folder with `fill`, beside where it shall be, and puts it there in one step. All is on the disk before
/// that. An error, or the end of the process at any moment, leaves the folder that was there.
///
/// # Errors
/// `Io`; those of `fill`.
pub(crate) fn replace_folder(path: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let new = beside(path, NEW)?;
    remove(&new)?;
    fs::create_dir_all(&new).map_err(|source| Error::io(&new, source))?;
    let filled = fill(&new).and_then(|()| sync_folder(&new));
    if let Err(error) = filled {
        // What is left would be removed by the next attempt; the error is what counts.
        drop(remove(&new));
        return Err(error);
    }
    put_in_place(&new, path)?;
    if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        sync(parent)?;
    }
    remove(&new)
}

/// Writes a file with `fill`, beside where it shall be, and puts it there in one step, as [`replace_folder`] does. The
/// folder that it lies in is made if there is none.
///
/// # Errors
/// `Io`; those of `fill`.
pub(crate) fn replace_file(path: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let new = beside(path, NEW)?;
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(parent).map_err(|source| Error::io(parent, source))?;
    let put = || fs::rename(&new, path).map_err(|source| Error::io(path, source));
    let placed = fill(&new).and_then(|()| sync(&new)).and_then(|()| put());
    if let Err(error) = placed {
        // What is left would be overwritten by the next attempt; the error is what counts.
        drop(fs::remove_file(&new));
        return Err(error);
    }
    sync(parent)
}

/// The folder itself or, if the system cannot exchange two folders and the process ended between two renamings, the
/// one that was there before.
pub(crate) fn whole_folder(path: &Path) -> Result<PathBuf> {
    let old = beside(path, OLD)?;
    if !path.exists() && old.exists() { Ok(old) } else { Ok(path.to_owned()) }
}

fn put_in_place(new: &Path, path: &Path) -> Result<()> {
    let failed = |errno: Errno| Error::io(path, errno.into());
    if !path.exists() {
        return fs::rename(new, path).map_err(|source| Error::io(path, source));
    }
    match renameat_with(CWD, new, CWD, path, RenameFlags::EXCHANGE) {
        Ok(()) => Ok(()),
        Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => {
            let old = beside(path, OLD)?;
            remove(&old)?;
            fs::rename(path, &old).map_err(|source| Error::io(path, source))?;
            fs::rename(new, path).map_err(|source| Error::io(path, source))?;
            remove(&old)
        }
        Err(errno) => Err(failed(errno)),
    }
}

/// `.NAME.suffix` in the same folder: on the same file system, and out of the way.
fn beside(path: &Path, suffix: &str) -> Result<PathBuf> {
    match path.file_name() {
        Some(name) => Ok(path.with_file_name(format!(".{}.{suffix}", name.to_string_lossy()))),
        None => Err(Error::argument("directory", "a path that ends in a name", path.display())),
    }
}

fn remove(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::io(folder, error)),
        _ => Ok(()),
    }
}

/// Brings a folder and all below it to the disk.
fn sync_folder(folder: &Path) -> Result<()> {
    let entries = fs::read_dir(folder).map_err(|source| Error::io(folder, source))?;
    for entry in entries {
        let path = entry.map_err(|source| Error::io(folder, source))?.path();
        if path.is_dir() { sync_folder(&path)? } else { sync(&path)? }
    }
    sync(folder)
}

fn sync(path: &Path) -> Result<()> {
    File::open(path).and_then(|file| file.sync_all()).map_err(|source| Error::io(path, source))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_attempt_leaves_the_old_file() {
        let root = std::env::temp_dir().join(format!("replace-file-{}", std::process::id()));
        let path = root.join("made/kept");
        let write = |text: &'static str| {
            move |file: &Path| fs::write(file, text).map_err(|source| Error::io(file, source))
        };
        replace_file(&path, write("first")).unwrap();
        replace_file(&path, write("second")).unwrap();
        assert!(replace_file(&path, |file| write("third")(file).and(Err(Error::Cancelled))).is_err());
        assert_eq!(fs::read_to_string(&path).unwrap(), "second");
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "nothing is left beside it");
        fs::remove_dir_all(&root).unwrap();
    }

    #[test]
    fn a_failed_attempt_leaves_the_old_folder() {
        let root = std::env::temp_dir().join(format!("replace-folder-{}", std::process::id()));
        let path = root.join("kept");
        let write = |text: &'static str| {
            move |folder: &Path| fs::write(folder.join("a"), text).map_err(|source| Error::io(folder, source))
        };
        let content = || fs::read_to_string(path.join("a")).unwrap();
        replace_folder(&path, write("first")).unwrap();
        assert_eq!(content(), "first");
        replace_folder(&path, write("second")).unwrap();
        assert_eq!(content(), "second");
        let failing = |folder: &Path| {
            write("third")(folder)?;
            Err(Error::Cancelled)
        };
        assert!(replace_folder(&path, failing).is_err());
        assert_eq!(content(), "second");
        assert_eq!(fs::read_dir(&root).unwrap().count(), 1, "nothing is left beside it");
        fs::remove_dir_all(&root).unwrap();
    }
}
