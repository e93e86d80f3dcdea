//! Repairing what a check finds, where that can be done without guessing.
//!
//! (qcow2.rst, "Host cluster management", "Cluster mapping".) What can be repaired follows from the
//! references: refcounts, missing or damaged refcount blocks, and COPIED flags. A pointer that leads
//! nowhere, and two things in one place, do not tell what was meant: they are left, and while there is one
//! of them nothing is lowered or freed, since what looks unused may be what such a pointer meant. Nor is the
//! refcount of a cluster raised that two things must not share: that would only hide it.
//!
//! The order, so that the image is at no instant worse than before, whenever the power goes:
//!
//! 1. Refcounts that are too low go up. Where blocks are missing or damaged, a new table with new blocks is
//!    written behind the end of the file, made durable, and put in place by one write of the header.
//! 2. COPIED flags of clusters that are shared go: now, and not before, writers copy them.
//! 3. Refcounts that are too high go down: nothing refers to what becomes free.
//! 4. COPIED flags of clusters with one reference are set. Without them a cluster is copied in vain,
//!    nothing else.
//! 5. The image is checked again; the dirty and the corrupt bit go if it is clean.
//!
//! Each step is durable before the next begins.

use std::collections::BTreeMap;

use super::check::{self, CHUNK, Examined, Progress, Report, Scope, examine};
use super::entry::{COMPRESSED, COPIED, OFFSET, ZERO};
use super::header::{Header, incompatible};
use super::refcount::Width;
use super::reftable::{Refcounts, read_table};
use super::runs::{Reserved, Run, merge};
use super::units::HostOffset;
use crate::block::error::{Error, ErrorKind, Result};
use crate::block::storage::Storage;
use crate::reactor::Io;

/// Largest refcount table, as QEMU's.
const MAX_TABLE_BYTES: u64 = 8 << 20;
/// Entries are changed in pieces that a loss of power leaves whole.
const SECTOR: usize = 512;

/// What is to be repaired.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repair {
    /// Leaks: refcounts that are too high.
    Leaks,
    /// Everything that can be.
    All,
}

/// What to do with an image that is to be written to and was not closed by its last writer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnDirty {
    /// Repair it, then open it.
    #[default]
    Repair,
    /// Do not open it.
    Refuse,
}

/// What a repair did.
#[derive(Clone, Debug)]
pub struct Repaired {
    /// What was found.
    pub before: Report,
    /// What is left.
    pub after: Report,
}

impl Repaired {
    /// Errors that are gone.
    pub fn errors_fixed(&self) -> u64 {
        self.before.errors.saturating_sub(self.after.errors)
    }

    /// Leaks that are gone.
    pub fn leaks_fixed(&self) -> u64 {
        self.before.leaks.saturating_sub(self.after.leaks)
    }
}

/// Repairs an image that nobody else uses.
///
/// # Errors
/// Those of [`check::check`] and of writing. The image is no worse then, and the repair may be tried again.
pub async fn repair(
    io: &Io,
    storage: &Storage,
    what: Repair,
    progress: Progress<'_>,
) -> Result<Repaired> {
    // What another process wrote may be in the page cache only: a loss of power must not take back what is
    // relied on here.
    storage.flush(io).await?;
    let header = Header::read(io, storage).await?;
    let found = examine(io, storage, &header, Scope::All, &mut *progress).await?;
    let before = found.report.clone();
    if !before.is_clean() {
        let mut work = Work {
            io,
            storage,
            width: width(&header)?,
            header,
        };
        match what {
            Repair::All => work.all(found).await?,
            Repair::Leaks => work.leaks(&found).await?,
        }
    }
    let header = Header::read(io, storage).await?;
    let after = match before.is_clean() {
        true => before.clone(),
        false => {
            examine(io, storage, &header, Scope::All, progress)
                .await?
                .report
        }
    };
    let marks = incompatible::DIRTY | incompatible::CORRUPT;
    if after.is_clean() && header.incompatible & marks != 0 {
        header.mark_sound(io, storage).await?;
        storage.flush(io).await?;
    }
    Ok(Repaired { before, after })
}

