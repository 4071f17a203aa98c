//! What tests expect of errors.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used)]

use wuerstchen::{Error, Result};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Argument,
    Io,
    Format,
    Unsupported,
}

pub fn kind(error: &Error) -> Option<Kind> {
    Some(match error {
        Error::InvalidArgument { .. } => Kind::Argument,
        Error::Io { .. } => Kind::Io,
        Error::Format { .. } => Kind::Format,
        Error::Unsupported { .. } => Kind::Unsupported,
        _ => return None,
    })
}

/// # Panics
/// Unless the result is an error of this kind whose text has all `parts`.
#[track_caller]
pub fn assert_error<T>(what: &str, result: Result<T>, expected: Kind, parts: &[&str]) {
    let error = result.err().unwrap_or_else(|| panic!("{what}: no error"));
    let text = error.to_string();
    assert_eq!(kind(&error), Some(expected), "{what}: {text}");
    for part in parts {
        assert!(text.contains(part), "{what}: no {part:?} in: {text}");
    }
}
