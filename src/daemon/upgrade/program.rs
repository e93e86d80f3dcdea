//! Starting the program again.

use std::collections::BTreeSet;
use std::ffi::{CString, OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::ptr;

use log::warn;

/// The number of the socket to the process whose place is to be taken.
pub(super) const FD_VARIABLE: &str = "VIRTIOBLKD_UPGRADE_FD";
/// The program to be started, if it is not the one that was started at first.
const BINARY_VARIABLE: &str = "VIRTIOBLKD_UPGRADE_BINARY";
/// For whom systemd opened sockets (sd_listen_fds(3)).
const LISTEN_PID: &str = "LISTEN_PID";

/// How this process was started, so that it can be started again.
#[derive(Clone, Debug)]
pub struct Program {
    path: PathBuf,
    /// Descriptors that whoever started this process meant for it.
    inherited: Vec<RawFd>,
    /// Some of them are sockets of systemd.
    listens: bool,
}

impl Program {
    /// To be called first in the process, while it has nothing open but what was given to it.
    ///
    /// # Errors
    /// `/proc` is not there.
    pub fn of_this_process() -> io::Result<Self> {
        let chosen = std::env::var_os(BINARY_VARIABLE).filter(|path| !path.is_empty());
        let path = match chosen {
            Some(path) => std::path::absolute(path)?,
            None => started_by(std::env::args_os().next().as_deref())?,
        };
        let channel = std::env::var(FD_VARIABLE).ok();
        let channel: Option<RawFd> = channel.and_then(|number| number.parse().ok());
        let mut inherited = open_fds()?;
        inherited.retain(|fd| Some(*fd) != channel && is_inheritable(*fd));
        let listen_pid = std::env::var(LISTEN_PID).ok();
        Ok(Program {
            path,
            inherited,
            listens: listen_pid.and_then(|pid| pid.parse().ok())
                == Some(crate::config::listen_pid()),
        })
    }

    /// What will be started.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Starts the program with the arguments and the environment of this process. It gets the standard streams,
    /// the descriptors that this process was started with, `channel`, and `extra` under the numbers given.
    ///
    /// It is not forked: this process's memory would be copied on write from then on.
    pub(super) fn start(&self, channel: &UnixStream, extra: &[(RawFd, File)]) -> io::Result<Child> {
        let replaced: BTreeSet<RawFd> = extra.iter().map(|(number, _)| *number).collect();
        let mut actions = Actions::new()?;
        for fd in &self.inherited {
            if !replaced.contains(fd) && is_open(*fd) {
                actions.inherit(*fd, *fd)?;
            }
        }
        for (number, file) in extra {
            actions.inherit(file.as_raw_fd(), *number)?;
        }
        actions.inherit(channel.as_raw_fd(), channel.as_raw_fd())?;
        // Some come from the VMM by way of libraries that do not say it at once.
        for fd in open_fds()? {
            if !self.inherited.contains(&fd) {
                close_on_exec(fd);
            }
        }

        let path = CString::new(self.path.as_os_str().as_bytes())?;
        let args = strings(std::env::args_os())?;
        let ours = [FD_VARIABLE, LISTEN_PID].map(OsStr::new);
        let kept = std::env::vars_os().filter(|(name, _)| !ours.contains(&name.as_os_str()));
        let mut variables: Vec<OsString> = kept
            .map(|(mut variable, value)| {
                variable.push("=");
                variable.push(value);
                variable
            })
            .collect();
        variables.push(format!("{FD_VARIABLE}={}", channel.as_raw_fd()).into());
        if self.listens {
            variables.push(format!("{LISTEN_PID}={}", std::process::id()).into());
        }
        let variables = strings(variables)?;
        let mut pid = 0;
        // SAFETY: the path ends in NUL, the lists in a null pointer, and what they point to lives through the
        // call; the actions are initialised.
        let failed = unsafe {
            libc::posix_spawn(
                &mut pid,
                path.as_ptr(),
                &actions.0,
                ptr::null(),
                pointers(&args).as_ptr(),
                pointers(&variables).as_ptr(),
            )
        };
        match failed {
            0 => Ok(Child { pid, ended: false }),
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }
}

fn strings(from: impl IntoIterator<Item = OsString>) -> io::Result<Vec<CString>> {
    from.into_iter()
        .map(|text| Ok(CString::new(text.as_bytes())?))
        .collect()
}

fn pointers(strings: &[CString]) -> Vec<*mut libc::c_char> {
    let pointers = strings.iter().map(|text| text.as_ptr().cast_mut());
    pointers.chain([ptr::null_mut()]).collect()
}

/// The path that leads to this program, as whoever started it wrote it: where that is a symbolic link, an upgrade
/// may have it point to another file.
fn started_by(name: Option<&OsStr>) -> io::Result<PathBuf> {
    let own = std::env::current_exe()?;
    let identity = |path: &Path| fs::metadata(path).map(|meta| (meta.dev(), meta.ino()));
    let this = identity(Path::new("/proc/self/exe"))?;
    let name = Path::new(name.unwrap_or_default());
    let candidates = match name.components().count() {
        0 => Vec::new(),
        1 if !name.as_os_str().as_bytes().contains(&b'/') => {
            let path = std::env::var_os("PATH").unwrap_or_default();
            std::env::split_paths(&path)
                .map(|dir| dir.join(name))
                .collect()
        }
        _ => vec![name.to_owned()],
    };
    let found = candidates
        .into_iter()
        .find(|path| identity(path).is_ok_and(|found| found == this));
    std::path::absolute(found.unwrap_or(own))
}

/// Descriptors of this process, without the standard streams.
fn open_fds() -> io::Result<Vec<RawFd>> {
    let mut fds = Vec::new();
    for entry in fs::read_dir("/proc/self/fd")? {
        if let Some(fd) = entry?
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        {
            fds.push(fd);
        }
    }
    // The one that was open to read the list is among them.
    fds.retain(|fd| *fd > 2 && is_open(*fd));
    Ok(fds)
}

fn flags(fd: RawFd) -> Option<libc::c_int> {
    // SAFETY: fcntl with F_GETFD takes no further argument.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFD) };
    (flags >= 0).then_some(flags)
}

fn is_open(fd: RawFd) -> bool {
    flags(fd).is_some()
}

fn is_inheritable(fd: RawFd) -> bool {
    flags(fd).is_some_and(|flags| flags & libc::FD_CLOEXEC == 0)
}

fn close_on_exec(fd: RawFd) {
    // SAFETY: fcntl with F_SETFD takes a plain integer; it fails if the descriptor is closed by now.
    unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) };
}

