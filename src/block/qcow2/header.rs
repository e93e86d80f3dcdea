//! The image header: what it says, what is refused, and its few updates in place.
//!
//! QEMU's `docs/interop/qcow2.rst`, sections "Header" and "Additional fields". An image is untrusted input:
//! every size is bounded and every offset checked before anything is read by it.
//!
//! Reading a header refuses what contradicts the format and features that nobody knows. What is known
//! and not done here is refused by who opens the image ([`Header::check_supported`]).

mod extensions;
mod update;

use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_lock::Mutex;

pub use extensions::{BitmapsExtension, EncryptionHeader};
use extensions::{Extensions, backing_name, feature_name};

use super::units::{Geometry, HostOffset};
use crate::block::error::{Error, ErrorKind, Result};
use crate::block::storage::Storage;
use crate::reactor::Io;

const MAGIC: u32 = 0x5146_49fb;
const V2_LENGTH: usize = 72;
const V3_LENGTH: usize = 104;
/// Limits that QEMU has too: 32 MiB of L1 table, 8 MiB of refcount table.
pub(super) const MAX_L1_BYTES: u64 = 32 << 20;
const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
/// Offsets in L1 and L2 entries have 56 bits.
pub(super) const MAX_HOST_OFFSET: u64 = 1 << 56;

/// Where the fields that are updated in place stand.
mod field {
    pub(super) const SIZE: usize = 24;
    /// Entries (4 bytes), then the offset.
    pub(super) const L1: usize = 36;
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

/// Bits of `compatible_features`.
pub mod compatible {
    /// Refcounts may be written late, after the dirty bit was set.
    pub const LAZY_REFCOUNTS: u64 = 1 << 0;
}

/// Bits of `autoclear_features`.
pub mod autoclear {
    /// The bitmaps extension is consistent.
    pub const BITMAPS: u64 = 1 << 0;
    /// The external data file is a raw image by itself.
    pub const RAW_EXTERNAL: u64 = 1 << 1;
    /// Ours, in no document: a program of ours took clusters ahead of need and has not closed the image, so
    /// some may have leaked. Any other program that writes to the image clears the bit (see `leaks`).
    pub const ARENAS: u64 = 1 << 63;
    /// What writing keeps up.
    pub const KEPT_UP: u64 = BITMAPS | RAW_EXTERNAL | ARENAS;
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

/// Compression types.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Raw deflate data.
    Deflate,
    /// A zstd frame.
    Zstd,
}

/// Encryption methods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encryption {
    /// Guest data is as it is.
    None,
    /// Method 1, which QEMU itself gave up.
    Aes,
    /// Method 2: the LUKS header is where the pointer says.
    Luks(EncryptionHeader),
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
    /// How compressed clusters are compressed.
    pub compression: Compression,
    /// How guest data is encrypted.
    pub encryption: Encryption,
    /// The external data file's name, where guest data lies in one; empty if the image does not tell.
    pub data_file: Option<String>,
    /// The bitmaps extension: the image has persistent bitmaps, consistent or not.
    pub bitmaps: Option<BitmapsExtension>,
    /// Updates read, change and write the first sector: one at a time.
    updates: Arc<Mutex<()>>,
}

