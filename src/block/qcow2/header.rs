//! The image header: what it says, what is refused, and its few updates in place.
//!
//! QEMU's `docs/interop/qcow2.rst`, sections "Header", "Additional fields", "Header extensions",
//! "Feature name table" and "Bitmaps extension". An image is untrusted input: every size is bounded
//! and every offset checked before anything is read by it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_lock::Mutex;

use super::units::{Geometry, HostOffset};
use crate::block::error::{Error, ErrorKind, Result};
use crate::block::storage::Storage;
use crate::reactor::Io;

const MAGIC: u32 = 0x5146_49fb;
const V2_LENGTH: usize = 72;
const V3_LENGTH: usize = 104;
/// Limits that QEMU has too: 32 MiB of L1 table, 8 MiB of refcount table, 1023 bytes of backing name.
const MAX_L1_BYTES: u64 = 32 << 20;
const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
const MAX_BACKING_NAME: usize = 1023;
/// Offsets in L1 and L2 entries have 56 bits.
pub(super) const MAX_HOST_OFFSET: u64 = 1 << 56;

/// Where the fields that are updated in place stand.
mod field {
    pub(super) const REFCOUNT_TABLE: usize = 48;
    pub(super) const INCOMPATIBLE: usize = 72;
    pub(super) const AUTOCLEAR: usize = 88;
}

/// Bits of `incompatible_features`.
pub mod incompatible {
    /// Refcounts may be wrong.
    pub const DIRTY: u64 = 1 << 0;
    /// Any structure may be wrong; the image must not be written to.
    pub const CORRUPT: u64 = 1 << 1;
    /// Data lives in another file.
    pub const EXTERNAL_DATA: u64 = 1 << 2;
    /// Compressed clusters are not deflate's.
    pub const COMPRESSION: u64 = 1 << 3;
    /// L2 entries have 128 bits.
    pub const EXTENDED_L2: u64 = 1 << 4;
    /// All of the above.
    pub const KNOWN: u64 = 0x1f;
}

/// Bits of `autoclear_features`.
pub mod autoclear {
    /// The bitmaps extension is consistent.
    pub const BITMAPS: u64 = 1 << 0;
    /// The external data file is a raw image by itself.
    pub const RAW_EXTERNAL: u64 = 1 << 1;
}

/// Header extension types.
mod extension {
    pub(super) const END: u32 = 0;
    pub(super) const BACKING_FORMAT: u32 = 0xe279_2aca;
    pub(super) const FEATURE_NAMES: u32 = 0x6803_f857;
    pub(super) const BITMAPS: u32 = 0x2385_2875;
}

/// The backing file that the header names. Whether it may be opened is not decided here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackingName {
    /// As written in the image: relative to the image's own directory, absolute, or something that is
    /// no path at all.
    pub name: String,
    /// The format extension's text, if there is one.
    pub format: Option<String>,
}

