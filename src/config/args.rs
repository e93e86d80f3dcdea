//! What the user wrote: options of the command line, and tables of the configuration file.
//!
//! The structs are read by clap and by serde alike, so an option and its key in the file have one name,
//! one type and one description.

use std::path::PathBuf;

use serde::Deserialize;

use super::{BackingCache, CacheMode, Format, LogLevel, OnDirty, PollMode};

/// A disk and its socket: options, or one `[[disk]]` table.
#[derive(Debug, Clone, Default, PartialEq, Eq, clap::Args, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
#[command(next_help_heading = "Disk")]
pub struct DiskArgs {
    /// Image file or block device, or `null:SIZE` for a device that stores nothing
    #[arg(long, value_name = "PATH|null:SIZE")]
    pub blk_file: Option<PathBuf>,

    /// Format of the image; it is never guessed [default: raw]
    #[arg(long, value_enum)]
    pub format: Option<Format>,

    /// Refuse every write
    #[arg(long)]
    pub read_only: bool,

    /// Host cache of the image [default: none]
    #[arg(long, value_enum)]
    pub cache: Option<CacheMode>,

    /// Host cache of the read-only files below a qcow2 image [default: writeback]
    #[arg(long, value_enum)]
    pub backing_cache: Option<BackingCache>,

    /// A qcow2 image that its last writer did not close [default: repair]
    #[arg(long, value_enum)]
    pub on_dirty: Option<OnDirty>,

    /// Another directory that backing and data files may be in; can be repeated
    #[arg(long, value_name = "DIR")]
    pub allow_path: Vec<PathBuf>,

    /// Memory for the mappings of a qcow2 image, in bytes or with K, M, G; also of each image below it
    /// [default: 72M]
    #[arg(long, value_name = "SIZE")]
    pub l2_cache_size: Option<String>,

    /// The external data file of a qcow2 image that has one [default: what the image says]
    #[arg(long, value_name = "PATH")]
    pub data_file: Option<PathBuf>,

    /// File with the key of the encrypted images
    #[arg(long, value_name = "PATH")]
    pub key_file: Option<PathBuf>,

    /// Open descriptor to read the key of the encrypted images from, to its end
    #[arg(long, value_name = "N")]
    pub key_fd: Option<i32>,

    /// Key of the encrypted images in the kernel's keyring: its description or its serial number
    #[arg(long, value_name = "NAME|SERIAL")]
    pub key_keyring: Option<String>,

    /// Key of one image: file:PATH, fd:N or keyring:NAME; can be repeated
    #[arg(long, value_name = "IMAGE=KIND:WHERE")]
    pub image_key: Vec<String>,

    /// Serial number that the guest sees, 1 to 20 characters [default: made from the image's path]
    #[arg(long, value_name = "TEXT")]
    pub serial: Option<String>,

    /// Logical block size in bytes: 512 or 4096 [default: 512]
    #[arg(long, value_name = "BYTES")]
    pub block_size: Option<u64>,

    /// Most queues the guest may use, 1 to 256 [default: one for each CPU of the host, at most 16]
    #[arg(long, value_name = "N")]
    pub num_queues: Option<u64>,

    /// Most entries a queue may have, a power of two from 2 to 32768 [default: 256]
    #[arg(long, value_name = "N")]
    pub queue_size: Option<u64>,

    /// Name of the disk in logs [default: disk0]
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,

    /// Listen for the VMM on a new Unix socket at this path
    #[arg(long, value_name = "PATH", help_heading = "Socket")]
    pub socket_path: Option<PathBuf>,

    /// Serve on this open descriptor, a Unix socket that is listening or already connected
    #[arg(long, value_name = "N", help_heading = "Socket")]
    pub fd: Option<i32>,

    /// Serve on the socket that systemd passed under this name (FileDescriptorName=)
    #[arg(long, value_name = "NAME", help_heading = "Socket")]
    pub fd_name: Option<String>,

    /// Group of the new socket, a name or a number
    #[arg(long, value_name = "GROUP", help_heading = "Socket")]
    pub socket_group: Option<String>,

    /// Permissions of the new socket, octal [default: 0600]
    #[arg(long, value_name = "MODE", help_heading = "Socket")]
    pub socket_mode: Option<String>,
}

/// The worker threads: options, or the `[workers]` table.
#[derive(Debug, Clone, Default, PartialEq, Eq, clap::Args, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
#[command(next_help_heading = "Workers")]
pub struct WorkerArgs {
    /// Number of worker threads; no more than there are queues [default: 1]
    #[arg(long, value_name = "N")]
    #[serde(rename = "count")]
    pub workers: Option<u64>,

    /// CPUs to pin the workers to, in order, such as 2,4-5
    #[arg(long, value_name = "LIST")]
    pub cpus: Option<String>,

    /// When a worker polls instead of sleeping [default: adaptive]
    #[arg(long, value_enum)]
    pub poll: Option<PollMode>,

    /// With --poll adaptive: longest time in microseconds to poll without work, 1 to 1000000
    /// [default: 50]
    #[arg(long, value_name = "N")]
    pub poll_max_us: Option<u64>,
}

/// The process: options, or keys outside any table.
#[derive(Debug, Clone, Default, PartialEq, Eq, clap::Args)]
#[command(next_help_heading = "Process")]
pub struct ProcessArgs {
    /// Exit when the first VMM has disconnected
    #[arg(long)]
    pub once: bool,

    /// Write the process id to this file, and remove it at exit
    #[arg(long, value_name = "FILE")]
    pub pid_file: Option<PathBuf>,

    /// Least serious messages to log [default: info, or what RUST_LOG says]
    #[arg(long, value_enum)]
    pub log_level: Option<LogLevel>,
}
