//! Internal snapshots: the table of them, and the metadata that they hold on to.
//!
//! `docs/interop/qcow2.rst`, section "Snapshots". A snapshot is an L1 table of its own. When it is made it
//! has the L2 tables and clusters of the active one in common with it; each way from an L1 table to a
//! cluster counts one reference. So a cluster that is in use by a snapshot has a refcount above 1 and no
//! COPIED flag in the active tables, and is never written to:
//!
//! - A shared L2 table is copied before the first of its entries changes ([`Qcow2::own_table`]). The
//!   clusters that it points at keep their refcounts: the way through the old table to them becomes one
//!   through the new table.
//! - A shared data cluster is replaced like any other that is not ours alone (`write`), and loses one
//!   reference.
//!
//! Snapshots are neither made nor deleted here. An image is untrusted: what a snapshot needs is kept out
//! of reach of the active tables, whatever the refcounts say.

use std::ops::Range;

use super::Qcow2;
use super::entry;
use super::header::{Header, MAX_HOST_OFFSET, MAX_L1_BYTES};
use super::reftable::read_table;
use super::units::HostOffset;
use crate::block::error::{Error, ErrorKind, Result};
use crate::block::storage::Storage;
use crate::reactor::Io;

/// Limits that QEMU has too: snapshots, bytes of their table, bytes of an entry's extra data.
const MAX_SNAPSHOTS: u32 = 65_536;
const MAX_TABLE_BYTES: u64 = 64 << 20;
const MAX_EXTRA_BYTES: u64 = 1024;
/// Bytes of an entry before its extra data.
const FIXED_BYTES: u64 = 40;
/// L1 entries of all snapshots that are looked at when an image is opened for writing.
const MAX_L1_ENTRIES: u64 = 1 << 26;
/// Runs of L2 tables that are kept in mind, and tables noted before they are made into runs.
const MAX_L2_RUNS: usize = 1 << 22;
const MAX_NOTED: usize = 1 << 20;
/// The table is read in pieces of this many bytes.
const PIECE: u64 = 64 << 10;

/// One internal snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Its unique id; what is not UTF-8 in it is replaced.
    pub id: String,
    /// Its name; what is not UTF-8 in it is replaced.
    pub name: String,
    /// Bytes of the virtual disk at that time; the image's own size where the entry does not tell.
    pub disk_bytes: u64,
    /// Bytes of the saved state of a virtual machine; 0: none was saved.
    pub vm_state_bytes: u64,
    /// When it was taken, in seconds since 1970.
    pub date_secs: u32,
    /// The part of a second behind that, in nanoseconds.
    pub date_nanos: u32,
    /// For how long the guest had run, in nanoseconds.
    pub vm_clock_nanos: u64,
    /// Instructions that the guest had executed, if they were counted.
    pub icount: Option<u64>,
    l1_offset: HostOffset,
    l1_entries: u64,
}

/// Clusters that an image's snapshots need, by number. Ranges are ascending and do not touch.
#[derive(Debug, Default)]
pub(super) struct Held {
    /// The snapshot table and the snapshots' L1 tables.
    tables: Vec<Range<u64>>,
    /// L2 tables that a snapshot has, of its own or in common with others.
    l2_tables: Vec<Range<u64>>,
}

impl Held {
    /// True if a snapshot has this cluster as an L2 table.
    pub(super) fn has_l2_table(&self, cluster: u64) -> bool {
        overlaps(&self.l2_tables, &(cluster..cluster + 1))
    }

    /// True if the cluster holds the snapshot table or a snapshot's L1 table.
    pub(super) fn has_table(&self, cluster: u64) -> bool {
        overlaps(&self.tables, &(cluster..cluster + 1))
    }

    /// All of it.
    pub(super) fn ranges(&self) -> impl Iterator<Item = Range<u64>> {
        self.tables.iter().chain(&self.l2_tables).cloned()
    }
}