fn bad(path: &Path, at: usize, what: impl Display) -> Error {
    Error::image(ErrorKind::InvalidImage, path, at as u64, what)
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
        let extended_l2 =
            version >= 3 && u64_at(bytes, field::INCOMPATIBLE) & incompatible::EXTENDED_L2 != 0;
        if extended_l2 && cluster_bits < 14 {
            return Err(bad(
                20,
                format!(
                    "extended L2 entries need clusters of 16 KiB; cluster_bits is {cluster_bits}"
                ),
            ));
        }
        Ok(Geometry {
            cluster_bits,
            refcount_order,
            extended_l2,
            data_file: version >= 3
                && u64_at(bytes, field::INCOMPATIBLE) & incompatible::EXTERNAL_DATA != 0,
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
            compression: Compression::Deflate,
            encryption: Encryption::None,
            data_file: None,
            bitmaps: None,
            updates: Arc::new(Mutex::new(())),
        };
        let compression = if length > V3_LENGTH { bytes[104] } else { 0 };

        let extensions = Extensions::parse(path, bytes, length)?;
        header.refuse_unknown(extensions.feature_names)?;
        header.compression = header.compression(compression)?;
        header.encryption = match (u32_at(bytes, 32), extensions.encryption) {
            (0, _) => Encryption::None,
            (1, _) => Encryption::Aes,
            (2, Some(pointer)) => Encryption::Luks(pointer),
            (2, None) => return Err(bad(32, "LUKS encryption without its header pointer".into())),
            (n, _) => return Err(bad(32, format!("unknown encryption method {n}"))),
        };
        let external = header.incompatible & incompatible::EXTERNAL_DATA != 0;
        if !external && header.autoclear & autoclear::RAW_EXTERNAL != 0 {
            return Err(bad(
                88,
                "a raw external data file, but no external data file".into(),
            ));
        }
        if external && header.snapshots > 0 {
            return Err(bad(
                60,
                "internal snapshots and an external data file exclude each other".into(),
            ));
        }
        header.data_file = external.then(|| extensions.data_file.unwrap_or_default());
        header.check_tables(file_len)?;
        header.bitmaps = extensions.bitmaps;
        header.backing = backing_name(path, bytes, length, extensions.backing_format)?;
        if header.autoclear & autoclear::RAW_EXTERNAL != 0 && header.backing.is_some() {
            return Err(bad(
                88,
                "a raw external data file and a backing file exclude each other".into(),
            ));
        }
        if header.autoclear & autoclear::BITMAPS != 0 && header.bitmaps.is_none() {
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

    fn refuse_unknown(&self, names: Option<&[u8]>) -> Result<()> {
        let unknown = self.incompatible & !incompatible::KNOWN;
        if unknown == 0 {
            return Ok(());
        }
        let list: Vec<String> = (0..64u32)
            .filter(|bit| unknown >> bit & 1 == 1)
            .map(|bit| feature_name(names, bit))
            .collect();
        Err(Error::image(
            ErrorKind::Unsupported,
            &self.path,
            field::INCOMPATIBLE as u64,
            format!(
                "the image uses features that are not known: {}",
                list.join(", ")
            ),
        ))
    }

    fn compression(&self, kind: u8) -> Result<Compression> {
        match (self.incompatible & incompatible::COMPRESSION != 0, kind) {
            (false, 0) => Ok(Compression::Deflate),
            (true, 1) => Ok(Compression::Zstd),
            (true, n @ 2..) => Err(self.unsupported(104, &format!("compression type {n}"))),
            _ => Err(Error::image(
                ErrorKind::InvalidImage,
                &self.path,
                104,
                "the compression type and its feature bit contradict each other",
            )),
        }
    }

    /// True if the bit of [`incompatible`] is set.
    pub fn has(&self, bit: u64) -> bool {
        self.incompatible & bit != 0
    }

    /// Refuses what an image must not have to be served at all.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`], by name.
    pub fn check_supported(&self) -> Result<()> {
        match self.encryption {
            Encryption::None | Encryption::Luks(_) => Ok(()),
            Encryption::Aes => Err(self.unsupported(32, "AES encryption")),
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

    /// Refuses what an image opened for writing must not have.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`], by name.
    pub fn check_writable(&self) -> Result<()> {
        if self.has(incompatible::CORRUPT) {
            let check = format!("check -r all {}", self.path.display());
            return Err(Error::image(
                ErrorKind::Unsupported,
                &self.path,
                field::INCOMPATIBLE as u64,
                format!(
                    "the image is marked corrupt and must not be written to; repair it with: virtioblkd \
                     {check} (or qemu-img {check}), or open it read-only"
                ),
            ));
        }
        // QEMU makes no such image: a snapshot of what is outside the image is none.
        if self.snapshots > 0 && self.data_file.is_some() {
            return Err(Error::image(
                ErrorKind::Unsupported,
                &self.path,
                60,
                format!(
                    "the image has internal snapshots and an external data file, and is not written to; \
                     open it read-only, or delete them with: qemu-img snapshot -d NAME {}",
                    self.path.display()
                ),
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "header_tests.rs"]
mod tests;
