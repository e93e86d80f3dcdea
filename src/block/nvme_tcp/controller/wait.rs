//! Waiting with a deadline, while other things may want attention.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::{Duration, Instant};

use super::trouble::{Result, later};

/// What is waited for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Want<'a> {
    /// Bytes to be read, or the end.
    Read(BorrowedFd<'a>),
    /// Room for bytes, or the end of connecting.
    Write(BorrowedFd<'a>),
    /// The deadline alone.
    Time,
}

/// Who waits. Everything that blocks on a path does so through one of these.
pub(crate) trait Waiter {
    /// Waits until what is wanted is there or `deadline` is over, or something else was done meanwhile. True if it
    /// is there.
    ///
    /// # Errors
    /// The path is to end, or what goes on beside has failed.
    fn wait(&mut self, want: Want<'_>, deadline: Instant) -> Result<bool>;
}

/// Waits for nothing else.
pub(crate) struct Patience;

impl Waiter for Patience {
    fn wait(&mut self, want: Want<'_>, deadline: Instant) -> Result<bool> {
        let mut fds = [pollfd(want)];
        poll(&mut fds, Some(deadline)).map_err(|error| later(format!("poll: {error}")))?;
        Ok(fds[0].revents != 0)
    }
}

/// An entry for [`poll`]. A negative descriptor is not looked at.
pub(crate) fn pollfd(want: Want<'_>) -> libc::pollfd {
    let (fd, events) = match want {
        Want::Read(fd) => (fd.as_raw_fd(), libc::POLLIN | libc::POLLRDHUP),
        Want::Write(fd) => (fd.as_raw_fd(), libc::POLLOUT),
        Want::Time => (-1, 0),
    };
    libc::pollfd {
        fd,
        events,
        revents: 0,
    }
}

/// Waits until one of `fds` is ready, or `deadline` is over; or an interruption, which looks like the latter.
pub(crate) fn poll(fds: &mut [libc::pollfd], deadline: Option<Instant>) -> io::Result<()> {
    let millis = deadline.map_or(-1, |deadline| {
        let left = deadline.saturating_duration_since(Instant::now());
        // Rounded up, or the last millisecond would be spun away.
        let left = left.saturating_add(Duration::from_micros(999));
        i32::try_from(left.as_millis()).unwrap_or(i32::MAX)
    });
    // SAFETY: `fds` is that many valid pollfds.
    let ready = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, millis) };
    if ready < 0 {
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
        for fd in fds {
            fd.revents = 0;
        }
    }
    Ok(())
}
