//! Persistent bitmaps: directory, tables and data (qcow2.rst, "Bitmaps").
//!
//! Without their autoclear bit bitmaps do not count: nobody may use them, and what they take is a leak.

use super::{Checker, Fix};
use crate::block::error::Result;
use crate::block::qcow2::header::autoclear;

/// Limits that QEMU has, too.
const MAX_BITMAPS: u32 = 65535;
const MAX_DIRECTORY_BYTES: u64 = 1024 * 65535;
const MAX_TABLE_ENTRIES: u64 = 0x800_0000;
const MAX_BYTES: u64 = 512 << 20;
/// Bytes of a directory entry before its extra data.
const FIXED: usize = 24;
/// In use, auto.
const KNOWN_FLAGS: u32 = 3;
const IN_USE: u32 = 1;
/// Reserved bits of a bitmap table entry; its offset.
const RESERVED: u64 = 0xff00_0000_0000_01fe;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

impl Checker<'_> {
    /// Counts everything that bitmaps refer to.
    pub(super) async fn bitmaps(&mut self) -> Result<()> {
        let Some(extension) = self.header.bitmaps else {
            return Ok(());
        };
        if self.header.autoclear & autoclear::BITMAPS == 0 {
            return Ok(());
        }
        let (at, bytes) = (extension.directory_offset.0, extension.directory_bytes);
        if extension.count == 0
            || extension.count > MAX_BITMAPS
            || bytes > MAX_DIRECTORY_BYTES
            || !self.geometry.is_aligned(at)
        {
            let what = format!(
                "a bitmap directory of {} entries and {bytes} bytes at {at:#x} can not be",
                extension.count
            );
            self.error(extension.at, Fix::Never, what);
            return Ok(());
        }
        self.refer(at, bytes, 1, Some("bitmap directory"))?;
        let words = self.read_words(at, bytes.next_multiple_of(8)).await?;
        let directory: Vec<u8> = words.iter().flat_map(|word| word.to_be_bytes()).collect();
        let directory = &directory[..directory.len().min(bytes as usize)];
        let mut from = 0;
        let mut found = 0;
        while from < directory.len() {
            let Some(entry) = Entry::parse(&directory[from..]) else {
                self.error(
                    at + from as u64,
                    Fix::Never,
                    "the bitmap directory is cut off",
                );
                return Ok(());
            };
            found += 1;
            self.bitmap(at + from as u64, &entry).await?;
            from += entry.bytes;
        }
        if found != extension.count {
            let what = format!(
                "the bitmap directory has {found} entries and the header says {}",
                extension.count
            );
            self.error(extension.at, Fix::Never, what);
        }
        Ok(())
    }

    async fn bitmap(&mut self, place: u64, entry: &Entry) -> Result<()> {
        let size = self.geometry.cluster_size();
        let (at, entries) = (entry.table, u64::from(entry.entries));
        let bytes = entries.saturating_mul(size);
        let covers = (bytes.saturating_mul(8)).checked_shl(entry.granularity.into());
        let short = entry.flags & IN_USE == 0 && covers.is_some_and(|c| c < self.header.size);
        if entries == 0
            || entries > MAX_TABLE_ENTRIES
            || bytes > MAX_BYTES
            || at == 0
            || !self.geometry.is_aligned(at)
            || !(9..=31).contains(&entry.granularity)
            || entry.flags & !KNOWN_FLAGS != 0
            || entry.kind != 1
            || entry.name > 1023
            || entry.extra != 0
            || short
        {
            let what = format!(
                "the bitmap at {at:#x} with {entries} clusters, granularity {}, type {} and flags {:#x} \
                 can not be",
                entry.granularity, entry.kind, entry.flags
            );
            self.error(place, Fix::Never, what);
            return Ok(());
        }
        self.refer(at, entries * 8, 1, Some("bitmap table"))?;
        let table = self.read_words(at, entries * 8).await?;
        for (index, raw) in table.into_iter().enumerate() {
            let offset = raw & OFFSET;
            // With an offset bit 0, all ones, is reserved, too.
            let is_bad = raw & RESERVED != 0
                || !self.geometry.is_aligned(offset)
                || (offset != 0 && raw & 1 != 0);
            if is_bad {
                let what = format!("bitmap table entry {index} ({raw:#x}) is not valid");
                self.error(at + index as u64 * 8, Fix::Never, what);
            } else if offset != 0 {
                self.refer(offset, size, 1, Some("bitmap"))?;
            }
        }
        Ok(())
    }
}

struct Entry {
    table: u64,
    entries: u32,
    flags: u32,
    kind: u8,
    granularity: u8,
    name: u16,
    extra: u32,
    /// Of the whole entry, padding included.
    bytes: usize,
}

impl Entry {
    /// The entry at the beginning of `bytes`, unless it is cut off.
    fn parse(bytes: &[u8]) -> Option<Self> {
        let fixed = bytes.get(..FIXED)?;
        let number = |from: usize, len: usize| {
            fixed[from..from + len]
                .iter()
                .fold(0u64, |v, b| v << 8 | u64::from(*b))
        };
        let (name, extra) = (number(18, 2), number(20, 4));
        let len = (FIXED as u64 + extra + name).next_multiple_of(8);
        let len = usize::try_from(len)
            .ok()
            .filter(|len| *len <= bytes.len())?;
        Some(Self {
            table: number(0, 8),
            entries: number(8, 4) as u32,
            flags: number(12, 4) as u32,
            kind: fixed[16],
            granularity: fixed[17],
            name: name as u16,
            extra: extra as u32,
            bytes: len,
        })
    }
}
