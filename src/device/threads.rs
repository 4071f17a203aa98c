//! The threads of a CPU device: a parallel loop over task numbers, and a thread of our own to run on.
//!
//! Threads are made with `pthread_create` rather than `std::thread`: spawning through `std` leaves a
//! thread-local destructor on the *host's* thread, which keeps `dlclose` from unloading the library. Ours are
//! always joined, block every signal (a host's handler must not run on them) and use no std thread handle.

use std::cell::UnsafeCell;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::reserve::Reserve;
use crate::error::{Error, Result};

/// How often an idle helper looks for work before it sleeps: about 20 microseconds, the gap between two ops.
const SPINS_BEFORE_SLEEP: u32 = 2000;

/// Stack of our threads. Kernels keep their scratch elsewhere; parsers may recurse.
const STACK_BYTES: usize = 4 << 20;

/// A joined-on-drop operating-system thread.
#[derive(Debug)]
pub struct Thread {
    id: libc::pthread_t,
}

type Entry = Box<dyn FnOnce() + Send>;

impl Thread {
    /// Starts a thread. A panic of `entry` ends the thread and nothing else.
    ///
    /// # Errors
    /// `OutOfMemory` if the system has no thread to give.
    pub fn start(entry: impl FnOnce() + Send + 'static) -> Result<Self> {
        let entry: Box<Entry> = Box::new(Box::new(entry));
        let argument = Box::into_raw(entry);
        // SAFETY: `id` and `attributes` are initialised by the calls that take them first; `run` owns
        // `argument` if the thread started, else it is taken back below.
        unsafe {
            let mut attributes = std::mem::zeroed::<libc::pthread_attr_t>();
            libc::pthread_attr_init(&mut attributes);
            libc::pthread_attr_setstacksize(&mut attributes, STACK_BYTES);
            let mut id = std::mem::zeroed::<libc::pthread_t>();
            let status = libc::pthread_create(&mut id, &attributes, run, argument.cast());
            libc::pthread_attr_destroy(&mut attributes);
            if status != 0 {
                drop(Box::from_raw(argument));
                return Err(Error::out_of_memory("a thread", STACK_BYTES));
            }
            Ok(Thread { id })
        }
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        // SAFETY: `id` is a joinable thread that nobody else joins.
        unsafe { libc::pthread_join(self.id, std::ptr::null_mut()) };
    }
}

extern "C" fn run(argument: *mut libc::c_void) -> *mut libc::c_void {
    // SAFETY: the signal set is filled before use; blocking signals on our own thread affects nobody.
    unsafe {
        let mut all = std::mem::zeroed::<libc::sigset_t>();
        libc::sigfillset(&mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &all, std::ptr::null_mut());
    }
    reset_rounding();
    // SAFETY: `start` made this pointer from a box and gave it to this thread alone.
    let entry = unsafe { Box::from_raw(argument.cast::<Entry>()) };
    if let Err(payload) = catch_unwind(AssertUnwindSafe(entry)) {
        // Dropping a payload may panic again, outside any guard.
        std::mem::forget(payload);
    }
    std::ptr::null_mut()
}

/// A thread inherits the floating-point mode of the one that started it: a host may round upwards or flush
/// subnormals, and its pictures must not depend on that.
fn reset_rounding() {
    #[cfg(target_arch = "x86_64")]
    {
        /// Round to nearest, all exceptions masked, subnormals kept: the state of a new process.
        const DEFAULT_MXCSR: u32 = 0x1f80;
        // SAFETY: loads a valid control word on our own thread, before any of our code computes.
        unsafe {
            std::arch::asm!("ldmxcsr [{}]", in(reg) &DEFAULT_MXCSR, options(nostack, readonly));
        }
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: zero is the control word of a new process: as above, and no other format of half precision. The rest is
    // as above.
    unsafe {
        std::arch::asm!("msr fpcr, xzr", options(nomem, nostack, preserves_flags));
    }
}

/// Runs `work` to its end on a fresh thread of ours while the caller waits.
///
/// Host threads may have small stacks, unusual floating-point modes or pending unloads; work that uses
/// thread-locals or deep stacks (parsers, kernels) runs here instead.
///
/// # Errors
/// What `work` returns; `Internal` if it panicked.
pub fn run_apart<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    run_apart_reporting(|_: &(dyn Fn(()) + Sync)| work(), |()| ())
}

