//! The L1 table and the cache of L2 slices.
//!
//! `docs/interop/qcow2.rst`, section "Cluster mapping". The L1 table is in memory as a whole; slices are
//! loaded at their first use and thrown away by a clock when there are more than the limit. An L1 entry
//! changes once at most: from 0 to a new table of zeros, or from a table that is shared with snapshots to a
//! copy of it (`snapshots`). Either way slices that are in memory, or being loaded, stay right: what the
//! new table says is what the entry led to before.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::future::poll_fn;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use super::alloc::Allocator;
use super::claim::Claims;
use super::entry;
use super::extended;
use super::header::{Header, MAX_HOST_OFFSET, MAX_L1_BYTES};
use super::l1::{check_l1, read_l1};
use super::room::Room;
use super::slice::{DIRTY, Directory, ORDERED, Pinned, Shape, Slice};
use super::snapshots::{Held, merge, overlaps};
use super::units::{Geometry, GuestCluster, HostCluster, HostOffset};
use crate::block::error::{Error, ErrorKind, Result};
use crate::block::storage::Storage;
use crate::reactor::{Epoch, Io};

/// L1 entries are written in pieces of this many bytes at most.
const L1_UNIT: u64 = 4096;
/// Slices that an image may grow to, if it has not more: 1 PiB in clusters of 64 KiB. They cost addresses,
/// no memory.
const MAX_SLICES: u64 = 1 << 25;
/// Slices that may be in memory whatever the limit.
const MIN_SLICES: usize = 4;

/// Locks a mutex that guards plain data: a panic elsewhere has left nothing half done.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// L1 and L2 of one image.
#[derive(Debug)]
pub(super) struct Tables {
    pub(super) geometry: Geometry,
    version: u32,
    size: AtomicU64,
    /// With room for the largest table that the image may grow to. Behind the table's end are zeros.
    l1: Room<AtomicU64>,
    /// The table in the file: byte offset and entries.
    l1_offset: AtomicU64,
    l1_entries: AtomicU64,
    /// Header, L1 table and L2 tables as they were when the image was opened; what becomes of them in an
    /// image that is written to, the allocator knows. In host clusters, ascending, not overlapping.
    fixed: Vec<Range<u64>>,
    /// What snapshots need, also of what the active disk has no more. Empty in an image that is only read.
    snapshots: Vec<Range<u64>>,
    directory: Directory,
    /// Loaded slices, in the order of the clock; its hand is at the front.
    clock: Mutex<VecDeque<u64>>,
    loaded: AtomicUsize,
    /// Memory of the loaded slices, and how much it may be. In bytes.
    memory: AtomicUsize,
    limit: usize,
    shape: Shape,
    graveyard: Mutex<Vec<(Epoch, Box<Slice>)>>,
    dirty: Mutex<Dirty>,
    loading: Mutex<HashMap<u64, Vec<Waker>>>,
    pub(super) claims: Claims,
}

/// What differs from the file.
#[derive(Debug, Default)]
pub(super) struct Dirty {
    pub(super) slices: Vec<u64>,
    pub(super) l1_units: BTreeSet<u64>,
    /// Something in `l1_units` must wait for data, as [`ORDERED`] says of slices.
    pub(super) l1_ordered: bool,
    /// When the oldest of it came to be.
    pub(super) since: Option<Instant>,
}

/// Where a slice of the virtual disk is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) slice: u64,
    pub(super) at: usize,
}

