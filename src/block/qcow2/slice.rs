//! L2 slices in memory: who may look at one, change it, and throw it away.
//!
//! A slice is found through the [`Directory`] with one Acquire load, and its entry is read with another:
//! no lock, no reference count. What keeps it alive:
//!
//! - **Looking** is done between two awaits only (the closure of [`Directory::with`] cannot await).
//!   An unlinked slice is freed when every reactor has passed a quiescent point
//!   ([`crate::reactor::Epochs`]).
//! - **Changing** needs a pin ([`Pinned`]). A pinned slice is never unlinked, so a change cannot get lost
//!   in a slice that was replaced by a freshly loaded one.
//! - **Unlinking** needs the slice to be clean and without pins ([`Marks::begin_evict`]).
//!
//! An entry takes four bytes ([`code`]). What does not fit is kept in full in the slice's spill, which is
//! made when it is first needed. In images with extended L2 entries a slice has its bitmaps, too. A slice that
//! is loaded as one run, its clusters one behind the other, is a *row*: it has the first entry's code and no
//! other, until an entry is replaced. An image that was converted, or written from front to back, is made of
//! such slices.

use std::ptr::{NonNull, null_mut, slice_from_raw_parts_mut};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, Ordering};

use super::code;
use super::entry;
use super::marks::Marks;
pub(super) use super::marks::{DIRTY, ORDERED};
use super::room::Room;
use super::units::Geometry;

/// In `changing`: a pair is being published. Bits 1 to 15 say at which entry; those above count.
const CHANGING: u64 = 1;
const CHANGES: u64 = 1 << 16;

/// What an allocation costs besides its own size, at most.
const BOX_BYTES: usize = 16;

/// What all slices of an image have in common.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    cluster_bits: u8,
    /// A power of two, 64 to 512.
    entries: u16,
    /// Each entry has a bitmap.
    extended: bool,
}

impl Shape {
    pub(super) fn new(g: &Geometry) -> Self {
        Self {
            cluster_bits: g.cluster_bits as u8,
            entries: 1 << g.slice_bits(),
            extended: g.extended_l2,
        }
    }

    fn entries(self) -> usize {
        self.entries.into()
    }

    /// Memory that a slice without a spill takes.
    pub(super) fn bytes(self) -> usize {
        let bitmaps = if self.extended { self.table_bytes() } else { 0 };
        size_of::<Thin>() + self.entries() * size_of::<AtomicU32>() + BOX_BYTES + bitmaps
    }

    /// Memory of a spill, or of the bitmaps.
    fn table_bytes(self) -> usize {
        self.entries() * size_of::<AtomicU64>() + BOX_BYTES
    }

    fn table(self) -> Box<[AtomicU64]> {
        (0..self.entries()).map(|_| AtomicU64::new(0)).collect()
    }

    /// Memory of the codes of what was a row.
    fn apart_bytes(self) -> usize {
        self.entries() * size_of::<AtomicU32>() + size_of::<Box<[AtomicU32]>>() + 2 * BOX_BYTES
    }
}

/// A piece of an L2 table.
pub(super) type Slice = SliceOf<[AtomicU32]>;
/// The same without its entries: as many as there are behind it.
type Thin = SliceOf<[AtomicU32; 0]>;

/// A slice with its entries in the same allocation.
#[derive(Debug)]
#[repr(C)]
pub(super) struct SliceOf<Codes: ?Sized> {
    /// Number of the slice, over the whole virtual disk.
    pub(super) index: u64,
    marks: Marks,
    /// Looked at since the clock's hand passed.
    used: AtomicBool,
    shape: Shape,
    /// Entries that have no code of their own; what the file says where the code is [`code::BAD`].
    spill: OnceLock<Box<[AtomicU64]>>,
    /// Of extended L2 entries.
    bitmaps: Option<Box<[AtomicU64]>>,
    /// Held by who publishes an entry together with its bitmap.
    changing: AtomicU64,
    /// Codes behind this: those of all entries, or none in a row.
    here: u32,
    /// Of a row: the code of the first entry.
    first: u32,
    /// The codes of what was a row when it was loaded. In a box of its own to take no more of every slice.
    apart: OnceLock<Box<Box<[AtomicU32]>>>,
    codes: Codes,
}

