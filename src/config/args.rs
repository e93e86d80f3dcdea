//! What the user wrote: options of the command line, and tables of the configuration file.
//!
//! The structs are read by clap and by serde alike, so an option and its key in the file have one name,
//! one type and one description.

use std::path::PathBuf;

use serde::Deserialize;

use crate::block::nvme_tcp::spec::{Address, DISCOVERY_PORT};
use crate::block::nvme_tcp::uri;

use super::nvme::Patience;
use super::{BackingCache, CacheMode, Format, IoPolicy, LogLevel, OnDirty, PollMode};

/// A disk and its socket: options, or one `[[disk]]` table.
#[derive(Debug, Clone, Default, PartialEq, Eq, clap::Args, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
#[command(next_help_heading = "Disk")]
pub struct DiskArgs {
    /// Image file or block device, `nvme+tcp://…` for a remote disk, or `null:SIZE` for a device that
    /// stores nothing
    #[arg(long, value_name = "PATH|URI|null:SIZE")]
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

    /// Keep what is read from below a qcow2 image in the image itself
    #[arg(long)]
    pub copy_on_read: bool,

    /// Serial number that the guest sees, 1 to 20 characters [default: made from the image's path, or
    /// from the identity of a remote disk]
    #[arg(long, value_name = "TEXT")]
    pub serial: Option<String>,

    /// Logical block size in bytes: 512 or 4096 [default: 512; of a remote disk its own]
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

    /// Remote disks that a qcow2 image may name as its backing file: `nvme+tcp://HOST:PORT/NQN` for a
    /// subsystem, or without the NQN for all there; can be repeated
    #[arg(long, value_name = "URI", help_heading = "Remote disks (NVMe/TCP)")]
    pub allow_remote: Vec<String>,

    /// This host's NQN [default: that of /etc/nvme/hostnqn, or one that is made and kept]
    #[arg(long, value_name = "NQN", help_heading = "Remote disks (NVMe/TCP)")]
    pub nvme_host_nqn: Option<String>,

    /// This host's identifier [default: that of /etc/nvme/hostid, or one that is made and kept]
    #[arg(long, value_name = "UUID", help_heading = "Remote disks (NVMe/TCP)")]
    pub nvme_host_id: Option<String>,

    /// Protect the headers of what is sent and received by a checksum
    #[arg(long, help_heading = "Remote disks (NVMe/TCP)")]
    pub nvme_header_digest: bool,

    /// Protect the data that is sent and received by a checksum
    #[arg(long, help_heading = "Remote disks (NVMe/TCP)")]
    pub nvme_data_digest: bool,

    /// Commands outstanding on one queue, 1 to 1024; the controller may grant fewer [default: 128]
    #[arg(long, value_name = "N", help_heading = "Remote disks (NVMe/TCP)")]
    pub nvme_queue_depth: Option<u64>,

    /// How long a controller that hears nothing waits before it gives us up; 0 for ever [default: 5]
    #[arg(long, value_name = "SECONDS", help_heading = "Remote disks (NVMe/TCP)")]
    pub nvme_keep_alive: Option<u64>,

    /// How long connecting a queue may take [default: 5]
    #[arg(long, value_name = "SECONDS", help_heading = "Remote disks (NVMe/TCP)")]
    pub nvme_connect_timeout: Option<u64>,

    /// How long a command may take before it is aborted, and again before the controller is reset
    /// [default: 30]
    #[arg(long, value_name = "SECONDS", help_heading = "Remote disks (NVMe/TCP)")]
    pub nvme_io_timeout: Option<u64>,

    /// Longest time between two attempts to connect again [default: 2]
    #[arg(long, value_name = "SECONDS", help_heading = "Remote disks (NVMe/TCP)")]
    pub nvme_reconnect_delay: Option<u64>,

    /// How long a lost controller is tried before it is given up [default: 600]
    #[arg(
        long,
        value_name = "SECONDS|off",
        help_heading = "Remote disks (NVMe/TCP)"
    )]
    pub nvme_ctrl_loss_tmo: Option<Patience>,

    /// How long requests are held while no path is usable [default: off, as long as there is hope]
    #[arg(
        long,
        value_name = "SECONDS|off",
        help_heading = "Remote disks (NVMe/TCP)"
    )]
    pub nvme_fast_io_fail_tmo: Option<Patience>,

    /// Which of several equally good paths a request takes [default: queue-depth]
    #[arg(long, value_enum, help_heading = "Remote disks (NVMe/TCP)")]
    pub nvme_io_policy: Option<IoPolicy>,

    /// Where the host's secret for authentication is (DHHC-1:…): file:PATH, fd:N or keyring:NAME
    #[arg(
        long,
        value_name = "KIND:WHERE",
        help_heading = "Remote disks (NVMe/TCP)"
    )]
    pub nvme_dhchap_secret: Option<String>,

    /// Where the controller's secret is, which then has to authenticate itself, too
    #[arg(
        long,
        value_name = "KIND:WHERE",
        help_heading = "Remote disks (NVMe/TCP)"
    )]
    pub nvme_dhchap_ctrl_secret: Option<String>,

    /// Where the pre-shared key for TLS is (NVMeTLSkey-1:…)
    #[arg(
        long,
        value_name = "KIND:WHERE",
        help_heading = "Remote disks (NVMe/TCP)"
    )]
    pub nvme_tls_key: Option<String>,

    /// Hold a reservation of the remote disk while it is in use
    #[arg(long, help_heading = "Remote disks (NVMe/TCP)")]
    pub nvme_reservations: bool,

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

fn discovery_address(text: &str) -> Result<Address, String> {
    uri::address(text, DISCOVERY_PORT).map_err(|error| error.to_string())
}

/// What `virtioblkd nvme discover` is told.
#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
pub struct DiscoverArgs {
    /// The discovery controller; port 8009 where none is given
    #[arg(value_name = "HOST[:PORT]", value_parser = discovery_address)]
    pub address: Address,

    /// Write the result for programs
    #[arg(long)]
    pub json: bool,

    /// This host's NQN [default: that of /etc/nvme/hostnqn, or one that is made and kept]
    #[arg(long, value_name = "NQN")]
    pub nvme_host_nqn: Option<String>,

    /// This host's identifier [default: that of /etc/nvme/hostid, or one that is made and kept]
    #[arg(long, value_name = "UUID")]
    pub nvme_host_id: Option<String>,

    /// Protect the headers of what is sent and received by a checksum
    #[arg(long)]
    pub nvme_header_digest: bool,

    /// Protect the data that is sent and received by a checksum
    #[arg(long)]
    pub nvme_data_digest: bool,

    /// How long connecting may take [default: 5]
    #[arg(long, value_name = "SECONDS")]
    pub nvme_connect_timeout: Option<u64>,

    /// Where the host's secret for authentication is (DHHC-1:…): file:PATH, fd:N or keyring:NAME
    #[arg(long, value_name = "KIND:WHERE")]
    pub nvme_dhchap_secret: Option<String>,

    /// Where the controller's secret is, which then has to authenticate itself, too
    #[arg(long, value_name = "KIND:WHERE")]
    pub nvme_dhchap_ctrl_secret: Option<String>,

    /// Where the pre-shared key for TLS is (NVMeTLSkey-1:…)
    #[arg(long, value_name = "KIND:WHERE")]
    pub nvme_tls_key: Option<String>,
}
