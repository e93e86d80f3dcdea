//! What a process and its successor tell each other, in the order in which they do.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::vhost_user::Device;
use crate::vhost_user::handover::{ConnectionState, FdNumber, said};

/// From the process that serves to its successor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum FromOld {
    /// First: what is served, with the descriptors of all image files.
    Hello(Hello),
    /// After `Ready`, once a disk: its sockets and its VMM. Its rings still run.
    Disk(Box<DiskState>),
    /// After `Mapped`: all rings have stopped, here. The images are the successor's to take.
    Stopped(Stopped),
    /// After `Taken`: from here on only the successor serves.
    Go,
}

/// From the successor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum FromNew {
    /// It has started, and describes the same disks.
    Ready,
    /// It has the guests' memory, and everything else that can be had before the rings stop.
    Mapped,
    /// It has the images, and the rings are started, though they fetch nothing yet.
    Taken,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Hello {
    pub disks: Vec<DiskHello>,
}

/// What must be the same for a guest that has probed the device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct DiskHello {
    pub name: String,
    pub queues: u16,
    pub queue_size: u16,
    pub read_only: bool,
    /// The start of the configuration space.
    pub config: Vec<u8>,
    /// How many of the descriptors are its image's files.
    pub files: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct DiskState {
    pub name: String,
    #[serde(deserialize_with = "said")]
    pub listener: Option<ListenerState>,
    #[serde(deserialize_with = "said")]
    pub connection: Option<ConnectionState>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ListenerState {
    pub sock: FdNumber,
    /// The socket file that was made for it, in bytes; none: the socket was given to us.
    #[serde(deserialize_with = "said")]
    path: Option<Vec<u8>>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Stopped {
    /// When the first ring began to stop, by CLOCK_MONOTONIC.
    pub since_ns: u64,
    /// For each disk, in the order of [`Hello`]: the rings that ran, and where they go on.
    pub bases: Vec<Vec<(u16, u32)>>,
}

impl ListenerState {
    pub(super) fn new(sock: FdNumber, path: Option<&Path>) -> Self {
        ListenerState {
            sock,
            path: path.map(|path| path.as_os_str().as_bytes().to_vec()),
        }
    }

    pub(super) fn path(&self) -> Option<PathBuf> {
        let path = self.path.clone()?;
        Some(PathBuf::from(OsString::from_vec(path)))
    }
}

/// Bytes of the configuration space that are compared: all of it, and room for what may come.
const CONFIG: u32 = 96;
/// The capacity in sectors (virtio 1.2, section 5.2.4).
const CAPACITY: std::ops::Range<usize> = 0..8;
/// `VIRTIO_BLK_F_RO` (virtio 1.2, section 5.2.3).
const READ_ONLY: u64 = 1 << 5;
/// What the driver can write there.
const WRITE_CACHE: usize = 32;

impl DiskHello {
    pub(super) fn new(name: &str, device: &dyn Device, files: usize) -> Result<Self, String> {
        Ok(DiskHello {
            name: name.to_owned(),
            queues: device.num_queues(),
            queue_size: device.max_queue_size(),
            read_only: device.features() & READ_ONLY != 0,
            config: device.config(0, CONFIG)?,
            files: u32::try_from(files).map_err(|error| error.to_string())?,
        })
    }

    /// Whether a guest that has probed this device can go on with `new`. What stood at zero belongs to a feature
    /// that was not offered, and may have become something.
    pub(super) fn check_successor(&self, new: &DiskHello) -> Result<(), String> {
        let differs = |what: &str, old: u64, new: u64| {
            Err(format!(
                "disk {}: {what} {old} would become {new} under a running guest",
                self.name
            ))
        };
        let capacity = |hello: &DiskHello| {
            let bytes = hello.config.get(CAPACITY)?;
            Some(u64::from_le_bytes(bytes.try_into().ok()?))
        };
        match (capacity(self), capacity(new)) {
            (Some(old), Some(new)) if old != new => {
                return differs("its number of sectors", old, new);
            }
            _ => {}
        }
        if self.read_only != new.read_only {
            let [old, new] = [self, new].map(|hello| u64::from(hello.read_only));
            return differs("its read-only flag", old, new);
        }
        if self.queues != new.queues {
            return differs(
                "its number of queues",
                self.queues.into(),
                new.queues.into(),
            );
        }
        if self.queue_size != new.queue_size {
            let (old, new) = (self.queue_size.into(), new.queue_size.into());
            return differs("its queue size", old, new);
        }
        for (at, old) in self.config.iter().enumerate() {
            let new = new.config.get(at).copied().unwrap_or(0);
            if *old != 0 && *old != new && at != WRITE_CACHE {
                let what = format!("byte {at} of its configuration space,");
                return differs(&what, (*old).into(), new.into());
            }
        }
        Ok(())
    }
}
