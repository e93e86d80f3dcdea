//! Encrypted images: where the LUKS header is, and what it means for its clusters.
//!
//! `docs/interop/qcow2.rst`, section "Full disk encryption header pointer". Guest data in plain clusters is
//! encrypted, with the place in the image file as IV; metadata is not, and neither are compressed clusters
//! (QEMU writes and reads them as they are, and `qemu-img` makes no such images).

use super::header::{Encryption, Header};
use super::units::HostCluster;
use crate::block::crypt::luks::Place;
use crate::block::error::{Error, ErrorKind, Result};

impl Header {
    /// Where the LUKS header and its key material are, in an image file of `file_len` bytes.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidImage`] if that is no place in the file.
    pub fn luks(&self, file_len: u64) -> Result<Option<Place>> {
        let Encryption::Luks(pointer) = self.encryption else {
            return Ok(None);
        };
        let (g, offset) = (&self.geometry, pointer.offset.0);
        let end = offset.checked_add(pointer.len);
        let file_end = file_len.next_multiple_of(g.cluster_size());
        if offset == 0 || !g.is_aligned(offset) || end.is_none_or(|end| end > file_end) {
            let what = format!(
                "the encryption header, {} bytes at {offset:#x}, is not in the file",
                pointer.len
            );
            let error = Error::image(ErrorKind::InvalidImage, &self.path, None, what);
            return Err(error);
        }
        Ok(Some(Place {
            offset,
            len: pointer.len,
        }))
    }

    /// The clusters of the LUKS header: first and count. They are metadata.
    pub(super) fn luks_clusters(&self) -> Option<(HostCluster, u64)> {
        let Encryption::Luks(pointer) = self.encryption else {
            return None;
        };
        let first = self.geometry.host_cluster(pointer.offset);
        Some((first, self.geometry.clusters(pointer.len)))
    }
}