impl Slice {
    /// A slice with entries and bitmaps as the file has them; `check` says which may be used.
    pub(super) fn new(
        index: u64,
        shape: Shape,
        raw: impl Iterator<Item = (u64, u64)>,
        check: impl Fn(usize, u64, u64) -> bool,
    ) -> Box<Self> {
        let slice: Box<Self> = match shape.entries() {
            0..=64 => Self::empty::<64>(index, shape),
            65..=128 => Self::empty::<128>(index, shape),
            129..=256 => Self::empty::<256>(index, shape),
            _ => Self::empty::<512>(index, shape),
        };
        for (at, (raw, bitmap)) in raw.enumerate().take(shape.entries()) {
            if check(at, raw, bitmap) {
                slice.store(at, raw);
            } else {
                slice.spill()[at].store(raw, Ordering::Relaxed);
                slice.codes[at].store(code::BAD, Ordering::Relaxed);
            }
            if let Some(bitmaps) = &slice.bitmaps {
                bitmaps[at].store(bitmap, Ordering::Relaxed);
            }
        }
        match slice.is_row() {
            true => Self::row(&slice),
            false => slice,
        }
    }

    /// Whether its clusters lie one behind the other. Not one without clusters: it is likely to get some.
    fn is_row(&self) -> bool {
        let code = |at: usize| self.codes[at].load(Ordering::Relaxed);
        let follows = |at| code::follows(code(at - 1), code(at));
        !self.shape.extended && code::has_cluster(code(0)) && (1..self.codes.len()).all(follows)
    }

    fn row(of: &Self) -> Box<Self> {
        let mut row = Self::empty::<0>(of.index, of.shape);
        row.first = of.code(0);
        row
    }

    fn empty<const N: usize>(index: u64, shape: Shape) -> Box<SliceOf<[AtomicU32; N]>> {
        Box::new(SliceOf {
            index,
            here: N as u32,
            first: 0,
            apart: OnceLock::new(),
            marks: Marks::default(),
            used: AtomicBool::new(true),
            shape,
            spill: OnceLock::new(),
            bitmaps: shape.extended.then(|| shape.table()),
            changing: AtomicU64::new(0),
            codes: [const { AtomicU32::new(0) }; N],
        })
    }

    /// Memory that the slice takes.
    pub(super) fn bytes(&self) -> usize {
        let spill = self.spill.get().map_or(0, |_| self.shape.table_bytes());
        let apart = self.apart.get().map_or(0, |_| self.shape.apart_bytes());
        let codes = (self.shape.entries() - self.codes.len()) * size_of::<AtomicU32>();
        self.shape.bytes() - codes + apart + spill
    }

    // ---- entries ----

    /// The raw entry, in host byte order.
    #[inline]
    pub(super) fn get(&self, at: usize) -> u64 {
        self.decoded(at, self.code(at))
    }

    #[inline]
    fn code(&self, at: usize) -> u32 {
        match self.codes.get(at) {
            Some(code) => code.load(Ordering::Acquire),
            None => self.code_of_row(at),
        }
    }

    fn code_of_row(&self, at: usize) -> u32 {
        match self.apart.get() {
            Some(codes) => codes
                .get(at)
                .map_or(code::BAD, |code| code.load(Ordering::Acquire)),
            None => code::behind(self.first, at as u32),
        }
    }

    /// Where the code of an entry that is to be replaced is, and the bytes of memory that making it took.
    fn own_code(&self, at: usize) -> (&AtomicU32, usize) {
        if let Some(code) = self.codes.get(at) {
            return (code, 0);
        }
        let mut taken = 0;
        let codes = self.apart.get_or_init(|| {
            taken = self.shape.apart_bytes();
            let code = |at| AtomicU32::new(code::behind(self.first, at));
            Box::new((0..u32::from(self.shape.entries)).map(code).collect())
        });
        (&codes[at], taken)
    }

    /// How many entries from `at` on, at most `wanted`, are as the first one. `same` gets the distance from
    /// the first; it must say yes to an entry that goes on as the one before it did: with the same flags,
    /// in the next host cluster.
    #[inline]
    pub(super) fn run(&self, at: usize, wanted: usize, same: impl Fn(usize, u64) -> bool) -> usize {
        // What the caller has seen of the first entry may be gone: only what `same` was asked about counts.
        let mut before = code::BAD;
        for n in 1..wanted {
            let code = self.code(at + n);
            if !code::follows(before, code) && !same(n, self.decoded(at + n, code)) {
                return n;
            }
            before = code;
        }
        wanted.max(1)
    }

    #[inline]
    fn decoded(&self, at: usize, code: u32) -> u64 {
        if code::is_plain(code) {
            code::plain(code, self.shape.cluster_bits.into())
        } else {
            self.get_special(at, code)
        }
    }

    /// The code may have changed between the loads of it and of the spill, and the spill with it: what
    /// is in the spill is the entry only if it still is when the spill was read. (A spilled entry that
    /// another spilled one replaces is one store, to the spill.)
    #[cold]
    fn get_special(&self, at: usize, mut code: u32) -> u64 {
        while code == code::SPILLED {
            let raw = self.spill()[at].load(Ordering::Acquire);
            pause();
            code = self.code(at);
            if code == code::SPILLED {
                return raw;
            }
        }
        code::raw(code, self.shape.cluster_bits.into())
    }

