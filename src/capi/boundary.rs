//! What every call has in common: out-parameters, argument checks, caught panics, poisoned handles, errors.

use std::cell::RefCell;
use std::ffi::{CStr, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::error::{WST_INTERNAL, WST_OK, wst_error, wst_status};
use super::hook;
use super::image::wst_image;
use crate::device::threads::panic_error;
use crate::error::{Error, Result};
use crate::image::Image;

/// The longest text or path, in bytes. A prompt has some hundred; the limit keeps copies of it small.
pub(super) const MAX_TEXT_BYTES: usize = 65_535;

/// The most entries that an array of handles, texts or numbers may have.
pub(super) const MAX_COUNT: usize = 65_536;

/// The largest `struct_size` that is believed; more is memory that nobody initialised.
const MAX_STRUCT_BYTES: usize = 4096;

/// Why a poisoned handle is not used. This is no new defect: it poisons no other handle.
const REFUSED: &str = "an earlier call failed with WST_INTERNAL; this handle can only be freed";

/// Set when a defect showed while a handle was in use. Shared with the handle's children.
#[derive(Clone, Default)]
pub(super) struct Poison(Arc<AtomicBool>);

impl Poison {
    fn check(&self, name: &str) -> Result<()> {
        if self.0.load(Ordering::Acquire) {
            return Err(Error::internal(name, REFUSED));
        }
        Ok(())
    }

    fn set(&self) {
        self.0.store(true, Ordering::Release);
    }
}

/// An object behind a pointer of the C ABI, always an `Arc`.
pub(super) trait Handle {
    /// The mark that forbids further use, for handles with a state that can break.
    fn poison(&self) -> Option<&Poison> {
        None
    }
}

/// A new handle for the caller, with one reference.
pub(super) fn give<T: Handle>(value: T) -> *mut T {
    Arc::into_raw(Arc::new(value)).cast_mut()
}

/// Another reference to the caller's handle.
///
/// # Safety
/// `handle` came from [`give`] and the caller's reference is not freed yet.
pub(super) unsafe fn retain<T: Handle>(handle: *const T) -> Arc<T> {
    // SAFETY: as the caller of this function promises.
    unsafe {
        Arc::increment_strong_count(handle);
        Arc::from_raw(handle)
    }
}

/// Takes the caller's reference back; NULL is nothing.
///
/// # Safety
/// As [`retain`]; the caller does not use the pointer again.
pub(super) unsafe fn release<T: Handle>(handle: *const T) {
    if !handle.is_null() {
        // SAFETY: as the caller of this function promises.
        quietly((), || drop(unsafe { Arc::from_raw(handle) }));
    }
}

/// Runs a getter or a free: a panic, which would be a defect, gives `fallback`.
pub(super) fn quietly<T>(fallback: T, body: impl FnOnce() -> T) -> T {
    hook::install();
    let _inside = hook::Inside::enter();
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(value) => value,
        Err(payload) => {
            // Dropping a payload may panic again, outside any guard.
            std::mem::forget(payload);
            fallback
        }
    }
}

/// A getter of a handle that may be NULL.
///
/// # Safety
/// `handle` is NULL or a live handle.
pub(super) unsafe fn get<T, V>(handle: *const T, fallback: V, field: impl FnOnce(&T) -> V) -> V {
    // SAFETY: as the caller of this function promises.
    match unsafe { handle.as_ref() } {
        Some(handle) => field(handle),
        None => fallback,
    }
}

/// One call: remembers which handles a defect poisons.
pub(super) struct Call {
    blamed: RefCell<Vec<Poison>>,
}

impl Call {
    /// The handle of the parameter `name`, which a defect in this call poisons.
    ///
    /// # Safety
    /// `handle` is NULL or a live handle.
    pub(super) unsafe fn handle<T: Handle>(&self, name: &str, handle: *const T) -> Result<Arc<T>> {
        // SAFETY: as the caller of this function promises.
        let handle = unsafe { handle_in(name, handle)? };
        if let Some(poison) = handle.poison() {
            self.blame(poison);
        }
        Ok(handle)
    }

    /// Lets a defect in this call poison one more handle.
    pub(super) fn blame(&self, poison: &Poison) {
        self.blamed.borrow_mut().push(poison.clone());
    }
}

