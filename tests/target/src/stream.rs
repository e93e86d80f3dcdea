//! The byte stream under a connection.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsRawFd, RawFd};

/// A non-blocking stream.
pub(crate) enum Stream {
    Plain(TcpStream),
}

impl Stream {
    pub fn fd(&self) -> RawFd {
        match self {
            Self::Plain(s) => s.as_raw_fd(),
        }
    }

    pub fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(s) => s.read(to),
        }
    }

    pub fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(s) => s.write(from),
        }
    }

    /// Says that nothing more follows; what was sent still arrives.
    pub fn finish(&mut self) {
        match self {
            Self::Plain(s) => drop(s.shutdown(std::net::Shutdown::Write)),
        }
    }

    /// Makes the end of the stream a reset (RST): what waits in the socket is thrown away.
    pub fn reset(&mut self) {
        let linger = libc::linger {
            l_onoff: 1,
            l_linger: 0,
        };
        // SAFETY: a valid descriptor, and a structure of the size that is told.
        unsafe {
            libc::setsockopt(
                self.fd(),
                libc::SOL_SOCKET,
                libc::SO_LINGER,
                (&raw const linger).cast(),
                size_of::<libc::linger>() as libc::socklen_t,
            );
            // The descriptor has a clone that others may still hold: disconnecting is what resets at once.
            let nobody = libc::sockaddr {
                sa_family: libc::AF_UNSPEC as libc::sa_family_t,
                sa_data: [0; 14],
            };
            libc::connect(
                self.fd(),
                &raw const nobody,
                size_of::<libc::sockaddr>() as libc::socklen_t,
            );
        }
    }
}
