//! What the settings mean once checked.
//!
//! [`Settings`] are what the user wrote, from the command line or from a file; [`Config::check`]
//! turns them into a [`Config`] in which every default is filled in, every path is absolute and no
//! two settings contradict each other, or says in an [`Error`] what to write instead. A `Config`
//! displays as a configuration file that means the same.
//!
//! Checked here is what can be known without opening an image. That an image is what its format says,
//! and that its size fits the block size, is found out by [`crate::block`] when it opens it.

pub mod args;
mod check;
mod disk;
mod error;
pub(crate) mod file;
mod host;
mod keys;
pub mod nvme;
pub(crate) mod parse;
mod show;
#[cfg(test)]
mod tests;

use std::os::fd::RawFd;
use std::path::PathBuf;
use std::time::Duration;

use clap::ValueEnum;
use serde::Deserialize;

use crate::block::nvme_tcp::uri::{Allowed, Uri};
use args::{DiskArgs, ProcessArgs, WorkerArgs};

pub use error::{Error, Key, Place};
pub use host::{Host, PassedSocket, listen_pid};
pub use nvme::Discovery;

/// Most queues of a disk: a vhost-user message names the queue of a kick, call or error descriptor
/// in 8 bits (`VHOST_USER_VRING_IDX_MASK` in QEMU's docs/interop/vhost-user.rst).
pub const MAX_NUM_QUEUES: u16 = 256;
/// Queues of a disk by default, on a host with that many CPUs.
pub const DEFAULT_MAX_NUM_QUEUES: u16 = 16;
/// Largest queue that the specification has (virtio 1.2, section 2.7). QEMU goes up to 1024.
pub const MAX_QUEUE_SIZE: u16 = 32768;
/// Largest queue by default.
pub const DEFAULT_QUEUE_SIZE: u16 = 256;
/// Longest time to poll without work, by default: about what a sleep and a wake-up cost the guest.
pub const DEFAULT_POLL_MAX: Duration = Duration::from_micros(50);
/// Permissions of a new socket by default: its owner's alone.
pub const DEFAULT_SOCKET_MODE: u32 = 0o600;
/// Memory for the mappings of a qcow2 image by default, in bytes: 1 TiB of them in clusters of 64 KiB.
pub const DEFAULT_L2_CACHE_SIZE: u64 = crate::block::spec::DEFAULT_L2_CACHE;
/// The least of it.
pub const MIN_L2_CACHE_SIZE: u64 = 64 << 10;
/// Length of a serial number, `VIRTIO_BLK_ID_BYTES` of the virtio specification.
pub const MAX_SERIAL: usize = 20;

/// Everything the process needs to know to serve its disks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// The worker threads.
    pub workers: WorkersConfig,
    /// The disks: one at least, with unlike names and serials.
    pub disks: Vec<DiskConfig>,
    /// Exit when the first VMM has disconnected.
    pub once: bool,
    /// Where to write the process id; absolute.
    pub pid_file: Option<PathBuf>,
    /// Least serious messages to log; `None` leaves it to `RUST_LOG`.
    pub log_level: Option<LogLevel>,
    /// What is allowed but probably not meant, for the log.
    pub warnings: Vec<String>,
}

/// The worker threads, which all disks share.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkersConfig {
    /// How many; not more than the disks have queues in total.
    pub count: usize,
    /// Worker `i` is pinned to the `i`-th of these CPUs; there are `count` of them, or none.
    pub cpus: Vec<usize>,
    /// When a worker polls instead of sleeping.
    pub poll: PollMode,
    /// Longest time to poll without work. Means something with [`PollMode::Adaptive`] only, and is
    /// the default otherwise.
    pub poll_max: Duration,
}