/// Repairs an image with the dirty bit that is about to be written to, or refuses it. Returns the header as
/// it is then.
///
/// # Errors
/// [`ErrorKind::Unsupported`] if it is to be refused, [`ErrorKind::Corrupt`] if errors are left; those of
/// [`repair`].
pub(super) async fn on_opening(
    io: &Io,
    storage: &Storage,
    header: Header,
    on_dirty: OnDirty,
) -> Result<Header> {
    if !header.has(incompatible::DIRTY) {
        return Ok(header);
    }
    let path = storage.path().display();
    let refuse = |kind, what: &str| {
        let hint = format!(
            "repair it with: virtioblkd check -r all {path} (or qemu-img check -r all {path})"
        );
        Err(Error::image(kind, storage.path(), None, what).hint(hint))
    };
    if on_dirty == OnDirty::Refuse {
        let what = "the image was not closed by its last writer, so its refcounts may be wrong";
        return refuse(ErrorKind::Unsupported, what);
    }
    log::info!("{path}: not closed by its last writer; repairing it before it is used");
    let done = repair(io, storage, Repair::All, &mut |_| {}).await?;
    if !done.after.is_clean() {
        let what = "the image was not closed by its last writer, and not all of its errors can be repaired";
        return refuse(ErrorKind::Corrupt, what);
    }
    let (errors, leaks) = (done.errors_fixed(), done.leaks_fixed());
    log::info!("{path}: repaired: {errors} errors, {leaks} leaked clusters given back");
    Header::read(io, storage).await
}

fn width(header: &Header) -> Result<Width> {
    Width::new(header.geometry.refcount_order).ok_or_else(|| {
        let what = "the refcount order is above 6";
        Error::image(ErrorKind::InvalidImage, &header.path, 96, what)
    })
}

/// Which COPIED flags are changed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Flags {
    /// Those that must go.
    Clear,
    /// Those that are missing.
    Set,
}

struct Work<'a> {
    io: &'a Io,
    storage: &'a Storage,
    header: Header,
    width: Width,
}