impl Tables {
    /// Reads and checks the L1 table. With `held`, for writing, every L2 table must be there once, be
    /// nothing else, and be the image's alone or else one that a snapshot has.
    pub(super) async fn open(
        io: &Io,
        storage: &Storage,
        header: &Header,
        held: Option<&Held>,
        cache_bytes: u64,
    ) -> Result<Self> {
        let g = header.geometry;
        let raw = read_l1(io, storage, header).await?;
        let fixed = check_l1(&raw, storage, header, held)?;
        let mut snapshots: Vec<Range<u64>> = held.into_iter().flat_map(Held::ranges).collect();
        merge(&mut snapshots);
        let shape = Shape::new(&g);
        let (l1, directory) = Self::rooms(header, held.is_some()).ok_or_else(|| {
            Error::image(
                ErrorKind::Unsupported,
                &header.path,
                24,
                format!("no memory for the map of a disk of {} bytes", header.size),
            )
        })?;
        for (index, raw) in (0..).zip(raw) {
            if let Some(entry) = l1.get(index) {
                entry.store(raw, Ordering::Relaxed);
            }
        }
        Ok(Self {
            geometry: g,
            version: header.version,
            size: AtomicU64::new(header.size),
            l1,
            l1_offset: AtomicU64::new(header.l1_offset.0),
            l1_entries: AtomicU64::new(header.l1_entries),
            fixed,
            snapshots,
            directory,
            clock: Mutex::default(),
            loaded: AtomicUsize::new(0),
            memory: AtomicUsize::new(0),
            limit: usize::try_from(cache_bytes)
                .unwrap_or(usize::MAX)
                .max(MIN_SLICES * shape.bytes()),
            shape,
            graveyard: Mutex::default(),
            dirty: Mutex::default(),
            loading: Mutex::default(),
            claims: Claims::default(),
        })
    }

    /// The L1 table and the directory of slices: as they are needed now, and in an image that may grow with
    /// room for that, if the system gives the addresses.
    fn rooms(header: &Header, grows: bool) -> Option<(Room<AtomicU64>, Directory)> {
        let g = header.geometry;
        let slices = header.size.div_ceil(g.cluster_size() << g.slice_bits());
        if grows {
            let entries = MAX_L1_BYTES / 8;
            let most = (entries << (g.l2_bits() - g.slice_bits())).min(MAX_SLICES);
            let l1 = Room::new(entries);
            let directory = Directory::new(most.max(slices));
            if let (Some(l1), Some(directory)) = (l1, directory) {
                return Some((l1, directory));
            }
        }
        Some((Room::new(header.l1_entries)?, Directory::new(slices)?))
    }

    // ---- places ----

    #[inline]
    pub(super) fn place(&self, cluster: GuestCluster) -> Place {
        let bits = self.geometry.slice_bits();
        Place {
            slice: cluster.0 >> bits,
            at: (cluster.0 & ((1 << bits) - 1)) as usize,
        }
    }

    /// Guest clusters from `cluster` to the end of its slice.
    #[inline]
    pub(super) fn left_in_slice(&self, cluster: GuestCluster) -> u64 {
        let entries = 1 << self.geometry.slice_bits();
        entries - (cluster.0 & (entries - 1))
    }

    /// The L1 index of a slice.
    #[inline]
    pub(super) fn l1_index(&self, slice: u64) -> u64 {
        let g = self.geometry;
        slice >> (g.l2_bits() - g.slice_bits())
    }

    fn l1_entry(&self, slice: u64) -> u64 {
        self.l1_raw(self.l1_index(slice))
    }

    /// An L1 entry as it is.
    pub(super) fn l1_raw(&self, index: u64) -> u64 {
        self.l1
            .get(index)
            .map_or(0, |entry| entry.load(Ordering::Acquire))
    }

    /// The `at`th guest cluster of a slice.
    pub(super) fn cluster_of(&self, slice: u64, at: u64) -> GuestCluster {
        GuestCluster((slice << self.geometry.slice_bits()) + at)
    }

    /// Where a slice is in the file; none without an L2 table.
    pub(super) fn slice_offset(&self, slice: u64) -> Option<HostOffset> {
        self.slice_offset_in(self.l1_entry(slice), slice)
    }

    /// The slice's L2 table, as long as it is shared with snapshots.
    pub(super) fn shared_table(&self, slice: u64) -> Option<HostOffset> {
        let raw = self.l1_entry(slice);
        entry::is_shared_table(raw).then_some(HostOffset(entry::l1_offset(raw)))
    }

    fn slice_offset_in(&self, l1_entry: u64, slice: u64) -> Option<HostOffset> {
        let g = self.geometry;
        let table = entry::l1_offset(l1_entry);
        let in_table = slice & ((1 << (g.l2_bits() - g.slice_bits())) - 1);
        (table != 0).then(|| HostOffset(table + in_table * g.slice_bytes()))
    }

    /// Guest clusters from `cluster` to the end of its L2 table.
    pub(super) fn left_in_table(&self, cluster: GuestCluster) -> u64 {
        let entries = 1 << self.geometry.l2_bits();
        entries - (cluster.0 & (entries - 1))
    }

    // ---- lookup ----

