//! From settings to a configuration: one disk by itself.

use std::fs;
use std::os::fd::RawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use super::args::DiskArgs;
use super::check::{absolute, invalid, new_file};
use super::{
    BackingCache, CacheMode, DEFAULT_L2_CACHE_SIZE, DEFAULT_MAX_NUM_QUEUES, DEFAULT_QUEUE_SIZE,
    DEFAULT_SOCKET_MODE, DiskConfig, Error, Format, Host, Key, Listen, MAX_NUM_QUEUES,
    MAX_QUEUE_SIZE, MAX_SERIAL, MIN_L2_CACHE_SIZE, OnDirty, PassedSocket, Place, Source, host,
    parse,
};
use crate::block::nvme_tcp::uri;

/// The longest socket path: `sun_path` of unix(7) less its NUL.
const MAX_SOCKET_PATH: usize = 107;
/// What is a block to a guest where nothing else is said, in bytes.
const DEFAULT_BLOCK_SIZE: u32 = 512;
/// The longest name of a disk.
const MAX_NAME: usize = 64;

/// One disk on its way from settings to configuration.
pub(super) struct Disk<'a> {
    pub args: &'a DiskArgs,
    pub place: &'a Place,
    pub name: String,
    /// Whether it is the only disk.
    pub alone: bool,
    pub host: &'a Host,
}

