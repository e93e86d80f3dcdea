//! Internal snapshots: their table and L1 tables (qcow2.rst, "Snapshots").
//!
//! A tolerant walk: what is bad is reported, and the walk goes on behind it as far as it can tell where.

use std::collections::BTreeMap;

use super::{Checker, Fix};
use crate::block::error::{Error, ErrorKind, Result};
use crate::block::qcow2::header::MAX_L1_BYTES;

/// Limits that QEMU has, too.
const MAX_SNAPSHOTS: u32 = 65536;
const MAX_TABLE_BYTES: u64 = 64 << 20;
const MAX_EXTRA_BYTES: u32 = 1024;
/// Bytes of an entry before its extra data.
const FIXED: u64 = 40;
/// Extra data that an entry of a version 3 image must have.
const V3_EXTRA: u32 = 16;

impl Checker<'_> {
    /// Counts the snapshot table and every snapshot's L1 table, and takes the L2 tables.
    pub(super) async fn snapshots(&mut self) -> Result<()> {
        let count = self.header.snapshots;
        if count == 0 {
            return Ok(());
        }
        let table = self.header.snapshots_offset.0;
        if count > MAX_SNAPSHOTS || !self.geometry.is_aligned(table) {
            let what = format!("a snapshot table of {count} entries at {table:#x} can not be");
            return Err(Error::image(
                ErrorKind::InvalidImage,
                self.storage.path(),
                60,
                what,
            ));
        }
        if self.header.data_file.is_some() {
            let what = format!("{count} snapshots in an image with an external data file");
            self.error(60, Fix::Never, what);
        }
        // How often each L1 table is pointed at: each is walked once.
        let mut tables: BTreeMap<(u64, u64), u64> = BTreeMap::new();
        let mut at = table;
        let mut end = table;
        for number in 0..count {
            at = at.next_multiple_of(8);
            let mut fixed = self.io.buf(FIXED as usize);
            self.storage.read(self.io, at, fixed.sg()).await?;
            let u32_at = |n: usize| {
                fixed[n..n + 4]
                    .iter()
                    .fold(0, |v, b| v << 8 | u32::from(*b))
            };
            let l1 = u64::from(u32_at(0)) << 32 | u64::from(u32_at(4));
            let entries = u64::from(u32_at(8));
            let (names, extra) = (u32_at(12), u32_at(36));
            let bytes =
                FIXED + u64::from(extra) + u64::from(names >> 16) + u64::from(names & 0xffff);
            if extra > MAX_EXTRA_BYTES || at + bytes - table > MAX_TABLE_BYTES {
                let what = format!(
                    "entry {number} of the snapshot table, with {extra} bytes of extra data, is too large"
                );
                return Err(
                    Error::image(ErrorKind::InvalidImage, self.storage.path(), at, what)
                        .hint("nothing behind it can be found"),
                );
            }
            if self.header.version >= 3 && extra < V3_EXTRA {
                let what = format!("entry {number} of the snapshot table lacks the disk's size");
                self.error(at, Fix::Never, what);
            }
            if !self.geometry.is_aligned(l1) {
                let what = format!("the L1 table of snapshot {number} at {l1:#x} is not aligned");
                self.error(at, Fix::Never, what);
            } else if entries * 8 > MAX_L1_BYTES {
                let what = format!("the L1 table of snapshot {number} has {entries} entries");
                self.error(at, Fix::Never, what);
            } else if entries > 0 {
                *tables.entry((l1, entries * 8)).or_default() += 1;
            }
            at += bytes;
            end = at;
        }
        for ((l1, bytes), times) in tables {
            self.refer(l1, bytes, times, Some("L1 table of a snapshot"))?;
            self.l1_table(l1, bytes, times, false).await?;
        }
        self.refer(table, end - table, 1, Some("snapshot table"))?;
        Ok(())
    }
}
