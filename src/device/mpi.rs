//! The processes that `mpirun` started, as [ranks](Reduce).

use std::ffi::{c_char, c_int, c_void};
use std::fmt;
use std::mem::ManuallyDrop;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use mpi::Threading;
use mpi::environment::{Universe, initialize_with_threading};
use mpi::ffi;
use mpi::topology::{Communicator, SimpleCommunicator};

use super::Reduce;
use crate::error::{Error, Result};

/// Numbers of one message: bounds the memory of a copy, and counts of MPI are 32 bits wide.
const MESSAGE: usize = 4 << 20;

/// What [`MpiRanks::abort`] ends the processes with.
const ABORTED: c_int = 1;

/// All processes of one `mpirun`. Statistics and gradients have a communicator each, so that both can be summed at
/// the same time where MPI may be called by several threads.
///
/// A failed call is an [`Error`] where MPI returns from it. It cannot where a process has ended: `mpirun` then ends
/// all others, and without it they wait for ever. An error in one process alone leaves the others waiting for it in
/// their next sum, so a program must end with [`MpiRanks::abort`] then.
///
/// Dropping the last owner ends MPI, for good, and waits for the other processes to come to that as well; it is to be
/// done on the thread that called [`MpiRanks::start`].
pub struct MpiRanks {
    ranks: usize,
    rank: usize,
    statistics: Mutex<Link>,
    /// Of its own only if several threads may call MPI.
    gradients: Option<Mutex<Link>>,
    /// A sum has failed: ranks may be at different places since, so nothing is summed any more.
    broken: AtomicBool,
    /// Dropped to end MPI, unless something failed.
    universe: ManuallyDrop<Universe>,
}

impl MpiRanks {
    /// Starts MPI and finds the other processes. To be called by the program's first thread, once.
    ///
    /// # Errors
    /// `Unsupported` if MPI runs already, or may be called by its first thread only; `Device` if it fails.
    pub fn start() -> Result<Self> {
        let Some((universe, threading)) = initialize_with_threading(Threading::Multiple) else {
            return Err(Error::unsupported("starting MPI again", "it is started once per process"));
        };
        if threading < Threading::Serialized {
            let reason = format!("this MPI offers {threading:?}, and steps run on threads of their own");
            return Err(Error::unsupported("training over MPI", reason));
        }
        let world = universe.world();
        let [ranks, rank] = [world.size(), world.rank()].map(|number| number as usize);
        let duplicate = || Link::new().map(Mutex::new).map_err(|reason| failed(rank, ranks, reason));
        let statistics = duplicate()?;
        let gradients = if threading == Threading::Multiple { Some(duplicate()?) } else { None };
        let universe = ManuallyDrop::new(universe);
        Ok(MpiRanks { ranks, rank, statistics, gradients, broken: AtomicBool::new(false), universe })
    }

    /// Ends this process and all others, with status 1: what is left to do after an error that they cannot know of.
    pub fn abort(&self) -> ! {
        SimpleCommunicator::world().abort(ABORTED)
    }

    fn sum<T: Copy>(&self, link: &Mutex<Link>, values: &mut [T], kind: ffi::MPI_Datatype) -> Result<()> {
        let link = link.lock().unwrap_or_else(PoisonError::into_inner);
        if self.broken.load(Ordering::Relaxed) {
            return Err(failed(self.rank, self.ranks, "an earlier sum over the ranks failed".into()));
        }
        let mut copy = Vec::new();
        for message in values.chunks_mut(MESSAGE) {
            copy.clear();
            copy.try_reserve(message.len())
                .map_err(|_| Error::out_of_memory("a sum over ranks", size_of_val(message)))?;
            copy.extend_from_slice(message);
            link.sum(&copy, message, kind).map_err(|reason| {
                self.broken.store(true, Ordering::Relaxed);
                failed(self.rank, self.ranks, reason)
            })?;
        }
        Ok(())
    }
}

impl Reduce for MpiRanks {
    fn ranks(&self) -> usize {
        self.ranks
    }

    fn rank(&self) -> usize {
        self.rank
    }

    fn sum_f64(&self, values: &mut [f64]) -> Result<()> {
        // SAFETY: a constant once MPI runs.
        self.sum(&self.statistics, values, unsafe { ffi::RSMPI_DOUBLE })
    }

    fn sum_f32(&self, values: &mut [f32]) -> Result<()> {
        // SAFETY: a constant once MPI runs.
        self.sum(self.gradients.as_ref().unwrap_or(&self.statistics), values, unsafe { ffi::RSMPI_FLOAT })
    }

    fn concurrent(&self) -> bool {
        self.gradients.is_some()
    }
}

impl Drop for MpiRanks {
    fn drop(&mut self) {
        // Ending MPI waits for all. After a failure they may never come, and a process that leaves without ending MPI
        // is what `mpirun` ends the others for.
        if !self.broken.load(Ordering::Relaxed) && !std::thread::panicking() {
            // SAFETY: dropped here only, and not used afterwards.
            unsafe { ManuallyDrop::drop(&mut self.universe) };
        }
    }
}

impl fmt::Debug for MpiRanks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MpiRanks({} of {})", self.rank, self.ranks)
    }
}

/// A communicator of all processes for one kind of sum.
struct Link(ffi::MPI_Comm);

// SAFETY: a handle that any thread may pass to MPI; `MpiRanks` has it used by one at a time.
unsafe impl Send for Link {}

impl Link {
    /// A duplicate of the world whose errors are returned.
    fn new() -> Result<Self, String> {
        // SAFETY: MPI runs, and all processes duplicate the world equally often, in `start`. The handle is written by
        // the call before it is used.
        unsafe {
            let mut own = ffi::RSMPI_COMM_NULL;
            checked(ffi::MPI_Comm_dup(ffi::RSMPI_COMM_WORLD, &mut own))?;
            checked(ffi::MPI_Comm_set_errhandler(own, ffi::RSMPI_ERRORS_RETURN))?;
            Ok(Link(own))
        }
    }

    /// `sums[i]` = sum of all processes' `values[i]`.
    fn sum<T: Copy>(&self, values: &[T], sums: &mut [T], kind: ffi::MPI_Datatype) -> Result<(), String> {
        let count = c_int::try_from(values.len().min(sums.len())).map_err(|error| error.to_string())?;
        let from = values.as_ptr().cast::<c_void>();
        let to = sums.as_mut_ptr().cast::<c_void>();
        // SAFETY: both hold `count` numbers of `kind`, which the callers take from `T`, and do not overlap.
        checked(unsafe { ffi::MPI_Allreduce(from, to, count, kind, ffi::RSMPI_SUM, self.0) })
    }
}

/// What MPI says of a status that is not success.
fn checked(status: c_int) -> Result<(), String> {
    if status == ffi::MPI_SUCCESS as c_int {
        return Ok(());
    }
    let mut text = [0u8; ffi::MPI_MAX_ERROR_STRING as usize + 1];
    let mut length: c_int = 0;
    // SAFETY: the text has the room that the standard asks for.
    unsafe { ffi::MPI_Error_string(status, text.as_mut_ptr().cast::<c_char>(), &mut length) };
    let text = text.get(..usize::try_from(length).unwrap_or(0)).unwrap_or_default();
    Err(format!("MPI error {status}: {}", String::from_utf8_lossy(text)))
}

fn failed(rank: usize, ranks: usize, reason: String) -> Error {
    Error::Device { device: format!("rank {rank} of {ranks}"), reason }
}
