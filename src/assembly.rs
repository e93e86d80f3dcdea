//! From a checked configuration to a running daemon: opens the disks, starts the workers, and joins
//! them to the control plane.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use log::{info, warn};
use thiserror::Error;

use crate::block::crypt::{KeySource, KeySpec};
use crate::block::nvme_tcp::spec::{IoPolicy, NvmeOptions};
use crate::block::{self, Disk, DiskSpec, HandedFiles};
use crate::config::{self, BackingCache, CacheMode, Config, DiskConfig, WorkersConfig};
use crate::daemon::{
    Daemon, DaemonError, DiskEndpoint, Options, Predecessor, Program, Signals, UpgradeError,
};
use crate::dataplane::device::{BlkDevice, DeviceSettings};
use crate::dataplane::{Dataplane, DataplaneConfig, PollConfig, PollMode};
use crate::reactor::{Io, IoConfig};
use crate::vhost_user::{Listen, sigbus};
use crate::virtio::blk::DeviceLimits;
use crate::virtio::blk::config::{ConfigError, DeviceConfig, Topology};
use crate::virtio::blk::request::{DeviceId, SerialError};

#[cfg(test)]
mod tests;

/// Ranges in one discard or write-zeroes request.
const MAX_RANGES: u32 = 64;
/// Submission queue entries of the io_uring that reads the images' headers.
const OPENING_RING_ENTRIES: u32 = 32;

/// Why the daemon could not start, or ended in failure.
#[derive(Debug, Error)]
pub enum AssemblyError {
    /// An image could not be opened.
    #[error("disk {name:?}: {source}")]
    Image {
        /// The disk.
        name: String,
        /// Why.
        source: block::Error,
    },
    /// What the guest would see of the disk is not possible.
    #[error("disk {name:?}: {source}")]
    Config {
        /// The disk.
        name: String,
        /// Why.
        source: ConfigError,
    },
    /// The serial can not be given to a guest.
    #[error("disk {name:?}: {source}")]
    Serial {
        /// The disk.
        name: String,
        /// Why.
        source: SerialError,
    },
    /// Two disks are one namespace, by two names.
    #[error(
        "disk {name:?}: its remote namespace is also that of disk {other:?}: two disks would overwrite each other; \
         make both read-only, or give one an overlay of its own"
    )]
    SameNamespace {
        /// The second disk.
        name: String,
        /// The first one.
        other: String,
    },
    /// No thread, io_uring or signal handling from the kernel.
    #[error("{operation}: {source}")]
    System {
        /// What was tried.
        operation: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The place of another process cannot be taken.
    #[error("taking over: {0}")]
    Upgrade(#[from] UpgradeError),
    /// The daemon's own life cycle.
    #[error(transparent)]
    Daemon(#[from] DaemonError),
}

fn system(operation: &'static str) -> impl FnOnce(io::Error) -> AssemblyError {
    move |source| AssemblyError::System { operation, source }
}

/// Serves what `config` describes until a signal, or until nobody is left to serve.
pub fn run(config: &Config) -> Result<(), AssemblyError> {
    // Before the first thread, which inherits the mask.
    let signals = Signals::block().map_err(system("blocking signals"))?;
    let program = Program::of_this_process().map_err(system("finding out how it was started"))?;
    let predecessor = Predecessor::of_this_process()?;
    let daemon = start(config, program, predecessor.as_ref()).inspect_err(|error| {
        if let Some(predecessor) = &predecessor {
            predecessor.refuse(&error.to_string());
        }
    })?;
    // Whatever was not taken over is closed.
    drop(predecessor);
    Ok(daemon.run(&signals)?)
}

/// Everything up to the point where VMMs are served.
fn start(
    config: &Config,
    program: Program,
    predecessor: Option<&Predecessor>,
) -> Result<Daemon, AssemblyError> {
    sigbus::install().map_err(system("installing the SIGBUS handler"))?;
    raise_open_files_limit();
    let plane =
        Dataplane::start(&plane_config(&config.workers)).map_err(system("starting the workers"))?;
    let mut endpoints = Vec::with_capacity(config.disks.len());
    let mut namespaces = Namespaces::default();
    for disk in &config.disks {
        let handed = predecessor.map(|predecessor| predecessor.images_of(&disk.name));
        let device = open_device_with(&plane, disk, handed.unwrap_or_default())?;
        namespaces.add(disk, &device)?;
        info!(
            "disk {:?}: {}; {} queues of up to {}, {} workers, serial {:?}",
            disk.name,
            device.describe(),
            disk.num_queues,
            disk.queue_size,
            plane.workers(),
            device.serial(),
        );
        endpoints.push(DiskEndpoint {
            name: disk.name.clone(),
            listen: listen(&disk.listen),
            device: Arc::new(device),
        });
    }
    let options = Options {
        once: config.once,
        pid_file: config.pid_file.clone(),
        program: Some(program),
    };
    Ok(match predecessor {
        None => Daemon::new(endpoints, &options)?,
        Some(predecessor) => Daemon::take_over(predecessor, endpoints, &options)?,
    })
}

/// The namespaces that are the disks of this process, by what they say of themselves: one may have several names.
#[derive(Debug, Default)]
struct Namespaces(Vec<([u8; 16], String, bool)>);

impl Namespaces {
    /// Refuses a namespace that two disks would write to. Of files their locks tell.
    fn add(&mut self, disk: &DiskConfig, device: &BlkDevice) -> Result<(), AssemblyError> {
        let Some(identity) = device.remote_identity() else {
            return Ok(());
        };
        let same = self.0.iter().filter(|(other, ..)| *other == identity);
        for (_, other, read_only) in same {
            if !(disk.read_only && *read_only) {
                return Err(AssemblyError::SameNamespace {
                    name: disk.name.clone(),
                    other: other.clone(),
                });
            }
        }
        self.0.push((identity, disk.name.clone(), disk.read_only));
        Ok(())
    }
}

/// A VMM may share its memory in hundreds of regions, each with a file of its own.
fn raise_open_files_limit() {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: `limit` is a valid, writable rlimit, read and then written by the calls.
    let failed = unsafe {
        libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) != 0 || {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) != 0
        }
    };
    if failed {
        warn!(
            "raising the limit of open files: {}; a VM with many memory regions may be refused",
            io::Error::last_os_error()
        );
    }
}

