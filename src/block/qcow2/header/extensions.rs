//! What follows the header's fields: extensions and the backing file's name.
//!
//! `docs/interop/qcow2.rst`, sections "Header extensions", "String header extensions", "Feature name
//! table", "Bitmaps extension", "Full disk encryption header pointer". Extensions that are not known here
//! stay in the file as they are.

use std::path::Path;

use super::{BackingName, bad, u32_at, u64_at};
use crate::block::error::Result;
use crate::block::qcow2::units::HostOffset;

const MAX_BACKING_NAME: usize = 1023;

/// Header extension types.
mod kind {
    pub(super) const END: u32 = 0;
    pub(super) const BACKING_FORMAT: u32 = 0xe279_2aca;
    pub(super) const FEATURE_NAMES: u32 = 0x6803_f857;
    pub(super) const BITMAPS: u32 = 0x2385_2875;
    pub(super) const ENCRYPTION: u32 = 0x0537_be77;
    pub(super) const DATA_FILE: u32 = 0x4441_5441;
}

/// The bitmaps extension: where the bitmap directory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BitmapsExtension {
    /// Where its fields stand in the file, for updates in place.
    pub at: u64,
    /// Bitmaps in the directory.
    pub count: u32,
    /// Bytes of the directory.
    pub directory_bytes: u64,
    /// Where it begins.
    pub directory_offset: HostOffset,
}

/// The full disk encryption header pointer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EncryptionHeader {
    /// Where the LUKS header begins in the image file.
    pub offset: HostOffset,
    /// Its bytes, key material included.
    pub len: u64,
}

/// Extensions as they were found.
#[derive(Debug, Default)]
pub(super) struct Extensions<'a> {
    pub(super) backing_format: Option<String>,
    pub(super) feature_names: Option<&'a [u8]>,
    pub(super) bitmaps: Option<BitmapsExtension>,
    pub(super) encryption: Option<EncryptionHeader>,
    pub(super) data_file: Option<String>,
}

impl<'a> Extensions<'a> {
    /// Walks the extensions behind a header of `length` bytes, in the first cluster's `bytes`.
    pub(super) fn parse(path: &Path, bytes: &'a [u8], length: usize) -> Result<Self> {
        let mut found = Self::default();
        // The backing name follows the extensions; it is no extension even without an end marker.
        let end = match u64_at(bytes, 8) {
            0 => bytes.len(),
            name => bytes.len().min(name.try_into().unwrap_or(usize::MAX)),
        };
        let mut at = length;
        while at + 8 <= end {
            let kind = u32_at(bytes, at);
            if kind == kind::END {
                break;
            }
            let len = u32_at(bytes, at + 4) as usize;
            let data = (at + 8)
                .checked_add(len)
                .filter(|stop| *stop <= end)
                .and_then(|stop| bytes.get(at + 8..stop))
                .ok_or_else(|| bad(path, at, "a header extension reaches beyond its area"))?;
            found.take(path, kind, at, data)?;
            at += 8 + len.next_multiple_of(8);
        }
        Ok(found)
    }

    fn take(&mut self, path: &Path, kind: u32, at: usize, data: &'a [u8]) -> Result<()> {
        let text = |what: &str| {
            std::str::from_utf8(data)
                .map(|text| text.trim_end_matches('\0').to_owned())
                .map_err(|_| bad(path, at, format!("the {what} is not text")))
        };
        let sized = |what: &str, len: usize| match data.len() == len {
            true => Ok(()),
            false => Err(bad(
                path,
                at,
                format!("the {what} has {} bytes instead of {len}", data.len()),
            )),
        };
        match kind {
            kind::BACKING_FORMAT => self.backing_format = Some(text("backing format")?),
            kind::FEATURE_NAMES => self.feature_names = Some(data),
            kind::BITMAPS => {
                sized("bitmaps extension", 24)?;
                self.bitmaps = Some(BitmapsExtension {
                    at: at as u64 + 8,
                    count: u32_at(data, 0),
                    directory_bytes: u64_at(data, 8),
                    directory_offset: HostOffset(u64_at(data, 16)),
                });
            }
            kind::ENCRYPTION => {
                sized("encryption header pointer", 16)?;
                self.encryption = Some(EncryptionHeader {
                    offset: HostOffset(u64_at(data, 0)),
                    len: u64_at(data, 8),
                });
            }
            kind::DATA_FILE => self.data_file = Some(text("data file's name")?),
            _ => {}
        }
        Ok(())
    }
}

/// The backing file's name, with the `format` of its extension.
pub(super) fn backing_name(
    path: &Path,
    bytes: &[u8],
    length: usize,
    format: Option<String>,
) -> Result<Option<BackingName>> {
    let offset = u64_at(bytes, 8);
    let len = u32_at(bytes, 16) as usize;
    if offset == 0 {
        return Ok(None);
    }
    let bad = |what: String| bad(path, 8, what);
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

/// The feature name table's text for an incompatible bit, or the bit's number.
pub(super) fn feature_name(names: Option<&[u8]>, bit: u32) -> String {
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