/// What the header says, checked.
#[derive(Clone, Debug)]
pub struct Header {
    /// The image's path, for messages.
    pub path: PathBuf,
    /// 2 or 3.
    pub version: u32,
    /// Cluster and refcount sizes.
    pub geometry: Geometry,
    /// Bytes of the virtual disk.
    pub size: u64,
    /// The active L1 table's place.
    pub l1_offset: HostOffset,
    /// Entries of the active L1 table; covers `size` at least.
    pub l1_entries: u64,
    /// The refcount table's place.
    pub refcount_table_offset: HostOffset,
    /// Clusters of the refcount table.
    pub refcount_table_clusters: u64,
    /// Internal snapshots.
    pub snapshots: u32,
    /// The snapshot table's place; meaningless without snapshots.
    pub snapshots_offset: HostOffset,
    /// Incompatible feature bits; version 2: 0.
    pub incompatible: u64,
    /// Compatible feature bits; version 2: 0.
    pub compatible: u64,
    /// Auto-clear feature bits; version 2: 0.
    pub autoclear: u64,
    /// The backing file, if one is named.
    pub backing: Option<BackingName>,
    /// The image has persistent bitmaps (consistent or not).
    pub bitmaps: bool,
    /// Updates read, change and write the first sector: one at a time.
    updates: Arc<Mutex<()>>,
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes
        .get(at..at + 4)
        .and_then(|b| b.try_into().ok())
        .map_or(0, u32::from_be_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes
        .get(at..at + 8)
        .and_then(|b| b.try_into().ok())
        .map_or(0, u64::from_be_bytes)
}

impl Header {
    /// Reads and checks an image's header.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidImage`] for what is no qcow2 image or contradicts the format,
    /// [`ErrorKind::Unsupported`] for features that this program does not have, by name.
    pub async fn read(io: &Io, storage: &Storage) -> Result<Self> {
        let path = storage.path();
        let file_len = storage.len();
        let mut first = io.buf(4096);
        storage.read(io, 0, first.sg()).await?;
        let geometry = Self::basics(path, &first)?;
        // The extensions and the backing name lie in the first cluster.
        if geometry.cluster_size() <= 4096 {
            let len = geometry.cluster_size() as usize;
            return Self::parse(path, &first[..len], file_len);
        }
        let mut cluster = io.buf(geometry.cluster_size() as usize);
        storage.read(io, 0, cluster.sg()).await?;
        Self::parse(path, &cluster, file_len)
    }

    /// Magic, version and cluster size: what must be known to read the rest.
    fn basics(path: &Path, bytes: &[u8]) -> Result<Geometry> {
        let bad = |at: u64, what: String| Error::image(ErrorKind::InvalidImage, path, at, what);
        if u32_at(bytes, 0) != MAGIC {
            return Err(bad(
                0,
                "this is not a qcow2 image (no QFI\\xfb magic)".into(),
            ));
        }
        let version = u32_at(bytes, 4);
        if !(2..=3).contains(&version) {
            return Err(Error::image(
                ErrorKind::Unsupported,
                path,
                4,
                format!("qcow2 version {version}; versions 2 and 3 are known"),
            ));
        }
        let cluster_bits = u32_at(bytes, 20);
        if !(9..=21).contains(&cluster_bits) {
            return Err(bad(
                20,
                format!("cluster_bits is {cluster_bits}; 9 (512 bytes) to 21 (2 MiB) are valid"),
            ));
        }
        let refcount_order = if version == 2 { 4 } else { u32_at(bytes, 96) };
        if refcount_order > 6 {
            return Err(bad(
                96,
                format!("refcount_order is {refcount_order}; 6 (64 bits) is the most"),
            ));
        }
        Ok(Geometry {
            cluster_bits,
            refcount_order,
        })
    }

    /// Checks `bytes`, the first cluster of an image file of `file_len` bytes.
    ///
    /// # Errors
    /// As [`Header::read`].
    pub fn parse(path: &Path, bytes: &[u8], file_len: u64) -> Result<Self> {
        let bad = |at: u64, what: String| Error::image(ErrorKind::InvalidImage, path, at, what);
        let geometry = Self::basics(path, bytes)?;
        let version = u32_at(bytes, 4);
        let length = if version == 2 {
            V2_LENGTH
        } else {
            let length = u32_at(bytes, 100) as usize;
            if length < V3_LENGTH || length % 8 != 0 || length > bytes.len() {
                return Err(bad(
                    100,
                    format!(
                        "header_length is {length}: not a multiple of 8 from 104 to the cluster size"
                    ),
                ));
            }
            length
        };
        let v3 = |at| if version == 2 { 0 } else { u64_at(bytes, at) };
        let mut header = Self {
            path: path.to_owned(),
            version,
            geometry,
            size: u64_at(bytes, 24),
            l1_offset: HostOffset(u64_at(bytes, 40)),
            l1_entries: u32_at(bytes, 36).into(),
            refcount_table_offset: HostOffset(u64_at(bytes, field::REFCOUNT_TABLE)),
            refcount_table_clusters: u32_at(bytes, field::REFCOUNT_TABLE + 8).into(),
            snapshots: u32_at(bytes, 60),
            snapshots_offset: HostOffset(u64_at(bytes, 64)),
            incompatible: v3(field::INCOMPATIBLE),
            compatible: v3(80),
            autoclear: v3(field::AUTOCLEAR),
            backing: None,
            bitmaps: false,
            updates: Arc::new(Mutex::new(())),
        };
        let compression = if length > V3_LENGTH { bytes[104] } else { 0 };

        let extensions = header.extensions(bytes, length)?;
        header.refuse_features(compression, extensions.feature_names)?;
        match u32_at(bytes, 32) {
            0 => {}
            1 => return Err(header.unsupported(32, "AES encryption")),
            2 => return Err(header.unsupported(32, "LUKS encryption")),
            n => return Err(bad(32, format!("unknown encryption method {n}"))),
        }
        header.check_tables(file_len)?;
        header.bitmaps = extensions.bitmaps;
        header.backing = header.backing_name(bytes, length, extensions.backing_format)?;
        if header.autoclear & autoclear::BITMAPS != 0 && !header.bitmaps {
            return Err(bad(
                88,
                "the bitmaps bit is set without the bitmaps extension".into(),
            ));
        }
        Ok(header)
    }