/// True if one of the ranges, ascending and apart, has a cluster in common with `other`.
pub(super) fn overlaps(ranges: &[Range<u64>], other: &Range<u64>) -> bool {
    let after = ranges.partition_point(|range| range.end <= other.start);
    ranges.get(after).is_some_and(|r| r.start < other.end)
}

/// Sorts ranges and joins those that touch.
pub(super) fn merge(ranges: &mut Vec<Range<u64>>) {
    ranges.sort_unstable_by_key(|range| range.start);
    ranges.dedup_by(|next, last| {
        let joins = next.start <= last.end;
        if joins {
            last.end = last.end.max(next.end);
        }
        joins
    });
}

/// The image's internal snapshots, oldest first.
///
/// # Errors
/// [`ErrorKind::InvalidImage`] for a table that contradicts the format or its limits; those of reading.
pub async fn list(io: &Io, storage: &Storage, header: &Header) -> Result<Vec<Snapshot>> {
    Ok(read(io, storage, header).await?.0)
}

/// The snapshots, and the bytes of their table.
async fn read(io: &Io, storage: &Storage, header: &Header) -> Result<(Vec<Snapshot>, u64)> {
    let start = header.snapshots_offset.0;
    let bad = |at: u64, what: String| {
        Error::image(ErrorKind::InvalidImage, &header.path, at, what).hint(format!(
            "look at the image with: qemu-img check {}",
            header.path.display()
        ))
    };
    if header.snapshots > MAX_SNAPSHOTS {
        let what = format!(
            "{} internal snapshots; {MAX_SNAPSHOTS} are the most",
            header.snapshots
        );
        return Err(bad(60, what));
    }
    let mut bytes = Bytes {
        storage,
        end: start.saturating_add(MAX_TABLE_BYTES).min(storage.len()),
        first: 0,
        piece: Vec::new(),
    };
    let mut list = Vec::new();
    let mut at = start;
    for index in 0..header.snapshots {
        at = at.next_multiple_of(8);
        let short = || {
            let what = "reaches beyond the end of the file, or the table is too large";
            bad(at, format!("the entry of internal snapshot {index} {what}"))
        };
        let fixed = bytes.get(io, at, FIXED_BYTES).await?.ok_or_else(short)?;
        let l1_offset = HostOffset(number(fixed, 0, 8));
        let l1_entries = number(fixed, 8, 4);
        let id_bytes = number(fixed, 12, 2);
        let name_bytes = number(fixed, 14, 2);
        let date_secs = number(fixed, 16, 4) as u32;
        let date_nanos = number(fixed, 20, 4) as u32;
        let vm_clock_nanos = number(fixed, 24, 8);
        let mut vm_state_bytes = number(fixed, 32, 4);
        let extra_bytes = number(fixed, 36, 4);
        if extra_bytes > MAX_EXTRA_BYTES {
            let what = format!("internal snapshot {index} has {extra_bytes} bytes of extra data");
            return Err(bad(at + 36, what));
        }
        let l1_bytes = l1_entries * 8;
        let l1_is_there = header.geometry.is_aligned(l1_offset.0)
            && l1_offset.0 != 0
            && l1_offset.0 < MAX_HOST_OFFSET
            && l1_offset.0 + l1_bytes <= storage.len().next_multiple_of(512);
        if l1_bytes > MAX_L1_BYTES || (l1_entries > 0 && !l1_is_there) {
            let what = format!(
                "the L1 table of internal snapshot {index}, {l1_entries} entries at {:#x}, can not be there",
                l1_offset.0
            );
            return Err(bad(at, what));
        }
        let (mut disk_bytes, mut icount) = (header.size, None);
        let variable = extra_bytes + id_bytes + name_bytes;
        let rest = bytes.get(io, at + FIXED_BYTES, variable).await?;
        let rest = rest.ok_or_else(short)?;
        let (extra, text) = rest.split_at(extra_bytes as usize);
        if extra_bytes >= 8 {
            vm_state_bytes = number(extra, 0, 8);
        }
        if extra_bytes >= 16 {
            disk_bytes = number(extra, 8, 8);
        }
        if extra_bytes >= 24 {
            icount = Some(number(extra, 16, 8)).filter(|count| *count != u64::MAX);
        }
        let (id, name) = text.split_at(id_bytes as usize);
        list.push(Snapshot {
            id: String::from_utf8_lossy(id).into_owned(),
            name: String::from_utf8_lossy(name).into_owned(),
            disk_bytes,
            vm_state_bytes,
            date_secs,
            date_nanos,
            vm_clock_nanos,
            icount,
            l1_offset,
            l1_entries,
        });
        at += FIXED_BYTES + variable;
    }
    Ok((list, at - start))
}

