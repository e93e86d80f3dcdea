//! A disk of zeros that forgets what is written to it: for measuring everything else.

use std::path::Path;

use crate::reactor::Sg;

use super::error::{Error, ErrorKind, Result};
use super::storage::Limits;

/// Bytes that read as zeros; writes go nowhere.
#[derive(Debug)]
pub struct NullStorage {
    len: u64,
    limits: Limits,
    read_only: bool,
}

impl NullStorage {
    /// Name in messages.
    pub const NAME: &'static str = "null";

    /// `len` bytes of nothing.
    pub fn new(len: u64, read_only: bool) -> Self {
        Self {
            len,
            limits: Limits::default(),
            read_only,
        }
    }

    pub(super) fn path(&self) -> &Path {
        Path::new(Self::NAME)
    }

    pub(super) fn len(&self) -> u64 {
        self.len
    }

    pub(super) fn limits(&self) -> &Limits {
        &self.limits
    }

    pub(super) fn read_only(&self) -> bool {
        self.read_only
    }

    pub(super) fn read(&self, to: Sg<'_>) -> Result<()> {
        to.zero();
        Ok(())
    }

    pub(super) fn write(&self) -> Result<()> {
        if self.read_only {
            return Err(Error::image(
                ErrorKind::ReadOnly,
                Self::NAME,
                None,
                "opened read-only",
            ));
        }
        Ok(())
    }
}