    /// The bitmap of an extended entry, else 0. For an entry and its bitmap together, [`Slice::look`].
    pub(super) fn bitmap(&self, at: usize) -> u64 {
        self.bitmaps
            .as_ref()
            .map_or(0, |bitmaps| bitmaps[at].load(Ordering::Acquire))
    }

    /// An entry and its bitmap as they were published together.
    #[inline]
    pub(super) fn look(&self, at: usize) -> (u64, u64) {
        let Some(bitmaps) = &self.bitmaps else {
            return (self.get(at), 0);
        };
        let mine = (at as u64) << 1 | CHANGING;
        let mut turns = 0u32;
        loop {
            // Acquire, all of them: they happen in this order. Who sees something new of a pair sees
            // here that it was being changed.
            let before = self.changing.load(Ordering::Acquire);
            if before & (CHANGES - 1) != mine {
                let bitmap = bitmaps[at].load(Ordering::Acquire);
                pause();
                let raw = self.get(at);
                pause();
                if self.changing.load(Ordering::Acquire) == before {
                    return (raw, bitmap);
                }
            }
            wait_a_little(&mut turns);
        }
    }

    /// Publishes an entry that the caller has claimed, and its bitmap: [`Slice::look`] finds both or
    /// none of them. Returns how many bytes of memory that took.
    pub(super) fn publish_pair(&self, at: usize, raw: u64, bitmap: u64) -> usize {
        let Some(bitmaps) = &self.bitmaps else {
            return self.store(at, raw);
        };
        let mut turns = 0u32;
        let mut count = self.changing.load(Ordering::Relaxed);
        loop {
            // Acquire: what the one before published is older than what comes now.
            let free = count & !(CHANGES - 1);
            let mine = free | (at as u64) << 1 | CHANGING;
            match self.changing.compare_exchange_weak(
                free,
                mine,
                Ordering::Acquire,
                Ordering::Relaxed,
            ) {
                Ok(_) => {
                    count = free;
                    break;
                }
                Err(now) => count = now,
            }
            wait_a_little(&mut turns);
        }
        // Both are Release: who sees one of them sees that the pair is being changed, or that it was.
        let taken = self.store(at, raw);
        pause();
        bitmaps[at].store(bitmap, Ordering::Release);
        self.changing
            .store(count.wrapping_add(CHANGES), Ordering::Release);
        taken
    }

    fn store(&self, at: usize, raw: u64) -> usize {
        let code = code::of(raw, self.shape.cluster_bits.into());
        let before = self.spill.get().is_some();
        if code == code::SPILLED {
            self.spill()[at].store(raw, Ordering::Release);
        }
        let (own, taken) = self.own_code(at);
        pause();
        own.store(code, Ordering::Release);
        match (before, code) {
            (true, code::BAD) => {
                // Nothing of the file's stands for it any more.
                self.spill()[at].store(0, Ordering::Release);
                taken
            }
            (false, code::SPILLED) => taken + self.shape.table_bytes(),
            _ => taken,
        }
    }

    fn spill(&self) -> &[AtomicU64] {
        self.spill.get_or_init(|| self.shape.table())
    }

    #[inline]
    pub(super) fn touch(&self) {
        if !self.used.load(Ordering::Relaxed) {
            self.used.store(true, Ordering::Relaxed);
        }
    }

    pub(super) fn take_used(&self) -> bool {
        self.used.swap(false, Ordering::Relaxed)
    }

    /// See [`Marks::set_dirty`].
    pub(super) fn set_dirty(&self, flags: u8) -> u8 {
        self.marks.set_dirty(flags)
    }

    /// See [`Marks::note_order`].
    pub(super) fn note_order(&self, ordered: bool) {
        self.marks.note_order(ordered);
    }

    /// See [`Marks::is_ordered`].
    pub(super) fn is_ordered(&self) -> bool {
        self.marks.is_ordered()
    }

    /// See [`Marks::take_dirty`].
    pub(super) fn take_dirty(&self) -> u8 {
        self.marks.take_dirty()
    }

    /// See [`Marks::begin_evict`].
    pub(super) fn begin_evict(&self) -> bool {
        self.marks.begin_evict()
    }

