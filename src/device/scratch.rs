//! Working memory of parallel loops, taken before the loop so that running out is an error and not an abort.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::{Buffer, Device};
use crate::error::Result;

/// One buffer of floats for each task that can run at the same time.
#[derive(Debug)]
pub struct Scratch {
    free: Mutex<Vec<Buffer>>,
}

impl Scratch {
    /// Buffers of `floats` floats each for a loop of `tasks` tasks.
    ///
    /// # Errors
    /// `OutOfMemory`, naming `what`.
    pub fn new(device: &Device, what: &str, tasks: usize, floats: usize) -> Result<Self> {
        let count = tasks.min(device.threads());
        let bytes = floats.saturating_mul(size_of::<f32>());
        let free = (0..count).map(|_| device.take(what, bytes)).collect::<Result<Vec<_>>>()?;
        Ok(Scratch { free: Mutex::new(free) })
    }

    /// Lends a buffer to `task`. Content is arbitrary, but every float is initialised.
    ///
    /// # Panics
    /// If more tasks run at once than the device has threads: a defect.
    pub fn with<T>(&self, task: impl FnOnce(&mut [f32]) -> T) -> T {
        let Some(buffer) = self.lock().pop() else { unreachable!("more running tasks than threads") };
        let mut lent = Lent { scratch: self, buffer: Some(buffer) };
        task(lent.buffer.as_mut().map_or(&mut [], floats_mut))
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Buffer>> {
        // A push or a pop is one call: a panic elsewhere leaves the list whole.
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Puts the buffer back when the task ends, by a panic too.
struct Lent<'a> {
    scratch: &'a Scratch,
    buffer: Option<Buffer>,
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        if let Some(buffer) = self.buffer.take() {
            self.scratch.lock().push(buffer);
        }
    }
}

/// A buffer as floats: as many as fit.
pub fn floats_mut(buffer: &mut Buffer) -> &mut [f32] {
    let bytes = buffer.bytes_mut();
    // SAFETY: buffers are 64-byte aligned and initialised, and every bit pattern is a float.
    unsafe { std::slice::from_raw_parts_mut(bytes.as_mut_ptr().cast(), bytes.len() / size_of::<f32>()) }
}

/// A buffer as floats, to read.
pub fn floats(buffer: &Buffer) -> &[f32] {
    let bytes = buffer.bytes();
    // SAFETY: as in `floats_mut`.
    unsafe { std::slice::from_raw_parts(bytes.as_ptr().cast(), bytes.len() / size_of::<f32>()) }
}

/// Pooled memory for sums in f64.
#[derive(Debug)]
pub struct Doubles {
    buffer: Buffer,
}

impl Doubles {
    /// `count` numbers of arbitrary content.
    ///
    /// # Errors
    /// `OutOfMemory`, naming `what`.
    pub fn new(device: &Device, what: &str, count: usize) -> Result<Self> {
        Ok(Doubles { buffer: device.take(what, count.saturating_mul(size_of::<f64>()))? })
    }

    /// The numbers.
    pub fn values(&self) -> &[f64] {
        let bytes = self.buffer.bytes();
        // SAFETY: as in `floats_mut`; the length is a whole number of them.
        unsafe { std::slice::from_raw_parts(bytes.as_ptr().cast(), bytes.len() / size_of::<f64>()) }
    }

    /// Their bytes, in the machine's order, to write.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        self.buffer.bytes_mut()
    }

    /// The numbers, to write.
    pub fn values_mut(&mut self) -> &mut [f64] {
        let bytes = self.buffer.bytes_mut();
        // SAFETY: as in `values`; `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(bytes.as_mut_ptr().cast(), bytes.len() / size_of::<f64>()) }
    }
}

/// A slice whose disjoint parts several tasks write.
#[derive(Debug, Clone, Copy)]
pub struct SharedMut<T> {
    data: *mut T,
    len: usize,
}

// SAFETY: only a pointer and a length; whoever forms a slice of it promises that nobody else has that part.
unsafe impl<T: Send> Send for SharedMut<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for SharedMut<T> {}

impl<T> SharedMut<T> {
    /// Over `whole`, which must outlive its use.
    pub fn new(whole: &mut [T]) -> Self {
        SharedMut { data: whole.as_mut_ptr(), len: whole.len() }
    }

    /// The number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The address of element `start`, from which `count` elements may be reached.
    ///
    /// # Panics
    /// If they are not inside the slice.
    pub fn pointer(&self, start: usize, count: usize) -> *mut T {
        assert!(start <= self.len && count <= self.len - start, "a part within {}", self.len);
        self.data.wrapping_add(start)
    }

    /// `count` elements from `start` on.
    ///
    /// # Safety
    /// The slice that `self` was made of is still borrowed for it, and no other task reaches this part while
    /// the result lives.
    ///
    /// # Panics
    /// If the part is not inside the slice.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn part<'a>(&self, start: usize, count: usize) -> &'a mut [T] {
        // SAFETY: in bounds by the check of `pointer`; exclusive by this function's contract.
        unsafe { std::slice::from_raw_parts_mut(self.pointer(start, count), count) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Context;

    #[test]
    fn tasks_have_buffers_of_their_own() {
        let cx = Context::new(&Device::cpu(3).unwrap());
        let scratch = Scratch::new(cx.device(), "test", 100, 64).unwrap();
        let mut out = [0usize; 100];
        let shared = SharedMut::new(&mut out);
        cx.parallel(100, |task| {
            scratch.with(|floats| {
                floats.fill(task as f32);
                std::thread::yield_now();
                // SAFETY: each task has its own element.
                unsafe { shared.part(task, 1)[0] = floats.iter().map(|&v| v as usize).sum() };
            });
        })
        .unwrap();
        assert!(out.iter().enumerate().all(|(task, &sum)| sum == 64 * task));
        assert!(Scratch::new(cx.device(), "test", 1, usize::MAX / 8).is_err());
    }
}