/// What a working thread has said and the waiting one has not heard yet.
struct Inbox<R> {
    state: Mutex<(VecDeque<R>, bool)>,
    changed: Condvar,
}

impl<R> Inbox<R> {
    fn lock(&self) -> MutexGuard<'_, (VecDeque<R>, bool)> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn say(&self, report: R) {
        self.lock().0.push_back(report);
        self.changed.notify_one();
    }

    fn close(&self) {
        self.lock().1 = true;
        self.changed.notify_one();
    }

    /// The next report; `None` once the thread is done and everything was heard.
    fn next(&self) -> Option<R> {
        let mut state = self.lock();
        loop {
            if let Some(report) = state.0.pop_front() {
                return Some(report);
            }
            if state.1 {
                return None;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// [`run_apart`] for work that reports: `hear` gets the reports on the calling thread, while the work goes on.
///
/// # Errors
/// As [`run_apart`].
pub fn run_apart_reporting<T: Send, R: Send>(
    work: impl FnOnce(&(dyn Fn(R) + Sync)) -> Result<T> + Send,
    mut hear: impl FnMut(R),
) -> Result<T> {
    let inbox = Inbox { state: Mutex::new((VecDeque::new(), false)), changed: Condvar::new() };
    let mut outcome: Option<Result<T>> = None;
    {
        let slot = SendPtr(&mut outcome as *mut Option<Result<T>>);
        let inbox = &inbox;
        let entry: Box<dyn FnOnce() + Send + '_> = Box::new(move || {
            let slot = slot;
            let work = AssertUnwindSafe(|| work(&|report| inbox.say(report)));
            let result =
                catch_unwind(work).unwrap_or_else(|payload| Err(panic_error("a library thread", payload)));
            // SAFETY: the caller's frame, which holds the slot, waits for this thread below.
            unsafe { *slot.0 = Some(result) };
            inbox.close();
        });
        // SAFETY: only the lifetime changes; the thread is joined before anything borrowed here ends, also
        // when `hear` unwinds.
        let entry: Entry = unsafe { std::mem::transmute(entry) };
        let _joined = Thread::start(entry)?;
        while let Some(report) = inbox.next() {
            hear(report);
        }
    }
    outcome.unwrap_or_else(|| Err(Error::internal("a library thread", "it ended without a result")))
}

/// The same under a reserve, which the thread's own end (caches in its thread-locals) still has at hand.
///
/// # Errors
/// What `work` returns; `Internal` if it panicked; `OutOfMemory` as [`Reserve::guard`].
pub fn run_apart_with_reserve<T: Send>(
    what: &str,
    bytes: usize,
    work: impl FnOnce() -> Result<T> + Send,
) -> Result<T> {
    reporting_with_reserve(what, bytes, |_: &(dyn Fn(()) + Sync)| work(), |()| ())
}

/// [`run_apart_reporting`] under a reserve.
///
/// # Errors
/// As [`run_apart_with_reserve`].
pub fn reporting_with_reserve<T: Send, R: Send>(
    what: &str,
    bytes: usize,
    work: impl FnOnce(&(dyn Fn(R) + Sync)) -> Result<T> + Send,
    hear: impl FnMut(R),
) -> Result<T> {
    let reserve = Reserve::new(what, bytes)?;
    let guarded = |say: &(dyn Fn(R) + Sync)| {
        // SAFETY: `run_apart_reporting` joins the thread.
        unsafe { reserve.stay() };
        reserve.guard(|| work(say))
    };
    run_apart_reporting(guarded, hear)
}

struct SendPtr<T>(*mut T);
// SAFETY: used to hand one thread exclusive access to one slot while its owner waits.
unsafe impl<T> Send for SendPtr<T> {}

/// The message of a caught panic as an error. A payload that is not a plain message is forgotten: its
/// destructor may panic again.
pub fn panic_error(place: &str, payload: Box<dyn std::any::Any + Send>) -> Error {
    let reason = match payload.downcast::<String>() {
        Ok(message) => *message,
        Err(payload) => match payload.downcast::<&'static str>() {
            Ok(message) => (*message).to_owned(),
            Err(payload) => {
                std::mem::forget(payload);
                "a panic without a message".to_owned()
            }
        },
    };
    Error::internal(place, reason)
}

