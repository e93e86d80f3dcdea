//! Writing: in place where a cluster is ours alone, else to a new cluster under a claim.
//!
//! The order of things in a write to a new cluster, and why (`docs/architecture.md`, "qcow2"):
//!
//! 1. The new clusters come with refcount 1, durably. A power loss leaks them at worst.
//! 2. Data, with the rest of the cluster around it, is written *before* the entry is published: readers
//!    never see a mapping without its data. Until then they, and the file, have the old mapping. Where the
//!    old content and the new clusters both are zeros the entry comes first: a mapping without its data
//!    shows what was there before, to readers and after a power loss, and the next writers to the cluster
//!    need not wait for this one.
//! 3. The entry is noted in the journal, if there is one, and published, and the slice marked dirty *before* the old cluster is freed. So a flush that
//!    lets the freed cluster go has the new entry in its snapshot.
//! 4. What fails before the publication leaves nothing behind: the new clusters go back, the claim ends,
//!    the old mapping stands.
//!
//! Where only a part of a cluster is written and the rest must be copied, the copying is put off (`cow`); it
//! is done at once where it can not be.
//!
//! When the mapping may go to the file is `flush`'s business. It is told (`ordered`) if the file's
//! mapping may not come before the data: always, but where old content and new cluster both are zeros.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use libc::iovec;

use super::Qcow2;
use super::alloc::Allocator;
use super::below::Below;
use super::claim::{Attempt, Claim};
use super::entry::{self, Entry, decode};
use super::fill::is_zero;
use super::freed::Freed;
use super::fresh::Fresh;
use super::journal::Room;
use super::target::Target;
use super::units::{GuestOffset, HostCluster, HostOffset};
use crate::block::error::{Error, ErrorKind, Result};
use crate::block::stack::Window;
use crate::reactor::{AlignedBuf, Io, Sg};

/// Pieces of a write with what is around it that need no list of their own.
const FEW: usize = 8;

/// A piece of a request: where on the disk it is to be written, and its bytes.
#[derive(Clone, Copy)]
pub(super) struct Piece<'a> {
    pub(super) offset: u64,
    pub(super) bytes: Sg<'a>,
}

impl Qcow2 {
    /// Writes all of `from` at `offset`. `below` shows what unallocated clusters show. Complete when it
    /// returns; durable with the next flush.
    ///
    /// # Errors
    /// Those of the storage and of allocation; what was written of the range is not defined then, and
    /// nothing outside of it has changed.
    #[inline]
    pub async fn write<B: Below + ?Sized>(
        &self,
        io: &Io,
        below: &B,
        offset: u64,
        from: Sg<'_>,
    ) -> Result<()> {
        self.check_range(offset, from.len() as u64)?;
        self.check_writes()?;
        self.note_change(io, offset, from.len() as u64).await?;
        // The common case: the whole range lies in one piece, in clusters that are ours alone.
        if let Some(host) = self.place_at_once(io, offset, from.len() as u64) {
            return self.data.write(io, host.0, from).await;
        }
        let mut window = Window::default();
        let written = self
            .write_pieces(io, below, offset, from, &mut window)
            .await;
        // Whatever happened, what is under way ends before its memory is let go.
        let ended = window.finish_all(io).await;
        written.and(ended)
    }

