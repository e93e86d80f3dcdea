//! Is an image consistent? Every reference is counted anew and compared with the refcounts.
//!
//! (qcow2.rst, "Host cluster management" and "Cluster mapping".) As `qemu-img check`: a refcount lower
//! than the references, a pointer to where nothing can be, reserved bits, and a wrong COPIED flag are
//! errors; a refcount higher than the references is a leak. Nothing is changed.

use std::collections::{BTreeMap, HashMap};
use std::fmt;

use super::entry::{self, Entry};
use super::header::Header;
use super::refcount::Width;
use super::reftable::read_table;
use super::runs::{Reserved, Run};
use super::units::Geometry;
use crate::block::error::{Error, ErrorKind, Result};
use crate::block::storage::Storage;
use crate::reactor::Io;

/// Findings that are told one by one; the others are counted.
const MAX_FINDINGS: usize = 1000;
/// Memory for refcount blocks, in bytes.
const CACHE_BYTES: usize = 32 << 20;
/// Clusters whose references are counted in one piece of memory.
const CHUNK: u64 = 4096;

/// What a check found.
#[derive(Debug, Default)]
pub struct Report {
    /// Inconsistencies that can cost data.
    pub errors: u64,
    /// Clusters that are allocated and not, or not that often, used: lost space, nothing else.
    pub leaks: u64,
    /// Guest clusters with a host cluster, compressed ones included.
    pub allocated: u64,
    /// The first of errors and leaks, in the order in which they were found.
    pub findings: Vec<Finding>,
}

impl Report {
    /// True if there is neither an error nor a leak.
    pub fn is_clean(&self) -> bool {
        self.errors + self.leaks == 0
    }

    fn add(&mut self, leak: bool, offset: u64, what: impl fmt::Display) {
        match leak {
            true => self.leaks += 1,
            false => self.errors += 1,
        }
        if self.findings.len() < MAX_FINDINGS {
            self.findings.push(Finding {
                leak,
                offset,
                what: what.to_string(),
            });
        }
    }

    fn error(&mut self, offset: u64, what: impl fmt::Display) {
        self.add(false, offset, what);
    }
}

/// One error or leak.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// A leak; else an error.
    pub leak: bool,
    /// Where in the file, in bytes.
    pub offset: u64,
    /// What is wrong there.
    pub what: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.leak { "leak" } else { "error" };
        write!(f, "{kind} at offset {:#x}: {}", self.offset, self.what)
    }
}

/// Checks an image that nobody writes to.
///
/// # Errors
/// Those of reading, and of [`Header::read`]; [`ErrorKind::Unsupported`] for images with internal
/// snapshots or bitmaps, whose tables are not walked.
pub async fn check(io: &Io, storage: &Storage) -> Result<Report> {
    let header = Header::read(io, storage).await?;
    header.check_supported()?;
    if header.snapshots > 0 || header.bitmaps.is_some() {
        let what = match header.bitmaps.is_some() {
            true => "persistent bitmaps",
            false => "internal snapshots",
        };
        let what = format!("images with {what} are not checked here; use: qemu-img check");
        return Err(Error::image(
            ErrorKind::Unsupported,
            storage.path(),
            None,
            what,
        ));
    }
    let geometry = header.geometry;
    let width = Width::new(geometry.refcount_order).ok_or_else(|| {
        let what = "the refcount order is above 6";
        Error::image(ErrorKind::InvalidImage, storage.path(), 96, what)
    })?;
    let at = header.refcount_table_offset.0;
    let bytes = header.refcount_table_clusters << geometry.cluster_bits;
    let mut checker = Checker {
        io,
        storage,
        geometry,
        width,
        len: storage.len(),
        table: read_table(io, storage, at, bytes).await?,
        blocks: HashMap::new(),
        references: BTreeMap::new(),
        metadata: Reserved::default(),
        report: Report::default(),
    };
    checker.refer(0, geometry.cluster_size(), Some("header"));
    checker.mapping(&header).await?;
    checker.refer(at, bytes, Some("refcount table"));
    checker.refcount_blocks(at);
    checker.compare().await?;
    Ok(checker.report)
}

