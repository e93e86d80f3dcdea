//! The handshake, on a connection that may be waited for.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use openssl::error::ErrorStack;
use openssl::ssl::{
    HandshakeError, MidHandshakeSslStream, Ssl, SslContext, SslContextBuilder, SslMethod,
    SslStream, SslVerifyMode, SslVersion,
};

use super::session::{self, RECORD, TlsSession, Wire};
use super::{TlsError, TlsPsk, ffi};

impl TlsSession {
    /// Does the handshake of a client on `stream`, which nothing was sent on yet. The stream waits ("blocking"
    /// mode); its timeouts are as before afterwards. What comes behind the handshake stays in the session.
    ///
    /// # Errors
    /// [`TlsError::Refused`] and [`TlsError::Hangup`] if the target does not take the key: it may take that of
    /// another [`super::Derivation`], on a new connection. [`TlsError::NoTls`], [`TlsError::TimedOut`], and
    /// those of the connection and of OpenSSL.
    pub fn connect(stream: &TcpStream, psk: &TlsPsk, deadline: Instant) -> Result<Self, TlsError> {
        let timeouts = (stream.read_timeout(), stream.write_timeout());
        let result = Self::connect_with(stream, psk, &mut |direction| {
            let left = Some(left(deadline)?);
            let set = match direction {
                Direction::Read => stream.set_read_timeout(left),
                Direction::Write => stream.set_write_timeout(left),
            };
            set.map_err(TlsError::Io)
        });
        if let (Ok(read), Ok(write)) = timeouts {
            stream.set_read_timeout(read).map_err(TlsError::Io)?;
            stream.set_write_timeout(write).map_err(TlsError::Io)?;
        }
        result
    }

    /// As [`TlsSession::connect`], on a stream that need not wait: `wait` is called before each read and write, and
    /// may return before one is possible. What it fails with ends the handshake.
    ///
    /// # Errors
    /// Those of [`TlsSession::connect`], and of `wait`.
    pub fn connect_with(
        stream: &TcpStream,
        psk: &TlsPsk,
        wait: &mut dyn FnMut(Direction) -> Result<(), TlsError>,
    ) -> Result<Self, TlsError> {
        let context = context(psk)?;
        let mut ssl = Ssl::new(&context)?;
        ffi::offer(&mut ssl, psk)?;
        let stream = handshake(stream, ssl, wait)?;
        ffi::forget(stream.ssl());
        // Without the key this would be a session with anybody: no certificate is looked at.
        if !stream.ssl().session_reused() {
            return Err(TlsError::Refused("it answered without it".to_owned()));
        }
        Ok(Self::new(stream))
    }
}

/// What is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Bytes to read.
    Read,
    /// Room for bytes that are written.
    Write,
}

type Wait<'a> = &'a mut dyn FnMut(Direction) -> Result<(), TlsError>;

/// TLS 1.3 with the one suite that the key has, and with a Diffie-Hellman exchange (psk_dhe_ke is all that
/// OpenSSL offers unless told otherwise). No certificate is trusted.
fn context(psk: &TlsPsk) -> Result<SslContext, ErrorStack> {
    let mut context = SslContextBuilder::new(SslMethod::tls_client())?;
    context.set_min_proto_version(Some(SslVersion::TLS1_3))?;
    context.set_max_proto_version(Some(SslVersion::TLS1_3))?;
    context.set_ciphersuites(psk.cipher_suite())?;
    context.set_verify(SslVerifyMode::PEER);
    Ok(context.build())
}

fn handshake(stream: &TcpStream, ssl: Ssl, wait: Wait<'_>) -> Result<SslStream<Wire>, TlsError> {
    let mut result = ssl.connect(Wire::default());
    loop {
        match result {
            Ok(mut session) => {
                send(stream, session.get_mut(), wait)?;
                return Ok(session);
            }
            Err(HandshakeError::WouldBlock(mut waiting)) => {
                send(stream, waiting.get_mut(), wait)?;
                receive(stream, waiting.get_mut(), wait)?;
                result = waiting.handshake();
            }
            Err(HandshakeError::Failure(mut failed)) => {
                let error = refusal(&failed);
                // The alert, if it can be sent: the target's log says why then.
                let _ = send(stream, failed.get_mut(), wait);
                return Err(error);
            }
            Err(HandshakeError::SetupFailure(error)) => return Err(error.into()),
        }
    }
}

/// Why the handshake failed.
fn refusal(failed: &MidHandshakeSslStream<Wire>) -> TlsError {
    let Some(stack) = failed.error().ssl_error() else {
        return TlsError::Hangup;
    };
    let Some(error) = stack.errors().first() else {
        return TlsError::Hangup;
    };
    if let Some(alert) = session::alert(error) {
        return match error.reason_code() - 1000 {
            // protocol_version.
            70 => TlsError::NoTls(alert),
            _ => TlsError::Refused(alert),
        };
    }
    let reason = error.reason().unwrap_or("unknown reason").to_owned();
    match error.reason_code() {
        // SSL_R_CERTIFICATE_VERIFY_FAILED: it went on with a certificate, as if no key had been offered.
        134 => TlsError::Refused("it answered with a certificate instead".to_owned()),
        // SSL_R_WRONG_VERSION_NUMBER, SSL_R_UNSUPPORTED_PROTOCOL, SSL_R_HTTP_REQUEST and the like.
        267 | 258 | 156 | 155 => TlsError::NoTls(reason),
        _ => TlsError::Record(reason),
    }
}

/// The time that is left.
pub(super) fn left(deadline: Instant) -> Result<Duration, TlsError> {
    let left = deadline.saturating_duration_since(Instant::now());
    match left.is_zero() {
        true => Err(TlsError::TimedOut),
        false => Ok(left),
    }
}

/// What a failed system call means: with a timeout, it ends with EAGAIN.
pub(super) fn of_io(error: std::io::Error) -> TlsError {
    match error.kind() {
        std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut => TlsError::TimedOut,
        _ => TlsError::Io(error),
    }
}

fn send(mut stream: &TcpStream, wire: &mut Wire, wait: Wait<'_>) -> Result<(), TlsError> {
    while !wire.outgoing().is_empty() {
        wait(Direction::Write)?;
        match stream.write(wire.outgoing()) {
            Ok(count) => wire.sent(count),
            Err(error) if is_for_now(&error) => {}
            Err(error) => return Err(hangup(error)),
        }
    }
    Ok(())
}

fn receive(mut stream: &TcpStream, wire: &mut Wire, wait: Wait<'_>) -> Result<(), TlsError> {
    let mut buffer = [0; RECORD];
    loop {
        wait(Direction::Read)?;
        match stream.read(&mut buffer) {
            Ok(0) => return Err(TlsError::Hangup),
            Ok(count) => {
                wire.feed(&buffer[..count]);
                return Ok(());
            }
            Err(error) if is_for_now(&error) => {}
            Err(error) => return Err(hangup(error)),
        }
    }
}

/// Another wait, which is bounded, and then it is tried again.
fn is_for_now(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
    )
}

/// A target that does not take a key may reset the connection.
fn hangup(error: std::io::Error) -> TlsError {
    match error.kind() {
        std::io::ErrorKind::ConnectionReset | std::io::ErrorKind::BrokenPipe => TlsError::Hangup,
        _ => of_io(error),
    }
}
