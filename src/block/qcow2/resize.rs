//! Another size of the virtual disk, while requests run.
//!
//! What the file says at any moment is true also after a loss of power:
//!
//! - **Growing.** A longer L1 table is written to new clusters and durable before the header points at it,
//!   which is one write of a sector; the old one is freed after that. What the new part of the disk would
//!   show of old data (behind the old end in its last cluster, in mappings that somebody left there, in a
//!   longer backing file) is made zeros, durably, before the header says the new size. Requests may use the
//!   new part when all that is done.
//! - **Shrinking.** Requests beyond the new end are refused first, and those under way are waited for. Then
//!   mappings beyond it are taken out, durably, and the header says the new size at last. A power loss before
//!   that leaves a disk of the old size whose end has lost its contents in part. The L1 and L2 tables stay.
//!
//! What is refused is what QEMU refuses (`qcow2_co_truncate`), and what is not kept up here.

use std::time::Duration;

use super::Qcow2;
use super::below::Below;
use super::claim::Attempt;
use super::discard::Unmap;
use super::entry;
use super::freed::Freed;
use super::header::MAX_L1_BYTES;
use super::units::{GuestCluster, HostOffset};
use crate::block::error::{Error, ErrorKind, Result};
use crate::block::layer::requests_ended;
use crate::reactor::Io;

/// The L1 table is written in pieces of this many bytes.
const PIECE: u64 = 1 << 20;

/// What the header says of size and L1 table.
#[derive(Clone, Copy)]
struct Shape {
    /// Bytes of the disk.
    size: u64,
    l1_offset: HostOffset,
    l1_entries: u64,
}

impl Qcow2 {
    /// Makes the disk `size` bytes long: a multiple of 512. `below` shows what unallocated clusters show, and
    /// is `below_size` bytes long. What comes to a growing disk reads as zeros. Requests may run, but the
    /// caller must not be one: nothing of its reactor's [`crate::reactor::Pin`]s may wait for this to end.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`] for a size that cannot be, [`ErrorKind::Unsupported`] for an image that cannot
    /// be resized, [`ErrorKind::ReadOnly`]: nothing has changed. Those of storage and allocation: the size
    /// has not changed, but what is beyond a smaller one may have lost its contents. Where not even the header
    /// can be put back, the disk has the smaller of both sizes, and is not written to if its L1 table was
    /// to move. The next attempt does what is left.
    pub async fn resize<B: Below + ?Sized>(
        &self,
        io: &Io,
        below: &B,
        below_size: u64,
        size: u64,
    ) -> Result<()> {
        let _one = self.resizing.lock().await;
        self.check_writes()?;
        self.check_resize(size)?;
        let old = self.size();
        if size > old {
            return self.grow(io, below, below_size, size).await;
        }
        if size < old {
            self.tables.set_size(size);
            if let Err(error) = self.cut(io, below, size, old).await {
                self.tables.set_size(old);
                return Err(error);
            }
        }
        // If it is not known afterwards which size the file says, the disk has the smaller one.
        match self.write_size(io, old, size).await {
            Err((error, true)) => {
                self.tables.set_size(old);
                Err(error)
            }
            other => other.map_err(|(error, _)| error),
        }
    }

    fn check_resize(&self, size: u64) -> Result<()> {
        let refuse = |kind, what: String| Err(Error::image(kind, &self.header.path, None, what));
        if size == 0 || size % 512 != 0 {
            return refuse(
                ErrorKind::OutOfRange,
                format!("{size} bytes are no size of a disk; write a multiple of 512"),
            );
        }
        let most = self.tables.max_size();
        if size > most {
            return refuse(
                ErrorKind::OutOfRange,
                format!(
                    "the image cannot grow to {size} bytes: with clusters of {} bytes its tables reach \
                     {most}; qemu-img convert can make an image with larger clusters",
                    self.tables.geometry.cluster_size()
                ),
            );
        }
        let unsupported = if self.header.snapshots > 0 && self.header.version < 3 {
            // Their table does not say how large the disk was.
            "internal snapshots in a version 2 image"
        } else if self.header.snapshots > 0 && size < self.size() {
            "internal snapshots, and cannot become smaller"
        } else if self.header.bitmaps.is_some() {
            "persistent bitmaps"
        } else if self.has_data_file() {
            "an external data file"
        } else {
            return Ok(());
        };
        refuse(
            ErrorKind::Unsupported,
            format!("the image cannot be resized: it has {unsupported}"),
        )
    }

