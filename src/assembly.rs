//! From a checked configuration to a running daemon: opens the disks, starts the workers, and joins
//! them to the control plane.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use log::{info, warn};
use thiserror::Error;

use crate::block::crypt::{KeySource, KeySpec};
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
    for disk in &config.disks {
        let handed = predecessor.map(|predecessor| predecessor.images_of(&disk.name));
        let device = open_device_with(&plane, disk, handed.unwrap_or_default())?;
        info!(
            "disk {:?}: {}; {} queues of up to {}, {} workers, serial {:?}",
            disk.name,
            device.describe(),
            disk.num_queues,
            disk.queue_size,
            plane.workers(),
            disk.serial,
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
    let limits = DeviceLimits {
        capacity_bytes: image.size(),
        read_only: disk.read_only,
        block_size: disk.block_size,
        max_discard_bytes: if what.can_discard {
            what.max_discard
        } else {
            0
        },
        max_discard_segments: MAX_RANGES,
        discard_alignment: what.discard_granularity.max(disk.block_size),
        max_write_zeroes_bytes: what.max_write_zeroes,
        max_write_zeroes_segments: MAX_RANGES,
        write_zeroes_may_unmap: what.write_zeroes_may_unmap,
    };
    if limits.usable_capacity() < image.size() {
        warn!(
            "disk {name:?}: {} bytes are no whole number of blocks of {}: the guest sees {} bytes",
            image.size(),
            disk.block_size,
            limits.usable_capacity()
        );
    }
    let topology = Topology {
        physical_block_size: what.physical_block.max(disk.block_size),
        min_io_size: what.physical_block.max(disk.block_size),
        opt_io_size: what.optimal_io,
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
    let settings = DeviceSettings {
        name: name.clone(),
        id: DeviceId::new(&disk.serial).map_err(|source| AssemblyError::Serial {
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

fn spec(disk: &DiskConfig, handed: Arc<HandedFiles>) -> DiskSpec {
    let source = match &disk.source {
        config::Source::File { path } => block::Source::File { path: path.clone() },
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
        l2_cache_bytes: disk.l2_cache_size,
        data_file: disk.data_file.clone(),
        keys: disk.keys.iter().map(key).collect(),
        handed,
        ..DiskSpec::new(source, format)
    }
}

/// To be called once for each key: a descriptor is taken over.
fn key(key: &config::KeyConfig) -> KeySpec {
    KeySpec {
        image: key.image.clone(),
        source: match &key.source {
            config::KeySource::File(path) => KeySource::File(path.clone()),
            config::KeySource::Fd(fd) => KeySource::Fd(Arc::new(own(*fd).into())),
            config::KeySource::Keyring(name) => KeySource::Keyring(name.clone()),
        },
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
