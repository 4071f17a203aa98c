//! The global allocator: the system's, and behind it the areas that serve what the system refuses.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::{Cell, UnsafeCell};
use std::marker::PhantomData;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

/// Most reserves at a time: pieces of guarded work, and used reserves of which a block is still alive.
const AREAS: usize = 1024;

/// The area that is part of the library. It serves every thread.
const EMERGENCY: usize = 0;
const EMERGENCY_BYTES: usize = 16 << 20;

/// The largest block of the emergency area. Code outside guarded work asks for no more without being able to fail:
/// the largest are texts of the caller, of up to 64 KiB, in messages, and lists of 65,536 handles of the caller.
const EMERGENCY_BLOCK: usize = 2 << 20;

/// Blocks start at multiples of this; areas are counted in it.
const UNIT: usize = 16;

/// Mappings are counted in this; every system's pages are multiples of it.
const PAGE: usize = 4096;

/// The largest reserve: `UNIT` times what [`Fill::next`] can count, less a margin for rounding.
const MAPPING_MAX: usize = 32 << 30;

/// The global allocator of programs with this library, unless they choose their own.
struct Guarded;

#[global_allocator]
static GUARDED: Guarded = Guarded;

/// An area that serves blocks, one after the other. The fields are atomics because a block may be freed anywhere.
struct Area {
    /// Taken by a [`Mapping`], or waiting for its last block to be freed.
    held: AtomicBool,
    /// Where the area lies, see [`pack_range`]. In one word: whoever frees a block of somebody else's reads it
    /// while it changes.
    range: AtomicU64,
    /// What is in use, see [`Fill`].
    fill: AtomicU64,
    used: AtomicBool,
    /// The area that this thread had at hand before.
    outer: AtomicUsize,
}

static TABLE: [Area; AREAS] = [const {
    Area {
        held: AtomicBool::new(false),
        range: AtomicU64::new(0),
        fill: AtomicU64::new(0),
        used: AtomicBool::new(false),
        outer: AtomicUsize::new(EMERGENCY),
    }
}; AREAS];

/// How many areas of the table, from its start, ever served a block. While it is 0, freeing costs one load more.
static EVER_USED: AtomicUsize = AtomicUsize::new(0);

#[repr(align(4096))]
struct Emergency(UnsafeCell<[u8; EMERGENCY_BYTES]>);
// SAFETY: never accessed as a whole; its blocks belong to those they were handed to.
unsafe impl Sync for Emergency {}
static EMERGENCY_AREA: Emergency = Emergency(UnsafeCell::new([0; EMERGENCY_BYTES]));

thread_local! {
    /// The innermost area that this thread has at hand. It needs no destructor: one would keep a host's thread
    /// from letting go of the library.
    static AT_HAND: Cell<usize> = const { Cell::new(EMERGENCY) };
}

/// What of an area is in use, in one word: who frees the last block also starts over, or frees the area.
#[derive(Clone, Copy)]
struct Fill {
    /// Where the next block starts, in units.
    next: u32,
    /// How many blocks are alive.
    alive: u32,
    /// Whether the mapping goes with the last block.
    abandoned: bool,
}

impl Fill {
    fn unpack(word: u64) -> Self {
        Fill { next: (word >> 32) as u32, alive: word as u32 >> 1, abandoned: word & 1 == 1 }
    }

    fn pack(self) -> u64 {
        u64::from(self.next) << 32 | u64::from(self.alive) << 1 | u64::from(self.abandoned)
    }
}

const PAGES_BITS: u32 = 28;

/// Address and length, both in pages; nothing if they are out of the range of a user's addresses.
fn pack_range(start: usize, bytes: usize) -> Option<u64> {
    let (first, pages) = ((start / PAGE) as u64, (bytes / PAGE) as u64);
    let fits = first >> (u64::BITS - PAGES_BITS) == 0 && pages >> PAGES_BITS == 0;
    fits.then_some(first << PAGES_BITS | pages)
}

fn unpack_range(range: u64) -> (usize, usize) {
    let pages = range & ((1 << PAGES_BITS) - 1);
    ((range >> PAGES_BITS) as usize * PAGE, pages as usize * PAGE)
}

fn contains(range: u64, address: usize) -> bool {
    let (start, bytes) = unpack_range(range);
    address.wrapping_sub(start) < bytes
}

impl Area {
    /// Changes the fill in one step and gives the fill before and after; nothing if `change` refuses.
    fn change(&self, change: impl Fn(Fill) -> Option<Fill>) -> Option<(Fill, Fill)> {
        let changed = |word| change(Fill::unpack(word)).map(Fill::pack);
        // Whoever reuses a block comes after whoever freed it.
        let before = self.fill.fetch_update(Ordering::AcqRel, Ordering::Acquire, changed).ok()?;
        let before = Fill::unpack(before);
        Some((before, change(before)?))
    }