    /// Copies the entries as the file has them, big-endian. A bad entry is what it was when the slice was
    /// loaded; an incomplete cluster, which the file does not know, has its `old` entry.
    pub(super) fn encode(&self, to: &mut [u8], old: impl Fn(u32) -> u64) {
        let bytes = if self.bitmaps.is_some() { 16 } else { 8 };
        for (at, to) in to
            .chunks_exact_mut(bytes)
            .enumerate()
            .take(self.shape.entries())
        {
            let (mut raw, bitmap) = self.look(at);
            if raw == entry::BAD {
                let spill = self.spill.get();
                raw = spill.map_or(0, |spill| spill[at].load(Ordering::Acquire));
            } else if let Some(index) = entry::incomplete_index(raw) {
                raw = old(index);
            }
            let (entry, extension) = to.split_at_mut(8);
            entry.copy_from_slice(&raw.to_be_bytes());
            if !extension.is_empty() {
                extension.copy_from_slice(&bitmap.to_be_bytes());
            }
        }
    }
}

/// Publishing a pair is a matter of a few instructions, unless the thread that does it has lost its CPU.
#[cold]
fn wait_a_little(turns: &mut u32) {
    *turns += 1;
    if *turns % 64 == 0 {
        std::thread::yield_now();
    } else {
        std::hint::spin_loop();
    }
}

/// A slice that is not unlinked before this is dropped.
#[derive(Debug)]
pub(super) struct Pinned(NonNull<Slice>);

// SAFETY: a slice is Sync, and the pin keeps it alive wherever it goes.
unsafe impl Send for Pinned {}
// SAFETY: as above.
unsafe impl Sync for Pinned {}

impl std::ops::Deref for Pinned {
    type Target = Slice;
    fn deref(&self) -> &Slice {
        // SAFETY: pinned slices are neither unlinked nor freed.
        unsafe { self.0.as_ref() }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        self.marks.unpin();
    }
}

/// All slices of the virtual disk, loaded or not: one word each, in pages that cost nothing before
/// something in them is loaded.
#[derive(Debug)]
pub(super) struct Directory {
    words: Room<AtomicPtr<Thin>>,
}

impl Directory {
    /// Room for `len` slices; none if there is no memory for that.
    pub(super) fn new(len: u64) -> Option<Self> {
        Some(Self {
            words: Room::new(len)?,
        })
    }

    /// Slices that there is room for.
    pub(super) fn len(&self) -> u64 {
        self.words.len() as u64
    }

    /// The slice at a word's address, if there is one.
    ///
    /// # Safety
    /// The slice has not been freed.
    #[inline]
    unsafe fn whole(slice: *mut Thin) -> Option<NonNull<Slice>> {
        // SAFETY: null, or of the caller's promise. Only a part is looked at that never changes.
        let codes = unsafe { slice.as_ref()? }.here as usize;
        NonNull::new(slice_from_raw_parts_mut(slice.cast::<AtomicU32>(), codes) as *mut Slice)
    }

    /// Looks at a slice, if it is loaded. On a reactor's thread only, in a task or in `block_on`.
    #[inline]
    pub(super) fn with<R>(&self, index: u64, look: impl FnOnce(&Slice) -> R) -> Option<R> {
        let slice = self.words.get(index)?.load(Ordering::Acquire);
        // SAFETY: a slice that could be found is freed only after this thread's next quiescent point,
        // and `look` cannot get there: it does not await. It has as many codes as it says.
        unsafe { Self::whole(slice).map(|slice| look(slice.as_ref())) }
    }

    /// Pins a slice, if it is loaded.
    pub(super) fn pin(&self, index: u64) -> Option<Pinned> {
        loop {
            match self.with(index, |slice| {
                slice.marks.pin().then(|| Pinned(NonNull::from(slice)))
            }) {
                Some(Some(pinned)) => return Some(pinned),
                // Being unlinked, or found dirty and left alone: a matter of a few instructions.
                Some(None) => std::thread::yield_now(),
                None => return None,
            }
        }
    }

    /// Makes a slice findable. Only its one loader does this.
    pub(super) fn link(&self, slice: Box<Slice>) {
        if let Some(word) = self.words.get(slice.index) {
            word.store(Box::into_raw(slice).cast::<Thin>(), Ordering::Release);
        }
    }

    /// The opposite, for a slice on which [`Marks::begin_evict`] succeeded.
    pub(super) fn unlink(&self, index: u64) -> Option<Box<Slice>> {
        let slice = self.words.get(index)?.swap(null_mut(), Ordering::AcqRel);
        // SAFETY: it came from `Box::into_raw` in `link`, of a box with as many codes as it says,
        // and the swap gives it out once. Threads may still look at it: the caller keeps the box until
        // they have passed a quiescent point.
        unsafe { Self::whole(slice).map(|slice| Box::from_raw(slice.as_ptr())) }
    }
}

/// Where another thread may come between, tests have it come.
#[cfg(not(test))]
#[inline(always)]
fn pause() {}
#[cfg(test)]
use tests::pause;

#[cfg(test)]
#[path = "tests/slice.rs"]
mod tests;
