//! One layer of a disk: bytes of its own, or holes through which the layer below is seen.

use std::sync::Arc;

use crate::reactor::Io;

use super::error::Result;
use super::storage::Storage;

/// What a range of a layer is made of, from its first byte on. Every `len` is in bytes, at least 1 and
/// at most what was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mapping {
    /// Bytes of the layer's storage.
    Data {
        /// Where they begin in [`Layer::data`].
        offset: u64,
        /// How many.
        len: u64,
    },
    /// Zeros.
    Zero {
        /// How many.
        len: u64,
    },
    /// What the layer below has there; zeros if there is none, or where it ends before.
    Backing {
        /// How many.
        len: u64,
    },
}

/// A layer that serves requests.
#[derive(Debug)]
pub enum Layer {
    /// The bytes of a storage as they are.
    Raw(Raw),
    /// Made up by a test.
    #[cfg(test)]
    Made(super::stack::tests::Made),
}

/// A storage whose bytes are the disk's.
#[derive(Debug)]
pub struct Raw {
    storage: Arc<Storage>,
    size: u64,
}

impl Raw {
    /// The first `size` bytes of `storage`.
    pub fn new(storage: Arc<Storage>, size: u64) -> Self {
        Self { storage, size }
    }
}

impl Layer {
    /// Bytes of the layer's disk.
    #[inline]
    pub fn size(&self) -> u64 {
        match self {
            Self::Raw(raw) => raw.size,
            #[cfg(test)]
            Self::Made(made) => made.size,
        }
    }

    /// Where [`Mapping::Data`] is found.
    #[inline]
    pub fn data(&self) -> &Storage {
        match self {
            Self::Raw(raw) => &raw.storage,
            #[cfg(test)]
            Self::Made(made) => &made.storage,
        }
    }

    /// What is at `offset`; `offset + len` is not beyond the layer's size, `len` not 0.
    ///
    /// # Errors
    /// Those of reading the metadata, and of metadata that makes no sense.
    #[inline]
    pub async fn map(&self, io: &Io, offset: u64, len: u64) -> Result<Mapping> {
        let _ = io;
        match self {
            Self::Raw(_) => Ok(Mapping::Data { offset, len }),
            #[cfg(test)]
            Self::Made(made) => Ok(made.map(offset, len)),
        }
    }
}