    async fn grow<B: Below + ?Sized>(
        &self,
        io: &Io,
        below: &B,
        below_size: u64,
        size: u64,
    ) -> Result<()> {
        let g = &self.tables.geometry;
        let old = self.size();
        let entries = size.div_ceil(g.l2_span());
        if entries > self.tables.l1_place().1 {
            self.move_l1(io, entries).await?;
        }
        {
            let _pin = io.pin();
            let edge = old.next_multiple_of(g.cluster_size());
            self.zero_bytes(io, below, old, edge - old, false).await?;
            let (first, end) = (edge >> g.cluster_bits, g.clusters(size));
            let (new, end) = (GuestCluster(first), GuestCluster(end));
            self.unallocate(io, new, end, (0, 0)).await?;
            let shown = g.clusters(below_size.min(size));
            if self.has_backing && shown > first {
                let len = (shown - first) << g.cluster_bits;
                if g.extended_l2 {
                    let zeroed = self.write_zeroes_extended(io, below, edge, len, true);
                    zeroed.await?;
                } else if self.header.version >= 3 {
                    let (first, end) = (GuestCluster(first), GuestCluster(shown));
                    self.unmap(io, first, end, Unmap::Free).await?;
                } else {
                    self.zero_bytes(io, below, edge, len, false).await?;
                }
            }
        }
        self.flush(io, below).await?;
        let written = self.write_size(io, old, size).await;
        written.map_err(|(error, _)| error)?;
        self.tables.set_size(size);
        // A discard up to the old end takes the whole last cluster: none is under way when the new part is used.
        requests_ended(io).await;
        Ok(())
    }

    /// Takes out what is beyond `size`, durably. Requests there are refused already.
    async fn cut<B: Below + ?Sized>(&self, io: &Io, below: &B, size: u64, old: u64) -> Result<()> {
        let g = &self.tables.geometry;
        requests_ended(io).await;
        // No cluster beyond the new end is incomplete from here on.
        self.fill_older(io, below, Duration::ZERO).await?;
        {
            let _pin = io.pin();
            let edge = size.next_multiple_of(g.cluster_size());
            self.zero_bytes(io, below, size, edge - size, false).await?;
            let (first, end) = (edge >> g.cluster_bits, g.clusters(old));
            let (first, end) = (GuestCluster(first), GuestCluster(end));
            self.unallocate(io, first, end, self.gone()).await?;
        }
        self.flush(io, below).await
    }

    /// What the entry and the bitmap of a mapping become that is taken out of a disk which still has its old
    /// size in the file: nothing of the backing file is to show there after a loss of power. Version 2
    /// cannot say that.
    fn gone(&self) -> (u64, u64) {
        match (self.has_backing, self.header.version) {
            (true, 3..) if self.tables.geometry.extended_l2 => (0, u64::MAX << 32),
            (true, 3..) => (entry::ZERO, 0),
            _ => (0, 0),
        }
    }

    /// Takes every mapping of clusters out that no request may use: they are to be as `gone`, or unallocated
    /// as they were.
    async fn unallocate(
        &self,
        io: &Io,
        first: GuestCluster,
        end: GuestCluster,
        gone: (u64, u64),
    ) -> Result<()> {
        let mut cluster = first;
        while cluster < end {
            let place = self.tables.place(cluster);
            let left = self.tables.left_in_slice(cluster).min(end.0 - cluster.0);
            let next = self.tables.with(place.slice, |slice| {
                (0..left).find(|n| {
                    let there = slice.look(place.at + *n as usize);
                    there != (0, 0) && there != gone
                })
            });
            match next {
                Some(Some(n)) => {
                    cluster.0 += n;
                    cluster.0 += self.unallocate_run(io, cluster, left - n, gone).await?;
                }
                Some(None) => cluster.0 += left,
                None if self.tables.slice_offset(place.slice).is_some() => {
                    self.load(io, place.slice).await?;
                }
                None => cluster.0 += self.tables.left_in_table(cluster),
            }
        }
        Ok(())
    }