impl Work<'_> {
    async fn all(&mut self, mut found: Examined) -> Result<()> {
        let mut lasting = found.report.lasting > 0;
        if found.bad_blocks + found.missing_blocks > 0 {
            // What is wrong with the old blocks alone does not last.
            let scope = Scope::WithoutRefcounts;
            found = examine(self.io, self.storage, &self.header, scope, &mut |_| {}).await?;
            lasting = found.report.lasting > 0;
            self.rebuild(&found, lasting).await?;
            self.header = Header::read(self.io, self.storage).await?;
            found = examine(self.io, self.storage, &self.header, Scope::All, &mut |_| {}).await?;
        }
        self.refcounts(&found, |count, references| count.max(references))
            .await?;
        if lasting {
            return Ok(());
        }
        self.copied(&found, Flags::Clear).await?;
        self.refcounts(&found, |_, references| references).await?;
        self.copied(&found, Flags::Set).await
    }

    async fn leaks(&mut self, found: &Examined) -> Result<()> {
        if found.report.lasting > 0 || found.bad_blocks > 0 {
            let what = "the image has errors, so what looks leaked may be in use";
            return Err(
                Error::image(ErrorKind::Corrupt, self.storage.path(), None, what)
                    .hint("see `virtioblkd check`; -r all repairs what can be repaired"),
            );
        }
        self.refcounts(found, |count, references| count.min(references))
            .await?;
        // A cluster that was thought to be shared may be written in place now; unless something is wrong.
        if found.report.errors == 0 {
            self.copied(found, Flags::Set).await?;
        }
        Ok(())
    }

    /// Clusters whose refcount is not what it should be, as (cluster, refcount, references).
    fn wrong(found: &Examined) -> impl Iterator<Item = (u64, u64, u64)> {
        let mut pieces: Vec<u64> = found.references.pieces().collect();
        pieces.extend(found.refcounts.pieces());
        pieces.sort_unstable();
        pieces.dedup();
        pieces
            .into_iter()
            .flat_map(|piece| piece..piece + CHUNK)
            .map(|cluster| {
                (
                    cluster,
                    found.refcounts.get(cluster),
                    found.references.get(cluster),
                )
            })
            .filter(|(_, count, references)| count != references)
    }

    /// Gives refcounts that are wrong the value of `new(refcount, references)`, durably. Clusters that
    /// become free give their space back.
    async fn refcounts(&mut self, found: &Examined, new: impl Fn(u64, u64) -> u64) -> Result<()> {
        let file_end = self.header.geometry.clusters(self.storage.len());
        let mut reserved = Reserved::default();
        let mut counts =
            Refcounts::open(self.io, self.storage, &self.header, file_end, &mut reserved).await?;
        let mut freed = Vec::new();
        for (cluster, count, references) in Self::wrong(found) {
            let value = new(count, references);
            if value == count || found.overlaps.binary_search(&cluster).is_ok() {
                continue;
            }
            let set = |_, _| value;
            counts
                .update(self.io, self.storage, Run::new(cluster, 1), set)
                .await?;
            if value == 0 && cluster < file_end {
                freed.push(Run::new(cluster, 1));
            }
        }
        counts.write_dirty(self.io, self.storage).await?;
        counts.sync(self.io, self.storage).await?;
        merge(&mut freed);
        let bits = self.header.geometry.cluster_bits;
        for run in freed {
            let (at, len) = (run.first << bits, run.count << bits);
            if let Err(error) = self.storage.discard(self.io, at, len).await {
                log::debug!("freed clusters keep their space: {error}");
            }
        }
        Ok(())
    }

    /// Writes a new refcount table and new blocks behind the end of the file, and puts them in the place of
    /// the old ones. `found` does not count those. With `keep` no refcount goes down.
    async fn rebuild(&mut self, found: &Examined, keep: bool) -> Result<()> {
        let (geometry, width) = (self.header.geometry, self.width);
        let size = geometry.cluster_size();
        let bits = width.entries_bits(geometry.cluster_bits);
        let target = |cluster| {
            let old = if keep {
                found.refcounts.get(cluster)
            } else {
                0
            };
            match found.overlaps.binary_search(&cluster) {
                Ok(_) => old,
                Err(_) => old.max(found.references.get(cluster)),
            }
        };
        // Nothing refers to what is behind this, and nothing is there.
        let in_use = if keep { found.refcounts.end() } else { 0 };
        let first = geometry
            .clusters(self.storage.len())
            .max(found.references.end())
            .max(in_use);
        let mut blocks: Vec<u64> = found
            .references
            .pieces()
            .chain(found.refcounts.pieces().filter(|_| keep))
            .flat_map(|piece| (piece >> bits)..=((piece + CHUNK - 1) >> bits))
            .collect();
        blocks.sort_unstable();
        blocks.dedup();
        blocks.retain(|index| ((index << bits)..((index + 1) << bits)).any(|c| target(c) > 0));
        let end = loop {
            blocks.sort_unstable();
            blocks.dedup();
            let last = blocks.last().copied().unwrap_or(0);
            let table = ((last + 1) * 8).div_ceil(size);
            let end = first + table + blocks.len() as u64;
            let before = blocks.len();
            blocks.extend((first >> bits)..=((end - 1) >> bits));
            blocks.sort_unstable();
            blocks.dedup();
            if blocks.len() == before {
                break end;
            }
        };
        let table_clusters = end - first - blocks.len() as u64;
        if table_clusters * size > MAX_TABLE_BYTES {
            let what = "a refcount table for the image would be larger than the format allows";
            return Err(Error::image(
                ErrorKind::Unsupported,
                self.storage.path(),
                None,
                what,
            ));
        }
        let mut table = vec![0u64; (table_clusters * size / 8) as usize];
        for (number, index) in blocks.iter().enumerate() {
            let place = first + table_clusters + number as u64;
            let mut buf = self.io.buf(size as usize);
            buf.fill(0);
            for cluster in (index << bits)..((index + 1) << bits) {
                let count = match cluster >= first && cluster < end {
                    true => 1,
                    false => target(cluster),
                };
                if count > 0 {
                    let at = (cluster & ((1 << bits) - 1)) as usize;
                    width.set(&mut buf, at, count.min(width.max()));
                }
            }
            let at = place << geometry.cluster_bits;
            self.storage.write(self.io, at, buf.sg()).await?;
            table[*index as usize] = at;
        }
        let at = first << geometry.cluster_bits;
        for (number, part) in table.chunks(1 << 17).enumerate() {
            let mut buf = self.io.buf(part.len() * 8);
            for (to, entry) in buf.chunks_exact_mut(8).zip(part) {
                to.copy_from_slice(&entry.to_be_bytes());
            }
            let at = at + (number << 20) as u64;
            self.storage.write(self.io, at, buf.sg()).await?;
        }
        self.storage.flush(self.io).await?;
        let clusters = table_clusters as u32;
        self.header
            .write_refcount_table(self.io, self.storage, HostOffset(at), clusters)
            .await?;
        self.storage.flush(self.io).await
    }

    /// Corrects COPIED flags in the active tables, by the references of what they point at, durably.
    async fn copied(&mut self, found: &Examined, flags: Flags) -> Result<()> {
        let geometry = self.header.geometry;
        let size = geometry.cluster_size();
        let external = self.header.data_file.is_some();
        let change = |raw: u64, once: bool| match flags {
            Flags::Clear if !once => raw & !COPIED,
            Flags::Set if once => raw | COPIED,
            _ => raw,
        };
        let once = |offset: u64| found.references.get(offset >> geometry.cluster_bits) == 1;
        let (at, bytes) = (self.header.l1_offset.0, self.header.l1_entries * 8);
        let l1 = read_table(self.io, self.storage, at, bytes).await?;
        let mut changed = BTreeMap::new();
        for (index, &raw) in l1.iter().enumerate() {
            let new = match raw & OFFSET {
                0 => raw,
                offset => change(raw, once(offset)),
            };
            if new != raw {
                changed.insert(at + index as u64 * 8, new);
            }
        }
        let mut tables: Vec<u64> = l1
            .iter()
            .map(|raw| raw & OFFSET)
            .filter(|o| *o != 0)
            .collect();
        tables.sort_unstable();
        tables.dedup();
        let word = |bytes: &[u8]| bytes.try_into().map_or(0, u64::from_be_bytes);
        let entry_bytes = 1 << geometry.entry_bits();
        for places in tables.chunks(check::window(size)) {
            for (at, buf) in check::read_window(self.io, self.storage, places, size).await? {
                for (index, bytes) in buf.chunks_exact(entry_bytes).enumerate() {
                    let raw = word(&bytes[..8]);
                    let offset = raw & OFFSET;
                    // In a data file offset 0 is one like others: COPIED says that it is meant.
                    let zero = raw & ZERO != 0 && !geometry.extended_l2;
                    let data = offset != 0 || (external && !zero && raw & COPIED != 0);
                    if raw & COMPRESSED != 0 || !data {
                        continue;
                    }
                    let new = change(raw, external || once(offset));
                    if new != raw {
                        changed.insert(at + (index * entry_bytes) as u64, new);
                    }
                }
            }
            self.write_words(&mut changed).await?;
        }
        self.write_words(&mut changed).await?;
        self.storage.flush(self.io).await
    }

    /// Replaces 64-bit words of the file, sector by sector.
    async fn write_words(&self, words: &mut BTreeMap<u64, u64>) -> Result<()> {
        let mut words = std::mem::take(words).into_iter().peekable();
        while let Some((at, word)) = words.next() {
            let sector = at & !(SECTOR as u64 - 1);
            let mut buf = self.io.buf(SECTOR);
            self.storage.read(self.io, sector, buf.sg()).await?;
            let mut put = |at: u64, word: u64| {
                let from = (at - sector) as usize;
                buf[from..from + 8].copy_from_slice(&word.to_be_bytes());
            };
            put(at, word);
            while let Some((at, word)) = words.next_if(|(at, _)| at - sector < SECTOR as u64) {
                put(at, word);
            }
            self.storage.write(self.io, sector, buf.sg()).await?;
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "repair_tests.rs"]
mod tests;