/// A big-endian number in bytes that are long enough.
fn number(bytes: &[u8], at: usize, len: usize) -> u64 {
    let bytes = bytes.iter().skip(at).take(len);
    bytes.fold(0, |n, byte| n << 8 | u64::from(*byte))
}

/// A part of the file that is looked at from its beginning to its end.
struct Bytes<'a> {
    storage: &'a Storage,
    /// Nothing is read from here on.
    end: u64,
    first: u64,
    piece: Vec<u8>,
}

impl Bytes<'_> {
    /// `len` bytes at `at`; none if they reach beyond the end.
    async fn get(&mut self, io: &Io, at: u64, len: u64) -> Result<Option<&[u8]>> {
        let Some(end) = at.checked_add(len).filter(|end| *end <= self.end) else {
            return Ok(None);
        };
        if at < self.first || end > self.first + self.piece.len() as u64 {
            // Whole sectors, so that the read needs no bounce buffer.
            self.first = at & !511;
            let len = (end - self.first).max(PIECE).next_multiple_of(512);
            let mut buf = io.buf(len as usize);
            self.storage.read(io, self.first, buf.sg()).await?;
            self.piece = buf.to_vec();
        }
        let skip = (at - self.first) as usize;
        Ok(self.piece.get(skip..skip + len as usize))
    }
}

/// What the snapshots of an image need, for an image that is opened for writing.
///
/// # Errors
/// [`ErrorKind::Corrupt`] for tables that lead nowhere, or overlap; [`ErrorKind::Unsupported`] for more of
/// them than are kept in mind; those of [`list`].
pub(super) async fn held(io: &Io, storage: &Storage, header: &Header) -> Result<Held> {
    if header.snapshots == 0 {
        return Ok(Held::default());
    }
    let g = header.geometry;
    let (list, table_bytes) = read(io, storage, header).await?;
    let clusters = |offset: u64, bytes: u64| offset >> g.cluster_bits..g.clusters(offset + bytes);
    let table = clusters(header.snapshots_offset.0, table_bytes);
    let mut tables = Vec::from([table]);
    let with_l1 = list.iter().filter(|snapshot| snapshot.l1_entries > 0);
    tables.extend(with_l1.map(|s| clusters(s.l1_offset.0, s.l1_entries * 8)));
    tables.sort_unstable_by_key(|range| range.start);
    if let Some(pair) = tables.windows(2).find(|pair| pair[1].start < pair[0].end) {
        let at = HostOffset(pair[1].start << g.cluster_bits);
        return Err(corrupt(header, at, "tables of internal snapshots overlap"));
    }
    merge(&mut tables);
    let total: u64 = list.iter().map(|snapshot| snapshot.l1_entries).sum();
    if total > MAX_L1_ENTRIES {
        return Err(too_many(header));
    }
    let mut l2_tables: Vec<Range<u64>> = Vec::new();
    let mut noted: Vec<u64> = Vec::new();
    for snapshot in &list {
        let at = snapshot.l1_offset;
        let l1 = read_table(io, storage, at.0, snapshot.l1_entries * 8).await?;
        for raw in l1 {
            let offset = entry::l1_offset(raw);
            if !entry::l1_is_well_formed(raw, &g)
                || offset >= storage.len()
                || overlaps(&tables, &clusters(offset, 1))
            {
                let what = format!(
                    "an L1 entry ({raw:#x}) of internal snapshot {:?} is not valid",
                    snapshot.name
                );
                return Err(corrupt(header, at, what));
            }
            if offset != 0 {
                noted.push(offset >> g.cluster_bits);
            }
        }
        if noted.len() >= MAX_NOTED {
            note(&mut l2_tables, &mut noted);
            if l2_tables.len() > MAX_L2_RUNS {
                return Err(too_many(header));
            }
        }
    }
    note(&mut l2_tables, &mut noted);
    Ok(Held { tables, l2_tables })
}