    async fn unallocate_run(
        &self,
        io: &Io,
        first: GuestCluster,
        most: u64,
        gone: (u64, u64),
    ) -> Result<u64> {
        let mut room = self.log_room(io, most).await?;
        let most = room.limit(most);
        let claim = match self.tables.try_claim(first, most, |_, _| true) {
            Attempt::Claimed(claim) => claim,
            Attempt::Busy => {
                drop(room);
                self.tables.unclaimed(first).await;
                return Ok(0);
            }
            Attempt::Unwanted | Attempt::Missing => return Ok(0),
            Attempt::Shared => {
                drop(room);
                self.own_table(io, self.tables.place(first).slice).await?;
                return Ok(0);
            }
        };
        let mut freed = Freed::default();
        let at = self.tables.place(first).at;
        let goes = |n: &usize| {
            let there = claim.slice().look(at + n);
            there != (0, 0) && there != gone
        };
        let mut log = room.log();
        for n in (0..claim.count()).filter(goes) {
            log.note(claim.cluster(n), gone.0, gone.1);
        }
        let noted = log.commit();
        for n in (0..claim.count()).filter(goes) {
            freed.note(self, claim.get(n));
            claim.publish_pair(&noted, n, gone.0, gone.1);
        }
        self.tables.mark_dirty(claim.slice(), false);
        let count = claim.count() as u64;
        drop((noted, claim));
        freed.free(self, io);
        Ok(count)
    }

    /// Gives the L1 table `entries` entries, in other clusters of the file.
    async fn move_l1(&self, io: &Io, entries: u64) -> Result<()> {
        let g = &self.tables.geometry;
        let alloc = self.allocator()?;
        debug_assert!(entries * 8 <= MAX_L1_BYTES);
        // No entry changes, and the file has all of them, as long as these are held.
        let _no_new_table = self.new_table.lock().await;
        let _no_flush = self.flush_and_hold(io).await?;
        // The search for leaks reads the tables where they were at opening.
        alloc.leaks().give_up();
        let fresh = alloc.allocate_run(io, g.clusters(entries * 8)).await?;
        let (first, count) = (fresh.first(), fresh.count());
        let offset = g.host_offset(first);
        let bytes = count << g.cluster_bits;
        let mut done = 0;
        while done < bytes {
            let len = (bytes - done).min(PIECE);
            let mut buf = io.buf(len as usize);
            self.tables.encode_l1_from(done / 8, &mut buf);
            self.storage.write(io, offset.0 + done, buf.sg()).await?;
            done += len;
        }
        self.storage.flush(io).await?;

        alloc.reserve_metadata(first, count, "L1 table")?;
        let (old_offset, old_entries) = self.tables.l1_place();
        let old = Shape {
            size: self.size(),
            l1_offset: old_offset,
            l1_entries: old_entries,
        };
        let new = Shape {
            l1_offset: offset,
            l1_entries: entries,
            ..old
        };
        match self.switch(io, old, new).await {
            Ok(()) => {}
            Err((error, true)) => {
                alloc.release_metadata(first, count);
                return Err(error);
            }
            Err((error, false)) => {
                // Either table may be the one that the next start reads: both stay, and stay the same.
                fresh.keep();
                return Err(error);
            }
        }
        fresh.keep();
        self.tables.set_l1_place(offset, entries);
        if old_entries > 0 {
            let (first, count) = (g.host_cluster(old_offset), g.clusters(old_entries * 8));
            alloc.release_part(first, count);
            alloc.free(io, first, count);
        }
        Ok(())
    }

    /// As [`Qcow2::switch`].
    async fn write_size(
        &self,
        io: &Io,
        old: u64,
        new: u64,
    ) -> std::result::Result<(), (Error, bool)> {
        let (l1_offset, l1_entries) = self.tables.l1_place();
        let old = Shape {
            size: old,
            l1_offset,
            l1_entries,
        };
        self.switch(io, old, Shape { size: new, ..old }).await
    }

    /// Has the header say `new` instead of `old`, durably. After a failure it says `old` again (true), or
    /// nobody knows which (false), and then no L2 table is made any more.
    async fn switch(
        &self,
        io: &Io,
        old: Shape,
        new: Shape,
    ) -> std::result::Result<(), (Error, bool)> {
        let Err(error) = self.write_shape(io, new).await else {
            return Ok(());
        };
        let Err(again) = self.write_shape(io, old).await else {
            return Err((error, true));
        };
        if old.l1_offset != new.l1_offset {
            self.refuse_writes
                .store(true, std::sync::atomic::Ordering::SeqCst);
            log::error!(
                "{again}; it is not known which L1 table the header points at, and the image is no longer \
                 written to"
            );
        }
        Err((error, false))
    }

    async fn write_shape(&self, io: &Io, to: Shape) -> Result<()> {
        let Ok(l1_entries) = u32::try_from(to.l1_entries) else {
            let what = format!("an L1 table of {} entries", to.l1_entries);
            let path = &self.header.path;
            return Err(Error::image(ErrorKind::OutOfRange, path, None, what));
        };
        let write = self
            .header
            .write_size(io, &self.storage, to.size, to.l1_offset, l1_entries);
        write.await?;
        self.storage.flush(io).await
    }
}
