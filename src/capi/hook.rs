//! Keeps caught panics off the host's stderr.
//!
//! The hook is a plain function: as a trait object it owns no heap memory and nothing of it outlives the
//! library. In the shared library `std` is a private copy, so the host's own hook is not touched and both go
//! together at `dlclose`. Where `std` is shared with the host (a Rust program, a static library), panics that
//! are not ours go on to the hook that was there before.

use std::cell::Cell;
use std::panic::PanicHookInfo;
use std::sync::{Once, OnceLock};

type Hook = Box<dyn Fn(&PanicHookInfo<'_>) + Sync + Send + 'static>;

static PREVIOUS: OnceLock<Hook> = OnceLock::new();

thread_local! {
    /// How many calls of ours this thread is inside of. Without a destructor: one would pin the library.
    static DEPTH: Cell<u32> = const { Cell::new(0) };
}

/// Installs the hook, once.
pub(super) fn install() {
    static INSTALLED: Once = Once::new();
    // A thread that is panicking may not change the hook; a later call will.
    if !INSTALLED.is_completed() && !std::thread::panicking() {
        INSTALLED.call_once(|| {
            let _ = PREVIOUS.set(std::panic::take_hook());
            std::panic::set_hook(Box::new(hook));
        });
    }
}

fn hook(info: &PanicHookInfo<'_>) {
    if DEPTH.get() > 0 || on_library_thread() {
        return;
    }
    if let Some(previous) = PREVIOUS.get() {
        previous(info);
    }
}

/// Whether this is a thread of `device::threads`: they are the ones that block every signal, even those of
/// their own faults.
fn on_library_thread() -> bool {
    // SAFETY: with no new set the call only reads the mask, into a set that it fills.
    unsafe {
        let mut blocked = std::mem::zeroed::<libc::sigset_t>();
        libc::pthread_sigmask(libc::SIG_SETMASK, std::ptr::null(), &mut blocked) == 0
            && [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL, libc::SIGABRT, libc::SIGTRAP]
                .iter()
                .all(|&signal| libc::sigismember(&blocked, signal) == 1)
    }
}

/// Marks this thread as being inside a call, until dropped.
pub(super) struct Inside(());

impl Inside {
    pub(super) fn enter() -> Self {
        DEPTH.set(DEPTH.get() + 1);
        Inside(())
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        DEPTH.set(DEPTH.get() - 1);
    }
}

/// Runs a callback of the host: what it does is not ours.
pub(super) fn outside<T>(callback: impl FnOnce() -> T) -> T {
    let depth = DEPTH.replace(0);
    let value = callback();
    DEPTH.set(depth);
    value
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    static HEARD: AtomicUsize = AtomicUsize::new(0);

    #[test]
    fn silent_inside_and_delegates_outside() {
        std::panic::set_hook(Box::new(|_| {
            HEARD.fetch_add(1, Ordering::Relaxed);
        }));
        install();
        let panics = || drop(std::panic::catch_unwind(|| panic!("on purpose")));
        {
            let _inside = Inside::enter();
            panics();
        }
        let _ = crate::device::threads::run_apart(|| -> crate::Result<()> { panic!("on purpose") });
        assert_eq!(HEARD.load(Ordering::Relaxed), 0);
        panics();
        {
            let _inside = Inside::enter();
            outside(panics);
        }
        assert_eq!(HEARD.load(Ordering::Relaxed), 2);
    }
}
