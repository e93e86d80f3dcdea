//! The refcount table and its blocks, as they are (qcow2.rst, "Host cluster management").

use super::{Checker, Fix, read_window, window};
use crate::block::error::Result;

/// Bits 0 to 8 of a refcount table entry are reserved.
const RESERVED: u64 = 0x1ff;
/// Refcounts of clusters outside the file that are looked up for the sake of a COPIED flag; more pointers
/// than this lead outside in no image worth the time.
pub(super) const MAX_BEYOND: u32 = 1000;

impl Checker<'_> {
    /// Where the refcount block with this index is, if there can be one.
    fn block_offset(&self, index: u64) -> Option<u64> {
        let raw = self.table.get(usize::try_from(index).ok()?)?;
        let offset = raw & !RESERVED;
        (offset != 0 && self.geometry.is_aligned(offset) && offset < self.len).then_some(offset)
    }

    pub(super) fn has_block(&self, index: u64) -> bool {
        self.block_offset(index).is_some()
    }

    /// Reads the table, and the blocks as far as they count clusters of the file.
    pub(super) async fn read_refcounts(&mut self) -> Result<()> {
        let at = self.header.refcount_table_offset.0;
        let size = self.geometry.cluster_size();
        let bytes = self.header.refcount_table_clusters * size;
        self.table = self.read_words(at, bytes).await?;
        let bits = self.width.entries_bits(self.geometry.cluster_bits);
        // A reference may go a little beyond the end: one cluster more.
        let clusters = self.len.div_ceil(size) + 1;
        let mut blocks: Vec<(u64, u64)> = (0..clusters.div_ceil(1 << bits))
            .take(self.table.len())
            .filter_map(|index| Some((self.block_offset(index)?, index)))
            .collect();
        blocks.sort_unstable();
        for window in blocks.chunks(window(size)) {
            let mut places: Vec<u64> = window.iter().map(|(at, _)| *at).collect();
            places.dedup();
            self.charge(places.len() as u64 * size)?;
            let bufs = read_window(self.io, self.storage, &places, size).await?;
            let mut bufs = bufs.iter();
            let mut now = bufs.next();
            for (at, index) in window {
                while let Some((first, buf)) = now {
                    if *at < first + buf.len() as u64 {
                        break;
                    }
                    now = bufs.next();
                }
                let Some((first, buf)) = now else {
                    break;
                };
                let from = (at - first) as usize;
                self.take_block(*index, &buf[from..from + size as usize], clusters)?;
            }
        }
        Ok(())
    }

    fn take_block(&mut self, index: u64, block: &[u8], clusters: u64) -> Result<()> {
        let bits = self.width.entries_bits(self.geometry.cluster_bits);
        let first = index << bits;
        let entries = (clusters - first).min(1 << bits) as usize;
        let per_word = 64 >> self.geometry.refcount_order;
        for at in (0..entries).step_by(per_word) {
            let byte = self.width.byte_of(at);
            if block[byte..byte + 8] == [0; 8] {
                continue;
            }
            for entry in at..(at + per_word).min(entries) {
                let count = self.width.get(block, entry);
                let set = self.refcounts.set(first + entry as u64, count);
                set.map_err(|_| self.too_large("refcounts"))?;
            }
        }
        Ok(())
    }

    /// A cluster's refcount, wherever the cluster is said to be.
    pub(super) async fn refcount(&mut self, cluster: u64) -> Result<u64> {
        if cluster <= self.len.div_ceil(self.geometry.cluster_size()) {
            return Ok(self.refcounts.get(cluster));
        }
        let bits = self.width.entries_bits(self.geometry.cluster_bits);
        let Some(block) = self.block_offset(cluster >> bits) else {
            return Ok(0);
        };
        if self.beyond == 0 {
            return Ok(0);
        }
        self.beyond -= 1;
        let entry = (cluster & ((1 << bits) - 1)) as usize;
        let byte = self.width.byte_of(entry) & !511;
        let mut buf = self.io.buf(512);
        let at = block + byte as u64;
        self.storage.read(self.io, at, buf.sg()).await?;
        let before = (byte * 8) >> self.geometry.refcount_order;
        Ok(self.width.get(&buf, entry - before))
    }

    /// Checks the table's pointers, and counts the blocks.
    pub(super) fn refcount_blocks(&mut self) -> Result<()> {
        let size = self.geometry.cluster_size();
        let table = self.header.refcount_table_offset.0;
        for index in 0..self.table.len() {
            let raw = self.table[index];
            let (place, offset) = (table + index as u64 * 8, raw & !RESERVED);
            let wrong = if raw & RESERVED != 0 {
                Some(format!(
                    "refcount table entry {index} ({raw:#x}) has reserved bits set"
                ))
            } else if !self.geometry.is_aligned(offset) {
                Some(format!(
                    "refcount block {index} at {offset:#x} is not aligned to a cluster"
                ))
            } else if offset >= self.len {
                Some(format!(
                    "refcount block {index} at {offset:#x} is beyond the end of the file"
                ))
            } else {
                None
            };
            if let Some(what) = wrong {
                self.bad_blocks += 1;
                self.error(place, Fix::All, what);
            } else if offset != 0 {
                self.refer(offset, size, 1, Some("refcount block"))?;
                if self.references.get(offset >> self.geometry.cluster_bits) > 1 {
                    self.bad_blocks += 1;
                    let what = format!("refcount block {index} overlaps something else");
                    self.error(offset, Fix::All, what);
                }
            }
        }
        Ok(())
    }
}