    fn unsupported(&self, at: u64, what: &str) -> Error {
        Error::image(
            ErrorKind::Unsupported,
            &self.path,
            at,
            format!(
                "the image uses {what}, which is not supported; qemu-img convert can make an image without it"
            ),
        )
    }

    fn refuse_features(&self, compression: u8, names: Option<&[u8]>) -> Result<()> {
        let at = field::INCOMPATIBLE as u64;
        let has = |bit| self.incompatible & bit != 0;
        let unknown = self.incompatible & !incompatible::KNOWN;
        if unknown != 0 {
            let list: Vec<String> = (0..64u32)
                .filter(|bit| unknown >> bit & 1 == 1)
                .map(|bit| feature_name(names, bit))
                .collect();
            return Err(Error::image(
                ErrorKind::Unsupported,
                &self.path,
                at,
                format!(
                    "the image uses features that are not known: {}",
                    list.join(", ")
                ),
            ));
        }
        let refuse = |kind, what: String| Err(Error::image(kind, &self.path, at, what));
        let check = format!("qemu-img check -r all {}", self.path.display());
        if has(incompatible::CORRUPT) {
            return refuse(
                ErrorKind::Unsupported,
                format!("the image is marked corrupt; repair it with: {check}"),
            );
        }
        if has(incompatible::DIRTY) {
            return refuse(
                ErrorKind::Unsupported,
                format!(
                    "the image was not closed and its refcounts are not valid; repair them with: {check}"
                ),
            );
        }
        if has(incompatible::EXTERNAL_DATA) || self.autoclear & autoclear::RAW_EXTERNAL != 0 {
            return Err(self.unsupported(at, "an external data file"));
        }
        if has(incompatible::EXTENDED_L2) {
            return Err(self.unsupported(at, "extended L2 entries (subclusters)"));
        }
        match (has(incompatible::COMPRESSION), compression) {
            (false, 0) => Ok(()),
            (true, 1) => Err(self.unsupported(104, "zstd compression")),
            (true, n @ 2..) => Err(self.unsupported(104, &format!("compression type {n}"))),
            _ => Err(Error::image(
                ErrorKind::InvalidImage,
                &self.path,
                104,
                "the compression type and its feature bit contradict each other",
            )),
        }
    }

