//! The pid file: written whole, and locked while we live.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Why the pid file cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum PidFileError {
    /// Its lock is held.
    #[error(
        "pid file {}: process {pid} is running and holds it; stop that one, or choose another pid file",
        path.display()
    )]
    Held {
        /// The file.
        path: PathBuf,
        /// What the file says, or a question mark.
        pid: String,
    },
    /// A system call failed.
    #[error("{operation} of pid file {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried.
        operation: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

/// A pid file of ours. It is removed when this is dropped.
#[derive(Debug)]
pub(super) struct PidFile {
    path: PathBuf,
    // Open for its lock.
    file: File,
}

impl PidFile {
    /// Makes the file, or takes one over that a dead process left.
    ///
    /// A reader never sees half a file: it is written beside its place, locked, and renamed.
    pub(super) fn take(path: &Path) -> Result<Self, PidFileError> {
        let failed = |operation| {
            move |source| PidFileError::Io {
                path: path.to_owned(),
                operation,
                source,
            }
        };
        // Held until the new file is in its place, so that two who start at once do not both get it.
        let _old = loop {
            let old = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o644)
                .open(path)
                .map_err(failed("open"))?;
            if !lock(&old).map_err(failed("lock"))? {
                let mut pid = String::new();
                let _ = old.take(32).read_to_string(&mut pid);
                let pid = pid.trim();
                return Err(PidFileError::Held {
                    path: path.to_owned(),
                    pid: if pid.is_empty() { "?" } else { pid }.to_owned(),
                });
            }
            // Whoever renamed or removed it between our open and our lock has the real one.
            if is_at(&old, path) {
                break old;
            }
        };
        Self::put(path).map_err(failed("write"))
    }

    /// Takes the file of a predecessor that has ended, or is about to: only this process was to take its place.
    pub(super) fn inherit(path: &Path) -> Result<Self, PidFileError> {
        Self::put(path).map_err(|source| PidFileError::Io {
            path: path.to_owned(),
            operation: "write",
            source,
        })
    }

    fn put(path: &Path) -> io::Result<Self> {
        let mut beside = path.as_os_str().to_owned();
        beside.push(format!(".{}", std::process::id()));
        let beside = PathBuf::from(beside);
        let written = (|| {
            let mut file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o644)
                .open(&beside)?;
            lock(&file)?;
            writeln!(file, "{}", std::process::id())?;
            fs::rename(&beside, path)?;
            Ok(file)
        })();
        let file = written.inspect_err(|_: &io::Error| {
            let _ = fs::remove_file(&beside);
        })?;
        Ok(PidFile {
            path: path.to_owned(),
            file,
        })
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        if is_at(&self.file, &self.path) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Locks the whole file for as long as it is open; whether nobody else has it locked.
fn lock(file: &File) -> io::Result<bool> {
    // SAFETY: flock takes a descriptor and an integer.
    if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } == 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    if error.kind() == io::ErrorKind::WouldBlock {
        return Ok(false);
    }
    Err(error)
}

/// Whether `path` names this very file.
fn is_at(file: &File, path: &Path) -> bool {
    let id = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
    match (file.metadata(), fs::symlink_metadata(path)) {
        (Ok(open), Ok(named)) => id(open) == id(named),
        _ => false,
    }
}
