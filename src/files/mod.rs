//! Whole files in memory: capped in size, allocated fallibly, parsed where a panic or a deep stack hurts nobody.

mod replace;

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use crate::device::{Buffer, threads};
use crate::error::{Error, Result};
pub(crate) use replace::{replace_file, replace_folder, whole_folder};

/// Opens a regular file and gives its size in bytes. A pipe or a device is refused instead of waited for.
///
/// # Errors
/// `Io`.
pub(crate) fn open(path: &Path) -> Result<(File, usize)> {
    let file = std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(|source| Error::io(path, source))?;
    let metadata = file.metadata().map_err(|source| Error::io(path, source))?;
    if !metadata.is_file() {
        let found = if metadata.is_dir() { "a folder" } else { "a pipe or device" };
        let reason = format!("expected a file, found {found}");
        return Err(Error::io(path, std::io::Error::new(std::io::ErrorKind::InvalidInput, reason)));
    }
    let size = usize::try_from(metadata.len())
        .map_err(|_| Error::format(path.display().to_string(), "a file that fits memory", metadata.len()))?;
    Ok((file, size))
}

/// The content of a file of at most `max_bytes` bytes.
///
/// # Errors
/// `Io`; `Format` if the file is larger; `OutOfMemory`.
pub(crate) fn read(path: &Path, max_bytes: usize) -> Result<Buffer> {
    let (mut file, size) = open(path)?;
    if size > max_bytes {
        let expected = format!("a file of at most {max_bytes} bytes");
        return Err(Error::format(path.display().to_string(), expected, format!("{size} bytes")));
    }
    let mut content = Buffer::new(&path.display().to_string(), size)?;
    file.read_exact(content.bytes_mut()).map_err(|source| Error::io(path, source))?;
    Ok(content)
}

/// The content of a text file.
///
/// # Errors
/// `Format` if it is not UTF-8.
pub(crate) fn text<'a>(path: &Path, content: &'a Buffer) -> Result<&'a str> {
    std::str::from_utf8(content.bytes()).map_err(|error| {
        let found = format!("a byte that is not, at {}", error.valid_up_to());
        Error::format(path.display().to_string(), "UTF-8 text", found)
    })
}

/// The size of a file in bytes; nothing if there is none.
pub(crate) fn size(path: &Path) -> usize {
    std::fs::metadata(path).map_or(0, |metadata| usize::try_from(metadata.len()).unwrap_or(usize::MAX))
}

/// Runs a parser that is not ours on a thread of its own, under a reserve of `bytes` bytes. A panic in it means that
/// the file is not what it should be.
///
/// # Errors
/// What `work` returns; `Format` if it panicked; `OutOfMemory`.
pub(crate) fn guarded<T: Send>(
    path: &Path,
    expected: &str,
    bytes: usize,
    work: impl FnOnce() -> Result<T> + Send,
) -> Result<T> {
    let place = path.display().to_string();
    threads::run_apart_with_reserve(&place, bytes, work).map_err(|error| match error {
        Error::Internal { reason, .. } => {
            let found = format!("content that its parser cannot take ({reason})");
            Error::format(place, expected, found)
        }
        error => error,
    })
}