    fn check_tables(&self, file_len: u64) -> Result<()> {
        let g = self.geometry;
        let bad = |at: u64, what: String| {
            Err(Error::image(ErrorKind::InvalidImage, &self.path, at, what))
        };
        let inside = |offset: u64, bytes: u64| {
            g.is_aligned(offset)
                && offset != 0
                && offset
                    .checked_add(bytes)
                    .is_some_and(|end| end <= MAX_HOST_OFFSET)
                && offset < file_len
        };
        let l1_bytes = self.l1_entries * 8;
        if l1_bytes > MAX_L1_BYTES {
            return bad(
                36,
                format!("an L1 table of {} entries is too large", self.l1_entries),
            );
        }
        let needed = self.size.div_ceil(g.l2_span());
        if needed > self.l1_entries {
            return bad(
                24,
                format!(
                    "a disk of {} bytes needs {needed} L1 entries and the table has {}",
                    self.size, self.l1_entries
                ),
            );
        }
        // An image of size 0 may have no L1 table.
        if self.l1_entries > 0 && !inside(self.l1_offset.0, l1_bytes) {
            return bad(
                40,
                format!("the L1 table's offset {:#x} is not valid", self.l1_offset.0),
            );
        }
        let table_bytes = self.refcount_table_clusters * g.cluster_size();
        if table_bytes == 0 || table_bytes > MAX_REFCOUNT_TABLE_BYTES {
            return bad(
                56,
                format!(
                    "a refcount table of {} clusters",
                    self.refcount_table_clusters
                ),
            );
        }
        if !inside(self.refcount_table_offset.0, table_bytes) {
            return bad(
                48,
                format!(
                    "the refcount table's offset {:#x} is not valid",
                    self.refcount_table_offset.0
                ),
            );
        }
        let (l1, table) = (self.l1_offset.0, self.refcount_table_offset.0);
        if l1 < table + table_bytes && table < l1 + l1_bytes {
            return bad(40, "the L1 table and the refcount table overlap".into());
        }
        if self.snapshots > 0 && !inside(self.snapshots_offset.0, 0) {
            return bad(
                64,
                format!(
                    "the snapshot table's offset {:#x} is not valid",
                    self.snapshots_offset.0
                ),
            );
        }
        Ok(())
    }

    fn backing_name(
        &self,
        bytes: &[u8],
        length: usize,
        format: Option<String>,
    ) -> Result<Option<BackingName>> {
        let offset = u64_at(bytes, 8);
        let len = u32_at(bytes, 16) as usize;
        if offset == 0 {
            return Ok(None);
        }
        let bad = |what: String| Error::image(ErrorKind::InvalidImage, &self.path, 8, what);
        if len == 0 || len > MAX_BACKING_NAME {
            return Err(bad(format!("a backing file name of {len} bytes")));
        }
        let name = usize::try_from(offset)
            .ok()
            .filter(|at| *at >= length)
            .and_then(|at| bytes.get(at..at.checked_add(len)?))
            .ok_or_else(|| {
                bad(format!(
                    "the backing file name at {offset:#x} is outside the first cluster"
                ))
            })?;
        let name = std::str::from_utf8(name)
            .ok()
            .filter(|name| !name.contains('\0'))
            .ok_or_else(|| bad("the backing file name is not text".into()))?;
        Ok(Some(BackingName {
            name: name.to_owned(),
            format,
        }))
    }

