//! Signals as something to be read, not something that interrupts.

use std::io;
use std::mem::{MaybeUninit, zeroed};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// SIGTERM, SIGINT, SIGHUP and SIGUSR2, read from a signalfd.
#[derive(Debug)]
pub struct Signals(OwnedFd);

impl Signals {
    /// Blocks the signals in the calling thread, and so in all that it starts from now on. To be called
    /// first in `main`: a thread that already runs would still die of them.
    ///
    /// # Errors
    /// The system has no signalfd to give.
    pub fn block() -> io::Result<Self> {
        // SAFETY: an all-zero sigset_t is valid, and the calls below only write to it.
        let mut set: libc::sigset_t = unsafe { zeroed() };
        // SAFETY: `set` is a valid, writable set; the signal numbers exist.
        unsafe {
            libc::sigemptyset(&mut set);
            for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGUSR2] {
                libc::sigaddset(&mut set, signal);
            }
        }
        // SAFETY: `set` is initialised; the old mask is not asked for.
        let result = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) };
        if result != 0 {
            return Err(io::Error::from_raw_os_error(result));
        }
        // SAFETY: `set` is initialised; a new descriptor is ours.
        unsafe {
            let fd = libc::signalfd(-1, &set, libc::SFD_NONBLOCK | libc::SFD_CLOEXEC);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(Signals(OwnedFd::from_raw_fd(fd)))
        }
    }

    /// The next signal that has come, if any.
    pub(super) fn next(&self) -> io::Result<Option<libc::c_int>> {
        const SIZE: usize = size_of::<libc::signalfd_siginfo>();
        let mut info = MaybeUninit::<libc::signalfd_siginfo>::uninit();
        // SAFETY: `info` has room for the SIZE bytes asked for.
        let len = unsafe { libc::read(self.0.as_raw_fd(), info.as_mut_ptr().cast(), SIZE) };
        match usize::try_from(len) {
            Ok(SIZE) => {
                // SAFETY: the kernel wrote a whole signalfd_siginfo.
                let info = unsafe { info.assume_init() };
                Ok(i32::try_from(info.ssi_signo).ok())
            }
            Ok(_) => Ok(None),
            Err(_) => {
                let error = io::Error::last_os_error();
                match error.kind() {
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(None),
                    _ => Err(error),
                }
            }
        }
    }
}

impl AsRawFd for Signals {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
