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
}