    fn extensions<'a>(&self, bytes: &'a [u8], length: usize) -> Result<Extensions<'a>> {
        let mut found = Extensions::default();
        let bad = |at: usize, what: &str| {
            Error::image(ErrorKind::InvalidImage, &self.path, at as u64, what)
        };
        // The backing name follows the extensions; it is no extension even without an end marker.
        let end = match u64_at(bytes, 8) {
            0 => bytes.len(),
            name => bytes.len().min(name.try_into().unwrap_or(usize::MAX)),
        };
        let mut at = length;
        while at + 8 <= end {
            let kind = u32_at(bytes, at);
            if kind == extension::END {
                break;
            }
            let len = u32_at(bytes, at + 4) as usize;
            let data = (at + 8)
                .checked_add(len)
                .filter(|stop| *stop <= end)
                .and_then(|stop| bytes.get(at + 8..stop))
                .ok_or_else(|| bad(at, "a header extension reaches beyond its area"))?;
            match kind {
                extension::BACKING_FORMAT => {
                    let text = std::str::from_utf8(data)
                        .map_err(|_| bad(at, "the backing format is not text"))?;
                    found.backing_format = Some(text.trim_end_matches('\0').to_owned());
                }
                extension::FEATURE_NAMES => found.feature_names = Some(data),
                extension::BITMAPS => found.bitmaps = true,
                _ => {}
            }
            at += 8 + len.next_multiple_of(8);
        }
        Ok(found)
    }

    /// Refuses what an image opened for writing must not have.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`], by name.
    pub fn check_writable(&self) -> Result<()> {
        if self.snapshots > 0 {
            return Err(Error::image(
                ErrorKind::Unsupported,
                &self.path,
                60,
                format!(
                    "the image has {} internal snapshot(s), and writing to such images is not supported; \
                     open it read-only, or delete them with: qemu-img snapshot -d NAME {}",
                    self.snapshots,
                    self.path.display()
                ),
            ));
        }
        if self.autoclear & autoclear::BITMAPS != 0 {
            return Err(Error::image(
                ErrorKind::Unsupported,
                &self.path,
                88,
                format!(
                    "the image has persistent bitmaps, and writing to such images is not supported; \
                     open it read-only, or remove them with: qemu-img bitmap --remove {} NAME",
                    self.path.display()
                ),
            ));
        }
        Ok(())
    }

    /// Points the header at another refcount table. Not durable before a flush.
    ///
    /// # Errors
    /// Those of reading and writing the first sector.
    pub async fn write_refcount_table(
        &self,
        io: &Io,
        storage: &Storage,
        offset: HostOffset,
        clusters: u32,
    ) -> Result<()> {
        self.update(io, storage, |sector| {
            put(sector, field::REFCOUNT_TABLE, &offset.0.to_be_bytes());
            put(sector, field::REFCOUNT_TABLE + 8, &clusters.to_be_bytes());
        })
        .await
    }

    /// Clears the auto-clear bits, as must be before the first write by a program that does not keep
    /// up what they stand for. Not durable before a flush.
    ///
    /// # Errors
    /// Those of reading and writing the first sector.
    pub async fn clear_autoclear(&self, io: &Io, storage: &Storage) -> Result<()> {
        if self.version < 3 || self.autoclear == 0 {
            return Ok(());
        }
        self.update(io, storage, |sector| {
            put(sector, field::AUTOCLEAR, &0u64.to_be_bytes());
        })
        .await
    }

    /// Sets the corrupt bit, so that nobody writes to the image before it is repaired. Version 2 has no
    /// such bit. Not durable before a flush.
    ///
    /// # Errors
    /// Those of reading and writing the first sector.
    pub async fn mark_corrupt(&self, io: &Io, storage: &Storage) -> Result<()> {
        if self.version < 3 {
            return Ok(());
        }
        self.update(io, storage, |sector| {
            let bits = u64_at(sector, field::INCOMPATIBLE) | incompatible::CORRUPT;
            put(sector, field::INCOMPATIBLE, &bits.to_be_bytes());
        })
        .await
    }

    async fn update(
        &self,
        io: &Io,
        storage: &Storage,
        change: impl FnOnce(&mut [u8]),
    ) -> Result<()> {
        let _one = self.updates.lock().await;
        let mut sector = io.buf(512);
        storage.read(io, 0, sector.sg()).await?;
        change(&mut sector);
        storage.write(io, 0, sector.sg()).await
    }
}

fn put(sector: &mut [u8], at: usize, value: &[u8]) {
    if let Some(place) = sector.get_mut(at..at + value.len()) {
        place.copy_from_slice(value);
    }
}

#[derive(Debug, Default)]
struct Extensions<'a> {
    backing_format: Option<String>,
    feature_names: Option<&'a [u8]>,
    bitmaps: bool,
}

/// The feature name table's text for an incompatible bit, or the bit's number.
fn feature_name(names: Option<&[u8]>, bit: u32) -> String {
    names
        .unwrap_or_default()
        .chunks_exact(48)
        .find(|entry| entry[0] == 0 && u32::from(entry[1]) == bit)
        .map(|entry| {
            let text = String::from_utf8_lossy(&entry[2..]);
            let text: String = text
                .trim_end_matches('\0')
                .chars()
                .filter(|c| !c.is_control())
                .collect();
            format!("{text:?} (bit {bit})")
        })
        .unwrap_or_else(|| format!("bit {bit}"))
}

#[cfg(test)]
#[path = "header_tests.rs"]
mod tests;
