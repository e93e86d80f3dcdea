//! The storage stack: what a disk's bytes are made of. Knows nothing of virtio or vhost-user.
//!
//! A `Disk` is a described stack of layers whose headers were read; `Disk::activate` takes the
//! locks, reads the metadata and gives the `ActiveDisk` that serves requests. Giving the active disk
//! back flushes everything and releases the locks (`ActiveDisk::deactivate`). So another process may
//! own the image at any time at which no ring runs here.
