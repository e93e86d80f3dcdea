//! From settings to a configuration: what concerns the process, the workers, and several disks together.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::args::WorkerArgs;
use super::disk::Disk;
use super::{
    Config, DEFAULT_POLL_MAX, DiskConfig, Error, Host, Key, Listen, Place, PollMode, Settings,
    Source, WorkersConfig, parse,
};
use crate::block::nvme_tcp::spec::NamespaceName;

/// A refusal of this value.
pub(super) fn invalid(
    key: Key,
    value: impl ToString,
    why: &str,
    instead: impl Into<String>,
) -> Error {
    Error::Invalid {
        key,
        value: value.to_string(),
        why: why.to_owned(),
        instead: instead.into(),
    }
}

/// The path from the root; symbolic links stay.
pub(super) fn absolute(key: &Key, path: &Path) -> Result<PathBuf, Error> {
    std::path::absolute(path).map_err(|source| Error::Path {
        key: key.clone(),
        path: path.to_owned(),
        source,
        instead: "write a path".to_owned(),
    })
}

/// The path of a file that is to be made: absolute, in a directory that exists, whose symbolic links
/// are resolved so that equal files have equal paths.
pub(super) fn new_file(key: &Key, path: &Path) -> Result<PathBuf, Error> {
    let path = absolute(key, path)?;
    let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(invalid(
            key.clone(),
            path.display(),
            "is no file",
            "write the path of a file",
        ));
    };
    match directory.canonicalize() {
        Ok(directory) => Ok(directory.join(name)),
        Err(source) => Err(Error::Path {
            key: key.clone(),
            path: directory.to_owned(),
            source,
            instead: "make the directory first, or write another path".to_owned(),
        }),
    }
}

impl Config {
    /// Says what the settings mean on this host.
    ///
    /// # Errors
    ///
    /// An [`Error`] for the first setting that cannot be.
    pub fn check(settings: &Settings, host: &Host) -> Result<Self, Error> {
        let mut warnings = Vec::new();
        let (process_place, workers_place) = match &settings.file {
            None => (Place::CommandLine, Place::CommandLine),
            Some(file) => (Place::File(file.clone()), Place::Workers(file.clone())),
        };
        if settings.disks.is_empty() {
            return Err(Error::Missing {
                key: process_place.key("disk"),
                instead: "write a [[disk]] table for each disk".to_owned(),
            });
        }
        let alone = settings.disks.len() == 1;
        let mut disks = Vec::new();
        let mut places = Vec::new();
        for (index, args) in settings.disks.iter().enumerate() {
            let name = args.name.clone().unwrap_or_else(|| format!("disk{index}"));
            let place = match &settings.file {
                None => Place::CommandLine,
                Some(file) => Place::Disk {
                    file: file.clone(),
                    disk: name.clone(),
                },
            };
            disks.push(
                Disk {
                    args,
                    place: &place,
                    name,
                    alone,
                    host,
                }
                .check()?,
            );
            places.push(place);
        }
        refuse_shared(&disks, &places)?;

        let pid_file = match &settings.process.pid_file {
            None => None,
            Some(path) => {
                let key = process_place.key("pid-file");
                let path = new_file(&key, path)?;
                if path.is_dir() {
                    let why = "is a directory";
                    return Err(invalid(
                        key,
                        path.display(),
                        why,
                        "write the path of a file",
                    ));
                }
                let taken = disks.iter().find(|d| {
                    matches!(&d.listen, Listen::Path { path: p, .. } if *p == path)
                        || matches!(&d.source, Source::File { path: p } if *p == path)
                });
                if let Some(disk) = taken {
                    return Err(Error::Shared {
                        key,
                        value: path.display().to_string(),
                        other: disk.name.clone(),
                        instead: "write a file of its own".to_owned(),
                    });
                }
                Some(path)
            }
        };

        let workers = check_workers(
            &settings.workers,
            &workers_place,
            &disks,
            host,
            &mut warnings,
        )?;
        for socket in &host.sockets {
            let used = disks.iter().any(
                |d| matches!(d.listen, Listen::Systemd { fd, .. } | Listen::Fd(fd) if fd == socket.fd),
            );
            if !used {
                warnings.push(format!(
                    "systemd passed a socket named {:?} (descriptor {}) that no disk is served on",
                    socket.name, socket.fd
                ));
            }
        }
        Ok(Self {
            workers,
            disks,
            once: settings.process.once,
            pid_file,
            log_level: settings.process.log_level,
            warnings,
        })
    }
}

