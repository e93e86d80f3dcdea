//! Where a VMM comes in: a socket file of our own, or a descriptor that was handed to us.

use std::ffi::CString;
use std::fs::{self, Permissions};
use std::io;
use std::mem::{offset_of, zeroed};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use log::debug;

/// Where one disk is to be found by its VMM.
#[derive(Debug)]
pub enum Listen {
    /// A socket file that is made, and removed at the end.
    Path {
        /// The file.
        path: PathBuf,
        /// Its permission bits; `None` leaves it to owner only (0600).
        mode: Option<u32>,
        /// Its group's id; `None` leaves the group of this process.
        group: Option<u32>,
    },
    /// A unix stream socket from whoever started us, listening or connected.
    Fd(OwnedFd),
}

/// Why a socket cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Another process serves this socket.
    #[error(
        "another process listens on {}: stop it, or choose another socket path",
        path.display()
    )]
    InUse {
        /// The socket file.
        path: PathBuf,
    },
    /// The path names something that is not ours to replace.
    #[error("{} exists and is no socket: remove it, or choose another socket path", path.display())]
    NotASocket {
        /// The file.
        path: PathBuf,
    },
    /// A unix socket's path is bounded by the system.
    #[error(
        "socket path {} is longer than the {} bytes that the system allows",
        path.display(),
        max_path()
    )]
    TooLong {
        /// The path.
        path: PathBuf,
    },
    /// A system call failed.
    #[error("{operation} of socket {}: {source}", path.display())]
    Path {
        /// The socket file.
        path: PathBuf,
        /// What was tried.
        operation: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The descriptor is not one that can be served.
    #[error("file descriptor {fd} cannot serve a VMM: {why}")]
    Fd {
        /// Its number.
        fd: RawFd,
        /// What is wrong with it.
        why: String,
    },
}

/// The longest path of a socket file, in bytes.
fn max_path() -> usize {
    // One byte is for the NUL.
    size_of::<libc::sockaddr_un>() - offset_of!(libc::sockaddr_un, sun_path) - 1
}

/// A listening socket. A socket file of our own is removed when it is dropped.
#[derive(Debug)]
pub struct Listener {
    sock: UnixListener,
    file: Option<SocketFile>,
}

/// An opened [`Listen`].
#[derive(Debug)]
pub enum Source {
    /// VMMs may come one after another.
    Listening(Listener),
    /// One VMM is there already, and no other will come.
    Connected(UnixStream),
}

impl Listen {
    /// Makes the socket, or looks at the one that was given. From here on a VMM may connect.
    ///
    /// A socket file that nobody listens on is replaced.
    ///
    /// # Errors
    /// Another process listens there, the path is not ours to take, or the system refuses.
    pub fn open(self) -> Result<Source, ListenError> {
        match self {
            Listen::Path { path, mode, group } => {
                Listener::bind(path, mode.unwrap_or(0o600), group).map(Source::Listening)
            }
            Listen::Fd(fd) => from_fd(fd),
        }
    }
}

fn from_fd(fd: OwnedFd) -> Result<Source, ListenError> {
    let number = fd.as_raw_fd();
    let refused = |why: String| ListenError::Fd { fd: number, why };
    let option = |name| {
        socket_option(number, name).map_err(|error| refused(format!("it is no socket: {error}")))
    };
    if option(libc::SO_DOMAIN)? != libc::AF_UNIX || option(libc::SO_TYPE)? != libc::SOCK_STREAM {
        return Err(refused("it is no unix stream socket".to_owned()));
    }
    set_cloexec(number).map_err(|error| refused(error.to_string()))?;
    if option(libc::SO_ACCEPTCONN)? != 0 {
        let sock = UnixListener::from(fd);
        sock.set_nonblocking(true)
            .map_err(|error| refused(error.to_string()))?;
        return Ok(Source::Listening(Listener { sock, file: None }));
    }
    let sock = UnixStream::from(fd);
    if sock.peer_addr().is_err() {
        return Err(refused("it is neither listening nor connected".to_owned()));
    }
    Ok(Source::Connected(sock))
}