/// One disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskConfig {
    /// Its name in logs: letters, digits, `.`, `_` and `-`.
    pub name: String,
    /// Where its VMM comes from.
    pub listen: Listen,
    /// What it is stored in.
    pub source: Source,
    /// The format of the image. A null device is raw.
    pub format: Format,
    /// Refuse every write.
    pub read_only: bool,
    /// How the image itself is cached by the host.
    pub cache: CacheMode,
    /// How the read-only files below a qcow2 image are cached by the host.
    pub backing_cache: BackingCache,
    /// Memory for the mappings of each qcow2 image, in bytes, [`MIN_L2_CACHE_SIZE`] at least. Means nothing
    /// for a raw image and a null device, and is the default then.
    pub l2_cache_size: u64,
    /// What to do with a qcow2 image that its last writer did not close.
    pub on_dirty: OnDirty,
    /// Most queues the guest may use, 1 to [`MAX_NUM_QUEUES`].
    pub num_queues: u16,
    /// Most entries a queue may have, a power of two from 2 to [`MAX_QUEUE_SIZE`].
    pub queue_size: u16,
    /// The serial number that the guest sees: 1 to [`MAX_SERIAL`] printable ASCII characters. `None`: it is made
    /// from the identity of the namespace, once that is connected.
    pub serial: Option<String>,
    /// Logical block size in bytes, 512 or 4096. `None`: the namespace's, once that is connected.
    pub block_size: Option<u32>,
    /// The directories that backing and data files may be in: the image's own first, then those that
    /// the user allowed. Absolute, symbolic links resolved. Empty for a raw image and a null device,
    /// which have no such files.
    pub allow_paths: Vec<PathBuf>,
    /// The remote namespaces that a qcow2 image may name as its backing file.
    pub allow_remote: Vec<Allowed>,
    /// How namespaces are connected; `None` where there can be none.
    pub nvme: Option<NvmeConfig>,
    /// Keep what is read from below a qcow2 image in the image.
    pub copy_on_read: bool,
    /// The external data file of a qcow2 image, absolute, if not the one that the image names.
    pub data_file: Option<PathBuf>,
    /// The keys of encrypted images. At most one is for all images, and comes first.
    pub keys: Vec<KeyConfig>,
}

/// How remote namespaces are connected and treated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NvmeConfig {
    /// The host's NQN, if not the machine's.
    pub host_nqn: Option<String>,
    /// The host's identifier, if not the machine's.
    pub host_id: Option<[u8; 16]>,
    /// Headers have checksums.
    pub header_digest: bool,
    /// Data has checksums.
    pub data_digest: bool,
    /// Commands outstanding on a queue, at most.
    pub queue_depth: u16,
    /// How long a controller that hears nothing waits; zero: for ever.
    pub keep_alive: Duration,
    /// How long connecting a queue may take.
    pub connect_timeout: Duration,
    /// How long a command may take.
    pub io_timeout: Duration,
    /// Longest time between two attempts to connect again.
    pub reconnect_delay: Duration,
    /// How long a lost controller is tried; `None`: for ever.
    pub ctrl_loss_tmo: Option<Duration>,
    /// How long requests are held while no path is usable, not longer than that; `None`: as long as there is hope.
    pub fast_io_fail_tmo: Option<Duration>,
    /// Which of several paths.
    pub io_policy: IoPolicy,
    /// Where the host's secret for in-band authentication is.
    pub dhchap_secret: Option<KeySource>,
    /// Where the controller's is. The host has one, too, then.
    pub dhchap_ctrl_secret: Option<KeySource>,
    /// Where the pre-shared key for TLS is.
    pub tls_key: Option<KeySource>,
    /// A reservation is held while the namespace is in use.
    pub reservations: bool,
}

/// A key of encrypted images.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyConfig {
    /// The image that it opens; absolute. `None`: all that have no key of their own.
    pub image: Option<PathBuf>,
    /// Where it is. The key itself is never in a configuration.
    pub source: KeySource,
}

/// Where a key is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeySource {
    /// In this file; absolute. All its bytes are the key.
    File(PathBuf),
    /// In what this descriptor reads, to its end. It was open when the process started.
    Fd(RawFd),
    /// In the kernel's keyring: a description, or a serial number.
    Keyring(String),
}