/// The one way in: clears the error and the out-parameters, then checks the latter, runs `body`, writes what it
/// returns. An error or a panic becomes a status and an error object.
///
/// # Safety
/// `error` is NULL or writable, and so are the pointers in `out`.
pub(super) unsafe fn boundary<O: Out>(
    place: &'static str,
    error: *mut *mut wst_error,
    out: O,
    body: impl FnOnce(&Call) -> Result<O::Value>,
) -> wst_status {
    hook::install();
    let _inside = hook::Inside::enter();
    // SAFETY: as the caller of this function promises.
    unsafe {
        if !error.is_null() {
            error.write(std::ptr::null_mut());
        }
        out.clear();
    }
    let call = Call { blamed: RefCell::new(Vec::new()) };
    let run = || {
        out.check()?;
        let value = body(&call)?;
        // SAFETY: checked above.
        unsafe { out.write(value) }
    };
    let outcome =
        catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|payload| Err(panic_error(place, payload)));
    let Err(failure) = outcome else { return WST_OK };
    let status = super::error::status_of(&failure);
    let refused = matches!(&failure, Error::Internal { reason, .. } if reason == REFUSED);
    if status == WST_INTERNAL && !refused {
        call.blamed.borrow().iter().for_each(Poison::set);
    }
    if !error.is_null() {
        let object = quietly(std::ptr::null_mut(), || give(wst_error::new(&failure)));
        // SAFETY: as the caller of this function promises.
        unsafe { error.write(object) };
    }
    status
}

/// Out-parameters: set to nothing on every path, written on success.
pub(super) trait Out {
    /// What is written.
    type Value;

    /// Sets everything that can be reached to NULL or 0.
    ///
    /// # Safety
    /// The pointers are NULL or writable.
    unsafe fn clear(&self);

    /// Whether [`Out::write`] may be called.
    fn check(&self) -> Result<()>;

    /// Hands the value to the caller.
    ///
    /// # Safety
    /// As [`Out::clear`], and [`Out::check`] passed.
    unsafe fn write(&self, value: Self::Value) -> Result<()>;
}

fn check_pointer<T>(name: &str, at: *const T) -> Result<()> {
    if at.is_null() {
        return Err(Error::argument(name, "a pointer", "NULL"));
    }
    if !at.is_aligned() {
        return Err(Error::argument(
            name,
            format!("an address aligned to {}", align_of::<T>()),
            format!("{at:p}"),
        ));
    }
    Ok(())
}

impl Out for () {
    type Value = ();
    unsafe fn clear(&self) {}
    fn check(&self) -> Result<()> {
        Ok(())
    }
    unsafe fn write(&self, (): ()) -> Result<()> {
        Ok(())
    }
}