    /// Looks at a slice, if it is loaded.
    #[inline]
    pub(super) fn with<R>(&self, slice: u64, look: impl FnOnce(&Slice) -> R) -> Option<R> {
        self.directory.with(slice, look)
    }

    /// Pins a slice, if it is loaded.
    pub(super) fn pin(&self, slice: u64) -> Option<Pinned> {
        self.directory.pin(slice)
    }

    /// Loads a slice that has an L2 table. When it returns, the slice was there a moment ago: look again.
    #[cold]
    pub(super) async fn load(
        &self,
        io: &Io,
        storage: &Storage,
        alloc: Option<&Allocator>,
        slice: u64,
    ) -> Result<()> {
        let Some(_loader) = self.become_loader(slice).await else {
            return Ok(());
        };
        if self.with(slice, |_| ()).is_some() {
            return Ok(());
        }
        // The table may become ours while its slice is read: what was shared is as in the copy.
        let l1_entry = self.l1_entry(slice);
        let Some(offset) = self.slice_offset_in(l1_entry, slice) else {
            return Ok(());
        };
        let is_shared = entry::is_shared_table(l1_entry);
        let mut buf = io.buf(self.geometry.slice_bytes() as usize);
        storage.read(io, offset.0, buf.sg()).await?;
        let word = |bytes: &[u8]| bytes.try_into().map_or(0, u64::from_be_bytes);
        let raw = buf.chunks_exact(1 << self.geometry.entry_bits()).map(|b| {
            let (entry, bitmap) = b.split_at(8);
            let raw = word(entry);
            let raw = if is_shared { entry::shared(raw) } else { raw };
            (raw, word(bitmap))
        });
        let file_len = storage.len();
        let extended = self.geometry.extended_l2;
        let first = slice << self.geometry.slice_bits();
        let check = |at, raw, bitmap| {
            (!extended || extended::is_well_formed(raw, bitmap, &self.geometry))
                && self.is_valid(GuestCluster(first + at as u64), raw, file_len, alloc)
        };
        let new = Slice::new(slice, self.shape, raw, check);
        self.note_memory(new.bytes());
        self.directory.link(new);
        self.loaded.fetch_add(1, Ordering::Relaxed);
        lock(&self.clock).push_back(slice);
        self.evict(io, slice);
        Ok(())
    }