/// Checks the settings of the workers, given all disks.
fn check_workers(
    args: &WorkerArgs,
    place: &Place,
    disks: &[DiskConfig],
    host: &Host,
    warnings: &mut Vec<String>,
) -> Result<WorkersConfig, Error> {
    let queues: usize = disks.iter().map(|d| usize::from(d.num_queues)).sum();
    let count = match args.workers {
        None => 1,
        Some(0) => {
            let key = place.key("workers");
            return Err(invalid(key, 0, "serves nothing", "write 1 or more"));
        }
        Some(count) => match usize::try_from(count) {
            Ok(count) if count <= queues => count,
            _ => {
                let why = format!("is more than there are queues to serve ({queues} in total)");
                let instead = "write fewer workers, or more with num-queues";
                return Err(invalid(place.key("workers"), count, &why, instead));
            }
        },
    };

    let mut cpus = Vec::new();
    if let Some(list) = &args.cpus {
        let key = place.key("cpus");
        cpus = parse::cpu_list(list)
            .map_err(|expected| invalid(key.clone(), list, "is no list of CPUs", expected))?;
        if let Some(cpu) = cpus.iter().find(|cpu| !host.cpus.contains(cpu)) {
            let why = format!("names CPU {cpu}, which this host does not have online");
            let instead = format!("choose from {}", parse::show_cpu_list(&host.cpus));
            return Err(invalid(key, list, &why, instead));
        }
        if let Some(cpu) = (1..cpus.len()).find(|i| cpus[..*i].contains(&cpus[*i])) {
            let why = format!("names CPU {} twice", cpus[cpu]);
            return Err(invalid(key, list, &why, "write a CPU for each worker"));
        }
        if cpus.len() < count {
            let why = format!("names {} CPUs for {count} workers", cpus.len());
            return Err(invalid(key, list, &why, "write a CPU for each worker"));
        }
        if cpus.len() > count {
            warnings.push(format!(
                "{key} names {} CPUs and {} is {count}, so the CPUs {} are not used",
                cpus.len(),
                place.key("workers"),
                parse::show_cpu_list(&cpus[count..])
            ));
            cpus.truncate(count);
        }
    }

    let poll = args.poll.unwrap_or(PollMode::Adaptive);
    let poll_max = match args.poll_max_us {
        None => DEFAULT_POLL_MAX,
        Some(us) => {
            let key = place.key("poll-max-us");
            if poll != PollMode::Adaptive {
                return Err(Error::Conflict {
                    key,
                    other: place.key("poll").with(if poll == PollMode::Always {
                        "always"
                    } else {
                        "never"
                    }),
                    instead: "only adaptive polling has a longest time; leave out one of them"
                        .to_owned(),
                });
            }
            if !(1..=1_000_000).contains(&us) {
                let instead = format!(
                    "write 1 to 1000000 microseconds, or {} to sleep at once",
                    place.key("poll").with("never")
                );
                return Err(invalid(key, us, "is out of range", instead));
            }
            Duration::from_micros(us)
        }
    };
    Ok(WorkersConfig {
        count,
        cpus,
        poll,
        poll_max,
    })
}

/// What makes two names the same image.
#[derive(PartialEq, Eq, Hash)]
enum Identity<'a> {
    /// Device and inode.
    File(u64, u64),
    /// The number of a block device.
    Device(u64),
    /// A namespace of a subsystem, wherever that is. It may have other names, too, which only a connection tells.
    Namespace(&'a str, NamespaceName),
}

fn identity(source: &Source) -> Option<Identity<'_>> {
    let path = match source {
        Source::File { path } => path,
        Source::Nvme(uri) => return Some(Identity::Namespace(&uri.subsystem, uri.namespace)),
        Source::Null { .. } => return None,
    };
    let metadata = fs::metadata(path).ok()?;
    Some(match metadata.file_type().is_block_device() {
        true => Identity::Device(metadata.rdev()),
        false => Identity::File(metadata.dev(), metadata.ino()),
    })
}

/// Refuses two disks that share a name, a socket, an image or a serial number.
fn refuse_shared(disks: &[DiskConfig], places: &[Place]) -> Result<(), Error> {
    let mut names = HashMap::new();
    let mut sockets = HashMap::new();
    let mut images: HashMap<_, &DiskConfig> = HashMap::new();
    let mut serials = HashMap::new();
    for (disk, place) in disks.iter().zip(places) {
        let shared = |name, value: String, other: &DiskConfig, instead: &str| Error::Shared {
            key: place.key(name),
            value,
            other: other.name.clone(),
            instead: instead.to_owned(),
        };
        if let Some(other) = names.insert(&disk.name, disk) {
            return Err(shared(
                "name",
                disk.name.clone(),
                other,
                "give each disk its own name",
            ));
        }
        let (key, socket) = match &disk.listen {
            Listen::Path { path, .. } => ("socket-path", path.display().to_string()),
            Listen::Fd(fd) => ("fd", fd.to_string()),
            // The same descriptor by its number and by its name is the same socket.
            Listen::Systemd { fd, .. } => ("fd-name", fd.to_string()),
        };
        if let Some(other) = sockets.insert(socket.clone(), disk) {
            return Err(shared(key, socket, other, "give each disk its own socket"));
        }
        let keys = disk.keys.iter().map(|key| ("key-fd", &key.source));
        let secrets = disk.nvme.iter().flat_map(super::NvmeConfig::secrets);
        for (name, source) in keys.chain(secrets) {
            // Read to its end at the start, and closed.
            let Some(fd) = source.fd() else { continue };
            if let Some(other) = sockets.insert(fd.to_string(), disk) {
                let instead = "write a descriptor for each key and each socket";
                return Err(shared(name, fd.to_string(), other, instead));
            }
        }
        if let Some(identity) = identity(&disk.source) {
            if let Some(other) = images.insert(identity, disk) {
                // Nothing is lost where nobody writes.
                if !(disk.read_only && other.read_only) {
                    let instead = "two disks would overwrite each other; make both read-only, or \
                                   give one an overlay of its own (`qemu-img create -b`)";
                    return Err(shared("blk-file", disk.source.to_string(), other, instead));
                }
            }
        }
        let Some(serial) = &disk.serial else { continue };
        if let Some(other) = serials.insert(serial, disk) {
            let instead = "give each disk its own serial";
            return Err(shared("serial", serial.clone(), other, instead));
        }
    }
    Ok(())
}
