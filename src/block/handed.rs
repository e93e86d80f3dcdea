//! Open image files that another process handed over, with the locks on them.
//!
//! Locks belong to an open file description (`super::lock`). A process that takes the place of another goes on
//! with the very descriptions of the other one, so that there is no moment at which an image is locked by
//! neither, and locking it "again" is what the kernel calls a lock that is held already.

use std::fs::{File, Metadata};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// The files of one disk that were handed over and are not in use yet.
#[derive(Debug, Default)]
pub struct HandedFiles {
    files: Mutex<Vec<File>>,
    ours: Arc<AtomicBool>,
}

/// A file that was handed over.
#[derive(Debug)]
pub(super) struct HandedFile {
    pub(super) file: File,
    /// False as long as the locks are still the other process's, which may have to go on with them.
    pub(super) ours: Arc<AtomicBool>,
}

impl HandedFiles {
    /// Files that another process has open too, and locked.
    pub fn new(files: Vec<File>) -> Arc<Self> {
        Arc::new(Self {
            files: Mutex::new(files),
            ours: Arc::default(),
        })
    }

    /// The one that is the same file as `opened`, opened in the same way.
    pub(super) fn take(&self, opened: &File) -> Option<HandedFile> {
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        let at = files.iter().position(|file| is_same(file, opened))?;
        Some(HandedFile {
            file: files.swap_remove(at),
            ours: self.ours.clone(),
        })
    }

    /// The other process is out of it: from now on the locks are this one's to give back. Files that nobody
    /// has taken are closed.
    pub fn settle(&self) {
        self.ours.store(true, Ordering::Release);
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        files.clear();
    }
}

fn is_same(one: &File, other: &File) -> bool {
    // What differs between two ways of opening an image.
    let flags = |file: &File| {
        // SAFETY: fcntl with F_GETFL takes no further argument.
        let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
        (flags >= 0).then_some(flags & (libc::O_ACCMODE | libc::O_DIRECT))
    };
    let identity = |meta: Metadata| match meta.file_type().is_block_device() {
        true => (true, meta.rdev(), 0),
        false => (false, meta.dev(), meta.ino()),
    };
    match (one.metadata(), other.metadata(), flags(one), flags(other)) {
        (Ok(one), Ok(other), Some(how), Some(wanted)) => {
            identity(one) == identity(other) && how == wanted
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::super::lock::Role;
    use super::super::tests::dir;
    use super::super::{ErrorKind, FileOptions, FileStorage, Storage};
    use super::*;

    const OPTIONS: FileOptions = FileOptions {
        read_only: false,
        direct: false,
    };

    fn duplicate(storage: &Storage) -> File {
        let Storage::File(file) = storage else {
            unreachable!()
        };
        file.file().try_clone().unwrap()
    }

    #[test]
    fn locks_that_were_handed_over_are_held_without_a_gap_and_not_given_back_too_early() {
        let dir = dir();
        let path = dir.path().join("a");
        std::fs::write(&path, [0; 512]).unwrap();
        let open = |handed: &HandedFiles| {
            Storage::File(FileStorage::open_with(&path, OPTIONS, handed).unwrap())
        };
        let old = open(&HandedFiles::default());
        old.lock(Role::RawWriter).unwrap();
        let other = open(&HandedFiles::default());
        let in_the_way = || other.lock(Role::RawWriter).unwrap_err().kind() == ErrorKind::Locked;
        assert!(in_the_way());

        // A process that takes over, and gives up again.
        let handed = HandedFiles::new(vec![duplicate(&old)]);
        let new = open(&handed);
        old.keep_locked();
        new.lock(Role::RawWriter).unwrap();
        new.unlock();
        drop(new);
        assert!(in_the_way());
        old.lock(Role::RawWriter).unwrap();

        // And one that gets it.
        let handed = HandedFiles::new(vec![duplicate(&old)]);
        let new = open(&handed);
        old.keep_locked();
        new.lock(Role::RawWriter).unwrap();
        handed.settle();
        drop(old);
        assert!(in_the_way());
        new.unlock();
        other.lock(Role::RawWriter).unwrap();
    }

    #[test]
    fn only_the_same_file_opened_in_the_same_way_is_taken() {
        let dir = dir();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        std::fs::write(&a, [0; 512]).unwrap();
        std::fs::write(&b, [0; 512]).unwrap();
        let write = |path| File::options().read(true).write(true).open(path).unwrap();
        let handed = HandedFiles::new(vec![write(&b), File::open(&a).unwrap()]);
        assert!(handed.take(&write(&a)).is_none());
        assert!(handed.take(&File::open(&b).unwrap()).is_none());
        assert!(handed.take(&write(&b)).is_some());
        assert!(handed.take(&write(&b)).is_none(), "once");
        handed.settle();
        assert!(handed.take(&File::open(&a).unwrap()).is_none());
    }
}
