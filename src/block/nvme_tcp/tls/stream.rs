//! A connection with its session, for a thread that may wait.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::Instant;

use super::handshake::{left, of_io};
use super::session::{RECORD, TlsSession};
use super::{TlsError, TlsPsk};

/// A TLS session on its connection, read and written as the connection would be. Each call waits until the
/// deadline at most, if there is one.
#[derive(Debug)]
pub struct TlsStream {
    stream: TcpStream,
    session: TlsSession,
    deadline: Option<Instant>,
    buffer: Box<[u8; RECORD]>,
}

impl TlsStream {
    /// Does the handshake ([`TlsSession::connect`]).
    ///
    /// # Errors
    /// Those of the handshake.
    pub fn connect(stream: TcpStream, psk: &TlsPsk, deadline: Instant) -> Result<Self, TlsError> {
        let session = TlsSession::connect(&stream, psk, deadline)?;
        Ok(Self {
            stream,
            session,
            deadline: None,
            buffer: Box::new([0; RECORD]),
        })
    }

    /// Until when the calls that follow wait; none: for ever. One that passes it fails with
    /// [`io::ErrorKind::TimedOut`]; the session is whole after that, and what was not sent yet is sent by the
    /// next call.
    pub fn set_deadline(&mut self, deadline: Option<Instant>) {
        self.deadline = deadline;
    }

    /// The connection, to wait for it by poll(2). Bytes that were read from it before may be in the session:
    /// read until [`io::ErrorKind::TimedOut`] first.
    pub fn get_ref(&self) -> &TcpStream {
        &self.stream
    }

    /// The connection and the session, for another driver.
    pub fn into_parts(self) -> (TcpStream, TlsSession) {
        (self.stream, self.session)
    }

    fn timeout(&self) -> Result<Option<std::time::Duration>, TlsError> {
        self.deadline.map(left).transpose()
    }

    fn send(&mut self) -> Result<(), TlsError> {
        while !self.session.output().is_empty() {
            let timeout = self.timeout()?;
            self.stream
                .set_write_timeout(timeout)
                .map_err(TlsError::Io)?;
            match self.stream.write(self.session.output()) {
                Ok(count) => self.session.sent(count),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(of_io(error)),
            }
        }
        Ok(())
    }
}

impl Read for TlsStream {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        if to.is_empty() {
            return Ok(0);
        }
        loop {
            let read = self.session.read(to);
            // The answer to a KeyUpdate, or an alert.
            if !self.session.output().is_empty() {
                let sent = self.send();
                if read.is_ok() {
                    sent?;
                }
            }
            match read {
                Ok(0) => {}
                Ok(count) => return Ok(count),
                Err(TlsError::Closed) => return Ok(0),
                Err(error) => return Err(error.into()),
            }
            self.stream.set_read_timeout(self.timeout()?)?;
            match self.stream.read(&mut self.buffer[..]) {
                // The end without close_notify may be somebody else's doing (RFC 8446, section 6.1).
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => self.session.feed(&self.buffer[..count]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(of_io(error).into()),
            }
        }
    }
}

impl Write for TlsStream {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        // What an earlier call left comes first, so that a slow connection bounds the output.
        self.send()?;
        let count = from.len().min(8 * RECORD);
        self.session.write(&from[..count])?;
        match self.send() {
            // The bytes are in the session, and may be in part on the wire: they count as written.
            Ok(()) | Err(TlsError::TimedOut) => Ok(count),
            Err(error) => Err(error.into()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(self.send()?)
    }
}