pub(super) fn socket_option(fd: RawFd, name: libc::c_int) -> io::Result<libc::c_int> {
    let mut value: libc::c_int = 0;
    let mut len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: `value` and `len` describe one writable int.
    let result = unsafe {
        libc::getsockopt(
            fd,
            libc::SOL_SOCKET,
            name,
            (&raw mut value).cast(),
            &mut len,
        )
    };
    if result == 0 {
        Ok(value)
    } else {
        Err(io::Error::last_os_error())
    }
}

fn set_cloexec(fd: RawFd) -> io::Result<()> {
    // SAFETY: fcntl with F_SETFD takes a plain integer.
    if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

impl Listener {
    fn bind(path: PathBuf, mode: u32, group: Option<u32>) -> Result<Self, ListenError> {
        if path.as_os_str().len() > max_path() {
            return Err(ListenError::TooLong { path });
        }
        remove_stale(&path)?;
        let sock = match bind_only(&path) {
            Ok(sock) => sock,
            Err(source) if source.kind() == io::ErrorKind::AddrInUse => {
                // Somebody was faster.
                return Err(ListenError::InUse { path });
            }
            Err(source) => {
                return Err(ListenError::Path {
                    path,
                    operation: "bind",
                    source,
                });
            }
        };
        let failed = |operation| {
            let path = path.clone();
            move |source| ListenError::Path {
                path,
                operation,
                source,
            }
        };
        // From here on an error removes the file.
        let file = SocketFile::new(path.clone()).map_err(failed("stat"))?;
        // Nobody can connect before `listen`, so that mode and group are never found wrong. The group
        // first: chown clears bits of the mode.
        if group.is_some() {
            chown(&path, None, group).map_err(failed("chown"))?;
        }
        fs::set_permissions(&path, Permissions::from_mode(mode)).map_err(failed("chmod"))?;
        // SAFETY: `sock` is an open socket.
        if unsafe { libc::listen(sock.as_raw_fd(), 16) } != 0 {
            return Err(failed("listen")(io::Error::last_os_error()));
        }
        let sock = UnixListener::from(sock);
        sock.set_nonblocking(true).map_err(failed("fcntl"))?;
        Ok(Listener {
            sock,
            file: Some(file),
        })
    }

    /// A listening socket of a predecessor. Its socket file stays when this is dropped, unless it is
    /// [owned](Listener::own_file) by then.
    pub fn inherited(sock: UnixListener) -> Self {
        Listener { sock, file: None }
    }

    /// Has the socket file removed when this is dropped.
    pub fn own_file(&mut self, path: PathBuf) {
        match SocketFile::new(path) {
            Ok(file) => self.file = Some(file),
            // It was removed: there is nothing to own.
            Err(error) => debug!("the socket file of a predecessor: {error}"),
        }
    }

    /// The next VMM that waits to be served, if there is one.
    ///
    /// # Errors
    /// The system cannot accept it, for example because too many files are open.
    pub fn accept(&self) -> io::Result<Option<UnixStream>> {
        loop {
            match self.sock.accept() {
                Ok((sock, _)) => return Ok(Some(sock)),
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => return Ok(None),
                    // It went away while it waited, or a signal came.
                    io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted => {}
                    _ => return Err(error),
                },
            }
        }
    }

    /// Where VMMs connect, for the log.
    pub fn path(&self) -> Option<&Path> {
        self.file.as_ref().map(|file| file.path.as_path())
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.sock.as_fd()
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        self.sock.as_raw_fd()
    }
}

