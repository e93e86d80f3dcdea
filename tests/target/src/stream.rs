//! The byte stream under a connection.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsRawFd, RawFd};

use openssl::ssl::{ErrorCode, ShutdownState, SslStream};

use crate::tls;

/// A non-blocking stream.
pub(crate) enum Stream {
    Plain(TcpStream),
    Tls(SslStream<TcpStream>),
}

impl Stream {
    pub fn fd(&self) -> RawFd {
        match self {
            Self::Plain(s) => s.as_raw_fd(),
            Self::Tls(s) => s.get_ref().as_raw_fd(),
        }
    }

    /// Bytes that are decrypted already: no poll tells of them.
    pub fn has_pending(&self) -> bool {
        match self {
            Self::Plain(_) => false,
            Self::Tls(s) => s.ssl().pending() > 0,
        }
    }

    /// A step of the handshake: none when it is over, else what to wait for.
    pub fn handshake(&mut self) -> io::Result<Option<libc::c_short>> {
        let Self::Tls(s) = self else { return Ok(None) };
        match s.accept() {
            Ok(()) => Ok(None),
            Err(e) if e.code() == ErrorCode::WANT_READ => Ok(Some(libc::POLLIN)),
            Err(e) if e.code() == ErrorCode::WANT_WRITE => Ok(Some(libc::POLLOUT)),
            Err(e) => Err(io::Error::other(format!("TLS handshake: {e}"))),
        }
    }

    /// Who TLS has shown to be at the other end; none without TLS.
    pub fn peer(&self) -> Option<tls::Peer> {
        match self {
            Self::Plain(_) => None,
            Self::Tls(s) => tls::peer(s.ssl()),
        }
    }

    pub fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(s) => s.read(to),
            Self::Tls(s) => s.read(to),
        }
    }

    pub fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(s) => s.write(from),
            Self::Tls(s) => s.write(from),
        }
    }

    /// Says that nothing more follows; what was sent still arrives.
    pub fn finish(&mut self) {
        match self {
            Self::Plain(s) => drop(s.shutdown(std::net::Shutdown::Write)),
            Self::Tls(s) => {
                // close_notify once, then the end of the stream.
                if !s.get_shutdown().contains(ShutdownState::SENT) {
                    let _ = s.shutdown();
                }
                let _ = s.get_ref().shutdown(std::net::Shutdown::Write);
            }
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
