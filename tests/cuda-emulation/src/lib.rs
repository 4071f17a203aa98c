//! Stand-ins for `libcuda.so.1`, `libnvrtc.so.13` and `libcublasLt.so.13` that run CUDA on the CPU, for tests.
//!
//! [`load`] comes before anything that looks for those libraries: the dynamic linker then finds these under their
//! names. What the emulation catches, and how it is set, is in its README. The other functions panic where [`load`]
//! fails.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_char, c_int, c_long, c_uint, c_void};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

const FOLDER: &str = env!("CUEMU_LIBRARIES");
const FAILURE: &str = env!("CUEMU_FAILURE");

/// The libraries, in one folder: the driver, the compiler, the matrix products.
pub fn libraries() -> [PathBuf; 3] {
    ["libcuda.so.1", "libnvrtc.so.13", "libcublasLt.so.13"].map(|name| Path::new(FOLDER).join(name))
}

/// Loads them into this process, once.
///
/// # Errors
/// A text, where the machine has no C++ compiler or the libraries do not load.
pub fn load() -> Result<(), String> {
    driver().map(|_| ())
}

/// Lets the n-th call from now on, of all three libraries, fail with a code of the driver's, once. The compiler and
/// the matrix products give it in their own numbers. Calls that free something do not count.
pub fn fail_call(n: u32, code: i32) {
    fail(None, n.into(), code);
}

/// The same, of the calls of one function.
pub fn fail_call_of(name: &str, n: u32, code: i32) {
    fail(Some(name), n.into(), code);
}

fn fail(name: Option<&str>, n: c_long, code: i32) {
    let name = name.and_then(|name| CString::new(name).ok());
    let function: unsafe extern "C" fn(*const c_char, c_long, c_int) = function(c"cuemu_fail_call");
    // SAFETY: takes a string or null, and numbers.
    unsafe { function(name.as_ref().map_or(std::ptr::null(), |name| name.as_ptr()), n, code) }
}

/// Takes back a [`fail_call`] that has not come to its call.
pub fn fail_no_call() {
    fail(None, -1, 0);
}

/// How many calls were made so far that [`fail_call`] counts.
pub fn calls() -> u64 {
    number(c"cuemu_calls")
}

/// The same by the names of the functions.
pub fn calls_by_name() -> BTreeMap<String, u64> {
    unsafe extern "C" fn note(name: *const c_char, count: c_long, calls: *mut c_void) {
        // SAFETY: the pointer that is handed over below; the name is a string.
        let (calls, name) = unsafe { (&mut *calls.cast::<BTreeMap<_, _>>(), CStr::from_ptr(name)) };
        calls.insert(name.to_string_lossy().into_owned(), u64::try_from(count).unwrap_or(0));
    }
    type Note = unsafe extern "C" fn(*const c_char, c_long, *mut c_void);
    let function: unsafe extern "C" fn(Note, *mut c_void) = function(c"cuemu_each_call");
    let mut calls: BTreeMap<String, u64> = BTreeMap::new();
    // SAFETY: the map outlives the call, and is the only thing that `note` gets.
    unsafe { function(note, (&raw mut calls).cast()) };
    calls
}

/// Kernels that ran so far, in graphs too.
pub fn launches() -> u64 {
    number(c"cuemu_launches")
}

/// How many objects are alive that the process has to free: "memory", "host" (pinned), "stream", "event", "module",
/// "graph" (executable or not), "context" (retained), "library handle" (of the compiler and matrix products), or of
/// all kinds. "bytes" is device memory, and not among all.
pub fn live(kind: Option<&str>) -> i64 {
    let kind = kind.and_then(|kind| CString::new(kind).ok());
    let function: unsafe extern "C" fn(*const c_char) -> c_long = function(c"cuemu_live");
    // SAFETY: takes a string or null.
    unsafe { function(kind.as_ref().map_or(std::ptr::null(), |kind| kind.as_ptr())) }
}

/// In which order threads, warps and blocks run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// By number.
    Ascending,
    /// Backwards.
    Descending,
    /// At random, by a seed.
    Random(u32),
}

/// Sets it for the launches that run from now on.
pub fn set_order(order: Order) {
    let (order, seed) = match order {
        Order::Ascending => (0, 0),
        Order::Descending => (1, 0),
        Order::Random(seed) => (2, seed),
    };
    let function: unsafe extern "C" fn(c_int, c_uint) = function(c"cuemu_set_order");
    // SAFETY: takes numbers.
    unsafe { function(order, seed) }
}

/// How much memory each device has: 4 GiB at first.
pub fn set_memory(bytes: usize) {
    let function: unsafe extern "C" fn(usize) = function(c"cuemu_set_memory");
    // SAFETY: takes a number.
    unsafe { function(bytes) }
}

fn number(name: &CStr) -> u64 {
    let function: unsafe extern "C" fn() -> c_long = function(name);
    // SAFETY: takes nothing.
    u64::try_from(unsafe { function() }).unwrap_or(0)
}

// --- Loading ----------------------------------------------------------------------------------------------------

/// The fake driver's handle, which is never closed.
struct Driver(*mut c_void);

// SAFETY: the dynamic linker takes its handles from any thread.
unsafe impl Send for Driver {}
// SAFETY: as above.
unsafe impl Sync for Driver {}

fn driver() -> Result<&'static Driver, String> {
    static DRIVER: OnceLock<Result<Driver, String>> = OnceLock::new();
    DRIVER.get_or_init(load_once).as_ref().map_err(Clone::clone)
}

fn load_once() -> Result<Driver, String> {
    if !FAILURE.is_empty() {
        return Err(format!("the CUDA emulation was not built: {FAILURE}"));
    }
    let libraries = libraries();
    // Also under the short names, libcuda.so and so on: who asks for those must not find a real library.
    for path in libraries.iter().map(|path| path.with_extension("")).chain(libraries.clone()) {
        open(&path)?;
    }
    let [driver, ..] = &libraries;
    Ok(Driver(open(driver)?))
}

fn open(path: &Path) -> Result<*mut c_void, String> {
    let name = CString::new(path.as_os_str().as_encoded_bytes()).map_err(|error| error.to_string())?;
    // SAFETY: the libraries are ours; their initialisers do nothing. They are never closed.
    let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
    if handle.is_null() { Err(last_error()) } else { Ok(handle) }
}

/// A function of the fake driver, of the pointer type `F`.
fn function<F: Copy>(name: &CStr) -> F {
    assert_eq!(size_of::<F>(), size_of::<*mut c_void>());
    let driver = driver().unwrap_or_else(|error| panic!("{error}"));
    // SAFETY: the library is open, the name is a string.
    let found = unsafe { libc::dlsym(driver.0, name.as_ptr()) };
    assert!(!found.is_null(), "{}", last_error());
    // SAFETY: `F` has a pointer's size; the callers, all in this file, name the type of the function in C.
    unsafe { std::mem::transmute_copy(&found) }
}

fn last_error() -> String {
    // SAFETY: gives a string that lives until the next failure, or null.
    let text = unsafe { libc::dlerror() };
    if text.is_null() {
        return String::from("unknown error of the dynamic linker");
    }
    // SAFETY: as above.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}
