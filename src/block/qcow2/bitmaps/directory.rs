//! The bitmap directory: what bitmaps an image has.
//!
//! `docs/interop/qcow2.rst`, sections "Bitmaps extension", "Bitmap directory" and "Bitmap table". The image
//! is untrusted: the limits are those that QEMU has, and everything is checked before it is followed.

use std::collections::HashSet;
use std::ops::Range;
use std::path::Path;

use super::super::header::{BitmapsExtension, Header, autoclear};
use super::super::runs::{Run, merge};
use super::super::units::Geometry;
use crate::block::error::{Error, ErrorKind, Result};
use crate::block::storage::Storage;
use crate::reactor::Io;

const MAX_BITMAPS: u64 = 65_535;
const MAX_DIRECTORY_BYTES: u64 = 1024 * MAX_BITMAPS;
const MAX_NAME: usize = 1023;
/// Bytes of a bitmap's data in the file, at most.
const MAX_DATA_BYTES: u64 = 512 << 20;
const GRANULARITY_BITS: Range<u32> = 9..32;
/// Bytes of a directory entry before its extra data and its name.
const FIXED: usize = 24;

/// Bits of an entry's flags.
pub(super) mod flag {
    pub(in super::super) const IN_USE: u32 = 1 << 0;
    pub(in super::super) const AUTO: u32 = 1 << 1;
    pub(in super::super) const EXTRA_DATA_COMPATIBLE: u32 = 1 << 2;
    pub(super) const KNOWN: u32 = 7;
}

/// What a table entry says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TableEntry {
    /// A cluster of zeros.
    Zeros,
    /// A cluster of ones.
    Ones,
    /// The cluster at this offset.
    At(u64),
}

impl TableEntry {
    pub(super) fn decode(raw: u64, g: &Geometry) -> Option<Self> {
        match raw {
            0 => Some(Self::Zeros),
            1 => Some(Self::Ones),
            // Reserved: bits 0 to 8, and 56 to 63.
            at if at >> 56 == 0 && g.is_aligned(at) => Some(Self::At(at)),
            _ => None,
        }
    }

    pub(super) fn encode(self) -> u64 {
        match self {
            Self::Zeros => 0,
            Self::Ones => 1,
            Self::At(at) => at,
        }
    }
}

/// A persistent bitmap, as the directory tells of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bitmap {
    /// Its name; what is no text in it is replaced.
    pub name: String,
    /// Bytes of the virtual disk that a bit stands for.
    pub granularity: u64,
    /// Writing to the image keeps it up.
    pub auto: bool,
    /// It is in use, or was when its user ended without storing it: what it holds means nothing.
    pub in_use: bool,
    /// Bytes of extra data, which no program is known to have.
    pub extra_data: u32,
    /// Where its flags stand in the directory's bytes.
    pub(super) flags_at: usize,
    pub(super) flags: u32,
    pub(super) table: u64,
    pub(super) table_entries: u64,
}

impl Bitmap {
    /// Bits that a disk of `size` bytes needs.
    pub(super) fn bits(&self, size: u64) -> u64 {
        size.div_ceil(self.granularity)
    }

    /// True if extra data forbids to use it.
    pub(super) fn is_closed(&self) -> bool {
        self.extra_data > 0 && self.flags & flag::EXTRA_DATA_COMPATIBLE == 0
    }
}

/// The directory's bytes, and what they say.
#[derive(Debug)]
pub(super) struct Directory {
    pub(super) offset: u64,
    /// Whole sectors.
    pub(super) bytes: Vec<u8>,
    pub(super) bitmaps: Vec<Bitmap>,
}

pub(super) fn corrupt(path: &Path, offset: u64, what: String) -> Error {
    Error::image(ErrorKind::Corrupt, path, offset, what).hint(format_args!(
        "open the image read-only, or look at it with: qemu-img check {}",
        path.display()
    ))
}

/// The bitmaps of an image; none if it has no such extension.
///
/// # Errors
/// [`ErrorKind::Corrupt`] for a directory that contradicts the format or goes beyond QEMU's limits; those of
/// reading it.
pub async fn list(io: &Io, storage: &Storage, header: &Header) -> Result<Vec<Bitmap>> {
    let Some(extension) = header.bitmaps else {
        return Ok(Vec::new());
    };
    let mut bitmaps = read(io, storage, header, extension).await?.bitmaps;
    // Somebody has written to the image who knew nothing of bitmaps.
    let stale = header.autoclear & autoclear::BITMAPS == 0;
    bitmaps.iter_mut().for_each(|bitmap| bitmap.in_use |= stale);
    Ok(bitmaps)
}

/// Reads and checks the directory.
pub(super) async fn read(
    io: &Io,
    storage: &Storage,
    header: &Header,
    extension: BitmapsExtension,
) -> Result<Directory> {
    let (at, len) = (extension.directory_offset.0, extension.directory_bytes);
    let count = u64::from(extension.count);
    let possible = (1..=MAX_BITMAPS).contains(&count)
        && (count * FIXED as u64..=MAX_DIRECTORY_BYTES).contains(&len)
        && at != 0
        && header.geometry.is_aligned(at)
        && at.checked_add(len).is_some_and(|end| end <= storage.len());
    if !possible {
        let what = format!("a bitmap directory of {count} entries in {len} bytes at {at:#x}");
        return Err(corrupt(&header.path, extension.at, what));
    }
    let mut buf = io.buf((len as usize).next_multiple_of(512));
    storage.read(io, at, buf.sg()).await?;
    let bitmaps = parse(&header.path, at, &buf[..len as usize], count)?;
    for bitmap in &bitmaps {
        check(header, at, bitmap)?;
    }
    Ok(Directory {
        offset: at,
        bytes: buf.to_vec(),
        bitmaps,
    })
}