fn plane_config(workers: &WorkersConfig) -> DataplaneConfig {
    DataplaneConfig {
        workers: workers.count,
        cpus: workers.cpus.clone(),
        poll: PollConfig {
            mode: match workers.poll {
                config::PollMode::Adaptive => PollMode::Adaptive,
                config::PollMode::Always => PollMode::Always,
                config::PollMode::Never => PollMode::Never,
            },
            max: workers.poll_max,
        },
    }
}

/// Opens a disk's image (its headers: nothing is locked before a ring starts) and makes the device that
/// the guest will see.
pub fn open_device(plane: &Arc<Dataplane>, disk: &DiskConfig) -> Result<BlkDevice, AssemblyError> {
    open_device_with(plane, disk, Arc::default())
}

/// [`open_device`], with the image files that another process has handed over.
fn open_device_with(
    plane: &Arc<Dataplane>,
    disk: &DiskConfig,
    handed: Arc<HandedFiles>,
) -> Result<BlkDevice, AssemblyError> {
    let name = &disk.name;
    let io = Io::new(&IoConfig {
        worker: 0,
        entries: OPENING_RING_ENTRIES,
        epochs: plane.epochs().clone(),
    })
    .map_err(system("making an io_uring"))?;
    let image = io
        .block_on(Disk::open(&io, spec(disk, handed)))
        .map_err(|source| AssemblyError::Image {
            name: name.clone(),
            source,
        })?;
    let what = image.limits();
    let block_size = disk.block_size.unwrap_or_else(|| image.block_size());
    if image.remote_identity().is_some() && block_size < what.logical_block {
        warn!(
            "disk {name:?}: blocks of {block_size} bytes, as told, on a namespace that has blocks of {}: smaller \
             writes read what stands around them first",
            what.logical_block
        );
    }
    let limits = DeviceLimits {
        capacity_bytes: image.size(),
        read_only: disk.read_only,
        block_size,
        max_discard_bytes: if what.can_discard {
            what.max_discard
        } else {
            0
        },
        max_discard_segments: MAX_RANGES,
        discard_alignment: what.discard_granularity.max(block_size),
        max_write_zeroes_bytes: what.max_write_zeroes,
        max_write_zeroes_segments: MAX_RANGES,
        write_zeroes_may_unmap: what.write_zeroes_may_unmap,
    };
    if limits.usable_capacity() < image.size() {
        warn!(
            "disk {name:?}: {} bytes are no whole number of blocks of {}: the guest sees {} bytes",
            image.size(),
            block_size,
            limits.usable_capacity()
        );
    }
    // What a target says of itself may be anything.
    let physical = match what.physical_block {
        bytes if bytes.is_power_of_two() && bytes / block_size <= u32::from(u16::MAX) => bytes,
        _ => block_size,
    };
    let topology = Topology {
        physical_block_size: physical.max(block_size),
        min_io_size: physical.max(block_size),
        opt_io_size: what.optimal_io / block_size * block_size,
    };
    let write_through = disk.cache == CacheMode::Writethrough;
    let config = DeviceConfig::new(
        &limits,
        &topology,
        disk.num_queues,
        disk.queue_size,
        !write_through,
    )
    .map_err(|source| AssemblyError::Config {
        name: name.clone(),
        source,
    })?;
    let serial = serial(disk, &image);
    let settings = DeviceSettings {
        name: name.clone(),
        id: DeviceId::new(&serial).map_err(|source| AssemblyError::Serial {
            name: name.clone(),
            source,
        })?,
        num_queues: disk.num_queues,
        queue_size: disk.queue_size,
        limits,
        force_write_through: write_through,
    };
    Ok(BlkDevice::new(plane.clone(), image, settings, config))
}

