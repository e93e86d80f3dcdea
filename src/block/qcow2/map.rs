//! From the guest's offset to where its bytes are: the hot path of every request.

use super::Qcow2;
use super::entry::{Compressed, Entry, decode};
use super::slice::Slice;
use super::units::{GuestCluster, GuestOffset, HostOffset};
use crate::block::error::{Error, ErrorKind, Result};
use crate::reactor::Io;

/// What a range of the virtual disk is made of, from its first byte on. Lengths in bytes, at least 1
/// and at most what was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// Plain bytes of the image file.
    Data {
        /// Where, in the image file.
        host: HostOffset,
        /// How many.
        len: u64,
    },
    /// Zeros.
    Zero {
        /// How many.
        len: u64,
    },
    /// What the layer below says; zeros where there is none.
    Backing {
        /// How many.
        len: u64,
    },
    /// Part of a compressed cluster: [`Qcow2::read_compressed`] reads it.
    Compressed {
        /// Where the deflated cluster lies.
        data: Compressed,
        /// Bytes of the cluster before the range.
        skip: u64,
        /// How many.
        len: u64,
    },
}

/// What a lookup without I/O found.
pub(super) enum Found {
    Extent(Extent),
    /// The slice of this number is needed first.
    Missing(u64),
    /// The entry of this cluster is not valid.
    Bad(GuestCluster),
}

impl Qcow2 {
    /// What is at `offset`, for `len` bytes at most, both inside the disk. Waits for I/O only where the
    /// L2 slice is not in memory. What it finds stays readable until the request that asked ends (its
    /// [`crate::reactor::Pin`]).
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`] beyond the disk, [`ErrorKind::Corrupt`] for an entry that leads nowhere,
    /// those of reading the slice.
    #[inline]
    pub async fn map(&self, io: &Io, offset: u64, len: u64) -> Result<Extent> {
        self.check_range(offset, len)?;
        loop {
            match self.lookup(offset, len) {
                Found::Extent(extent) => return Ok(extent),
                Found::Missing(slice) => self.load(io, slice).await?,
                Found::Bad(cluster) => return Err(self.found_bad(io, cluster).await),
            }
        }
    }

    /// [`Qcow2::map`] without waiting: none where I/O is needed first, or the entry is not valid. The range is inside
    /// the disk.
    #[inline]
    pub(in crate::block) fn map_at_once(&self, offset: u64, len: u64) -> Option<Extent> {
        match self.lookup(offset, len) {
            Found::Extent(extent) => Some(extent),
            Found::Missing(_) | Found::Bad(_) => None,
        }
    }

    #[inline]
    pub(super) fn check_range(&self, offset: u64, len: u64) -> Result<()> {
        match offset.checked_add(len) {
            Some(end) if end <= self.tables.size() => Ok(()),
            _ => Err(Error::image(
                ErrorKind::OutOfRange,
                &self.header.path,
                offset,
                format!(
                    "{len} bytes beyond the disk of {} bytes",
                    self.tables.size()
                ),
            )),
        }
    }

    /// Loads a slice, and makes room where too many wait to be written.
    #[cold]
    pub(super) async fn load(&self, io: &Io, slice: u64) -> Result<()> {
        self.tables
            .load(io, &self.storage, self.alloc.as_deref(), slice)
            .await?;
        if self.tables.is_crowded() {
            // An error here is for the flush that the guest asks for: nothing is lost, only crowded.
            if let Err(error) = self.write_back(io).await {
                log::warn!("writing back metadata: {error}");
            }
        }
        Ok(())
    }

    #[cold]
    pub(super) fn bad_entry(&self, cluster: GuestCluster) -> Error {
        Error::image(
            ErrorKind::Corrupt,
            &self.header.path,
            None,
            format!(
                "the L2 entry of the disk's cluster {} is not valid; look at the image with: qemu-img check {}",
                cluster.0,
                self.header.path.display()
            ),
        )
    }

    /// [`Qcow2::map`] as far as it goes without I/O.
    #[inline]
    pub(super) fn lookup(&self, offset: u64, len: u64) -> Found {
        if self.tables.geometry.extended_l2 {
            return self.lookup_extended(offset, len);
        }
        let g = &self.tables.geometry;
        let cluster = g.guest_cluster(GuestOffset(offset));
        let skip = g.in_cluster(offset);
        let place = self.tables.place(cluster);
        let found = self.tables.with(place.slice, |slice| {
            slice.touch();
            let raw = slice.get(place.at);
            let left = self.tables.left_in_slice(cluster) as usize;
            let wanted = g.clusters(skip + len).min(left as u64) as usize;
            let bytes = |clusters: usize| (((clusters as u64) << g.cluster_bits) - skip).min(len);
            Found::Extent(match decode(raw, g) {
                Entry::Data { host, .. } => Extent::Data {
                    host: HostOffset(host.0 + skip),
                    len: bytes(self.run(slice, place.at, wanted, |n, next| {
                        let want = host.0 + ((n as u64) << g.cluster_bits);
                        matches!(next, Entry::Data { host, .. } if host.0 == want)
                    })),
                },
                Entry::Zero { .. } => Extent::Zero {
                    len: bytes(self.run(slice, place.at, wanted, |_, next| {
                        matches!(next, Entry::Zero { .. })
                    })),
                },
                Entry::Unallocated => {
                    self.unallocated(bytes(self.run(slice, place.at, wanted, |_, next| {
                        next == Entry::Unallocated
                    })))
                }
                Entry::Compressed(data) => Extent::Compressed {
                    data,
                    skip,
                    len: (g.cluster_size() - skip).min(len),
                },
                Entry::Incomplete(index) => {
                    return self.lookup_incomplete(cluster, index, skip, len);
                }
                Entry::Bad => return Found::Bad(cluster),
            })
        });
        match found {
            Some(found) => found,
            None if self.tables.slice_offset(place.slice).is_some() => Found::Missing(place.slice),
            None => {
                let left = (self.tables.left_in_table(cluster) << g.cluster_bits) - skip;
                Found::Extent(self.unallocated(left.min(len)))
            }
        }
    }

    /// How many entries from `at` on, at most `wanted`, are as the first one. `same` gets the distance
    /// from the first, and says yes to one that goes on as the one before it ([`Slice::run`]).
    #[inline]
    pub(super) fn run(
        &self,
        slice: &Slice,
        at: usize,
        wanted: usize,
        same: impl Fn(usize, Entry) -> bool,
    ) -> usize {
        slice.run(at, wanted, |n, raw| {
            same(n, decode(raw, &self.tables.geometry))
        })
    }

    pub(super) fn unallocated(&self, len: u64) -> Extent {
        if self.has_backing {
            Extent::Backing { len }
        } else {
            Extent::Zero { len }
        }
    }
}
