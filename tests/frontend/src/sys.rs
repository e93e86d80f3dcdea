//! The few system calls that `std` does not carry: memfd, eventfd, poll, and descriptors over a socket.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

/// Turns a negative return value into the thread's last OS error.
fn check(ret: libc::c_int) -> io::Result<libc::c_int> {
    if ret < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(ret)
    }
}

/// A `memfd` of `size` bytes, as a VMM backs its guest memory.
///
/// # Errors
/// Those of memfd_create(2) and ftruncate(2).
pub fn memfd(size: u64) -> io::Result<OwnedFd> {
    new_memfd(size, 0)
}

/// The same in huge pages of 2 MiB; `size` is a multiple of that.
///
/// # Errors
/// As [`memfd`].
pub fn huge_memfd(size: u64) -> io::Result<OwnedFd> {
    new_memfd(size, libc::MFD_HUGETLB | libc::MFD_HUGE_2MB)
}

fn new_memfd(size: u64, flags: libc::c_uint) -> io::Result<OwnedFd> {
    // SAFETY: the name is a valid C string; a descriptor that is returned is ours alone.
    let fd = unsafe {
        let raw = libc::memfd_create(c"guest-memory".as_ptr(), libc::MFD_CLOEXEC | flags);
        OwnedFd::from_raw_fd(check(raw)?)
    };
    truncate(&fd, size)?;
    Ok(fd)
}

/// Sets the length of a file by descriptor.
///
/// # Errors
/// Those of ftruncate(2); a size beyond `i64` is `InvalidInput`.
pub fn truncate(fd: &OwnedFd, size: u64) -> io::Result<()> {
    let size = libc::off_t::try_from(size).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: the descriptor is open for the length of the call.
    check(unsafe { libc::ftruncate(fd.as_raw_fd(), size) }).map(drop)
}