    /// A block, or null if there is no room.
    fn take(&self, index: usize, layout: Layout) -> *mut u8 {
        let (start, bytes) = unpack_range(self.range.load(Ordering::Relaxed));
        let place = |fill: Fill| {
            let address = (start + fill.next as usize * UNIT).checked_next_multiple_of(layout.align())?;
            let end = (address - start).checked_add(layout.size())?;
            (end <= bytes).then_some((address, end.div_ceil(UNIT) as u32))
        };
        let taken = self.change(|fill| {
            let (_, next) = place(fill)?;
            Some(Fill { next, alive: fill.alive + 1, ..fill })
        });
        let Some((address, _)) = taken.and_then(|(before, _)| place(before)) else { return null_mut() };
        EVER_USED.fetch_max(index + 1, Ordering::Relaxed);
        std::ptr::with_exposed_provenance_mut(address)
    }

    /// Lets the last block grow where it is.
    fn extend(&self, block: *mut u8, old_bytes: usize, new_bytes: usize) -> bool {
        let (start, bytes) = unpack_range(self.range.load(Ordering::Relaxed));
        let offset = block.addr() - start;
        let grown = self.change(|fill| {
            let end = offset.checked_add(new_bytes)?;
            let last = (offset + old_bytes).div_ceil(UNIT) == fill.next as usize;
            (last && end <= bytes).then(|| Fill { next: end.div_ceil(UNIT) as u32, ..fill })
        });
        grown.is_some()
    }

    fn give_back(&self) {
        let changed = self.change(|fill| {
            let alive = fill.alive.saturating_sub(1);
            Some(Fill { next: if alive == 0 { 0 } else { fill.next }, alive, ..fill })
        });
        if changed.is_some_and(|(_, after)| after.alive == 0 && after.abandoned) {
            self.unmap();
        }
    }

    /// Frees mapping and place in the table. Called once, when there is neither a [`Mapping`] nor a block.
    fn unmap(&self) {
        // First out of the table: the system may give these addresses to somebody else at once.
        let (start, bytes) = unpack_range(self.range.swap(0, Ordering::AcqRel));
        // SAFETY: mapped in `Mapping::new`; nothing points into it any more.
        unsafe { libc::munmap(std::ptr::with_exposed_provenance_mut(start), bytes) };
        self.held.store(false, Ordering::Release);
    }
}

/// The area that a block lies in, if it is not the system's.
fn area_of(block: *mut u8) -> Option<usize> {
    match EVER_USED.load(Ordering::Relaxed) {
        0 => None,
        used => find(block, used),
    }
}

#[cold]
fn find(block: *mut u8, used: usize) -> Option<usize> {
    TABLE[..used].iter().position(|area| contains(area.range.load(Ordering::Relaxed), block.addr()))
}

/// A block that the system has refused, or null.
#[cold]
fn serve(layout: Layout) -> *mut u8 {
    // During the end of a thread as well: the cell has no destructor.
    let mut index = AT_HAND.with(Cell::get);
    while index != EMERGENCY {
        let area = &TABLE[index];
        area.used.store(true, Ordering::Relaxed);
        let block = area.take(index, layout);
        if !block.is_null() {
            return block;
        }
        index = area.outer.load(Ordering::Relaxed);
    }
    if layout.size() > EMERGENCY_BLOCK {
        return null_mut();
    }
    let area = &TABLE[EMERGENCY];
    let start = EMERGENCY_AREA.0.get().expose_provenance();
    let Some(range) = pack_range(start, EMERGENCY_BYTES) else { return null_mut() };
    // The same from every thread.
    area.range.store(range, Ordering::Relaxed);
    area.take(EMERGENCY, layout)
}

#[cfg(not(test))]
fn refuses(_bytes: usize) -> bool {
    false
}

#[cfg(test)]
pub(super) use refusal::{refuse_from, refuses};

/// Lets tests run out of memory.
#[cfg(test)]
mod refusal {
    use std::cell::Cell;

    thread_local! {
        static FROM: Cell<usize> = const { Cell::new(usize::MAX) };
    }

    /// From now on this thread is refused blocks of at least `bytes` bytes.
    pub fn refuse_from(bytes: usize) {
        FROM.with(|from| from.set(bytes));
    }

    pub fn refuses(bytes: usize) -> bool {
        bytes >= FROM.with(Cell::get)
    }
}

