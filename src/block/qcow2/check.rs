//! Is an image consistent? Every reference is counted anew and compared with the refcounts.
//!
//! (qcow2.rst, "Host cluster management", "Cluster mapping", "Snapshots", "Bitmaps".) Counted as
//! `qemu-img check` counts: a refcount lower than the references, a pointer to where nothing can be,
//! reserved bits, and a wrong COPIED flag in the active tables are errors; a refcount higher than the
//! references is a leak. Nothing is changed; `repair` works on what is found here.
//!
//! Two entries are errors here that QEMU's check lets pass, because nobody can read them: a zero flag in a
//! version 2 image (QEMU's own reader refuses it), and COPIED without an offset.
//!
//! The image is untrusted. Counts take memory only where something is referenced, up to [`MEMORY`]; an L2
//! table is read once, however often it is pointed at; and all tables together may not have many times
//! the bytes of the file. What goes beyond ends the check with an error.

mod bitmaps;
mod counts;
mod refcounts;
mod report;
mod snapshots;
mod tables;

use std::collections::BTreeMap;
use std::fmt::Display;
use std::sync::atomic::{AtomicBool, Ordering};

pub(super) use counts::{CHUNK, Counts};
pub use report::{Finding, Fix, Report};

use super::header::{Encryption, Header, MAX_HOST_OFFSET};
use super::refcount::Width;
use super::units::Geometry;
use crate::block::error::{Error, ErrorKind, Result};
use crate::block::storage::{Pending, Storage};
use crate::reactor::{AlignedBuf, Io};

/// Memory for either kind of counts, in bytes: a byte a cluster where they are dense.
const MEMORY: usize = 1 << 30;
/// Reads that are under way at a time, and their bytes together.
const DEPTH: usize = 32;
const WINDOW_BYTES: usize = 32 << 20;
/// Neighbouring tables are read together up to this many bytes.
const MAX_READ: u64 = 1 << 20;

/// Gets the part of the work that is done, 0.0 to 1.0.
pub type Progress<'a> = &'a mut dyn FnMut(f64);

/// Checks an image that nobody writes to.
///
/// # Errors
/// Those of reading, and of [`Header::read`]; [`ErrorKind::Unsupported`] for an image that would need more
/// memory or time than any sound image of its size.
pub async fn check(io: &Io, storage: &Storage) -> Result<Report> {
    check_with(io, storage, &mut |_| {}).await
}

/// As [`check`], and tells how far it has come.
///
/// # Errors
/// As [`check`].
pub async fn check_with(io: &Io, storage: &Storage, progress: Progress<'_>) -> Result<Report> {
    let header = Header::read(io, storage).await?;
    let found = examine(io, storage, &header, Scope::All, progress).await?;
    Ok(found.report)
}

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scope {
    /// Everything.
    All,
    /// All but the refcount table and its blocks, which are going to be replaced.
    WithoutRefcounts,
    /// As that, of an image that is being written to: nothing is compared, and what lies behind the end of
    /// the file is there by now.
    InUse,
}

/// What a check knows at its end.
pub(super) struct Examined {
    pub(super) report: Report,
    /// References that were found, no more than a refcount can say.
    pub(super) references: Counts,
    /// Refcounts in the image, as far as its file goes.
    pub(super) refcounts: Counts,
    /// Entries of the refcount table that can not be followed, or whose block is something else, too.
    pub(super) bad_blocks: u64,
    /// Indices of refcount blocks that are missing though clusters of theirs are referenced.
    pub(super) missing_blocks: u64,
    /// Clusters with too low a refcount that two things must not share, ascending.
    pub(super) overlaps: Vec<u64>,
}

pub(super) async fn examine(
    io: &Io,
    storage: &Storage,
    header: &Header,
    scope: Scope,
    progress: Progress<'_>,
) -> Result<Examined> {
    let never = AtomicBool::new(false);
    examine_until(io, storage, header, scope, progress, &never).await
}

/// As [`examine`], and ends with an error soon after `cancelled` has become true.
pub(super) async fn examine_until(
    io: &Io,
    storage: &Storage,
    header: &Header,
    scope: Scope,
    progress: Progress<'_>,
    cancelled: &AtomicBool,
) -> Result<Examined> {
    let geometry = header.geometry;
    let width = Width::new(geometry.refcount_order).ok_or_else(|| {
        let what = "the refcount order is above 6";
        Error::image(ErrorKind::InvalidImage, storage.path(), 96, what)
    })?;
    // QEMU counts a file in sectors.
    let len = storage.len().next_multiple_of(512);
    let mut checker = Checker {
        io,
        storage,
        header,
        scope,
        cancelled,
        geometry,
        width,
        len,
        refcounts: Counts::new(MEMORY),
        references: Counts::new(MEMORY),
        metadata: Counts::new(MEMORY),
        names: BTreeMap::new(),
        table: Vec::new(),
        l2: tables::L2Tables::default(),
        beyond: refcounts::MAX_BEYOND,
        bad_blocks: 0,
        missing_blocks: 0,
        overlaps: Vec::new(),
        // A sound image's tables do not overlap, so together they are no larger than the file.
        budget: len.saturating_mul(2).saturating_add(64 << 20),
        report: Report::default(),
    };
    checker.run(progress).await?;
    Ok(Examined {
        report: checker.report,
        references: checker.references,
        refcounts: checker.refcounts,
        bad_blocks: checker.bad_blocks,
        missing_blocks: checker.missing_blocks,
        overlaps: checker.overlaps,
    })
}

