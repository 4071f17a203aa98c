//! The one error type: what was asked, what was expected, what was found, in the user's words.

use std::path::{Path, PathBuf};

/// A shorthand for results of this library.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong, grouped as the C ABI's status codes group it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An argument of a call is out of range, of the wrong shape, or missing.
    #[error("{name}: expected {expected}, found {found}")]
    InvalidArgument {
        /// The parameter or option, as the caller spelt it.
        name: String,
        /// What would have been accepted.
        expected: String,
        /// What was given.
        found: String,
    },
    /// A file could not be opened, read, mapped or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// A file was read but does not hold what it should.
    #[error("{place}: expected {expected}, found {found}")]
    Format {
        /// The file, and within it the tensor or field.
        place: String,
        /// What the model or the file format asks for.
        expected: String,
        /// What the file holds.
        found: String,
    },
    /// A valid request that this build, device or model cannot serve.
    #[error("{what} is not supported: {reason}")]
    Unsupported {
        /// The request.
        what: String,
        /// Why not, and what would be.
        reason: String,
    },
    /// Memory ran out. The handle that was used stays usable.
    #[error("out of memory: {bytes} bytes for {what}")]
    OutOfMemory {
        /// What the memory was for.
        what: String,
        /// How much was asked for.
        bytes: usize,
    },
    /// The compute device failed.
    #[error("device {device}: {reason}")]
    Device {
        /// The device as [`crate::ModelOptions`] names it.
        device: String,
        /// What failed.
        reason: String,
    },
    /// The work was cancelled by its token.
    #[error("cancelled")]
    Cancelled,
    /// An exclusive handle is in use by another thread.
    #[error("{what} is in use by another call")]
    Busy {
        /// The handle.
        what: String,
    },
    /// A defect of this library.
    #[error("internal error in {place}: {reason}")]
    Internal {
        /// Where it was noticed.
        place: String,
        /// What was noticed.
        reason: String,
    },
}

impl Error {
    /// An argument that cannot be accepted.
    pub fn argument(
        name: impl Into<String>,
        expected: impl Into<String>,
        found: impl std::fmt::Display,
    ) -> Self {
        Error::InvalidArgument { name: name.into(), expected: expected.into(), found: found.to_string() }
    }

    /// File content that cannot be accepted.
    pub fn format(
        place: impl Into<String>,
        expected: impl Into<String>,
        found: impl std::fmt::Display,
    ) -> Self {
        Error::Format { place: place.into(), expected: expected.into(), found: found.to_string() }
    }

    /// A failed file operation.
    pub fn io(path: impl AsRef<Path>, source: std::io::Error) -> Self {
        Error::Io { path: path.as_ref().to_path_buf(), source }
    }

    /// A request that cannot be served.
    pub fn unsupported(what: impl Into<String>, reason: impl Into<String>) -> Self {
        Error::Unsupported { what: what.into(), reason: reason.into() }
    }

    /// An allocation that failed.
    pub fn out_of_memory(what: impl Into<String>, bytes: usize) -> Self {
        Error::OutOfMemory { what: what.into(), bytes }
    }

    /// A device that failed.
    pub fn device(device: impl Into<String>, reason: impl Into<String>) -> Self {
        Error::Device { device: device.into(), reason: reason.into() }
    }

    /// A broken invariant.
    pub fn internal(place: impl Into<String>, reason: impl Into<String>) -> Self {
        Error::Internal { place: place.into(), reason: reason.into() }
    }

    /// The same error once more, for a result that several callers ask for.
    pub(crate) fn duplicate(&self) -> Self {
        use Error::*;
        match self {
            InvalidArgument { name, expected, found } => {
                InvalidArgument { name: name.clone(), expected: expected.clone(), found: found.clone() }
            }
            Io { path, source } => {
                Io { path: path.clone(), source: std::io::Error::new(source.kind(), source.to_string()) }
            }
            Format { place, expected, found } => {
                Format { place: place.clone(), expected: expected.clone(), found: found.clone() }
            }
            Unsupported { what, reason } => Unsupported { what: what.clone(), reason: reason.clone() },
            OutOfMemory { what, bytes } => OutOfMemory { what: what.clone(), bytes: *bytes },
            Device { device, reason } => Device { device: device.clone(), reason: reason.clone() },
            Cancelled => Cancelled,
            Busy { what } => Busy { what: what.clone() },
            Internal { place, reason } => Internal { place: place.clone(), reason: reason.clone() },
        }
    }
}