// SAFETY: every block is the system's or lies in an area, which the table tells apart for as long as the block lives;
// areas hand out disjoint, aligned blocks that stay mapped while they are counted.
unsafe impl GlobalAlloc for Guarded {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if !refuses(layout.size()) {
            // SAFETY: the caller's promise is the one that is asked for.
            let block = unsafe { System.alloc(layout) };
            if !block.is_null() {
                return block;
            }
        }
        serve(layout)
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if !refuses(layout.size()) {
            // SAFETY: the caller's promise is the one that is asked for.
            let block = unsafe { System.alloc_zeroed(layout) };
            if !block.is_null() {
                return block;
            }
        }
        let block = serve(layout);
        if !block.is_null() {
            // SAFETY: the block has this size.
            unsafe { block.write_bytes(0, layout.size()) };
        }
        block
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        match area_of(block) {
            Some(index) => TABLE[index].give_back(),
            // SAFETY: no area's, so the system's; the rest the caller promises.
            None => unsafe { System.dealloc(block, layout) },
        }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, new_bytes: usize) -> *mut u8 {
        let area = area_of(block);
        match area {
            Some(_) if new_bytes <= layout.size() => return block,
            Some(index) => {
                let at_hand = AT_HAND.with(Cell::get) == index;
                if at_hand && TABLE[index].extend(block, layout.size(), new_bytes) {
                    return block;
                }
            }
            None if refuses(new_bytes) => {}
            None => {
                // SAFETY: the system's block; the rest the caller promises.
                let moved = unsafe { System.realloc(block, layout, new_bytes) };
                if !moved.is_null() {
                    return moved;
                }
            }
        }
        // SAFETY: the caller promises that the new size makes a valid layout.
        let wanted = unsafe { Layout::from_size_align_unchecked(new_bytes, layout.align()) };
        let moved = match area {
            // SAFETY: the caller promises a size above zero.
            Some(_) => unsafe { self.alloc(wanted) },
            None => serve(wanted),
        };
        if !moved.is_null() {
            // SAFETY: both blocks have that many bytes and do not overlap; the old one is then let go of as it was
            // made.
            unsafe {
                moved.copy_from_nonoverlapping(block, layout.size().min(new_bytes));
                self.dealloc(block, layout);
            }
        }
        moved
    }
}

/// The system's memory and no other.
///
/// # Safety
/// As [`GlobalAlloc::alloc`].
pub(super) unsafe fn allocate(layout: Layout) -> *mut u8 {
    if refuses(layout.size()) {
        return null_mut();
    }
    // SAFETY: the caller's promise is the one that is asked for.
    unsafe { System.alloc(layout) }
}

/// # Safety
/// The block is one of [`allocate`], with the same layout.
pub(super) unsafe fn free(block: *mut u8, layout: Layout) {
    // SAFETY: as the caller promises.
    unsafe { System.dealloc(block, layout) }
}

/// A mapped area. Dropping it leaves the area to the blocks in it that are still alive.
#[derive(Debug)]
pub(super) struct Mapping {
    index: usize,
}

impl Mapping {
    /// Nothing if there is no address space or the table is full.
    pub(super) fn new(bytes: usize) -> Option<Self> {
        let bytes = bytes.checked_next_multiple_of(PAGE).filter(|bytes| *bytes <= MAPPING_MAX)?;
        let free =
            |area: &Area| !area.held.load(Ordering::Relaxed) && !area.held.swap(true, Ordering::Acquire);
        let index = EMERGENCY + 1 + TABLE[EMERGENCY + 1..].iter().position(free)?;
        let area = &TABLE[index];
        // SAFETY: a new private mapping wherever the system likes.
        let start = unsafe {
            libc::mmap(
                null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        let range =
            if start == libc::MAP_FAILED { None } else { pack_range(start.expose_provenance(), bytes) };
        let Some(range) = range else {
            if start != libc::MAP_FAILED {
                // SAFETY: mapped above; nobody has it yet.
                unsafe { libc::munmap(start, bytes) };
            }
            area.held.store(false, Ordering::Release);
            return None;
        };
        area.fill.store(Fill { next: 0, alive: 0, abandoned: false }.pack(), Ordering::Relaxed);
        area.used.store(false, Ordering::Relaxed);
        area.range.store(range, Ordering::Release);
        Some(Mapping { index })
    }

    /// Has this thread use the area until the guard is dropped. One thread at a time.
    pub(super) fn enter(&self) -> Inside {
        let outer = AT_HAND.with(Cell::get);
        let mut inner = outer;
        while inner != EMERGENCY && inner != self.index {
            inner = TABLE[inner].outer.load(Ordering::Relaxed);
        }
        if inner == EMERGENCY {
            // Not at hand yet.
            TABLE[self.index].outer.store(outer, Ordering::Relaxed);
            AT_HAND.with(|at_hand| at_hand.set(self.index));
        }
        Inside { outer, not_send: PhantomData }
    }

    pub(super) fn was_used(&self) -> bool {
        TABLE[self.index].used.load(Ordering::Relaxed)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        let area = &TABLE[self.index];
        let changed = area.change(|fill| Some(Fill { abandoned: true, ..fill }));
        if changed.is_some_and(|(_, after)| after.alive == 0) {
            area.unmap();
        }
    }
}

/// While it lives, the thread that made it has an area at hand.
pub(super) struct Inside {
    outer: usize,
    not_send: PhantomData<*const ()>,
}

impl Drop for Inside {
    fn drop(&mut self) {
        AT_HAND.with(|at_hand| at_hand.set(self.outer));
    }
}

/// How many areas are taken.
#[cfg(test)]
pub(super) fn areas_held() -> usize {
    TABLE.iter().filter(|area| area.held.load(Ordering::Relaxed)).count()
}