struct Checker<'a> {
    io: &'a Io,
    storage: &'a Storage,
    header: &'a Header,
    scope: Scope,
    cancelled: &'a AtomicBool,
    geometry: Geometry,
    width: Width,
    /// Bytes of the file.
    len: u64,
    /// What the image says.
    refcounts: Counts,
    /// What was found.
    references: Counts,
    /// The part of `references` that comes from metadata.
    metadata: Counts,
    /// What metadata begins where, by cluster, without L2 tables: (clusters, name).
    names: BTreeMap<u64, (u64, &'static str)>,
    /// The refcount table as it is.
    table: Vec<u64>,
    l2: tables::L2Tables,
    /// Refcounts outside the file that may still be looked up.
    beyond: u32,
    bad_blocks: u64,
    missing_blocks: u64,
    overlaps: Vec<u64>,
    /// Bytes of tables that may still be read.
    budget: u64,
    report: Report,
}

impl Checker<'_> {
    async fn run(&mut self, progress: Progress<'_>) -> Result<()> {
        let size = self.geometry.cluster_size();
        self.report.total = self.geometry.clusters(self.header.size);
        // Refcounts first: COPIED is judged by them.
        self.read_refcounts().await?;
        self.refer(0, size, 1, Some("header"))?;
        self.active_l1().await?;
        self.snapshots().await?;
        if self.scope == Scope::All {
            let at = self.header.refcount_table_offset.0;
            let bytes = self.header.refcount_table_clusters * size;
            let there = self.refer(at, bytes, 1, Some("refcount table"))?;
            self.bad_blocks += u64::from(!there);
        }
        if let Encryption::Luks(luks) = self.header.encryption {
            self.refer(luks.offset.0, luks.len, 1, Some("encryption header"))?;
        }
        self.bitmaps().await?;
        self.l2_tables(progress).await?;
        if self.scope == Scope::All {
            self.refcount_blocks()?;
        }
        if self.scope != Scope::InUse {
            self.compare();
        }
        progress(1.0);
        Ok(())
    }

    fn error(&mut self, offset: u64, fix: Fix, what: impl Display) {
        self.report.add(1, false, offset, fix, what);
    }

    /// Counts `times` references to each cluster that `bytes` at `offset` touch; false if they are not
    /// there. The file may end inside the last cluster.
    fn refer(
        &mut self,
        offset: u64,
        bytes: u64,
        times: u64,
        metadata: Option<&'static str>,
    ) -> Result<bool> {
        if bytes == 0 {
            return Ok(true);
        }
        let end = offset.saturating_add(bytes);
        let (most, max) = match self.scope {
            Scope::InUse => (MAX_HOST_OFFSET, u64::MAX),
            _ => (self.len, self.width.max()),
        };
        if end >= most.saturating_add(self.geometry.cluster_size()) {
            let what = metadata.unwrap_or("guest data");
            let what = format!("{what} of {bytes} bytes is beyond the end of the file");
            self.report.add(times, false, offset, Fix::Never, what);
            return Ok(false);
        }
        let bits = self.geometry.cluster_bits;
        let (first, last) = (offset >> bits, (end - 1) >> bits);
        for cluster in first..=last {
            let added = self.references.add(cluster, times, max);
            let excess = added.map_err(|_| self.too_large("references"))?;
            if excess > 0 {
                let what = format!(
                    "more references than a refcount of {} bits can count",
                    self.geometry.refcount_bits()
                );
                let at = cluster << bits;
                self.report.add(excess, false, at, Fix::Never, what);
            }
            if metadata.is_some() {
                let added = self.metadata.add(cluster, times, u64::MAX);
                added.map_err(|_| self.too_large("references"))?;
            }
        }
        if let Some(what) = metadata.filter(|what| *what != tables::L2_TABLE) {
            self.names.entry(first).or_insert((last - first + 1, what));
        }
        Ok(true)
    }

    /// The name of the metadata in a cluster.
    fn name(&self, cluster: u64) -> Option<&'static str> {
        let before = self.names.range(..=cluster).next_back();
        match before {
            Some((first, (count, name))) if cluster - first < *count => Some(name),
            _ if self.metadata.get(cluster) > 0 => Some(tables::L2_TABLE),
            _ => None,
        }
    }

    /// Two things that must not share a cluster share this one. Data, and L2 tables, may be shared: that is
    /// what refcounts are for.
    fn is_overlap(&self, cluster: u64) -> bool {
        let metadata = self.metadata.get(cluster);
        let offset = cluster << self.geometry.cluster_bits;
        metadata > 0
            && (self.references.get(cluster) != metadata
                || (metadata > 1 && self.l2.times(offset) != metadata))
    }

    #[cold]
    fn too_large(&self, what: &str) -> Error {
        let mib = MEMORY >> 20;
        let what = format!("counting its {what} would take more than {mib} MiB of memory");
        Error::image(ErrorKind::Unsupported, self.storage.path(), None, what)
            .hint("qemu-img check has no such limit; no sound image of a usual size comes to it")
    }

    /// Takes `bytes` that are about to be read off what may be read.
    fn charge(&mut self, bytes: u64) -> Result<()> {
        if self.cancelled.load(Ordering::Relaxed) {
            let what = "the check was ended";
            return Err(Error::image(ErrorKind::Io, self.storage.path(), None, what));
        }
        self.budget = self.budget.checked_sub(bytes).ok_or_else(|| {
            let what = "its tables overlap: together they are several times as large as the file";
            Error::image(ErrorKind::Corrupt, self.storage.path(), None, what)
                .hint("the check was ended; the image is damaged beyond what can be counted")
        })?;
        Ok(())
    }

    /// Compares refcounts and references.
    fn compare(&mut self) {
        let whole = self.len.div_ceil(self.geometry.cluster_size());
        let clusters = whole.max(self.references.end());
        let mut pieces: Vec<u64> = self.references.pieces().collect();
        pieces.extend(self.refcounts.pieces());
        pieces.sort_unstable();
        pieces.dedup();
        let mut missing = None;
        let mut highest = 0;
        for piece in pieces {
            for cluster in piece..(piece + counts::CHUNK).min(clusters) {
                let (count, found) = (self.refcounts.get(cluster), self.references.get(cluster));
                if count > 0 || found > 0 {
                    highest = cluster;
                }
                if count != found {
                    self.judge(cluster, count, found);
                }
                if found > 0 && count == 0 {
                    let block = cluster >> self.width.entries_bits(self.geometry.cluster_bits);
                    if missing != Some(block) && !self.has_block(block) {
                        missing = Some(block);
                        self.missing_blocks += 1;
                    }
                }
            }
        }
        self.report.image_end = (highest + 1) << self.geometry.cluster_bits;
    }

    fn judge(&mut self, cluster: u64, count: u64, found: u64) {
        let holds = self.name(cluster);
        let holds = holds.map_or(String::new(), |what| format!(" (the {what} is here)"));
        let what = format!("refcount {count}, references {found}{holds}");
        let offset = cluster << self.geometry.cluster_bits;
        match (count > found, self.is_overlap(cluster)) {
            (true, _) => self.report.add(1, true, offset, Fix::Leaks, what),
            (false, false) => self.report.add(1, false, offset, Fix::All, what),
            (false, true) => {
                self.overlaps.push(cluster);
                let what = format!("{what}: other things are in the same place");
                self.report.add(1, false, offset, Fix::Never, what);
            }
        }
    }

    /// A table of `bytes` at `offset`, up to the end of the file; zeros follow from there.
    async fn read_words(&mut self, offset: u64, bytes: u64) -> Result<Vec<u64>> {
        let there = bytes.min(self.len.saturating_sub(offset)) / 8 * 8;
        self.charge(there)?;
        super::reftable::read_table(self.io, self.storage, offset, there).await
    }
}