/// What the guest finds its disk by: of a namespace, 64 bits of a hash of what it says of itself, which is the same
/// over every path and on every host.
fn serial(disk: &DiskConfig, image: &Disk) -> String {
    let identity = image.remote_identity().unwrap_or_default();
    let made = || format!("nvme{:016x}", config::parse::fnv1a(&identity));
    disk.serial.clone().unwrap_or_else(made)
}

fn spec(disk: &DiskConfig, handed: Arc<HandedFiles>) -> DiskSpec {
    let source = match &disk.source {
        config::Source::File { path } => block::Source::File { path: path.clone() },
        config::Source::Nvme(uri) => block::Source::Nvme(uri.clone()),
        config::Source::Null { size } => block::Source::Null { size: *size },
    };
    let format = match disk.format {
        config::Format::Raw => block::Format::Raw,
        config::Format::Qcow2 => block::Format::Qcow2,
        config::Format::Luks => block::Format::Luks,
    };
    DiskSpec {
        read_only: disk.read_only,
        // A disk that writes through flushes in the data plane, as for a guest that asked for it.
        cache: match disk.cache {
            CacheMode::None => block::CacheMode::None,
            CacheMode::Writeback | CacheMode::Writethrough => block::CacheMode::Writeback,
        },
        backing_cache: match disk.backing_cache {
            BackingCache::None => block::CacheMode::None,
            BackingCache::Writeback => block::CacheMode::Writeback,
        },
        on_dirty: match disk.on_dirty {
            config::OnDirty::Repair => block::OnDirty::Repair,
            config::OnDirty::Refuse => block::OnDirty::Refuse,
        },
        allow_paths: disk.allow_paths.clone(),
        allow_remote: disk.allow_remote.clone(),
        nvme: Arc::new(disk.nvme.as_ref().map(nvme_options).unwrap_or_default()),
        copy_on_read: disk.copy_on_read,
        l2_cache_bytes: disk.l2_cache_size,
        data_file: disk.data_file.clone(),
        keys: disk.keys.iter().map(key).collect(),
        handed,
        ..DiskSpec::new(source, format)
    }
}

fn key(key: &config::KeyConfig) -> KeySpec {
    KeySpec {
        image: key.image.clone(),
        source: key_source(&key.source),
    }
}

/// To be called once for each: a descriptor is taken over.
fn key_source(source: &config::KeySource) -> KeySource {
    match source {
        config::KeySource::File(path) => KeySource::File(path.clone()),
        config::KeySource::Fd(fd) => KeySource::Fd(Arc::new(own(*fd).into())),
        config::KeySource::Keyring(name) => KeySource::Keyring(name.clone()),
    }
}

/// How namespaces are connected. To be called once: descriptors of secrets are taken over.
pub fn nvme_options(nvme: &config::NvmeConfig) -> NvmeOptions {
    NvmeOptions {
        host_nqn: nvme.host_nqn.clone(),
        host_id: nvme.host_id,
        header_digest: nvme.header_digest,
        data_digest: nvme.data_digest,
        queue_depth: nvme.queue_depth,
        keep_alive: nvme.keep_alive,
        connect_timeout: nvme.connect_timeout,
        io_timeout: nvme.io_timeout,
        reconnect_delay: nvme.reconnect_delay,
        ctrl_loss: nvme.ctrl_loss_tmo,
        fast_io_fail: nvme.fast_io_fail_tmo,
        policy: match nvme.io_policy {
            config::IoPolicy::QueueDepth => IoPolicy::QueueDepth,
            config::IoPolicy::RoundRobin => IoPolicy::RoundRobin,
        },
        dhchap_secret: nvme.dhchap_secret.as_ref().map(key_source),
        dhchap_ctrl_secret: nvme.dhchap_ctrl_secret.as_ref().map(key_source),
        tls_key: nvme.tls_key.as_ref().map(key_source),
        reservations: nvme.reservations,
    }
}

fn listen(listen: &config::Listen) -> Listen {
    match listen {
        config::Listen::Path { path, mode, group } => Listen::Path {
            path: path.clone(),
            mode: Some(*mode),
            group: *group,
        },
        config::Listen::Fd(fd) | config::Listen::Systemd { fd, .. } => Listen::Fd(own(*fd)),
    }
}

fn own(fd: RawFd) -> OwnedFd {
    // SAFETY: the configuration's check found it open and named by one disk only, and whoever started
    // this process passed it to be used by it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}
