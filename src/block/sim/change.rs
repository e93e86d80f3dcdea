//! What operations do to the contents.

use std::ops::Range;

/// A change of the contents.
#[derive(Clone, Debug)]
pub(super) enum Change {
    Bytes {
        offset: u64,
        data: Vec<u8>,
    },
    Fill {
        offset: u64,
        len: u64,
        byte: u8,
        grows: bool,
    },
    SetLen(u64),
}

impl Change {
    /// Bytes that may change in a file of `len` bytes.
    pub(super) fn range(&self, len: u64) -> Range<u64> {
        match self {
            Self::Bytes { offset, data } => *offset..offset + data.len() as u64,
            Self::Fill {
                offset,
                len: fill,
                grows: true,
                ..
            } => *offset..offset + fill,
            Self::Fill {
                offset, len: fill, ..
            } => (*offset).min(len)..(offset + fill).min(len),
            Self::SetLen(new) => (*new).min(len)..len.max(*new),
        }
    }

    /// Whether it makes a storage longer that does not reach so far.
    pub(super) fn grows(&self) -> bool {
        !matches!(self, Self::Fill { grows: false, .. })
    }

    pub(super) fn apply(&self, image: &mut Vec<u8>) {
        let range = self.range(image.len() as u64);
        let range = range.start as usize..range.end as usize;
        if let Self::SetLen(len) = self {
            image.resize(*len as usize, 0);
            return;
        }
        if image.len() < range.end {
            image.resize(range.end, 0);
        }
        match self {
            Self::Bytes { data, .. } => image[range].copy_from_slice(data),
            Self::Fill { byte, .. } => image[range].fill(*byte),
            Self::SetLen(_) => {}
        }
    }
}