/// Reads the pieces at `places`, ascending, of `size` bytes each: neighbours together, and several reads at a
/// time. Returns where each read began, and its bytes.
pub(super) async fn read_window(
    io: &Io,
    storage: &Storage,
    places: &[u64],
    size: u64,
) -> Result<Vec<(u64, AlignedBuf)>> {
    let most = (MAX_READ / size).max(1) as usize;
    let neighbours = |a: &u64, b: &u64| a + size == *b;
    let mut bufs: Vec<(u64, AlignedBuf)> = places
        .chunk_by(neighbours)
        .flat_map(|run| run.chunks(most))
        .map(|run| (run[0], io.buf(run.len() * size as usize)))
        .collect();
    for batch in bufs.chunks_mut(DEPTH) {
        let begun: Vec<Pending<'_>> = batch
            .iter_mut()
            .map(|(at, buf)| storage.begin_read(io, *at, buf.sg()))
            .collect();
        let mut result = Ok(());
        for read in begun {
            result = result.and(read.finish(io).await);
        }
        result?;
    }
    Ok(bufs)
}

/// How many pieces of `size` bytes are read by one [`read_window`].
pub(super) fn window(size: u64) -> usize {
    (WINDOW_BYTES / size as usize).clamp(1, 4096)
}

#[cfg(test)]
pub(super) mod tests;