/// A new handle.
pub(super) struct HandleOut<T>(pub(super) &'static str, pub(super) *mut *mut T);

impl<T: Handle> Out for HandleOut<T> {
    type Value = T;
    unsafe fn clear(&self) {
        if self.check().is_ok() {
            // SAFETY: as the caller of this function promises.
            unsafe { self.1.write(std::ptr::null_mut()) };
        }
    }
    fn check(&self) -> Result<()> {
        check_pointer(self.0, self.1)
    }
    unsafe fn write(&self, value: T) -> Result<()> {
        // SAFETY: as the caller of this function promises.
        unsafe { self.1.write(give(value)) };
        Ok(())
    }
}

/// A new handle, or NULL.
pub(super) struct MaybeOut<T>(pub(super) HandleOut<T>);

impl<T: Handle> Out for MaybeOut<T> {
    type Value = Option<T>;
    unsafe fn clear(&self) {
        // SAFETY: as the caller of this function promises.
        unsafe { self.0.clear() }
    }
    fn check(&self) -> Result<()> {
        self.0.check()
    }
    unsafe fn write(&self, value: Option<T>) -> Result<()> {
        // SAFETY: as the caller of this function promises; nothing leaves the NULL of `clear`.
        value.map_or(Ok(()), |value| unsafe { self.0.write(value) })
    }
}

/// A flag or number.
pub(super) struct ValueOut<T>(pub(super) &'static str, pub(super) *mut T);

impl<T: Copy + Default> Out for ValueOut<T> {
    type Value = T;
    unsafe fn clear(&self) {
        if self.check().is_ok() {
            // SAFETY: as the caller of this function promises.
            unsafe { self.1.write(T::default()) };
        }
    }
    fn check(&self) -> Result<()> {
        check_pointer(self.0, self.1)
    }
    unsafe fn write(&self, value: T) -> Result<()> {
        // SAFETY: as the caller of this function promises.
        unsafe { self.1.write(value) };
        Ok(())
    }
}

/// A struct that starts with `struct_size`.
///
/// # Safety
/// `repr(C)`, starts with `struct_size: u32`, has no padding, and all zeros is a value.
pub(super) unsafe trait Sized32: Copy {
    /// The struct's name in C.
    const NAME: &'static str;
    /// Where the first field after `struct_size` ends.
    const FIRST_END: usize;
}

/// A struct of the caller, of whatever version the caller was compiled against: the common part is filled.
pub(super) struct StructOut<T>(pub(super) &'static str, pub(super) *mut T);

impl<T: Sized32> StructOut<T> {
    /// The bytes that both sides know.
    fn common(&self) -> Result<usize> {
        check_pointer(self.0, self.1)?;
        // SAFETY: the caller's struct starts with `struct_size`.
        let size = unsafe { self.1.cast::<u32>().read() } as usize;
        if size < T::FIRST_END || size > MAX_STRUCT_BYTES {
            let expected = format!("sizeof({}), {} bytes", T::NAME, size_of::<T>());
            return Err(Error::argument(format!("{}->struct_size", self.0), expected, size));
        }
        Ok(size.min(size_of::<T>()))
    }
}

impl<T: Sized32> Out for StructOut<T> {
    type Value = T;
    unsafe fn clear(&self) {
        if let Ok(bytes) = self.common() {
            // SAFETY: the caller's struct has that many bytes.
            unsafe { self.1.cast::<u8>().add(4).write_bytes(0, bytes - 4) };
        }
    }
    fn check(&self) -> Result<()> {
        self.common().map(drop)
    }
    unsafe fn write(&self, value: T) -> Result<()> {
        let bytes = self.common()?;
        // SAFETY: both structs have that many bytes; `struct_size` stays the caller's.
        unsafe {
            let from = (&raw const value).cast::<u8>().add(4);
            std::ptr::copy_nonoverlapping(from, self.1.cast::<u8>().add(4), bytes - 4);
        }
        Ok(())
    }
}

/// An array of new images.
pub(super) struct ImagesOut {
    pub(super) images: *mut *mut wst_image,
    pub(super) count: usize,
}

impl ImagesOut {
    /// Says before any work whether the caller's array fits.
    pub(super) fn expect(&self, count: usize) -> Result<()> {
        if self.count == count {
            return Ok(());
        }
        let expected = format!("{count}, prompts x images per prompt (wst_generate_options_image_count)");
        Err(Error::argument("image_count", expected, self.count))
    }
}

impl Out for &ImagesOut {
    type Value = Vec<Image>;
    unsafe fn clear(&self) {
        if self.check().is_ok() {
            for i in 0..self.count {
                // SAFETY: the caller's array has `count` entries.
                unsafe { self.images.add(i).write(std::ptr::null_mut()) };
            }
        }
    }
    fn check(&self) -> Result<()> {
        check_count("image_count", self.count)?;
        if self.count == 0 { Ok(()) } else { check_pointer("images", self.images) }
    }
    unsafe fn write(&self, images: Vec<Image>) -> Result<()> {
        self.expect(images.len())?;
        for (i, image) in images.into_iter().enumerate() {
            // SAFETY: the caller's array has `count` entries.
            unsafe { self.images.add(i).write(give(wst_image::new(image))) };
        }
        Ok(())
    }
}

impl<A: Out, B: Out> Out for (A, B) {
    type Value = (A::Value, B::Value);
    unsafe fn clear(&self) {
        // SAFETY: as the caller of this function promises.
        unsafe {
            self.0.clear();
            self.1.clear();
        }
    }
    fn check(&self) -> Result<()> {
        self.0.check()?;
        self.1.check()
    }
    unsafe fn write(&self, value: Self::Value) -> Result<()> {
        // SAFETY: as the caller of this function promises.
        unsafe {
            self.0.write(value.0)?;
            self.1.write(value.1)
        }
    }
}

/// A handle that is only read: a defect in the call does not poison it.
///
/// # Safety
/// `handle` is NULL or a live handle.
pub(super) unsafe fn handle_in<T: Handle>(name: &str, handle: *const T) -> Result<Arc<T>> {
    check_pointer(name, handle)?;
    // SAFETY: as the caller of this function promises.
    let handle = unsafe { retain(handle) };
    if let Some(poison) = handle.poison() {
        poison.check(name)?;
    }
    Ok(handle)
}

/// A handle that may be left out.
///
/// # Safety
/// As [`handle_in`].
pub(super) unsafe fn optional_in<T: Handle>(name: &str, handle: *const T) -> Result<Option<Arc<T>>> {
    if handle.is_null() {
        return Ok(None);
    }
    // SAFETY: as the caller of this function promises.
    unsafe { handle_in(name, handle).map(Some) }
}

fn check_count(name: &str, count: usize) -> Result<()> {
    if count > MAX_COUNT {
        return Err(Error::argument(name, format!("at most {MAX_COUNT}"), count));
    }
    Ok(())
}

/// `count` numbers, handles or pointers; NULL stands for none of them.
///
/// # Safety
/// `data` is NULL or points to `count` values that stay as they are during the call.
pub(super) unsafe fn slice_in<'a, T>(
    (name, data): (&str, *const T),
    (count_name, count): (&str, usize),
) -> Result<&'a [T]> {
    check_count(count_name, count)?;
    if count == 0 {
        return Ok(&[]);
    }
    check_pointer(name, data)?;
    // SAFETY: as the caller of this function promises.
    Ok(unsafe { std::slice::from_raw_parts(data, count) })
}

/// An array of `count` handles, at least one.
///
/// # Safety
/// As [`slice_in`]; the entries are NULL or live handles.
pub(super) unsafe fn handles_in<T: Handle>(
    name: &str,
    handles: *const *const T,
    count: usize,
) -> Result<Vec<Arc<T>>> {
    if count == 0 {
        return Err(Error::argument("count", "at least 1", 0));
    }
    // SAFETY: as the caller of this function promises.
    let handles = unsafe { slice_in((name, handles), ("count", count))? };
    let mut kept = Vec::new();
    kept.try_reserve_exact(count).map_err(|_| Error::out_of_memory(name, count * size_of::<Arc<T>>()))?;
    for (i, &handle) in handles.iter().enumerate() {
        // SAFETY: as the caller of this function promises.
        kept.push(unsafe { handle_in(&format!("{name}[{i}]"), handle)? });
    }
    Ok(kept)
}

/// A UTF-8 text.
///
/// # Safety
/// `text` is NULL or ends with a NUL byte, and stays as it is during the call.
pub(super) unsafe fn text_in<'a>(name: &str, text: *const c_char) -> Result<&'a str> {
    check_pointer(name, text)?;
    // SAFETY: reads up to the NUL byte, or stops at the limit.
    let length = unsafe { libc::strnlen(text, MAX_TEXT_BYTES + 1) };
    if length > MAX_TEXT_BYTES {
        return Err(Error::argument(name, format!("at most {MAX_TEXT_BYTES} bytes of text"), "more"));
    }
    // SAFETY: the text ends within the limit.
    let text = unsafe { CStr::from_ptr(text) };
    text.to_str().map_err(|error| {
        let found = format!("a broken sequence at byte {}", error.valid_up_to());
        Error::argument(name, "UTF-8 text", found)
    })
}

/// A text that may be left out.
///
/// # Safety
/// As [`text_in`].
pub(super) unsafe fn optional_text_in<'a>(name: &str, text: *const c_char) -> Result<Option<&'a str>> {
    if text.is_null() {
        return Ok(None);
    }
    // SAFETY: as the caller of this function promises.
    unsafe { text_in(name, text).map(Some) }
}

/// The path of a file or folder: UTF-8, not empty.
///
/// # Safety
/// As [`text_in`].
pub(super) unsafe fn path_in<'a>(name: &str, path: *const c_char) -> Result<&'a Path> {
    // SAFETY: as the caller of this function promises.
    let path = unsafe { text_in(name, path)? };
    if path.is_empty() {
        return Err(Error::argument(name, "a path", "an empty text"));
    }
    Ok(Path::new(path))
}

/// An enum's value: `values[i]` belongs to the number `i`.
pub(super) fn enum_in<T: Copy>(name: &str, number: i32, values: &[(&str, T)]) -> Result<T> {
    let value = usize::try_from(number).ok().and_then(|i| values.get(i));
    value.map(|(_, value)| *value).ok_or_else(|| {
        let known: Vec<String> =
            values.iter().enumerate().map(|(i, (name, _))| format!("{name} ({i})")).collect();
        Error::argument(name, known.join(", "), number)
    })
}

/// A function of the host with the pointer that it wants back.
#[derive(Clone, Copy)]
pub(super) struct Callback<F> {
    pub(super) function: F,
    pub(super) user_data: *mut std::ffi::c_void,
}

// SAFETY: the header says on which threads callbacks run; the host answers for what `user_data` points to.
unsafe impl<F: Send> Send for Callback<F> {}
// SAFETY: as above.
unsafe impl<F: Sync> Sync for Callback<F> {}