/// One parallel loop, on the stack of the thread that started it.
struct Region {
    body: *const (dyn Fn(usize) + Sync),
    tasks: usize,
    next: AtomicUsize,
    helpers: AtomicUsize,
    panicked: AtomicBool,
}

impl Region {
    /// Takes tasks until none is left.
    fn work(&self) {
        loop {
            let task = self.next.fetch_add(1, Ordering::Relaxed);
            if task >= self.tasks {
                return;
            }
            // SAFETY: the starting thread keeps the closure alive until no helper is left.
            let body = unsafe { &*self.body };
            if let Err(payload) = catch_unwind(AssertUnwindSafe(|| body(task))) {
                std::mem::forget(payload);
                self.panicked.store(true, Ordering::Relaxed);
            }
        }
    }
}

#[derive(Clone, Copy)]
struct RegionPtr(*const Region);
// SAFETY: regions are shared between threads by design; all their fields are atomics or read-only.
unsafe impl Send for RegionPtr {}

#[derive(Default)]
struct Queue {
    regions: Vec<RegionPtr>,
    closing: bool,
}

struct Shared {
    queue: Mutex<Queue>,
    work: Condvar,
    /// Counts announcements, so that a spinning helper sees new work without taking the lock.
    epoch: AtomicUsize,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes part in open regions until the pool closes.
    fn help(&self) {
        let mut seen = self.epoch.load(Ordering::Acquire);
        let mut queue = self.lock();
        loop {
            // SAFETY: a region in the queue is alive: its owner removes it, under this lock, before it returns.
            let open = queue.regions.iter().map(|r| unsafe { &*r.0 });
            if let Some(region) = open.into_iter().find(|r| r.next.load(Ordering::Relaxed) < r.tasks) {
                region.helpers.fetch_add(1, Ordering::Relaxed);
                drop(queue);
                region.work();
                // The region may be gone as soon as this is done.
                region.helpers.fetch_sub(1, Ordering::Release);
                for _ in 0..SPINS_BEFORE_SLEEP {
                    if self.epoch.load(Ordering::Relaxed) != seen {
                        break;
                    }
                    std::hint::spin_loop();
                }
                seen = self.epoch.load(Ordering::Acquire);
                queue = self.lock();
                continue;
            }
            if queue.closing {
                return;
            }
            queue = self.work.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// A fixed set of helper threads. The thread that starts a loop always takes part in it, so a pool of one
/// thread has no helpers. Any number of threads may start loops at once.
pub struct ThreadPool {
    shared: Arc<Shared>,
    helpers: UnsafeCell<Vec<Thread>>,
    threads: usize,
}

// SAFETY: `helpers` is touched only in `new` and `drop`.
unsafe impl Sync for ThreadPool {}
// SAFETY: as above.
unsafe impl Send for ThreadPool {}

impl ThreadPool {
    /// A pool in which loops run on `threads` threads, the caller's included.
    ///
    /// # Errors
    /// `OutOfMemory` if a thread cannot be started.
    pub fn new(threads: usize) -> Result<Self> {
        let threads = threads.max(1);
        let shared = Arc::new(Shared {
            queue: Mutex::new(Queue::default()),
            work: Condvar::new(),
            epoch: AtomicUsize::new(0),
        });
        let pool = ThreadPool { shared: shared.clone(), helpers: UnsafeCell::new(Vec::new()), threads };
        for _ in 1..threads {
            let shared = shared.clone();
            let helper = Thread::start(move || shared.help())?;
            // SAFETY: nobody else has the pool yet.
            unsafe { (*pool.helpers.get()).push(helper) };
        }
        Ok(pool)
    }

    /// How many threads take part in a loop.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Calls `body` once with each number below `tasks`, in any order, and waits for all.
    ///
    /// # Errors
    /// `Internal` if a call panicked; the others have run.
    pub fn parallel(&self, tasks: usize, body: &(dyn Fn(usize) + Sync)) -> Result<()> {
        // SAFETY: only the lifetime is erased; the region is withdrawn before this function returns.
        let body = unsafe {
            std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), *const (dyn Fn(usize) + Sync)>(body)
        };
        let region = Region {
            body,
            tasks,
            next: AtomicUsize::new(0),
            helpers: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
        };
        let shared_out = self.threads > 1 && tasks > 1;
        if shared_out {
            let mut queue = self.shared.lock();
            queue.regions.push(RegionPtr(&region));
            drop(queue);
            self.shared.epoch.fetch_add(1, Ordering::Release);
            self.shared.work.notify_all();
        }
        region.work();
        if shared_out {
            self.shared.lock().regions.retain(|r| !std::ptr::eq(r.0, &region));
            let mut spins = 0u32;
            while region.helpers.load(Ordering::Acquire) > 0 {
                spins += 1;
                if spins > SPINS_BEFORE_SLEEP {
                    // SAFETY: gives the processor to whoever holds the last task.
                    unsafe { libc::sched_yield() };
                } else {
                    std::hint::spin_loop();
                }
            }
        }
        if region.panicked.load(Ordering::Relaxed) {
            return Err(Error::internal("a parallel loop", "a kernel panicked"));
        }
        Ok(())
    }
}

impl Drop for ThreadPool {
    fn drop(&mut self) {
        self.shared.lock().closing = true;
        self.shared.epoch.fetch_add(1, Ordering::Release);
        self.shared.work.notify_all();
        self.helpers.get_mut().clear();
    }
}

impl std::fmt::Debug for ThreadPool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ThreadPool({})", self.threads)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        for threads in [1, 2, 5] {
            let pool = ThreadPool::new(threads).unwrap();
            for tasks in [0, 1, 2, 1000] {
                let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                pool.parallel(tasks, &|i| {
                    counts[i].fetch_add(1, Ordering::Relaxed);
                })
                .unwrap();
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn loops_of_many_callers_share_the_helpers() {
        let pool = ThreadPool::new(3).unwrap();
        let total = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        pool.parallel(7, &|i| {
                            total.fetch_add(i, Ordering::Relaxed);
                        })
                        .unwrap();
                    }
                });
            }
        });
        assert_eq!(total.into_inner(), 4 * 200 * 21);
    }

    #[test]
    fn a_panic_becomes_an_error() {
        let pool = ThreadPool::new(2).unwrap();
        let error = pool.parallel(4, &|i| assert_ne!(i, 2)).unwrap_err();
        assert!(matches!(error, Error::Internal { .. }));
        pool.parallel(4, &|_| {}).unwrap();
        let error = run_apart(|| -> Result<()> { panic!("on purpose") }).unwrap_err();
        assert!(error.to_string().contains("on purpose"), "{error}");
    }

    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    #[test]
    fn the_rounding_of_the_caller_does_not_reach_our_threads() {
        unsafe extern "C" {
            fn fesetround(mode: libc::c_int) -> libc::c_int;
        }
        let upward = if cfg!(target_arch = "x86_64") { 0x800 } else { 0x40_0000 };
        let sum = || std::hint::black_box(1f32) + std::hint::black_box(1e-10);
        let caller = std::thread::spawn(move || {
            // SAFETY: a mode that C's fenv.h names, on a thread that ends here.
            assert_eq!(unsafe { fesetround(upward) }, 0);
            (sum(), run_apart(|| Ok(sum())).unwrap())
        });
        let (above, ours) = caller.join().unwrap();
        assert!(above > 1.0 && ours == 1.0, "{above} {ours}");
    }
}