struct Checker<'a> {
    io: &'a Io,
    storage: &'a Storage,
    geometry: Geometry,
    width: Width,
    len: u64,
    /// The refcount table; pointers that can not be followed are set to 0.
    table: Vec<u64>,
    blocks: HashMap<usize, Box<[u8]>>,
    /// References found, by cluster, in pieces of [`CHUNK`]; memory for what is referenced only.
    references: BTreeMap<u64, Box<[u32]>>,
    metadata: Reserved,
    report: Report,
}

impl Checker<'_> {
    /// Counts a reference to each cluster that `bytes` at `offset` touch; false if they are not there.
    /// The file may end inside the last cluster.
    fn refer(&mut self, offset: u64, bytes: u64, metadata: Option<&'static str>) -> bool {
        let end = offset.saturating_add(bytes);
        if end >= self.len.saturating_add(self.geometry.cluster_size()) {
            let what = metadata.unwrap_or("guest data");
            let what = format!("{what} of {bytes} bytes is beyond the end of the file");
            self.report.error(offset, what);
            return false;
        }
        let bits = self.geometry.cluster_bits;
        let run = Run::new(offset >> bits, ((end - 1) >> bits) + 1 - (offset >> bits));
        for cluster in run.first..run.end() {
            let chunk = self
                .references
                .entry(cluster / CHUNK)
                .or_insert_with(|| vec![0; CHUNK as usize].into_boxed_slice());
            let count = &mut chunk[(cluster % CHUNK) as usize];
            *count = count.saturating_add(1);
        }
        if let Some(what) = metadata {
            // A clash shows as a refcount too low; the name is for the message.
            let _ = self.metadata.add(run, what);
        }
        true
    }

    fn references(&self, cluster: u64) -> u64 {
        let chunk = self.references.get(&(cluster / CHUNK));
        chunk.map_or(0, |chunk| chunk[(cluster % CHUNK) as usize].into())
    }

    /// Walks L1 and L2.
    async fn mapping(&mut self, header: &Header) -> Result<()> {
        if header.l1_entries == 0 {
            return Ok(());
        }
        let (at, bytes) = (header.l1_offset.0, header.l1_entries * 8);
        if !self.refer(at, bytes, Some("L1 table")) {
            return Ok(());
        }
        let table = read_table(self.io, self.storage, at, bytes).await?;
        for (index, raw) in table.into_iter().enumerate() {
            let place = at + index as u64 * 8;
            if raw == 0 {
                continue;
            }
            if !entry::l1_is_well_formed(raw, &self.geometry) {
                let what = format!("L1 entry {index} ({raw:#x}) is not valid");
                self.report.error(place, what);
                continue;
            }
            let offset = entry::l1_offset(raw);
            if offset == 0 {
                continue;
            }
            let size = self.geometry.cluster_size();
            if self.refer(offset, size, Some("L2 table")) {
                self.copied(place, raw, offset).await?;
                self.l2_table(offset, header.version).await?;
            }
        }
        Ok(())
    }

    async fn l2_table(&mut self, at: u64, version: u32) -> Result<()> {
        let size = self.geometry.cluster_size();
        let table = read_table(self.io, self.storage, at, size).await?;
        for (index, raw) in table.into_iter().enumerate() {
            if raw == 0 {
                continue;
            }
            let place = at + index as u64 * 8;
            if !entry::is_well_formed(raw, &self.geometry, version) {
                let what = format!("L2 entry {index} ({raw:#x}) is not valid");
                self.report.error(place, what);
                continue;
            }
            match entry::decode(raw, &self.geometry) {
                Entry::Compressed(data) => {
                    self.report.allocated += 1;
                    self.refer(data.offset.0, data.bytes, None);
                }
                // Nobody counts references to clusters of a data file.
                Entry::Data { .. } | Entry::Zero { host: Some(_), .. }
                    if self.geometry.data_file =>
                {
                    self.report.allocated += 1;
                }
                Entry::Data { host, .. }
                | Entry::Zero {
                    host: Some(host), ..
                } => {
                    self.report.allocated += 1;
                    if self.refer(host.0, size, None) {
                        self.copied(place, raw, host.0).await?;
                    }
                }
                Entry::Unallocated
                | Entry::Zero { host: None, .. }
                | Entry::Incomplete(_)
                | Entry::Bad => {}
            }
        }
        Ok(())
    }

    /// The COPIED flag says whether the refcount is exactly one.
    async fn copied(&mut self, place: u64, raw: u64, offset: u64) -> Result<()> {
        let count = self.count(offset >> self.geometry.cluster_bits).await?;
        if (raw & entry::COPIED != 0) != (count == 1) {
            let flag = if count == 1 { "lacks" } else { "has" };
            let what = format!(
                "the entry {flag} the COPIED flag; its cluster at {offset:#x} has refcount {count}"
            );
            self.report.error(place, what);
        }
        Ok(())
    }

    /// Checks the table's pointers and counts the blocks.
    fn refcount_blocks(&mut self, table: u64) {
        let size = self.geometry.cluster_size();
        for index in 0..self.table.len() {
            let offset = self.table[index];
            if offset == 0 {
                continue;
            }
            let place = table + index as u64 * 8;
            if !self.geometry.is_aligned(offset) || offset >= self.len {
                let what = format!("refcount block {index} at {offset:#x} can not be there");
                self.report.error(place, what);
                self.table[index] = 0;
            } else if self.refer(offset, size, Some("refcount block"))
                && self.references(offset >> self.geometry.cluster_bits) > 1
            {
                let what = format!("refcount block {index} overlaps something else");
                self.report.error(offset, what);
            }
        }
    }

    /// A refcount block's bytes, unless there is none.
    async fn block(&mut self, index: usize) -> Result<Option<&[u8]>> {
        let offset = self.table.get(index).copied().unwrap_or(0);
        if offset == 0 || !self.geometry.is_aligned(offset) || offset >= self.len {
            return Ok(None);
        }
        if !self.blocks.contains_key(&index) {
            let size = self.geometry.cluster_size() as usize;
            if (self.blocks.len() + 1) * size > CACHE_BYTES {
                self.blocks.clear();
            }
            let mut buf = self.io.buf(size);
            self.storage.read(self.io, offset, buf.sg()).await?;
            self.blocks.insert(index, (*buf).into());
        }
        Ok(self.blocks.get(&index).map(|block| &block[..]))
    }

    /// A cluster's refcount on disk.
    async fn count(&mut self, cluster: u64) -> Result<u64> {
        let (width, bits) = (
            self.width,
            self.width.entries_bits(self.geometry.cluster_bits),
        );
        let block = self.block((cluster >> bits) as usize).await?;
        let entry = (cluster & ((1 << bits) - 1)) as usize;
        Ok(block.map_or(0, |block| width.get(block, entry)))
    }

    /// Compares refcounts and references, block by block and then where there is no block.
    async fn compare(&mut self) -> Result<()> {
        let clusters = self.geometry.clusters(self.len);
        let bits = self.width.entries_bits(self.geometry.cluster_bits);
        for index in 0..self.table.len() {
            let width = self.width;
            let first = (index as u64) << bits;
            if self.table[index] == 0 || first >= clusters {
                continue;
            }
            let Some(block) = self.block(index).await?.map(<[u8]>::to_vec) else {
                continue;
            };
            for cluster in first..(first + (1 << bits)).min(clusters) {
                self.judge(cluster, width.get(&block, (cluster - first) as usize));
            }
        }
        let uncounted: Vec<u64> = self
            .references
            .iter()
            .flat_map(|(chunk, counts)| (chunk * CHUNK..).zip(counts.iter()))
            .filter(|(_, count)| **count > 0)
            .map(|(cluster, _)| cluster)
            .filter(|cluster| {
                self.table
                    .get((cluster >> bits) as usize)
                    .is_none_or(|b| *b == 0)
            })
            .collect();
        for cluster in uncounted {
            self.judge(cluster, 0);
        }
        Ok(())
    }

    fn judge(&mut self, cluster: u64, count: u64) {
        let references = self.references(cluster);
        if count == references {
            return;
        }
        let holds = self.metadata.clash(Run::new(cluster, 1));
        let holds = holds.map_or(String::new(), |(_, what)| format!(" (the {what} is here)"));
        let what = format!("refcount {count}, references {references}{holds}");
        let offset = cluster << self.geometry.cluster_bits;
        self.report.add(count > references, offset, what);
    }
}

#[cfg(test)]
#[path = "check_tests.rs"]
mod tests;