/// What the new process does before it becomes the program.
struct Actions(libc::posix_spawn_file_actions_t);

impl Actions {
    fn new() -> io::Result<Self> {
        // SAFETY: zeros are a valid value to be initialised.
        let mut actions = unsafe { std::mem::zeroed() };
        // SAFETY: `actions` is writable.
        match unsafe { libc::posix_spawn_file_actions_init(&mut actions) } {
            0 => Ok(Actions(actions)),
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }

    /// `from` is open as `to`; where these are the same, it stays open (posix_spawn_file_actions_adddup2).
    fn inherit(&mut self, from: RawFd, to: RawFd) -> io::Result<()> {
        // SAFETY: the actions are initialised; the numbers are only noted.
        match unsafe { libc::posix_spawn_file_actions_adddup2(&mut self.0, from, to) } {
            0 => Ok(()),
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }
}

impl Drop for Actions {
    fn drop(&mut self) {
        // SAFETY: initialised in `new`, and not used after this.
        unsafe { libc::posix_spawn_file_actions_destroy(&mut self.0) };
    }
}

/// A process that was started, and is killed when this is dropped.
#[derive(Debug)]
pub(super) struct Child {
    pid: libc::pid_t,
    ended: bool,
}

impl Child {
    pub(super) fn pid(&self) -> libc::pid_t {
        self.pid
    }

    pub(super) fn signal(&self, signal: libc::c_int) {
        if !self.ended {
            // SAFETY: kill takes plain integers; the process has not been waited for, so the number is its.
            unsafe { libc::kill(self.pid, signal) };
        }
    }

    /// Ends it, however far it is, and waits until it is gone with all that it had.
    pub(super) fn end(&mut self) {
        self.signal(libc::SIGKILL);
        while !self.ended {
            // SAFETY: waitpid with a null pointer stores nothing.
            let result = unsafe { libc::waitpid(self.pid, ptr::null_mut(), 0) };
            let error = io::Error::last_os_error();
            if result < 0 && error.kind() != io::ErrorKind::Interrupted {
                warn!("waiting for process {}: {error}", self.pid);
            }
            self.ended = result >= 0 || error.kind() != io::ErrorKind::Interrupted;
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.end();
    }
}
