//! What can go wrong with an image or a device, told with its path, offset and operation.

use std::fmt::{self, Display};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Result of the block room.
pub type Result<T> = std::result::Result<T, Error>;

/// What kind of failure it is: what a caller decides by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// The device or the kernel refused the operation.
    Io,
    /// No space is left, on the file system or in a quota.
    NoSpace,
    /// A write to something opened read-only.
    ReadOnly,
    /// The image asks for something that this program does not do.
    Unsupported,
    /// The image contradicts itself; it must not be written to.
    Corrupt,
    /// The image, or what the user said of it, is not what it should be.
    InvalidImage,
    /// Another process holds the image.
    Locked,
    /// The user, or the system's permissions, do not allow this.
    NotAllowed,
    /// The file does not exist.
    NotFound,
    /// A range that the file cannot have.
    OutOfRange,
}

/// A failure: kind, path, operation, offset and cause. Cheap to clone, so that several waiters can be
/// told of one failure. Its `Display` is complete: it says everything and what to do next.
#[derive(Clone, Debug, thiserror::Error)]
#[error(transparent)]
pub struct Error(Arc<Inner>);

#[derive(Debug, thiserror::Error)]
struct Inner {
    kind: ErrorKind,
    path: PathBuf,
    /// What was being done ("read", "flush"); empty where the message says it.
    operation: &'static str,
    offset: Option<u64>,
    message: String,
    errno: Option<i32>,
}

impl Display for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.path.display())?;
        if !self.operation.is_empty() {
            write!(f, "{}", self.operation)?;
            if let Some(offset) = self.offset {
                write!(f, " at offset {offset:#x}")?;
            }
            write!(f, ": ")?;
        } else if let Some(offset) = self.offset {
            write!(f, "at offset {offset:#x}: ")?;
        }
        write!(f, "{}", self.message)
    }
}

impl Error {
    /// A system call's failure. The kind comes from the errno.
    pub fn io(
        path: impl AsRef<Path>,
        operation: &'static str,
        offset: impl Into<Option<u64>>,
        source: io::Error,
    ) -> Self {
        let errno = source.raw_os_error();
        let kind = match errno {
            Some(libc::ENOSPC | libc::EDQUOT) => ErrorKind::NoSpace,
            Some(libc::EROFS) => ErrorKind::ReadOnly,
            Some(libc::ENOENT) => ErrorKind::NotFound,
            Some(libc::EACCES | libc::EPERM) => ErrorKind::NotAllowed,
            Some(libc::EOPNOTSUPP | libc::ENOSYS) => ErrorKind::Unsupported,
            _ => ErrorKind::Io,
        };
        Self(Arc::new(Inner {
            kind,
            path: path.as_ref().to_owned(),
            operation,
            offset: offset.into(),
            message: source.to_string(),
            errno,
        }))
    }

    /// Something wrong with an image, or with how it is used. `message` says what, and what to do.
    pub fn image(
        kind: ErrorKind,
        path: impl AsRef<Path>,
        offset: impl Into<Option<u64>>,
        message: impl Display,
    ) -> Self {
        Self(Arc::new(Inner {
            kind,
            path: path.as_ref().to_owned(),
            operation: "",
            offset: offset.into(),
            message: message.to_string(),
            errno: None,
        }))
    }

    /// The same failure, with a sentence more: why it was done, or what to do.
    #[must_use]
    pub fn hint(self, more: impl Display) -> Self {
        let Inner {
            kind,
            path,
            operation,
            offset,
            message,
            errno,
        } = &*self.0;
        Self(Arc::new(Inner {
            kind: *kind,
            path: path.clone(),
            operation,
            offset: *offset,
            message: format!("{message}; {more}"),
            errno: *errno,
        }))
    }

    /// What kind of failure it is.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The file it happened to.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// Where in the file, in bytes.
    pub fn offset(&self) -> Option<u64> {
        self.0.offset
    }

    /// The system's error number, if a system call failed.
    pub fn errno(&self) -> Option<i32> {
        self.0.errno
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_says_what_where_and_why() {
        let error = Error::io(
            "/d/a.img",
            "write",
            4096,
            io::Error::from_raw_os_error(libc::ENOSPC),
        );
        assert_eq!(error.kind(), ErrorKind::NoSpace);
        assert_eq!(error.errno(), Some(libc::ENOSPC));
        assert!(
            error
                .to_string()
                .starts_with("/d/a.img: write at offset 0x1000: No space left"),
            "{error}"
        );
        let error = Error::image(ErrorKind::Locked, "b.img", None, "in use").hint("stop it");
        assert_eq!(error.to_string(), "b.img: in use; stop it");
    }
}
