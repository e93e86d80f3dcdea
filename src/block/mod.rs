//! The storage stack: what a disk's bytes are made of. Knows nothing of virtio or vhost-user.
//!
//! A `Disk` is a described stack of layers whose headers were read; `Disk::activate` takes the
//! locks, reads the metadata and gives the `ActiveDisk` that serves requests. Giving the active disk
//! back flushes everything and releases the locks (`ActiveDisk::deactivate`). So another process may
//! own the image at any time at which no ring runs here.

mod active;
mod chain;
mod copy_on_read;
#[cfg(test)]
mod copy_on_read_tests;
pub mod crypt;
mod data_file;
#[cfg(test)]
mod device_tests;
pub mod disk;
pub mod error;
pub mod file;
mod handed;
mod holes;
pub mod layer;
pub mod lock;
pub mod null;
pub mod nvme_tcp;
pub mod qcow2;
#[cfg(test)]
pub mod sim;
pub mod spec;
pub mod stack;
pub mod storage;
#[cfg(test)]
mod tests;
mod zeros;

pub(crate) use chain::{MAX_DEPTH, resolve_backing};
pub use copy_on_read::CopyStats;
pub use disk::{ActiveDisk, CacheMode, Disk, DiskLimits, DiskSpec, Format, Source};
pub use error::{Error, ErrorKind, Result};
pub use file::{FileOptions, FileStorage};
pub use handed::HandedFiles;
pub use layer::{Layer, Mapping, Raw};
pub use lock::Role;
pub use null::NullStorage;
pub use qcow2::OnDirty;
pub use stack::read_chain;

/// Bytes of memory that the crash journal of a disk takes ([`Disk::activate_with`]).
pub const JOURNAL_BYTES: usize = 1 << 20;
pub use storage::{Limits, Pending, Storage};