/// Waits until `fd` is readable (or hung up); false when `timeout` passed first.
///
/// # Errors
/// Those of poll(2) but `EINTR`, which is retried.
pub fn wait_readable(fd: RawFd, timeout: Duration) -> io::Result<bool> {
    let deadline = Instant::now() + timeout;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        // Rounded up, so that a wait never turns into a spin in its last millisecond.
        let millis = i32::try_from(left.as_micros().div_ceil(1000)).unwrap_or(i32::MAX);
        let mut entry = libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one valid pollfd for the length of the call.
        match check(unsafe { libc::poll(&mut entry, 1, millis) }) {
            Ok(0) => return Ok(false),
            Ok(_) => return Ok(true),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

/// Bytes that a unix socket has sent and the other side has not read.
///
/// # Errors
/// Those of ioctl(2).
pub fn queued_bytes(socket: RawFd) -> io::Result<usize> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: TIOCOUTQ (SIOCOUTQ) writes one int.
    check(unsafe { libc::ioctl(socket, libc::TIOCOUTQ, &mut bytes) })?;
    Ok(usize::try_from(bytes).unwrap_or(0))
}

/// An eventfd: a kick, a call or an error notifier.
#[derive(Debug)]
pub struct EventFd(OwnedFd);

impl EventFd {
    /// A non-blocking eventfd at zero.
    ///
    /// # Errors
    /// Those of eventfd(2).
    pub fn new() -> io::Result<Self> {
        // SAFETY: plain call; a descriptor that is returned is ours alone.
        let fd = unsafe {
            let raw = libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK);
            OwnedFd::from_raw_fd(check(raw)?)
        };
        Ok(Self(fd))
    }

    /// Adds one.
    ///
    /// # Errors
    /// Those of write(2).
    pub fn signal(&self) -> io::Result<()> {
        let one = 1u64.to_ne_bytes();
        // SAFETY: eight readable bytes.
        let n = unsafe { libc::write(self.raw(), one.as_ptr().cast(), one.len()) };
        if n == 8 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }

    /// Takes the counter; zero when it was not signalled.
    pub fn take(&self) -> u64 {
        let mut value = [0u8; 8];
        // SAFETY: eight writable bytes; the descriptor does not block.
        let n = unsafe { libc::read(self.raw(), value.as_mut_ptr().cast(), value.len()) };
        if n == 8 { u64::from_ne_bytes(value) } else { 0 }
    }

    /// Waits for a signal and takes it; false when `timeout` passed first.
    ///
    /// # Errors
    /// Those of poll(2).
    pub fn wait(&self, timeout: Duration) -> io::Result<bool> {
        if !wait_readable(self.raw(), timeout)? {
            return Ok(false);
        }
        self.take();
        Ok(true)
    }

    /// The raw descriptor, to be sent over a socket.
    pub fn raw(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// How many descriptors one message can carry here (the kernel's own limit is 253).
const MAX_FDS: usize = 64;

/// Room for the control message of `MAX_FDS` descriptors, aligned for `cmsghdr`.
#[repr(align(8))]
struct Control([u8; 1024]);

/// One sendmsg(2) with descriptors attached to its first byte; returns the bytes that went out.
///
/// # Errors
/// Those of sendmsg(2); more than 64 descriptors are `InvalidInput`.
pub fn send_with_fds(socket: RawFd, bytes: &[u8], fds: &[RawFd]) -> io::Result<usize> {
    if fds.len() > MAX_FDS {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut control = Control([0; 1024]);
    let mut part = libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    };
    // SAFETY: all-zero is a valid msghdr.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &mut part;
    message.msg_iovlen = 1;
    if !fds.is_empty() {
        let length = std::mem::size_of_val(fds) as u32;
        message.msg_control = control.0.as_mut_ptr().cast();
        // SAFETY: plain arithmetic.
        message.msg_controllen = unsafe { libc::CMSG_SPACE(length) } as _;
        // SAFETY: the control buffer holds one header and MAX_FDS descriptors, and is aligned for it.
        unsafe {
            let header = libc::CMSG_FIRSTHDR(&message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(length) as _;
            std::ptr::copy_nonoverlapping(
                fds.as_ptr().cast::<u8>(),
                libc::CMSG_DATA(header),
                length as usize,
            );
        }
    }
    // SAFETY: the message points at live buffers for the length of the call.
    let sent = unsafe { libc::sendmsg(socket, &message, libc::MSG_NOSIGNAL) };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

/// One recvmsg(2) with whatever descriptors came; zero bytes mean end of file.
///
/// # Errors
/// Those of recvmsg(2); a socket timeout shows as `WouldBlock`.
pub fn recv_with_fds(socket: RawFd, bytes: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut control = Control([0; 1024]);
    let mut part = libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: bytes.len(),
    };
    // SAFETY: all-zero is a valid msghdr.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.0.as_mut_ptr().cast();
    message.msg_controllen = control.0.len() as _;
    // SAFETY: the message points at live buffers for the length of the call.
    let got = unsafe { libc::recvmsg(socket, &mut message, libc::MSG_CMSG_CLOEXEC) };
    let got = usize::try_from(got).map_err(|_| io::Error::last_os_error())?;
    let mut fds = Vec::new();
    // SAFETY: the kernel filled the control buffer; the headers are walked by its own macros, and each
    // descriptor found there is new and ours alone.
    unsafe {
        let mut header = libc::CMSG_FIRSTHDR(&message);
        while !header.is_null() {
            if (*header).cmsg_level == libc::SOL_SOCKET && (*header).cmsg_type == libc::SCM_RIGHTS {
                let length = (*header).cmsg_len as usize - libc::CMSG_LEN(0) as usize;
                let data = libc::CMSG_DATA(header).cast::<RawFd>();
                for i in 0..length / size_of::<RawFd>() {
                    fds.push(OwnedFd::from_raw_fd(data.add(i).read_unaligned()));
                }
            }
            header = libc::CMSG_NXTHDR(&message, header);
        }
    }
    Ok((got, fds))
}

/// The number of clock ticks a second, the unit of CPU time in `/proc/PID/stat`.
pub fn clock_ticks() -> u64 {
    // SAFETY: plain call.
    let ticks = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    u64::try_from(ticks).unwrap_or(100).max(1)
}

/// Sends `signal` to `pid`.
///
/// # Errors
/// Those of kill(2).
pub fn kill(pid: u32, signal: i32) -> io::Result<()> {
    let pid = libc::pid_t::try_from(pid).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: plain call.
    check(unsafe { libc::kill(pid, signal) }).map(drop)
}