fn parse(path: &Path, offset: u64, bytes: &[u8], count: u64) -> Result<Vec<Bitmap>> {
    let mut bitmaps = Vec::new();
    let mut names = HashSet::new();
    let mut at = 0;
    while at < bytes.len() {
        let bad = |what: &str| corrupt(path, offset + at as u64, format!("a bitmap {what}"));
        let entry = &bytes[at..];
        let field = |from: usize, len: usize| -> u64 {
            let bytes = entry.get(from..from + len).unwrap_or_default();
            bytes
                .iter()
                .fold(0, |value, byte| value << 8 | u64::from(*byte))
        };
        let extra = field(20, 4) as usize;
        let name_at = FIXED + extra;
        let end = name_at + field(18, 2) as usize;
        let (Some(name), true) = (entry.get(name_at..end), entry.len() >= FIXED) else {
            return Err(bad("reaches beyond the bitmap directory"));
        };
        if name.is_empty() || name.len() > MAX_NAME {
            return Err(bad("has no name, or one that is too long"));
        }
        if !names.insert(name) {
            return Err(bad("has the name of another"));
        }
        let granularity_bits = field(17, 1) as u32;
        if field(16, 1) != 1 || !GRANULARITY_BITS.contains(&granularity_bits) {
            return Err(bad("is of a type or granularity that is not known"));
        }
        let flags = field(12, 4) as u32;
        if flags & !flag::KNOWN != 0 {
            return Err(bad("has flags that are not known"));
        }
        bitmaps.push(Bitmap {
            name: String::from_utf8_lossy(name).into_owned(),
            granularity: 1 << granularity_bits,
            auto: flags & flag::AUTO != 0,
            in_use: flags & flag::IN_USE != 0,
            extra_data: extra as u32,
            flags_at: at + 12,
            flags,
            table: field(0, 8),
            table_entries: field(8, 4),
        });
        at += end.next_multiple_of(8);
    }
    match at == bytes.len() && bitmaps.len() as u64 == count {
        true => Ok(bitmaps),
        false => {
            let what = format!("the bitmap directory has not just {count} bitmaps");
            Err(corrupt(path, offset, what))
        }
    }
}

/// Checks what an entry says of the bitmap's table.
fn check(header: &Header, directory: u64, bitmap: &Bitmap) -> Result<()> {
    let g = &header.geometry;
    let bad = |what: &str| {
        let at = directory + bitmap.flags_at as u64 - 12;
        Err(corrupt(
            &header.path,
            at,
            format!("the bitmap {:?} {what}", bitmap.name),
        ))
    };
    if bitmap.table == 0 || bitmap.table >> 56 != 0 || !g.is_aligned(bitmap.table) {
        return bad("has a table where none can be");
    }
    let data = bitmap.table_entries << g.cluster_bits;
    if data == 0 || data > MAX_DATA_BYTES {
        return bad("has no table, or one that is too large");
    }
    let needed = g.clusters(bitmap.bits(header.size).div_ceil(8));
    // One that is in use may be of another size.
    if !bitmap.in_use && bitmap.table_entries != needed {
        return bad("has a table of a size that does not fit the disk");
    }
    Ok(())
}

/// Reads a bitmap's table; what stays in the file of `file_len` bytes is for the caller to see to.
pub(super) async fn read_table(
    io: &Io,
    storage: &Storage,
    header: &Header,
    bitmap: &Bitmap,
) -> Result<Vec<TableEntry>> {
    let bytes = bitmap.table_entries * 8;
    if bitmap.table + bytes > storage.len() {
        let what = format!(
            "the table of the bitmap {:?} is beyond the file",
            bitmap.name
        );
        return Err(corrupt(&header.path, bitmap.table, what));
    }
    let raw = super::super::reftable::read_table(io, storage, bitmap.table, bytes).await?;
    let entry = |(n, raw): (usize, u64)| {
        let inside =
            |entry: &TableEntry| !matches!(entry, TableEntry::At(at) if *at >= storage.len());
        TableEntry::decode(raw, &header.geometry)
            .filter(inside)
            .ok_or_else(|| {
                let at = bitmap.table + n as u64 * 8;
                let what = format!(
                    "entry {n} of the bitmap {:?} ({raw:#x}) is not valid",
                    bitmap.name
                );
                corrupt(&header.path, at, what)
            })
    };
    raw.into_iter().enumerate().map(entry).collect()
}

/// The clusters of a bitmap's data, joined to runs; None if two entries lead to the same one.
pub(super) fn clusters(g: &Geometry, table: &[TableEntry]) -> Option<Vec<Run>> {
    let cluster = |entry: &TableEntry| match entry {
        TableEntry::At(at) => Some(Run::new(at >> g.cluster_bits, 1)),
        _ => None,
    };
    let mut runs: Vec<Run> = table.iter().filter_map(cluster).collect();
    let count = runs.len() as u64;
    merge(&mut runs);
    (runs.iter().map(|run| run.count).sum::<u64>() == count).then_some(runs)
}