/// Adds noted clusters to the ranges.
fn note(ranges: &mut Vec<Range<u64>>, noted: &mut Vec<u64>) {
    noted.sort_unstable();
    noted.dedup();
    let mut new: Vec<Range<u64>> = Vec::new();
    for cluster in noted.drain(..) {
        match new.last_mut() {
            Some(last) if last.end == cluster => last.end += 1,
            _ => new.push(cluster..cluster + 1),
        }
    }
    ranges.append(&mut new);
    merge(ranges);
}

fn corrupt(header: &Header, at: HostOffset, what: impl std::fmt::Display) -> Error {
    Error::image(ErrorKind::Corrupt, &header.path, at.0, what).hint(format!(
        "look at the image with: qemu-img check -r all {}",
        header.path.display()
    ))
}

fn too_many(header: &Header) -> Error {
    let what = format!(
        "the image's {} internal snapshots have more tables than this program keeps in mind",
        header.snapshots
    );
    Error::image(ErrorKind::Unsupported, &header.path, 60, what).hint(format!(
        "open it read-only, or delete some with: qemu-img snapshot -d NAME {}",
        header.path.display()
    ))
}

impl Qcow2 {
    /// Makes the slice's L2 table the active table's alone, so that its entries may change.
    ///
    /// Slices of it that are in memory stay: the copy says what they say. None of them is dirty, and none
    /// of their entries is claimed, since nobody gets a claim before the table is ours
    /// ([`Tables::try_claim`](super::tables::Tables::try_claim)). The copy is durable before the L1 entry
    /// goes to the file (`ordered`); the old table loses its reference when the L1 entry is durable, and no
    /// request may still be loading from it (limbo). A power loss leaves the old table or the new one, and
    /// both lead to the same clusters.
    #[cold]
    pub(super) async fn own_table(&self, io: &Io, slice: u64) -> Result<()> {
        let mut room = self.log_room(io, 1).await?;
        let _one = self.new_table.lock().await;
        // Who held it may have found that no L1 entry may change any more.
        self.check_writes()?;
        let Some(old) = self.tables.shared_table(slice) else {
            return Ok(());
        };
        let g = &self.tables.geometry;
        let alloc = self.allocator()?;
        let cluster = g.host_cluster(old);
        // A snapshot has it, or the image would not have been opened. Its reference stays.
        let count = alloc.refcount(io, cluster).await?;
        if count < 2 {
            let what = format!("an L2 table in use by two L1 tables has refcount {count}");
            let error = corrupt(&self.header, old, what);
            self.stop_writing(io, &error).await;
            return Err(error);
        }
        let fresh = self.allocate(io, 1).await?;
        let new = g.host_offset(fresh.first());
        let mut table = io.buf(g.cluster_size() as usize);
        self.storage.read(io, old.0, table.sg()).await?;
        // The second word of an extended entry is no entry.
        for raw in table.chunks_exact_mut(1 << g.entry_bits()) {
            if let Some(word) = raw.first_chunk_mut::<8>() {
                *word = entry::shared(u64::from_be_bytes(*word)).to_be_bytes();
            }
        }
        self.storage.write(io, new.0, table.sg()).await?;
        alloc.reserve_metadata(fresh.first(), 1, "L2 table")?;
        self.log_and_link(&mut room, slice, new, true);
        fresh.keep();
        // The table's place stays reserved in `Tables`, where entries of the file are judged.
        alloc.release_metadata(cluster, 1);
        alloc.free(io, cluster, 1);
        Ok(())
    }
}
