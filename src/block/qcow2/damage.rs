//! Damage that is found while an image is in use.
//!
//! (qcow2.rst, "Header", incompatible features bit 1.) As in QEMU: what shows that metadata is wrong marks
//! the image as corrupt, and nothing more is written to it. Found are an L2 entry that leads nowhere or to
//! metadata, a cluster that was in use and has refcount 0, and a free cluster that holds metadata. In each
//! case the next allocation could hand out a cluster that is in use. Reading goes on.

use std::sync::atomic::Ordering;

use super::Qcow2;
use super::units::GuestCluster;
use crate::block::error::{Error, ErrorKind};
use crate::reactor::Io;

impl Qcow2 {
    /// The error for an L2 entry that must not be used; an image that is written to is marked.
    #[cold]
    pub(super) async fn found_bad(&self, io: &Io, cluster: GuestCluster) -> Error {
        let error = self.bad_entry(cluster);
        self.stop_writing(io, &error).await;
        error
    }

    /// Stops writing if `error` says that metadata is wrong.
    pub(super) async fn note_damage(&self, io: &Io, error: &Error) {
        if error.kind() == ErrorKind::Corrupt {
            self.stop_writing(io, error).await;
        }
    }

    /// Marks the image as corrupt, durably. No write begins after that.
    #[cold]
    pub(super) async fn stop_writing(&self, io: &Io, why: &Error) {
        if self.alloc.is_none() || self.refuse_writes.swap(true, Ordering::Relaxed) {
            return;
        }
        log::error!("{why}; the image is no longer written to");
        let mut marked = self.header.mark_corrupt(io, &self.storage).await;
        if marked.is_ok() {
            marked = self.storage.flush(io).await;
        }
        if let Err(error) = marked {
            log::error!("marking the image as corrupt: {error}");
        }
    }
}
