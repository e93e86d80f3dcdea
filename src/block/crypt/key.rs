//! Where passphrases come from: a file, an inherited descriptor, the kernel's keyring.
//!
//! A passphrase is the bytes that are found there, as they are: as QEMU's `secret` object takes a file, a
//! newline at the end counts.

use std::ffi::CString;
use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::secret::{MAX_SECRET, Secret};
use crate::block::error::{Error, ErrorKind, Result};
use crate::block::file::FileStorage;
use crate::block::storage::Storage;

/// Where one passphrase is.
#[derive(Clone, Debug)]
pub enum KeySource {
    /// The contents of a file.
    File(PathBuf),
    /// What can be read from an open file or pipe, to its end. It can be read once.
    Fd(Arc<File>),
    /// A key of type "user" in the kernel's keyring: its description, or its serial number.
    Keyring(String),
    /// One of the others, which was read already.
    Read(Arc<Key>),
}

impl KeySource {
    /// The same, read: from then on it does not matter what becomes of the place.
    ///
    /// # Errors
    /// As [`Key::read`].
    pub(in crate::block) fn read(&self) -> Result<Self> {
        match self {
            Self::Read(_) => Ok(self.clone()),
            other => Key::read(other).map(|key| Self::Read(Arc::new(key))),
        }
    }
}

impl fmt::Display for KeySource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Fd(_) => write!(f, "the key's descriptor"),
            Self::Keyring(name) => write!(f, "the kernel's key {name:?}"),
            Self::Read(key) => f.write_str(&key.origin),
        }
    }
}

/// A passphrase for images.
#[derive(Clone, Debug)]
pub struct KeySpec {
    /// The image that it opens; none: all that have no key of their own.
    pub image: Option<PathBuf>,
    /// Where it is.
    pub source: KeySource,
}

/// One passphrase, read.
#[derive(Clone, Debug)]
pub struct Key {
    image: Option<PathBuf>,
    origin: String,
    secret: Arc<Secret>,
    /// The descriptor that it was read from. It stays open, so that its number stays free for a successor's.
    from: Option<Arc<File>>,
}

impl Key {
    /// Reads what is at `source`.
    ///
    /// # Errors
    /// Those of reading; [`ErrorKind::InvalidImage`] for a key that is empty or longer than 64 KiB.
    pub(in crate::block) fn read(source: &KeySource) -> Result<Self> {
        load(source, None)
    }

    /// Where it came from, for messages.
    pub(in crate::block) fn origin(&self) -> &str {
        &self.origin
    }

    pub(in crate::block) fn secret(&self) -> &[u8] {
        self.secret.bytes()
    }

    /// For a key that was read from a descriptor: its number, and a pipe with the key.
    pub(in crate::block) fn descriptor(&self) -> Option<io::Result<(RawFd, File)>> {
        let from = self.from.as_ref()?;
        Some(pipe().and_then(|(reader, mut writer)| {
            // A pipe has room for more than any key has, unless its user has too many pipes.
            writer.write_all(self.secret())?;
            Ok((from.as_raw_fd(), reader))
        }))
    }
}

/// The passphrases of a disk's images.
#[derive(Debug, Default)]
pub struct Keys(Vec<Key>);

impl Keys {
    /// Reads all of `specs`.
    ///
    /// # Errors
    /// Those of reading; [`ErrorKind::InvalidImage`] for a key that is empty or longer than 64 KiB.
    pub fn load(specs: &[KeySpec]) -> Result<Self> {
        let keys = specs
            .iter()
            .map(|spec| load(&spec.source, spec.image.clone()));
        keys.collect::<Result<_>>().map(Self)
    }

    /// The key of an image: its own, else the one for all.
    pub(super) fn find(&self, image: &Storage) -> Option<&Key> {
        let is_named = |name: &Path| match image {
            Storage::File(file) => {
                FileStorage::identity_of(name).is_ok_and(|found| found == file.identity())
            }
            other => other.path() == name,
        };
        let own = |key: &&Key| key.image.as_deref().is_some_and(is_named);
        let own = self.0.iter().find(own);
        own.or_else(|| self.0.iter().find(|key| key.image.is_none()))
    }

