//! Sums over ranks by a function of the host, which runs on the thread that called the step.

use std::ffi::c_void;
use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Mutex, PoisonError};

use super::boundary::Callback;
use super::hook;
use super::job::this_thread;
use crate::device::Reduce;
use crate::device::threads::reporting_with_reserve;
use crate::error::{Error, Result};

/// What asking takes in memory that cannot be allocated fallibly.
const ASKING_BYTES: usize = 1 << 20;

pub(super) type SumFunction =
    unsafe extern "C" fn(values: *mut c_void, count: usize, is_double: i32, user_data: *mut c_void) -> i32;

/// The ranks of one training run, joined by a function of the host.
pub(super) struct HostReduce {
    rank: usize,
    ranks: usize,
    sum: Callback<SumFunction>,
    /// How a step reaches the thread that called it, while there is one.
    asking: Mutex<Option<Ask>>,
    /// The thread that the function runs on now; 0: it does not run.
    inside: AtomicUsize,
}

/// Numbers to be summed, and where to say how that went.
struct Request {
    values: *mut c_void,
    count: usize,
    is_double: i32,
    answer: Sender<i32>,
}

// SAFETY: who asks waits for the answer, and leaves the numbers alone until it comes.
unsafe impl Send for Request {}

/// Hands a request over. Valid until the step ends.
struct Ask(*const (dyn Fn(Request) + Sync));

// SAFETY: what it points to may be called from any thread, and outlives the step that calls it.
unsafe impl Send for Ask {}

impl HostReduce {
    pub(super) fn new(rank: usize, ranks: usize, sum: Callback<SumFunction>) -> Self {
        HostReduce { rank, ranks, sum, asking: Mutex::new(None), inside: AtomicUsize::new(0) }
    }

    /// Whether this is the host's function itself, which would wait for its own end.
    pub(super) fn called_by_itself(&self) -> bool {
        self.inside.load(Ordering::Acquire) == this_thread()
    }

    /// Runs a step on another thread; the sums that it asks for are made on this one.
    pub(super) fn serve<T: Send>(&self, step: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        reporting_with_reserve(
            "a sum over ranks",
            ASKING_BYTES,
            |say: &(dyn Fn(Request) + Sync)| {
                let say: *const (dyn Fn(Request) + Sync + '_) = say;
                // SAFETY: only the lifetime changes; the place is empty again before `say` ends.
                let ask =
                    Ask(unsafe { std::mem::transmute::<*const _, *const (dyn Fn(Request) + Sync)>(say) });
                let _lent = Lent::new(&self.asking, ask);
                step()
            },
            |request: Request| {
                let code = self.call(&request);
                // Who asked waits: the channel is open.
                let _ = request.answer.send(code);
            },
        )
    }

    fn call(&self, request: &Request) -> i32 {
        self.inside.store(this_thread(), Ordering::Release);
        let Request { values, count, is_double, .. } = *request;
        // SAFETY: the host gave the function with this user data and promised to keep both alive; the numbers are
        // the asking thread's, which waits.
        let code =
            hook::outside(|| unsafe { (self.sum.function)(values, count, is_double, self.sum.user_data) });
        self.inside.store(0, Ordering::Release);
        code
    }

    fn ask(&self, values: *mut c_void, count: usize, is_double: i32) -> Result<()> {
        let (answer, answered) = channel();
        {
            let asking = self.asking.lock().unwrap_or_else(PoisonError::into_inner);
            let Some(ask) = asking.as_ref() else {
                return Err(Error::internal("a sum over ranks", "asked for outside of a step"));
            };
            // SAFETY: `serve` takes it back before it ends, for which it needs the lock that is held here.
            unsafe { (*ask.0)(Request { values, count, is_double, answer }) };
        }
        match answered.recv() {
            Ok(0) => Ok(()),
            Ok(code) => {
                let reason = format!("the host's sum over ranks failed: its function returned {code}");
                Err(Error::io("sum over ranks", std::io::Error::other(reason)))
            }
            Err(_) => Err(Error::internal("a sum over ranks", "nobody answered")),
        }
    }
}

/// Takes the way to the calling thread back when it ends.
struct Lent<'a>(&'a Mutex<Option<Ask>>);

impl<'a> Lent<'a> {
    fn new(place: &'a Mutex<Option<Ask>>, ask: Ask) -> Self {
        *place.lock().unwrap_or_else(PoisonError::into_inner) = Some(ask);
        Lent(place)
    }
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

impl Reduce for HostReduce {
    fn ranks(&self) -> usize {
        self.ranks
    }

    fn rank(&self) -> usize {
        self.rank
    }

    fn sum_f64(&self, values: &mut [f64]) -> Result<()> {
        self.ask(values.as_mut_ptr().cast(), values.len(), 1)
    }

    fn sum_f32(&self, values: &mut [f32]) -> Result<()> {
        self.ask(values.as_mut_ptr().cast(), values.len(), 0)
    }
}

impl fmt::Debug for HostReduce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rank {} of {}, summed by the host", self.rank, self.ranks)
    }
}
