//! Several small copies in one launch.

use super::kernels;
use super::stream::{Launch, Parameter, Stream};
use crate::error::Result;

kernels!(KERNELS, "copy");

/// As the source has it.
const MOST_COPIES: usize = 64;
const THREADS: usize = 256;
/// Of one copy: a thread then moves a few words.
const MOST_BLOCKS: usize = 64;
const BYTES_PER_BLOCK: usize = 4 * THREADS;

/// One of several copies within a device.
#[derive(Debug, Clone, Copy)]
pub struct Copy {
    /// Address of the first byte.
    pub from: u64,
    /// Address that it goes to.
    pub to: u64,
    /// How many.
    pub bytes: usize,
}

/// As the kernel declares it.
#[repr(C)]
#[derive(Clone, Copy)]
struct Copies {
    from: [u64; MOST_COPIES],
    to: [u64; MOST_COPIES],
    bytes: [u64; MOST_COPIES],
}

// SAFETY: three arrays of 64-bit numbers, as in the source.
unsafe impl Parameter for Copies {}

impl Stream {
    /// Copies runs of bytes.
    ///
    /// # Safety
    /// All addresses have as many bytes as is said; no target overlaps a source or another target.
    ///
    /// # Errors
    /// `Device`.
    pub unsafe fn copy_all(&self, copies: &[Copy]) -> Result<()> {
        for some in copies.chunks(MOST_COPIES) {
            let zero = [0; MOST_COPIES];
            let mut parameter = Copies { from: zero, to: zero, bytes: zero };
            for (i, copy) in some.iter().enumerate() {
                (parameter.from[i], parameter.to[i]) = (copy.from, copy.to);
                parameter.bytes[i] = copy.bytes as u64;
            }
            let longest = some.iter().map(|copy| copy.bytes).max().unwrap_or(0);
            let blocks = longest.div_ceil(BYTES_PER_BLOCK).clamp(1, MOST_BLOCKS);
            let launch = Launch {
                grid: [blocks as u32, some.len() as u32, 1],
                block: [THREADS as u32, 1, 1],
                shared_bytes: 0,
            };
            // SAFETY: as the kernel declares; the addresses are good by this function's contract.
            unsafe { self.launch(&KERNELS, "copy_all", None, launch, &[&parameter])? };
        }
        Ok(())
    }
}