    /// A pipe with the key for each that was read from a descriptor, and that descriptor's number.
    ///
    /// # Errors
    /// No more pipes are to be had.
    pub fn descriptors(&self) -> io::Result<Vec<(RawFd, File)>> {
        self.0.iter().filter_map(Key::descriptor).collect()
    }

    /// True if there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

fn load(source: &KeySource, image: Option<PathBuf>) -> Result<Key> {
    let origin = source.to_string();
    let path = Path::new(&origin);
    let read = |from: &mut dyn Read| Secret::new(|memory| fill(from, memory));
    let secret = match source {
        KeySource::File(path) => File::open(path).and_then(|mut file| {
            let mode = file.metadata()?.mode();
            if mode & 0o044 != 0 {
                log::warn!(
                    "{}: the key can be read by others than its owner; `chmod 600` keeps it secret",
                    path.display()
                );
            }
            read(&mut file)
        }),
        KeySource::Fd(file) => read(&mut &**file),
        KeySource::Keyring(name) => from_keyring(name),
        KeySource::Read(key) => {
            let key = Key::clone(key);
            return Ok(Key { image, ..key });
        }
    };
    let secret = secret.map_err(|error| Error::io(path, "read the key", None, error))?;
    let wrong = match secret.bytes().len() {
        0 => "the key is empty",
        MAX_SECRET.. => "the key has 64 KiB or more, which is no passphrase",
        _ => {
            return Ok(Key {
                image,
                origin,
                secret: Arc::new(secret),
                from: match source {
                    KeySource::Fd(file) => Some(file.clone()),
                    _ => None,
                },
            });
        }
    };
    Err(Error::image(ErrorKind::InvalidImage, path, None, wrong))
}

/// A pipe to read from and to write to, neither of which waits.
fn pipe() -> io::Result<(File, File)> {
    let mut fds = [-1; 2];
    // SAFETY: the array has room for the two descriptors.
    if unsafe { libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC | libc::O_NONBLOCK) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: both are new and nobody else's.
    Ok(unsafe { (File::from_raw_fd(fds[0]), File::from_raw_fd(fds[1])) })
}

/// Fills `memory` as far as there is something to read.
fn fill(from: &mut dyn Read, memory: &mut [u8]) -> io::Result<usize> {
    let mut len = 0;
    while len < memory.len() {
        match from.read(&mut memory[len..]) {
            Ok(0) => break,
            Ok(count) => len += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(len)
}

/// keyctl(2), request_key(2).
fn from_keyring(name: &str) -> io::Result<Secret> {
    let serial = match name.parse::<i32>() {
        Ok(serial) => serial,
        Err(_) => find_key(name)?,
    };
    Secret::new(|memory| {
        // SAFETY: the kernel writes at most as many bytes as the buffer is said to have.
        let len = unsafe {
            libc::syscall(
                libc::SYS_keyctl,
                libc::KEYCTL_READ as libc::c_ulong,
                serial as libc::c_long,
                memory.as_mut_ptr(),
                memory.len(),
            )
        };
        usize::try_from(len).map_err(|_| io::Error::last_os_error())
    })
}

/// The serial number of a key by its description: in the keyrings of the thread, the process and the
/// session, then in that of the user.
fn find_key(name: &str) -> io::Result<i32> {
    let name = CString::new(name)?;
    // SAFETY: both strings end in NUL; without callout information nothing is made.
    let found = unsafe {
        libc::syscall(
            libc::SYS_request_key,
            c"user".as_ptr(),
            name.as_ptr(),
            std::ptr::null::<libc::c_char>(),
            0 as libc::c_long,
        )
    };
    if found > 0 {
        return Ok(found as i32);
    }
    let first = io::Error::last_os_error();
    // SAFETY: as above.
    let found = unsafe {
        libc::syscall(
            libc::SYS_keyctl,
            libc::KEYCTL_SEARCH as libc::c_ulong,
            libc::KEY_SPEC_USER_KEYRING as libc::c_long,
            c"user".as_ptr(),
            name.as_ptr(),
            0 as libc::c_long,
        )
    };
    match found {
        1.. => Ok(found as i32),
        _ => Err(first),
    }
}