/// Where a disk's VMM comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Listen {
    /// A socket to create.
    Path {
        /// Where; absolute, and short enough for a socket address.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
        /// The number of its group, if not the process's own.
        group: Option<u32>,
    },
    /// A Unix socket that was open when the process started, listening or connected.
    Fd(RawFd),
    /// A socket that systemd passed (sd_listen_fds(3)).
    Systemd {
        /// Its name, of `FileDescriptorName=`.
        name: String,
        /// Its descriptor.
        fd: RawFd,
    },
}

/// What a disk is stored in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A regular file or a block device, which existed when this was checked.
    File {
        /// Its path; absolute, symbolic links kept.
        path: PathBuf,
    },
    /// A remote namespace.
    Nvme(Uri),
    /// Nothing: reads give zeros and writes are forgotten.
    Null {
        /// Its size in bytes, a multiple of the block size.
        size: u64,
    },
}

/// The format of an image. It is never guessed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// The bytes of the disk and nothing else.
    Raw,
    /// QEMU's copy-on-write format, version 2 or 3.
    Qcow2,
    /// A LUKS1 header and the disk's bytes encrypted.
    Luks,
}

/// How the host caches an image that is written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CacheMode {
    /// Past the host's page cache (`O_DIRECT`); durable after a flush.
    None,
    /// In the host's page cache; durable after a flush.
    Writeback,
    /// Each write is durable before it completes.
    Writethrough,
}

/// What to do with a qcow2 image whose dirty bit is set: a writer with lazy refcounts did not close it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnDirty {
    /// Repair it before it is written to.
    Repair,
    /// Refuse to write to it.
    Refuse,
}

/// How the host caches the read-only files below an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BackingCache {
    /// Not at all (`O_DIRECT`).
    None,
    /// In its page cache, once for all VMs on one base.
    Writeback,
}

/// Which of several equally good paths to a namespace a request takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum IoPolicy {
    /// The one with the fewest commands outstanding.
    QueueDepth,
    /// One after the other.
    RoundRobin,
}

/// When a worker polls instead of sleeping.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PollMode {
    /// While there is work and for a while after it, as long as that pays.
    Adaptive,
    /// All the time: takes a whole CPU for each worker.
    Always,
    /// Never; sleep whenever there is nothing to do.
    Never,
}

/// Least serious messages to log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// What ends a disk or the process.
    Error,
    /// What needs somebody's attention.
    Warn,
    /// What a VMM does now and then.
    Info,
    /// What happens on the control plane, in detail.
    Debug,
    /// Everything.
    Trace,
}

impl From<LogLevel> for log::LevelFilter {
    fn from(level: LogLevel) -> Self {
        match level {
            LogLevel::Error => Self::Error,
            LogLevel::Warn => Self::Warn,
            LogLevel::Info => Self::Info,
            LogLevel::Debug => Self::Debug,
            LogLevel::Trace => Self::Trace,
        }
    }
}

/// What the user wrote, and where: not checked yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// The file it comes from; `None` for the command line.
    file: Option<PathBuf>,
    disks: Vec<DiskArgs>,
    workers: WorkerArgs,
    process: ProcessArgs,
}

impl Settings {
    /// The options of a command line, which describe one disk.
    pub fn from_command_line(disk: DiskArgs, workers: WorkerArgs, process: ProcessArgs) -> Self {
        Self {
            file: None,
            disks: vec![disk],
            workers,
            process,
        }
    }

    /// The tables of a configuration file.
    pub fn from_file(
        file: PathBuf,
        disks: Vec<DiskArgs>,
        workers: WorkerArgs,
        process: ProcessArgs,
    ) -> Self {
        Self {
            file: Some(file),
            disks,
            workers,
            process,
        }
    }

    /// Lets the options about the process that stand beside `--config` win over the file.
    pub fn override_process(&mut self, options: ProcessArgs) {
        self.process.once |= options.once;
        self.process.pid_file = options.pid_file.or(self.process.pid_file.take());
        self.process.log_level = options.log_level.or(self.process.log_level);
    }
}