impl Disk<'_> {
    /// Fills in the defaults; refuses what cannot be.
    pub fn check(self) -> Result<DiskConfig, Error> {
        let args = self.args;
        self.check_name()?;
        let format = args.format.unwrap_or(Format::Raw);
        let block_size = match args.block_size {
            None => None,
            Some(512) => Some(512),
            Some(4096) => Some(4096),
            Some(other) => {
                let key = self.place.key("block-size");
                return Err(invalid(key, other, "is no block size", "write 512 or 4096"));
            }
        };
        let source = self.check_source(block_size.unwrap_or(DEFAULT_BLOCK_SIZE))?;
        let block_size = match source {
            Source::Nvme(_) => block_size,
            _ => block_size.or(Some(DEFAULT_BLOCK_SIZE)),
        };
        let allow_paths = self.check_layers(&source, format)?;
        let allow_remote = self.check_allow_remote()?;
        let l2_cache_size = self.check_l2_cache_size()?;
        let data_file = match &args.data_file {
            Some(path) => Some(absolute(&self.place.key("data-file"), path)?),
            None => None,
        };
        let serial = match &args.serial {
            Some(serial) => Some(self.check_serial(serial)?),
            None => default_serial(&source, &self.name),
        };
        Ok(DiskConfig {
            listen: self.check_listen()?,
            nvme: self.check_nvme(&source, &allow_remote)?,
            allow_remote,
            copy_on_read: self.check_copy_on_read()?,
            num_queues: self.check_num_queues()?,
            queue_size: self.check_queue_size()?,
            source,
            format,
            read_only: args.read_only,
            cache: args.cache.unwrap_or(CacheMode::None),
            backing_cache: args.backing_cache.unwrap_or(BackingCache::Writeback),
            on_dirty: args.on_dirty.unwrap_or(OnDirty::Repair),
            serial,
            block_size,
            keys: self.check_keys(format)?,
            allow_paths,
            l2_cache_size,
            data_file,
            name: self.name,
        })
    }

    fn check_name(&self) -> Result<(), Error> {
        let plain = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
        if self.name.is_empty() || self.name.len() > MAX_NAME || !self.name.bytes().all(plain) {
            return Err(invalid(
                self.place.key("name"),
                &self.name,
                "is no name of a disk",
                format!("write 1 to {MAX_NAME} letters, digits, dots, underscores and hyphens"),
            ));
        }
        Ok(())
    }

    fn check_source(&self, block_size: u32) -> Result<Source, Error> {
        let key = self.place.key("blk-file");
        let Some(path) = &self.args.blk_file else {
            return Err(Error::Missing {
                instead: format!(
                    "name the image with {}, or {} for a disk that stores nothing",
                    key.with("PATH"),
                    key.with("null:SIZE")
                ),
                key,
            });
        };
        let text = path.to_string_lossy();
        let here = format!("; a file of that name is ./{text}");
        if let Some(size) = text.strip_prefix("null:") {
            let wrong = |expected: &str| {
                invalid(key.clone(), &text, "is no size of a null device", expected)
            };
            let size = parse::size(size).map_err(wrong)?;
            if size == 0 || size > i64::MAX as u64 || size % u64::from(block_size) != 0 {
                return Err(wrong(&format!(
                    "write a multiple of the block size, {block_size}, such as null:1G"
                )));
            }
            return Ok(Source::Null { size });
        }
        if text.starts_with("json:") {
            let instead = format!("write the path of the image, and say its format{here}");
            return Err(invalid(
                key,
                &text,
                "is QEMU's json: syntax, which is refused",
                instead,
            ));
        }
        if uri::is_remote(&text) {
            return self.check_uri(key, &text);
        }
        if text.contains("://") {
            let instead =
                format!("write a path, nvme+tcp://HOST:PORT/NQN?nsid=N, or null:SIZE{here}");
            return Err(invalid(
                key,
                &text,
                "is of a kind that is not known",
                instead,
            ));
        }
        let path = absolute(&key, path)?;
        let metadata = fs::metadata(&path).map_err(|source| Error::Path {
            key: key.clone(),
            path: path.clone(),
            source,
            instead: "write the path of an image that exists; `qemu-img create` makes one"
                .to_owned(),
        })?;
        let kind = metadata.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            let why = "is neither a regular file nor a block device";
            return Err(invalid(
                key,
                path.display(),
                why,
                "write the path of an image",
            ));
        }
        Ok(Source::File { path })
    }

    /// Checks what concerns the files below an image; returns the directories they may be in.
    fn check_layers(&self, source: &Source, format: Format) -> Result<Vec<PathBuf>, Error> {
        if let Source::Nvme(uri) = source {
            self.check_namespace(uri, format)?;
            return match self.unused_without_layers(Format::Raw) {
                Some(key) => Err(Error::Conflict {
                    key,
                    other: source.to_string(),
                    instead: "a remote disk has no mappings and no backing file; leave it out"
                        .to_owned(),
                }),
                None => Ok(Vec::new()),
            };
        }
        let Source::File { path } = source else {
            return match self.unused_without_layers(format) {
                Some(key) => Err(Error::Conflict {
                    key,
                    other: source.to_string(),
                    instead: "a null device has no format and no files; leave it out".to_owned(),
                }),
                None => Ok(Vec::new()),
            };
        };
        if format != Format::Qcow2 {
            let (word, default) = match format {
                Format::Luks => ("luks", ""),
                _ => ("raw", " (the default)"),
            };
            return match self.unused_without_layers(Format::Raw) {
                Some(key) => Err(Error::Conflict {
                    key,
                    other: format!("{}{default}", self.place.key("format").with(word)),
                    instead: format!(
                        "a {word} image has no mappings and no backing file; leave it out, or write {} if it is one",
                        self.place.key("format").with("qcow2")
                    ),
                }),
                None => Ok(Vec::new()),
            };
        }
        let key = self.place.key("allow-path");
        let own = path.parent().unwrap_or(Path::new("/"));
        let mut directories = Vec::new();
        for directory in
            std::iter::once(own).chain(self.args.allow_path.iter().map(PathBuf::as_path))
        {
            let wrong = |source| Error::Path {
                key: key.clone(),
                path: directory.to_owned(),
                source,
                instead: "write a directory that exists".to_owned(),
            };
            let directory = directory.canonicalize().map_err(wrong)?;
            if !directory.is_dir() {
                let instead = "write the directory that the file is in";
                return Err(invalid(
                    key,
                    directory.display(),
                    "is not a directory",
                    instead,
                ));
            }
            if !directories.contains(&directory) {
                directories.push(directory);
            }
        }
        Ok(directories)
    }

    /// A setting that says something about layers that a raw image and a null device do not have.
    fn unused_without_layers(&self, format: Format) -> Option<Key> {
        if format != Format::Raw {
            Some(self.place.key("format"))
        } else if self.args.backing_cache.is_some() {
            Some(self.place.key("backing-cache"))
        } else if self.args.on_dirty.is_some() {
            Some(self.place.key("on-dirty"))
        } else if !self.args.allow_path.is_empty() {
            Some(self.place.key("allow-path"))
        } else if !self.args.allow_remote.is_empty() {
            Some(self.place.key("allow-remote"))
        } else if self.args.copy_on_read {
            Some(self.place.key("copy-on-read"))
        } else if self.args.l2_cache_size.is_some() {
            Some(self.place.key("l2-cache-size"))
        } else if self.args.data_file.is_some() {
            Some(self.place.key("data-file"))
        } else {
            None
        }
    }

    fn check_l2_cache_size(&self) -> Result<u64, Error> {
        let Some(text) = &self.args.l2_cache_size else {
            return Ok(DEFAULT_L2_CACHE_SIZE);
        };
        let wrong =
            |why: &str, instead: &str| invalid(self.place.key("l2-cache-size"), text, why, instead);
        match parse::size(text) {
            Ok(size) if size >= MIN_L2_CACHE_SIZE => Ok(size),
            Ok(_) => Err(wrong(
                "is too little to work with",
                "write 64K or more; 72M is enough for 1 TiB in clusters of 64 KiB",
            )),
            Err(instead) => Err(wrong("is no size", instead)),
        }
    }

    fn check_serial(&self, serial: &str) -> Result<String, Error> {
        let printable = serial.bytes().all(|b| (0x20..0x7f).contains(&b));
        if serial.is_empty() || serial.len() > MAX_SERIAL || !printable {
            return Err(invalid(
                self.place.key("serial"),
                serial,
                "is no serial number",
                format!("write 1 to {MAX_SERIAL} printable ASCII characters"),
            ));
        }
        Ok(serial.to_owned())
    }

    fn check_num_queues(&self) -> Result<u16, Error> {
        match self.args.num_queues {
            None => Ok(u16::try_from(self.host.cpus.len())
                .unwrap_or(DEFAULT_MAX_NUM_QUEUES)
                .clamp(1, DEFAULT_MAX_NUM_QUEUES)),
            Some(n) => match u16::try_from(n) {
                Ok(n) if (1..=MAX_NUM_QUEUES).contains(&n) => Ok(n),
                _ => Err(invalid(
                    self.place.key("num-queues"),
                    n,
                    "is out of range",
                    format!("write 1 to {MAX_NUM_QUEUES}; as many as the guest has CPUs is best"),
                )),
            },
        }
    }

    fn check_queue_size(&self) -> Result<u16, Error> {
        match self.args.queue_size {
            None => Ok(DEFAULT_QUEUE_SIZE),
            Some(n) => match u16::try_from(n) {
                Ok(n) if (2..=MAX_QUEUE_SIZE).contains(&n) && n.is_power_of_two() => Ok(n),
                _ => Err(invalid(
                    self.place.key("queue-size"),
                    n,
                    "is no size of a queue",
                    format!("write a power of two from 2 to {MAX_QUEUE_SIZE}"),
                )),
            },
        }
    }

    fn check_listen(&self) -> Result<Listen, Error> {
        let args = self.args;
        let given: Vec<&'static str> = [
            ("socket-path", args.socket_path.is_some()),
            ("fd", args.fd.is_some()),
            ("fd-name", args.fd_name.is_some()),
        ]
        .into_iter()
        .filter_map(|(name, given)| given.then_some(name))
        .collect();
        if let [first, second, ..] = given[..] {
            return Err(Error::Conflict {
                key: self.place.key(first),
                other: second.to_owned(),
                instead: "a disk has one socket; leave out one of them".to_owned(),
            });
        }
        let Some(path) = &args.socket_path else {
            let ours = [
                ("socket-mode", args.socket_mode.is_some()),
                ("socket-group", args.socket_group.is_some()),
            ];
            if let Some((name, _)) = ours.into_iter().find(|(_, given)| *given) {
                return Err(Error::Conflict {
                    key: self.place.key(name),
                    other: given
                        .first()
                        .map_or("a socket of systemd", |name| name)
                        .to_owned(),
                    instead:
                        "whoever made the socket chose who may use it; leave it out, or write \
                              socket-path"
                            .to_owned(),
                });
            }
            return match args.fd {
                Some(fd) => self.check_fd(fd).map(Listen::Fd),
                None => self.check_systemd(),
            };
        };

        let key = self.place.key("socket-path");
        let path = new_file(&key, path)?;
        if path.as_os_str().as_bytes().len() > MAX_SOCKET_PATH {
            let why = format!("is longer than a socket's path can be ({MAX_SOCKET_PATH} bytes)");
            let instead = "write a shorter path, such as one in /run";
            return Err(invalid(key, path.display(), &why, instead));
        }
        // A stale socket may be replaced when listening, and nothing else.
        if fs::symlink_metadata(&path).is_ok_and(|m| !m.file_type().is_socket()) {
            let why = "exists and is not a socket";
            return Err(invalid(
                key,
                path.display(),
                why,
                "move it away, or write another path",
            ));
        }
        let mode = match &args.socket_mode {
            None => DEFAULT_SOCKET_MODE,
            Some(text) => parse::mode(text).map_err(|expected| {
                invalid(
                    self.place.key("socket-mode"),
                    text,
                    "is no file mode",
                    expected,
                )
            })?,
        };
        let group = match &args.socket_group {
            None => None,
            Some(group) => Some(host::group_id(group).ok_or_else(|| {
                let key = self.place.key("socket-group");
                invalid(
                    key,
                    group,
                    "is no group of this host",
                    "write its name or its number",
                )
            })?),
        };
        Ok(Listen::Path { path, mode, group })
    }

    fn check_fd(&self, fd: RawFd) -> Result<RawFd, Error> {
        let key = self.place.key("fd");
        let instead = "write the number of a Unix socket that is open at the start, 3 or more";
        if fd < 3 {
            return Err(invalid(key, fd, "is taken for standard streams", instead));
        }
        match host::is_socket(fd) {
            Ok(true) => Ok(fd),
            Ok(false) => Err(invalid(key, fd, "is not a socket", instead)),
            Err(_) => Err(invalid(key, fd, "is not an open descriptor", instead)),
        }
    }

    /// Finds the socket that systemd passed for this disk: that of the name in `fd-name`; else the
    /// only one, for the only disk; else that of the disk's name.
    fn check_systemd(&self) -> Result<Listen, Error> {
        let sockets = &self.host.sockets;
        let passed = || match &sockets[..] {
            [] => "systemd passed no socket (LISTEN_PID and LISTEN_FDS)".to_owned(),
            some => {
                let names: Vec<_> = some.iter().map(|s| s.name.as_str()).collect();
                format!("systemd passed {}", names.join(", "))
            }
        };
        let listen = |socket: &PassedSocket| Listen::Systemd {
            name: socket.name.clone(),
            fd: socket.fd,
        };
        if let Some(name) = &self.args.fd_name {
            let mut named = sockets.iter().filter(|s| s.name == *name);
            let key = self.place.key("fd-name");
            return match (named.next(), named.next()) {
                (Some(socket), None) => Ok(listen(socket)),
                (None, _) => Err(invalid(
                    key,
                    name,
                    "is the name of no socket",
                    format!("{}; write FileDescriptorName={name} in its unit", passed()),
                )),
                (Some(_), Some(_)) => {
                    let instead = "write another FileDescriptorName= in one of the units";
                    Err(invalid(
                        key,
                        name,
                        "is the name of several sockets",
                        instead,
                    ))
                }
            };
        }
        match &sockets[..] {
            [socket] if self.alone => return Ok(listen(socket)),
            _ => {}
        }
        let mut named = sockets.iter().filter(|s| s.name == self.name);
        match (named.next(), named.next()) {
            (Some(socket), None) => Ok(listen(socket)),
            _ if sockets.is_empty() => {
                let key = self.place.key("socket-path");
                Err(Error::Missing {
                    instead: format!(
                        "say where the VMM connects with {}; an open socket is given with {}, and \
                         a socket of systemd needs neither",
                        key.with("PATH"),
                        self.place.key("fd").with("N")
                    ),
                    key,
                })
            }
            _ => Err(Error::Missing {
                key: self.place.key("fd-name"),
                instead: format!("{}; say which of them is this disk's", passed()),
            }),
        }
    }
}

/// A serial number that stays the same while the image stays where it is, and differs between images:
/// the beginning of the file's name, for people, and 32 bits of a hash of its path. A namespace's is made of what it
/// says of itself.
pub(super) fn default_serial(source: &Source, disk: &str) -> Option<String> {
    let (label, hash) = match source {
        Source::Nvme(_) => return None,
        Source::Null { .. } => ("null".to_owned(), parse::fnv1a(disk.as_bytes())),
        Source::File { path } => {
            let stem = path.file_stem().unwrap_or_default().to_string_lossy();
            let plain = stem
                .chars()
                .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' });
            (
                plain.take(MAX_SERIAL - 9).collect(),
                parse::fnv1a(path.as_os_str().as_bytes()),
            )
        }
    };
    Some(format!("{label}-{:08x}", hash as u32))
}
