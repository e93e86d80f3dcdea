//! Guest data in a file of its own.
//!
//! `docs/interop/qcow2.rst`, "Header" (external data file bit, raw external data bit) and "Cluster mapping".
//! A guest's cluster is in the data file at the guest's offset. Nothing counts references to it, so a
//! cluster that is not mapped is not allocated, it is just the place where it will be.
//!
//! A data file that is "raw" shows what the guest sees, without a look at the image. So what makes zeros
//! writes them to the data file, and the mappings stay; new clusters are filled as a whole in any case.

use std::sync::Arc;

use super::Qcow2;
use super::claim::Claim;
use super::entry::{Entry, decode};
use super::fresh::Fresh;
use super::header::{Encryption, Header, autoclear};
use super::units::{GuestCluster, HostCluster};
use crate::block::error::{Error, ErrorKind, Result};
use crate::block::storage::Storage;
use crate::reactor::Io;

/// Where the guest's data is: in `data`, if the image has a data file or is encrypted, else in the image file
/// itself.
pub(super) fn place(
    header: &Header,
    image: &Arc<Storage>,
    data: Option<Arc<Storage>>,
) -> Result<Arc<Storage>> {
    let elsewhere = header.data_file.is_some();
    let encrypted = header.encryption != Encryption::None;
    let (kind, what) = match data {
        None if encrypted => (
            ErrorKind::NotAllowed,
            "is encrypted, and was not opened with its key",
        ),
        None if elsewhere => (
            ErrorKind::InvalidImage,
            "the image has an external data file, and none was given",
        ),
        None => return Ok(image.clone()),
        Some(data) if elsewhere || encrypted => return Ok(data),
        Some(_) => (
            ErrorKind::InvalidImage,
            "the image has no external data file, and one was given",
        ),
    };
    Err(Error::image(kind, &header.path, None, what))
}

impl Qcow2 {
    /// True if the data file must at all times show what the guest sees.
    pub(super) fn is_raw_data(&self) -> bool {
        self.has_data_file() && self.header.autoclear & autoclear::RAW_EXTERNAL != 0
    }

    /// New clusters for guest data, for `guest` and up to `want` behind it.
    pub(super) async fn new_clusters(
        &self,
        io: &Io,
        guest: GuestCluster,
        want: u64,
    ) -> Result<Fresh<'_>> {
        match self.has_data_file() {
            true => Ok(Fresh::elsewhere(HostCluster(guest.0), want)),
            false => self.allocate(io, want).await,
        }
    }

    /// How much of the `len` bytes at `offset`, whole new clusters, is to be written: a data file does not
    /// grow beyond the disk's end.
    pub(super) fn fill_len(&self, offset: u64, len: u64) -> u64 {
        if !self.has_data_file() {
            return len;
        }
        let end = self.size().max(self.data.len());
        len.min(end.saturating_sub(offset))
    }

    /// Gives the space of claimed clusters in the data file back, before the claim's entries are replaced:
    /// afterwards somebody could have written there. A hint.
    pub(super) async fn drop_data(&self, io: &Io, claim: &Claim<'_>) {
        if !self.has_data_file() || self.data.limits().discard_granularity == 0 {
            return;
        }
        let g = &self.tables.geometry;
        let mut n = 0;
        while n < claim.count() {
            let host = |n: usize| match decode(claim.get(n), g) {
                Entry::Data { host, .. }
                | Entry::Zero {
                    host: Some(host), ..
                } => Some(host.0),
                _ => None,
            };
            let Some(at) = host(n) else {
                n += 1;
                continue;
            };
            let next = |m: &usize| host(*m) == Some(at + (((m - n) as u64) << g.cluster_bits));
            let count = 1 + (n + 1..claim.count()).take_while(next).count();
            let len = self.fill_len(at, (count as u64) << g.cluster_bits);
            // Zeros, not just anything: a loss of power may leave the old mapping.
            if let Err(error) = self.data.write_zeroes(io, at, len, true).await {
                log::debug!("unmapped clusters keep their space: {error}");
            }
            n += count;
        }
    }
}
