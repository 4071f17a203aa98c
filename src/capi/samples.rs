//! Pictures and captions as a trainer prepared them.

use std::sync::{PoisonError, RwLock};

use super::boundary::{Handle, Poison, boundary, get, handle_in, quietly, release};
use super::error::{wst_error, wst_status};
use super::lists::reserved;
use crate::error::{Error, Result};
use crate::training::Sample;

/// Pictures and captions as far as they stay the same from epoch to epoch: latents and tokens of frozen networks,
/// resized pixels. A list; exclusive while it is being changed.
pub struct wst_samples {
    list: RwLock<Vec<Sample>>,
    poison: Poison,
}

impl Handle for wst_samples {
    fn poison(&self) -> Option<&Poison> {
        Some(&self.poison)
    }
}

impl wst_samples {
    pub(super) fn new(list: Vec<Sample>) -> Self {
        wst_samples { list: RwLock::new(list), poison: Poison::default() }
    }

    /// Changes one sample.
    pub(super) fn change(&self, number: usize, change: impl FnOnce(&Sample) -> Result<Sample>) -> Result<()> {
        let mut list = self.list.try_write().map_err(|_| busy())?;
        let expected = format!("less than {}", list.len());
        let sample = list.get_mut(number).ok_or_else(|| Error::argument("index", expected, number))?;
        *sample = change(sample)?;
        Ok(())
    }

    /// Calls `work` with the samples of these numbers; of none, with all.
    pub(super) fn with<T>(&self, numbers: &[usize], work: impl FnOnce(&[&Sample]) -> Result<T>) -> Result<T> {
        let list = self.list.try_read().map_err(|_| busy())?;
        let all = numbers.is_empty();
        let mut chosen = reserved("samples", if all { list.len() } else { numbers.len() })?;
        if all {
            chosen.extend(list.iter());
        }
        for (i, &number) in numbers.iter().enumerate() {
            chosen.push(list.get(number).ok_or_else(|| {
                Error::argument(format!("indices[{i}]"), format!("less than {}", list.len()), number)
            })?);
        }
        work(&chosen)
    }
}

fn busy() -> Error {
    Error::Busy { what: "samples".into() }
}

/// How many samples there are; 0 for NULL.
///
/// Owner: nothing changes hands.
/// Threads: any; waits while another thread changes the list.
/// Errors: none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_samples_count(samples: *const wst_samples) -> usize {
    let count = |samples: &wst_samples| samples.list.read().unwrap_or_else(PoisonError::into_inner).len();
    // SAFETY: NULL or live samples, as the header asks.
    quietly(0, || unsafe { get(samples, 0, count) })
}

/// Adds the samples of `from` at the end of `to`. The two share them: that costs a list, no pictures.
///
/// Owner: nothing changes hands; `from` stays as it is and may be freed.
/// Threads: one at a time per `to`.
/// Errors: WST_INVALID_ARGUMENT, WST_OUT_OF_MEMORY, WST_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_samples_append(
    to: *mut wst_samples,
    from: *const wst_samples,
    error: *mut *mut wst_error,
) -> wst_status {
    // SAFETY: the pointers are NULL or as the header asks.
    unsafe {
        boundary("wst_samples_append", error, (), |call| {
            let to = call.handle("to", to)?;
            // A list may be appended to itself: the two locks are not held together.
            let added = handle_in("from", from)?.with(&[], |all| {
                let mut added = reserved("samples", all.len())?;
                added.extend(all.iter().copied().cloned());
                Ok(added)
            })?;
            let mut list = to.list.try_write().map_err(|_| busy())?;
            let bytes = added.len().saturating_mul(size_of::<Sample>());
            list.try_reserve(added.len()).map_err(|_| Error::out_of_memory("samples", bytes))?;
            list.extend(added);
            Ok(())
        })
    }
}

/// Frees samples. NULL is a no-op.
///
/// Owner: takes the samples from the caller.
/// Threads: any.
/// Errors: none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn wst_samples_free(samples: *mut wst_samples) {
    // SAFETY: NULL or live samples, as the header asks.
    unsafe { release(samples) }
}