/// Removes a socket file that nobody listens on.
fn remove_stale(path: &Path) -> Result<(), ListenError> {
    let failed = |operation, source| ListenError::Path {
        path: path.to_owned(),
        operation,
        source,
    };
    let metadata = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed("stat", error)),
    };
    if !metadata.file_type().is_socket() {
        return Err(ListenError::NotASocket {
            path: path.to_owned(),
        });
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(ListenError::InUse {
            path: path.to_owned(),
        }),
        Err(error) => match error.kind() {
            io::ErrorKind::ConnectionRefused => match fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    Err(failed("removal", error))
                }
                _ => Ok(()),
            },
            io::ErrorKind::NotFound => Ok(()),
            // A full backlog: somebody listens.
            io::ErrorKind::WouldBlock => Err(ListenError::InUse {
                path: path.to_owned(),
            }),
            _ => Err(failed("connect to the old one", error)),
        },
    }
}

/// Binds without listening: a connection is refused until the caller listens.
fn bind_only(path: &Path) -> io::Result<OwnedFd> {
    // SAFETY: plain integers in, a descriptor of our own out.
    let fd = unsafe {
        let fd = libc::socket(libc::AF_UNIX, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        OwnedFd::from_raw_fd(fd)
    };
    // SAFETY: an all-zero sockaddr_un is a valid value.
    let mut address: libc::sockaddr_un = unsafe { zeroed() };
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    let bytes = CString::new(path.as_os_str().as_bytes())?.into_bytes_with_nul();
    for (to, from) in address.sun_path.iter_mut().zip(&bytes) {
        *to = *from as libc::c_char;
    }
    let len = offset_of!(libc::sockaddr_un, sun_path) + bytes.len();
    // The file is made with the mode of the socket's inode: ours only, until the mode is set.
    // SAFETY: `fd` is open; `address` is initialised up to `len`.
    let result = unsafe {
        libc::fchmod(fd.as_raw_fd(), 0o600);
        libc::bind(
            fd.as_raw_fd(),
            (&raw const address).cast(),
            len as libc::socklen_t,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(fd)
}

/// A socket file of our own, removed when this is dropped, unless another has taken its place.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    id: (u64, u64),
}

impl SocketFile {
    fn new(path: PathBuf) -> io::Result<Self> {
        let metadata = fs::symlink_metadata(&path)?;
        Ok(SocketFile {
            id: (metadata.dev(), metadata.ino()),
            path,
        })
    }

    fn remove(&self) {
        let ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|metadata| (metadata.dev(), metadata.ino()) == self.id);
        if ours {
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        self.remove();
    }
}

/// The sockets that systemd passed (`sd_listen_fds(3)`: `LISTEN_PID`, `LISTEN_FDS`), with their names
/// (`LISTEN_FDNAMES`). To be called once, early, before anything else opens files.
///
/// Nothing was passed to this process if the list is empty.
pub fn systemd_sockets() -> Vec<(OwnedFd, Option<String>)> {
    let number = |name| {
        std::env::var(name)
            .ok()
            .and_then(|value| value.parse::<u32>().ok())
    };
    let names = std::env::var("LISTEN_FDNAMES").unwrap_or_default();
    passed_sockets(number("LISTEN_PID"), number("LISTEN_FDS"), &names)
}

/// The first descriptor that systemd passes (`SD_LISTEN_FDS_START`).
const LISTEN_FDS_START: RawFd = 3;

fn passed_sockets(
    pid: Option<u32>,
    count: Option<u32>,
    names: &str,
) -> Vec<(OwnedFd, Option<String>)> {
    // The variables are inherited by whoever forgets to remove them: the pid says for whom they are.
    if pid != Some(std::process::id()) {
        return Vec::new();
    }
    let count = count.unwrap_or(0).min(1024) as RawFd;
    let mut names = names.split(':').filter(|name| !name.is_empty());
    (LISTEN_FDS_START..LISTEN_FDS_START + count)
        .filter(|fd| set_cloexec(*fd).is_ok())
        .map(|fd| {
            // SAFETY: the descriptor is open, and LISTEN_PID gave it to this process to own.
            let fd = unsafe { OwnedFd::from_raw_fd(fd) };
            (fd, names.next().map(str::to_owned))
        })
        .collect()
}

#[cfg(test)]
#[path = "listener_tests.rs"]
mod tests;