    /// Writes run by run. Runs in place stay under way in `window` while the next are looked for; all have
    /// ended before this waits for anything else. A transfer under way may hold blocks of the device
    /// ([`Storage`](crate::block::storage::Storage) keeps writes to parts of a block apart): with one at
    /// hand, waiting for a claim or for a block of which only a part is written could be waiting in a ring.
    async fn write_pieces<'a, B: Below + ?Sized>(
        &'a self,
        io: &'a Io,
        below: &B,
        mut offset: u64,
        mut rest: Sg<'a>,
        window: &mut Window<'a>,
    ) -> Result<()> {
        let align = self.data.limits().io_align as u64;
        while !rest.is_empty() {
            let done = match self.long_target(offset, rest.len() as u64) {
                Target::InPlace { host, len } if (host.0 | len) & (align - 1) == 0 => {
                    let (part, _) = rest.split_at(len as usize);
                    window.make_room(io).await?;
                    window.push(self.data.begin_write(io, host.0, part));
                    len
                }
                Target::InPlace { host, len } => {
                    window.finish_all(io).await?;
                    let (part, _) = rest.split_at(len as usize);
                    self.data.write(io, host.0, part).await?;
                    len
                }
                other => {
                    window.finish_all(io).await?;
                    match other {
                        Target::Claim => self.write_new(io, below, offset, rest).await?,
                        Target::Incomplete => {
                            self.write_incomplete(io, below, offset, rest).await?
                        }
                        other => self.prepare(io, other).await?,
                    }
                }
            };
            offset += done;
            rest = rest.split_at(done as usize).1;
        }
        Ok(())
    }

    /// Refuses writes to an image that is not to be written to.
    #[inline]
    pub(super) fn check_writes(&self) -> Result<()> {
        if self.refuse_writes.load(Ordering::Relaxed) {
            return Err(self.refused());
        }
        Ok(())
    }

    #[cold]
    fn refused(&self) -> Error {
        let path = &self.header.path;
        if self.alloc.is_none() {
            return Error::image(ErrorKind::ReadOnly, path, None, "opened read-only");
        }
        Error::image(
            ErrorKind::Corrupt,
            path,
            None,
            format!(
                "the image was found to be corrupt and is no longer written to; repair it with: qemu-img check -r all {}",
                path.display()
            ),
        )
    }

    /// Writes to as many new clusters as can be claimed and had in one run. Returns bytes written; 0:
    /// things have changed, look again.
    pub(super) async fn write_new<B: Below + ?Sized>(
        &self,
        io: &Io,
        below: &B,
        offset: u64,
        from: Sg<'_>,
    ) -> Result<u64> {
        let g = &self.tables.geometry;
        if g.extended_l2 {
            return self.write_new_extended(io, below, offset, from).await;
        }
        let cluster = g.guest_cluster(GuestOffset(offset));
        let wanted = g.clusters(g.in_cluster(offset) + from.len() as u64);
        let wanted = wanted.min(self.tables.left_in_slice(cluster));
        let mut room = self.log_room(io, wanted).await?;
        let wanted = room.limit(wanted);
        let first = std::cell::Cell::new(Entry::Bad);
        let attempt = self.tables.try_claim(cluster, wanted, |n, raw| {
            let entry = decode(raw, g);
            if n == 0 {
                first.set(entry);
                return !matches!(
                    entry,
                    Entry::Bad | Entry::Incomplete(_) | Entry::Data { copied: true, .. }
                );
            }
            match first.get() {
                // Reserved clusters are used as they are, as far as they lie in a row.
                Entry::Zero {
                    host: Some(host),
                    copied: true,
                } => {
                    entry
                        == Entry::Zero {
                            host: Some(HostOffset(host.0 + ((n as u64) << g.cluster_bits))),
                            copied: true,
                        }
                }
                _ => !matches!(
                    entry,
                    Entry::Bad
                        | Entry::Incomplete(_)
                        | Entry::Data { copied: true, .. }
                        | Entry::Zero {
                            host: Some(_),
                            copied: true
                        }
                ),
            }
        });
        let claim = match attempt {
            Attempt::Claimed(claim) => claim,
            Attempt::Busy => {
                drop(room);
                self.tables.unclaimed(cluster).await;
                return Ok(0);
            }
            Attempt::Unwanted | Attempt::Missing => return Ok(0),
            Attempt::Shared => {
                drop(room);
                self.own_table(io, self.tables.place(cluster).slice).await?;
                return Ok(0);
            }
        };
        match first.get() {
            Entry::Zero {
                host: Some(host),
                copied: true,
            } => {
                self.write_reserved(io, &mut room, claim, host, offset, from)
                    .await
            }
            _ => {
                self.write_fresh(io, below, &mut room, claim, offset, from)
                    .await
            }
        }
    }

    /// The claimed clusters have host clusters whose contents do not count: they read as zeros. The rest
    /// of the first and last is written as zeros.
    async fn write_reserved(
        &self,
        io: &Io,
        room: &mut Room<'_>,
        claim: Claim<'_>,
        host: HostOffset,
        offset: u64,
        from: Sg<'_>,
    ) -> Result<u64> {
        let g = &self.tables.geometry;
        let skip = g.in_cluster(offset);
        let end = self.fill_len(host.0, (claim.count() as u64) << g.cluster_bits);
        let len = (end - skip).min(from.len() as u64);
        let mut head = zeros(io, skip);
        let mut tail = zeros(io, end - skip - len);
        let part = from.split_at(len as usize).0;
        self.write_around(io, host, head.sg(), part, tail.sg())
            .await?;
        // The host cluster may hold old data durably: not to be seen before the new.
        let ordered = true;
        claim.slice().note_order(ordered);
        let entry = |n: usize| entry::data(HostOffset(host.0 + ((n as u64) << g.cluster_bits)));
        let noted = claim.note(room, 0..claim.count(), entry);
        for n in 0..claim.count() {
            claim.publish(&noted, n, entry(n));
        }
        self.tables.mark_dirty(claim.slice(), ordered);
        Ok(len)
    }

    /// New clusters for the claimed ones.
    async fn write_fresh<B: Below + ?Sized>(
        &self,
        io: &Io,
        below: &B,
        room: &mut Room<'_>,
        mut claim: Claim<'_>,
        offset: u64,
        from: Sg<'_>,
    ) -> Result<u64> {
        let g = &self.tables.geometry;
        let cluster = g.guest_cluster(GuestOffset(offset));
        let fresh = self.new_clusters(io, cluster, claim.count() as u64).await?;
        claim.truncate(fresh.count() as usize);
        let skip = g.in_cluster(offset);
        let len = ((fresh.count() << g.cluster_bits) - skip).min(from.len() as u64);
        let part = from.split_at(len as usize).0;
        let piece = Piece {
            offset,
            bytes: part,
        };
        let stays_zero = self.fresh_reads_zero(&fresh)
            && (0..claim.count()).all(|n| self.reads_zero(claim.get(n)));
        if stays_zero {
            // Zeros become zeros: nobody can tell when, so nobody waits for this write.
            let host = self.publish_fresh(io, room, claim, fresh, false);
            self.data.write(io, host.0 + skip, part).await?;
        } else if let Some(ends) = self.make_records(io, &claim, &fresh, offset, len) {
            self.write_incomplete_ends(io, room, claim, fresh, piece, ends)
                .await?;
        } else {
            self.write_copied(io, below, room, claim, fresh, piece)
                .await?;
        }
        Ok(len)
    }

    /// Writes a piece, with what was there around it, to new clusters, and publishes them.
    async fn write_copied<B: Below + ?Sized>(
        &self,
        io: &Io,
        below: &B,
        room: &mut Room<'_>,
        claim: Claim<'_>,
        fresh: Fresh<'_>,
        piece: Piece<'_>,
    ) -> Result<()> {
        let g = &self.tables.geometry;
        let (offset, part) = (piece.offset, piece.bytes);
        let (skip, len) = (g.in_cluster(offset), part.len() as u64);
        let (first, count) = (fresh.first(), fresh.count());
        let base = offset - skip;
        let end = self.fill_len(base, count << g.cluster_bits);

        // What was there before, where the guest's bytes do not cover it.
        let (old_head, old_tail) = (claim.get(0), claim.get(count as usize - 1));
        let reads_zero = self.fresh_reads_zero(&fresh);
        let untouched = |raw| reads_zero && self.reads_zero(raw);
        let rest = end - skip - len;
        let needs_head = skip > 0 && !untouched(old_head);
        let needs_tail = rest > 0 && !untouched(old_tail);
        // Both ends of one cluster: one read, over the part between, which is not used.
        let whole = needs_head && needs_tail && count == 1;
        let mut before = io.buf(match (whole, needs_head) {
            (true, _) => end as usize,
            (false, true) => skip as usize,
            (false, false) => 0,
        });
        if needs_head {
            self.read_old(io, below, old_head, base, before.sg())
                .await?;
        }
        let mut after = io.buf(if needs_tail && !whole {
            rest as usize
        } else {
            0
        });
        if !after.is_empty() {
            let at = base + skip + len;
            self.read_old(io, below, old_tail, at, after.sg()).await?;
        }
        // Where nothing was read, or nothing but zeros, the new clusters are as they should be.
        let (all, after_all) = (before.len(), after.len());
        let behind = if whole {
            &before[all - rest as usize..]
        } else {
            &after[..]
        };
        let needs_tail = needs_tail && !(reads_zero && is_zero(behind));
        let needs_head = needs_head && !(reads_zero && is_zero(&before[..skip as usize]));
        let head_len = if needs_head { skip as usize } else { 0 };
        let (before, after) = (before.sg(), after.sg());
        let head = before.slice(0, head_len);
        let tail = match (needs_tail, whole) {
            (false, _) => after.slice(0, 0),
            (true, true) => before.slice(all - rest as usize, rest as usize),
            (true, false) => after.slice(0, after_all),
        };
        let host = HostOffset(g.host_offset(first).0 + skip - head.len() as u64);
        self.write_around(io, host, head, part, tail).await?;
        self.publish_fresh(io, room, claim, fresh, true);
        Ok(())
    }

    /// Replaces the claimed entries by new clusters, ends the claim and frees what was there. Where the
    /// new clusters begin.
    pub(super) fn publish_fresh(
        &self,
        io: &Io,
        room: &mut Room<'_>,
        claim: Claim<'_>,
        fresh: Fresh<'_>,
        ordered: bool,
    ) -> HostOffset {
        let g = &self.tables.geometry;
        let (first, _) = fresh.keep();
        claim.slice().note_order(ordered);
        let mut freed = Freed::default();
        let entry = |n| entry::data(g.host_offset(HostCluster(first.0 + n as u64)));
        let noted = claim.note(room, 0..claim.count(), entry);
        for n in 0..claim.count() {
            freed.note(self, claim.get(n));
            claim.publish(&noted, n, entry(n));
        }
        self.tables.mark_dirty(claim.slice(), ordered);
        drop((noted, claim));
        freed.free(self, io);
        g.host_offset(first)
    }

    /// One write of `head`, `part` and `tail`, one behind the other.
    pub(super) async fn write_around(
        &self,
        io: &Io,
        host: HostOffset,
        head: Sg<'_>,
        part: Sg<'_>,
        tail: Sg<'_>,
    ) -> Result<()> {
        if head.is_empty() && tail.is_empty() {
            return self.data.write(io, host.0, part).await;
        }
        let pieces = || head.iter().chain(part.iter()).chain(tail.iter());
        let iovec = |(ptr, len): (*mut u8, usize)| iovec {
            iov_base: ptr.cast(),
            iov_len: len,
        };
        // Most requests have few pieces; a list of many is the one thing here that is allocated.
        let mut few = [iovec((std::ptr::null_mut(), 0)); FEW];
        let many: Vec<iovec>;
        let count = pieces().take(FEW + 1).count();
        let list: &[iovec] = if count <= FEW {
            for (to, piece) in few.iter_mut().zip(pieces()) {
                *to = iovec(piece);
            }
            &few[..count]
        } else {
            many = pieces().map(iovec).collect();
            &many
        };
        // SAFETY: the pieces come from lists whose memory outlives this call, and nothing else uses the
        // buffers meanwhile.
        let all = unsafe { Sg::new(list) };
        self.data.write(io, host.0, all).await
    }

    /// True if an unreplaced entry reads as zeros.
    pub(super) fn reads_zero(&self, raw: u64) -> bool {
        match decode(raw, &self.tables.geometry) {
            Entry::Unallocated => !self.has_backing,
            Entry::Zero { .. } => true,
            Entry::Data { .. } | Entry::Compressed(_) | Entry::Incomplete(_) | Entry::Bad => false,
        }
    }

    /// Reads what a claimed entry shows, at the guest's `offset`, inside its cluster.
    pub(super) async fn read_old<B: Below + ?Sized>(
        &self,
        io: &Io,
        below: &B,
        raw: u64,
        offset: u64,
        to: Sg<'_>,
    ) -> Result<()> {
        let g = &self.tables.geometry;
        let skip = g.in_cluster(offset);
        match decode(raw, g) {
            Entry::Unallocated if self.has_backing => below.read(io, offset, to).await,
            Entry::Unallocated | Entry::Zero { .. } => {
                to.zero();
                Ok(())
            }
            Entry::Data { host, .. } => self.data.read(io, host.0 + skip, to).await,
            Entry::Compressed(data) => self.read_compressed(io, data, skip, to).await,
            Entry::Incomplete(_) | Entry::Bad => {
                Err(self.bad_entry(g.guest_cluster(GuestOffset(offset))))
            }
        }
    }

    /// Makes an L2 table for a slice that has none. The new table is a cluster of zeros, durably, so it is
    /// valid from the first moment and its L1 entry goes to the file whenever the next flush does.
    #[cold]
    pub(super) async fn make_table(&self, io: &Io, slice: u64) -> Result<()> {
        let mut room = self.log_room(io, 1).await?;
        let _one = self.new_table.lock().await;
        self.check_writes()?;
        if self.tables.slice_offset(slice).is_some() {
            return Ok(());
        }
        let g = &self.tables.geometry;
        let fresh = self.allocate(io, 1).await?;
        let table = g.host_offset(fresh.first());
        let zeroed = fresh.zeroed();
        if !zeroed {
            self.storage
                .write_zeroes(io, table.0, g.cluster_size(), false)
                .await?;
        }
        // A flush must not fail for want of space for what the guest was told is written.
        self.storage.reserve(io, table.0, g.cluster_size()).await?;
        let reserved = self
            .allocator()?
            .reserve_metadata(fresh.first(), 1, "L2 table");
        if let Err(error) = reserved {
            self.stop_writing(io, &error).await;
            return Err(error);
        }
        self.log_and_link(&mut room, slice, table, !zeroed);
        fresh.keep();
        Ok(())
    }

    pub(super) fn allocator(&self) -> Result<&Arc<Allocator>> {
        self.alloc.as_ref().ok_or_else(|| self.refused())
    }

    /// New clusters. If what is free turns out to be in use, the refcounts are wrong, and every write
    /// would do more damage: none comes after that.
    pub(super) async fn allocate(&self, io: &Io, want: u64) -> Result<Fresh<'_>> {
        let result = self.allocator()?.allocate(io, want).await;
        if let Err(error) = &result {
            self.note_damage(io, error).await;
        }
        result
    }
}

fn zeros(io: &Io, len: u64) -> AlignedBuf {
    let mut buf = io.buf(len as usize);
    buf.fill(0);
    buf
}