    /// The one that gets a guard loads; the others have waited for it.
    async fn become_loader(&self, slice: u64) -> Option<Loader<'_>> {
        let mut waited = false;
        poll_fn(|cx| {
            let mut loading = lock(&self.loading);
            match loading.get_mut(&slice) {
                Some(waiters) => {
                    waiters.push(cx.waker().clone());
                    waited = true;
                    Poll::Pending
                }
                None if waited => Poll::Ready(None),
                None => {
                    loading.insert(slice, Vec::new());
                    Poll::Ready(Some(Loader {
                        tables: self,
                        slice,
                    }))
                }
            }
        })
        .await
    }

    /// May an L2 entry of the file be used? The image is untrusted: an entry must not lead outside the
    /// file, or to metadata.
    fn is_valid(
        &self,
        guest: GuestCluster,
        raw: u64,
        file_len: u64,
        alloc: Option<&Allocator>,
    ) -> bool {
        let g = &self.geometry;
        if !entry::is_well_formed(raw, g, self.version) {
            return false;
        }
        let inside = |first: HostCluster, count: u64| {
            // The last cluster of a file may be cut off anywhere.
            first.0 << g.cluster_bits <= file_len
                && match alloc {
                    Some(alloc) => {
                        alloc.is_metadata(first, count).is_none()
                            && !overlaps(&self.snapshots, &(first.0..first.0 + count))
                    }
                    None => !self.is_fixed_metadata(first, count),
                }
        };
        match entry::decode(raw, g) {
            entry::Entry::Unallocated | entry::Entry::Zero { host: None, .. } => true,
            entry::Entry::Data { host, .. }
            | entry::Entry::Zero {
                host: Some(host), ..
            } if g.data_file => g.host_cluster(host).0 == guest.0,
            entry::Entry::Data { host, .. }
            | entry::Entry::Zero {
                host: Some(host), ..
            } => inside(g.host_cluster(host), 1),
            entry::Entry::Compressed(c) => {
                let (first, count) = c.clusters(g);
                c.offset.0 < file_len && c.offset.0 < MAX_HOST_OFFSET && inside(first, count)
            }
            entry::Entry::Incomplete(_) | entry::Entry::Bad => false,
        }
    }

    /// May a guest cluster have this entry? What an entry of the file must not be it must not be either.
    pub(super) fn may_be(
        &self,
        guest: GuestCluster,
        raw: u64,
        storage: &Storage,
        alloc: &Allocator,
    ) -> bool {
        self.is_valid(guest, raw, storage.len(), Some(alloc))
    }

    /// True if one of the clusters is header, L1, an L2 table that was there at opening, or a snapshot's.
    fn is_fixed_metadata(&self, first: HostCluster, count: u64) -> bool {
        overlaps(&self.fixed, &(first.0..first.0 + count))
    }

    /// The L1 table and L2 tables of the time of opening, and what snapshots need, in host clusters.
    pub(super) fn metadata(&self) -> impl Iterator<Item = Range<u64>> {
        // The header is the allocator's own business.
        self.fixed.iter().filter_map(|range| {
            let range = range.start.max(1)..range.end;
            (!range.is_empty()).then_some(range)
        })
    }

    // ---- changes ----

    /// Notes that a pinned slice was changed. `ordered`: it may be written only after a flush of data.
    pub(super) fn mark_dirty(&self, slice: &Slice, ordered: bool) {
        let flags = if ordered { DIRTY | ORDERED } else { DIRTY };
        if slice.set_dirty(flags) & DIRTY == 0 {
            let mut dirty = lock(&self.dirty);
            dirty.slices.push(slice.index);
            dirty.since.get_or_insert_with(Instant::now);
        }
    }

    /// Points the slice's L1 entry at a new L2 table.
    pub(super) fn link_table(&self, slice: u64, table: HostOffset, ordered: bool) {
        self.relink(self.l1_index(slice), table, ordered);
    }

    /// The same with the L1 entry's index.
    pub(super) fn relink(&self, index: u64, table: HostOffset, ordered: bool) {
        // Locked from before the store, so that who has seen the entry finds its order noted.
        let mut dirty = lock(&self.dirty);
        if let Some(entry) = self.l1.get(index) {
            entry.store(entry::data(table), Ordering::Release);
        }
        dirty.l1_units.insert(index / (self.l1_unit() / 8));
        dirty.l1_ordered |= ordered;
        dirty.since.get_or_insert_with(Instant::now);
    }

    /// Takes all that is dirty; what a failed flush took comes back by [`Tables::put_dirty`].
    pub(super) fn take_dirty(&self) -> Dirty {
        std::mem::take(&mut *lock(&self.dirty))
    }

    /// True if an L1 entry that was linked so far may be written only after a flush of data.
    pub(super) fn is_l1_ordered(&self) -> bool {
        lock(&self.dirty).l1_ordered
    }

    /// Marks L1 units as dirty again.
    pub(super) fn put_l1_dirty(&self, units: BTreeSet<u64>, ordered: bool) {
        if !units.is_empty() {
            let mut dirty = lock(&self.dirty);
            dirty.l1_units.extend(units);
            dirty.l1_ordered |= ordered;
            dirty.since.get_or_insert_with(Instant::now);
        }
    }

    /// Dirty slices, and for how long the oldest has been.
    pub(super) fn dirty(&self) -> (usize, Option<Duration>) {
        let dirty = lock(&self.dirty);
        (dirty.slices.len(), dirty.since.map(|since| since.elapsed()))
    }

    /// More slices are in memory than should be, and most of them cannot go before they are written.
    pub(super) fn is_crowded(&self) -> bool {
        self.memory.load(Ordering::Relaxed) > self.limit
            && lock(&self.dirty).slices.len() > self.loaded.load(Ordering::Relaxed) / 2
    }

    /// Slices that may be in memory.
    pub(super) fn limit(&self) -> usize {
        self.limit / self.shape.bytes()
    }

    /// Dirty slices at which they are to be written without being asked.
    pub(super) fn write_back_threshold(&self) -> usize {
        (self.limit() / 4).clamp(2, 256)
    }

    /// Bytes of the L1 table that are written at once.
    pub(super) fn l1_unit(&self) -> u64 {
        L1_UNIT.min(self.geometry.cluster_size())
    }

    /// A unit of the L1 table as the file has it, and where.
    pub(super) fn encode_l1(&self, unit: u64, to: &mut [u8]) -> HostOffset {
        self.encode_l1_from(unit * self.l1_unit() / 8, to);
        HostOffset(self.l1_offset.load(Ordering::Acquire) + unit * self.l1_unit())
    }

    /// The L1 table from entry `first` on, as the file has it.
    pub(super) fn encode_l1_from(&self, first: u64, to: &mut [u8]) {
        for (index, to) in (first..).zip(to.chunks_exact_mut(8)) {
            // The table's last cluster has room behind the last entry: zeros.
            let raw = self.l1.get(index);
            let raw = raw.map_or(0, |entry| entry.load(Ordering::Acquire));
            to.copy_from_slice(&raw.to_be_bytes());
        }
    }

    /// Where the L1 table is in the file, and its entries.
    pub(super) fn l1_place(&self) -> (HostOffset, u64) {
        let offset = self.l1_offset.load(Ordering::Acquire);
        let entries = self.l1_entries.load(Ordering::Acquire);
        (HostOffset(offset), entries)
    }

    /// The L1 table was moved in the file. No flush may run, and no L2 table be made.
    pub(super) fn set_l1_place(&self, offset: HostOffset, entries: u64) {
        self.l1_offset.store(offset.0, Ordering::Release);
        self.l1_entries.store(entries, Ordering::Release);
    }

    // ---- memory and eviction ----

    /// Notes that a slice in memory, or a new one, takes `bytes` more.
    pub(super) fn note_memory(&self, bytes: usize) {
        if bytes > 0 {
            self.memory.fetch_add(bytes, Ordering::Relaxed);
        }
    }

    /// Throws out clean slices that were not looked at lately, while there are too many. Not `new`, which
    /// somebody is about to look at: it may be the only clean one.
    fn evict(&self, io: &Io, new: u64) {
        let mut clock = lock(&self.clock);
        let mut graveyard = lock(&self.graveyard);
        graveyard.retain(|dead| !io.epochs().passed(dead.0));
        // Two rounds: the first may do no more than take the marks of use away.
        let mut steps = clock.len() * 2;
        while self.memory.load(Ordering::Relaxed) > self.limit && steps > 0 {
            steps -= 1;
            let Some(index) = clock.pop_front() else {
                break;
            };
            let out = self.with(index, |slice| {
                index != new && !slice.take_used() && slice.begin_evict()
            });
            match out {
                Some(true) => {
                    if let Some(slice) = self.directory.unlink(index) {
                        self.loaded.fetch_sub(1, Ordering::Relaxed);
                        self.memory.fetch_sub(slice.bytes(), Ordering::Relaxed);
                        graveyard.push((io.epochs().retire(), slice));
                    }
                }
                Some(false) => clock.push_back(index),
                None => {}
            }
        }
    }

    /// Slices in memory.
    #[cfg(test)]
    pub(super) fn loaded(&self) -> usize {
        self.loaded.load(Ordering::Relaxed)
    }

    /// Memory that they take, in bytes.
    #[cfg(test)]
    pub(super) fn memory(&self) -> usize {
        self.memory.load(Ordering::Relaxed)
    }

    /// Bytes of the virtual disk.
    #[inline]
    pub(super) fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    pub(super) fn set_size(&self, bytes: u64) {
        self.size.store(bytes, Ordering::SeqCst);
    }

    /// Bytes of the largest virtual disk that there is room for, here and in the format.
    pub(super) fn max_size(&self) -> u64 {
        let g = self.geometry;
        let by_l1 = (self.l1.len() as u64).saturating_mul(g.l2_span());
        let slice = g.cluster_size() << g.slice_bits();
        let by_directory = self.directory.len().saturating_mul(slice);
        by_l1.min(by_directory).min(i64::MAX as u64) & !511
    }
}

impl Drop for Tables {
    fn drop(&mut self) {
        for index in lock(&self.clock).drain(..) {
            drop(self.directory.unlink(index));
        }
    }
}

/// The right to load a slice; dropping it wakes those that wait for the slice.
struct Loader<'a> {
    tables: &'a Tables,
    slice: u64,
}

impl Drop for Loader<'_> {
    fn drop(&mut self) {
        let waiters = lock(&self.tables.loading).remove(&self.slice);
        waiters.into_iter().flatten().for_each(Waker::wake);
    }
}
