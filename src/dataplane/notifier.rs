//! What the VMM gave us to signal and to be signalled by: eventfds as a rule, but who knows.
//!
//! A worker may not wait, and whether a descriptor waits is the VMM's choice: the flag belongs to the open file
//! that it shares with us, so it is not ours to set.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;

/// A descriptor that is written to: call and error files.
#[derive(Debug)]
pub(super) struct Notifier {
    file: File,
    may_wait: bool,
}

impl Notifier {
    pub(super) fn new(file: File) -> Self {
        let may_wait = may_wait(&file);
        Self { file, may_wait }
    }

    /// Signals the other side. Does not wait: a descriptor that is full has been signalled, and not looked at.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] if it is full; whatever else a descriptor may say that is no eventfd.
    #[inline]
    pub(super) fn signal(&self) -> io::Result<()> {
        if self.may_wait && !is_writable(&self.file) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        (&self.file).write(&1u64.to_ne_bytes()).map(drop)
    }
}

/// Takes what a kick file holds, without waiting; 0 at its end.
///
/// # Errors
/// [`io::ErrorKind::WouldBlock`] if there is nothing; whatever else a descriptor may say that is no eventfd.
pub(super) fn take_kicks(mut kick: &File) -> io::Result<usize> {
    let mut count = [0u8; 8];
    if !may_wait(kick) {
        return kick.read(&mut count);
    }
    let part = libc::iovec {
        iov_base: count.as_mut_ptr().cast(),
        iov_len: count.len(),
    };
    // SAFETY: one iovec over eight writable bytes; an offset of -1 reads as read(2) does.
    let got = unsafe { libc::preadv2(kick.as_raw_fd(), &raw const part, 1, -1, libc::RWF_NOWAIT) };
    usize::try_from(got).map_err(|_| io::Error::last_os_error())
}

fn may_wait(file: &File) -> bool {
    // SAFETY: no memory is passed. A flag that cannot be read counts as missing.
    let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
    flags < 0 || flags & libc::O_NONBLOCK == 0
}

fn is_writable(file: &File) -> bool {
    let mut poll = libc::pollfd {
        fd: file.as_raw_fd(),
        events: libc::POLLOUT,
        revents: 0,
    };
    // SAFETY: one valid pollfd; the call does not wait.
    let ready = unsafe { libc::poll(&raw mut poll, 1, 0) };
    // An error is for the write to tell.
    ready != 0
}

#[cfg(test)]
mod tests {
    use std::os::fd::FromRawFd;

    use super::*;

    fn eventfd(flags: libc::c_int) -> File {
        // SAFETY: a new descriptor is ours alone.
        unsafe { File::from_raw_fd(libc::eventfd(0, flags)) }
    }

    fn pipe() -> (File, File) {
        let mut ends = [0; 2];
        // SAFETY: pipe2 fills two descriptors, which are ours alone.
        unsafe {
            assert_eq!(0, libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC));
            (File::from_raw_fd(ends[0]), File::from_raw_fd(ends[1]))
        }
    }

    #[test]
    fn full_eventfd_is_not_waited_for_whether_it_waits_or_not() {
        for flags in [0, libc::EFD_NONBLOCK] {
            let mut event = eventfd(flags);
            let notifier = Notifier::new(event.try_clone().unwrap());
            notifier.signal().unwrap();
            event.write_all(&(u64::MAX - 2).to_ne_bytes()).unwrap();
            let full = notifier.signal().unwrap_err();
            assert_eq!(full.kind(), io::ErrorKind::WouldBlock);
            assert_eq!(take_kicks(&event).unwrap(), 8);
            notifier.signal().unwrap();
        }
    }

    #[test]
    fn kick_that_somebody_else_took_is_not_waited_for() {
        for flags in [0, libc::EFD_NONBLOCK] {
            let event = eventfd(flags);
            let nothing = take_kicks(&event).unwrap_err();
            assert_eq!(nothing.kind(), io::ErrorKind::WouldBlock);
            Notifier::new(event.try_clone().unwrap()).signal().unwrap();
            assert_eq!(take_kicks(&event).unwrap(), 8);
        }
    }

    #[test]
    fn pipe_that_is_full_empty_or_broken_ends_in_an_error() {
        let (reader, writer) = pipe();
        let notifier = Notifier::new(writer);
        let nothing = take_kicks(&reader).unwrap_err();
        assert_eq!(nothing.kind(), io::ErrorKind::WouldBlock);
        let full = (0..100_000).find_map(|_| notifier.signal().err()).unwrap();
        assert_eq!(full.kind(), io::ErrorKind::WouldBlock);
        assert_eq!(take_kicks(&reader).unwrap(), 8);
        drop(reader);
        let broken = notifier.signal().unwrap_err();
        assert_eq!(broken.kind(), io::ErrorKind::BrokenPipe);
    }
}
