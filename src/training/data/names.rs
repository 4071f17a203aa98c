//! Many names in two blocks of memory, which are allocated fallibly: lists of files are as long as a folder or an
//! archive makes them.

use crate::error::{Error, Result};

/// Names by number.
#[derive(Debug, Default)]
pub(super) struct Names {
    bytes: Vec<u8>,
    /// Where each starts, and its length.
    spans: Vec<(usize, usize)>,
}

impl Names {
    pub(super) fn push(&mut self, name: &[u8]) -> Result<()> {
        let start = self.bytes.len();
        reserve(&mut self.bytes, name.len())?;
        self.bytes.extend_from_slice(name);
        push(&mut self.spans, (start, name.len()))
    }

    pub(super) fn len(&self) -> usize {
        self.spans.len()
    }

    /// Name `i`; empty beyond the end.
    pub(super) fn get(&self, i: usize) -> &[u8] {
        self.spans.get(i).map_or(&[], |&(start, len)| &self.bytes[start..start + len])
    }

    /// Sorts by bytes.
    pub(super) fn sort(&mut self) {
        let name = |&(start, len): &(usize, usize)| &self.bytes[start..start + len];
        self.spans.sort_unstable_by(|a, b| name(a).cmp(name(b)));
    }
}

/// Adds to a list.
///
/// # Errors
/// `OutOfMemory`.
pub(super) fn push<T>(list: &mut Vec<T>, item: T) -> Result<()> {
    reserve(list, 1)?;
    list.push(item);
    Ok(())
}

fn reserve<T>(list: &mut Vec<T>, more: usize) -> Result<()> {
    let bytes = list.len().saturating_add(more).saturating_mul(size_of::<T>());
    list.try_reserve(more).map_err(|_| Error::out_of_memory("the list of a data set", bytes))
}

/// The numbers below `count`.
///
/// # Errors
/// `OutOfMemory`; `Unsupported` from 2^32 on.
pub(super) fn numbers(count: usize) -> Result<Vec<u32>> {
    let end = u32::try_from(count)
        .map_err(|_| Error::unsupported(format!("{count} records at once"), "at most 4,294,967,295 are"))?;
    let mut list = Vec::new();
    reserve(&mut list, count)?;
    list.extend(0..end);
    Ok(list)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_back_sorted() {
        let mut names = Names::default();
        for name in ["b", "", "a/c", "a"] {
            names.push(name.as_bytes()).unwrap();
        }
        assert_eq!((names.len(), names.get(2), names.get(9)), (4, b"a/c".as_slice(), b"".as_slice()));
        names.sort();
        let sorted: Vec<&[u8]> = (0..4).map(|i| names.get(i)).collect();
        assert_eq!(sorted, [b"".as_slice(), b"a", b"a/c", b"b"]);
        assert_eq!(numbers(3).unwrap(), [0, 1, 2]);
        assert!(numbers(usize::MAX).is_err());
    }
}
