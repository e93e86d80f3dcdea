//! What `/proc` says about a process, and temporary directories.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::sys;

/// Open descriptors of a process.
///
/// # Errors
/// When the process is gone.
pub fn fd_count(pid: u32) -> io::Result<usize> {
    Ok(fs::read_dir(format!("/proc/{pid}/fd"))?.count())
}

/// Mappings of a process.
///
/// # Errors
/// When the process is gone.
pub fn mapping_count(pid: u32) -> io::Result<usize> {
    Ok(fs::read_to_string(format!("/proc/{pid}/maps"))?
        .lines()
        .count())
}

/// Mappings of a process whose name contains `needle` (guest memory is `guest-memory`).
///
/// # Errors
/// When the process is gone.
pub fn mappings_of(pid: u32, needle: &str) -> io::Result<usize> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    Ok(maps.lines().filter(|l| l.contains(needle)).count())
}

/// Threads of a process.
///
/// # Errors
/// When the process is gone.
pub fn thread_count(pid: u32) -> io::Result<usize> {
    Ok(fs::read_dir(format!("/proc/{pid}/task"))?.count())
}

/// User and system time of all threads of a process.
///
/// # Errors
/// When the process is gone.
pub fn cpu_time(pid: u32) -> io::Result<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The second field is the name in parentheses, which may hold anything; count from behind it.
    let rest = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let ticks: u64 = rest
        .split_whitespace()
        .skip(11)
        .take(2)
        .filter_map(|field| field.parse::<u64>().ok())
        .sum();
    Ok(Duration::from_millis(ticks * 1000 / sys::clock_ticks()))
}

/// What `/proc/PID/io` counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct IoCounters {
    /// Bytes read through system calls.
    pub rchar: u64,
    /// Bytes written through system calls.
    pub wchar: u64,
    /// Bytes that storage was asked for.
    pub read_bytes: u64,
    /// Bytes that storage was given.
    pub write_bytes: u64,
}

/// I/O of a process so far.
///
/// # Errors
/// When the process is gone.
pub fn io_counters(pid: u32) -> io::Result<IoCounters> {
    let text = fs::read_to_string(format!("/proc/{pid}/io"))?;
    let mut counters = IoCounters::default();
    for line in text.lines() {
        let Some((name, value)) = line.split_once(": ") else {
            continue;
        };
        let value = value.trim().parse().unwrap_or(0);
        match name {
            "rchar" => counters.rchar = value,
            "wchar" => counters.wchar = value,
            "read_bytes" => counters.read_bytes = value,
            "write_bytes" => counters.write_bytes = value,
            _ => {}
        }
    }
    Ok(counters)
}

/// Whether somebody listens on a unix socket; asks the kernel, so that no connection is spent on it.
///
/// # Errors
/// When `/proc/net/unix` cannot be read.
pub fn is_listening(socket: &Path) -> io::Result<bool> {
    const ACCEPTS_CONNECTIONS: u64 = 0x1_0000;
    let table = fs::read("/proc/net/unix")?;
    Ok(table.split(|b| *b == b'\n').any(|line| {
        let line = String::from_utf8_lossy(line);
        let mut fields = line.split_whitespace();
        let flags = fields.nth(3).and_then(|f| u64::from_str_radix(f, 16).ok());
        flags.is_some_and(|f| f & ACCEPTS_CONNECTIONS != 0)
            && fields.nth(3).map(Path::new) == Some(socket)
    }))
}

/// A directory that goes when the value goes.
#[derive(Debug)]
pub struct TempDir(PathBuf);

impl TempDir {
    /// A new directory under `$TMPDIR` or `/tmp`. Its name is short: a socket's path has 108 bytes.
    ///
    /// # Panics
    /// When it cannot be made.
    pub fn new() -> Self {
        Self::new_in(&std::env::temp_dir())
    }

    /// A new directory under `parent`.
    ///
    /// # Panics
    /// When it cannot be made.
    pub fn new_in(parent: &Path) -> Self {
        let template = CString::new(parent.join("vbt-XXXXXX").into_os_string().into_vec())
            .expect("a path without NUL");
        let raw = template.into_raw();
        // SAFETY: mkdtemp writes the six X of a string that we own; the pointer comes from `into_raw`.
        let (made, path) = unsafe {
            let made = !libc::mkdtemp(raw).is_null();
            (made, CString::from_raw(raw))
        };
        assert!(made, "mkdtemp {path:?}: {}", io::Error::last_os_error());
        Self(PathBuf::from(std::ffi::OsStr::from_bytes(path.as_bytes())))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// A path in it.
    pub fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        self.0.join(name)
    }
}

impl Default for TempDir {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
