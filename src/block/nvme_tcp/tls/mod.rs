//! TLS 1.3 with pre-shared keys (NVM Express TCP Transport Specification 1.1, section 3.6.1), by OpenSSL.
//!
//! A [`TlsPsk`] is made of the configured PSK of a host and a subsystem. [`TlsSession::connect`] does the
//! handshake on a connection that was just made; then the session turns plaintext into ciphertext and back,
//! while the connection belongs to its caller. [`TlsStream`] is both, for a thread that may wait.
//!
//! | module | what it does |
//! | --- | --- |
//! | [`TlsPsk`] | identities, and keys for them |
//! | [`TlsSession`] | handshake and records |
//! | [`TlsStream`] | a connection that is read and written like any other |

mod ffi;
mod handshake;
mod keyring;
mod psk;
mod session;
mod stream;

#[cfg(test)]
pub(super) mod tests;

pub use handshake::Direction;
pub use psk::{Derivation, TlsPsk};
pub use session::TlsSession;
pub use stream::TlsStream;

use std::io;

use openssl::error::ErrorStack;

/// What can go wrong with TLS. Nothing of a key is in it.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The target does not take the key, or the identity.
    #[error(
        "the target refused the pre-shared key ({0}); check that it has the same key for this host's NQN and \
         this subsystem's NQN, derived in the same way (`nvme check-tls-key` shows the identity)"
    )]
    Refused(String),
    /// What listens there speaks no TLS 1.3.
    #[error("the target speaks no TLS 1.3 on this port ({0}); check the port, or leave TLS out")]
    NoTls(String),
    /// The connection was closed in the middle of the handshake, without a word.
    #[error(
        "the target closed the connection during the TLS handshake; check that TLS is on at this port, and \
         that the target has the pre-shared key"
    )]
    Hangup,
    /// The handshake, or an operation of a [`TlsStream`], took too long.
    #[error("the target did not answer in time")]
    TimedOut,
    /// The target ended the session.
    #[error("the target closed the TLS session")]
    Closed,
    /// The target ended the session with an alert.
    #[error("the target ended the TLS session with an alert: {0}")]
    Alert(String),
    /// A record that is not what the target sent, or that breaks the protocol.
    #[error("a TLS record of the connection is damaged or forged: {0}")]
    Record(String),
    /// The session had failed before.
    #[error("the TLS session has failed before")]
    Dead,
    /// The identity has no room for NQNs that long.
    #[error("the two NQNs are too long together for a PSK identity of version 0")]
    TooLong,
    /// OpenSSL can not do what is asked of it: a restricted configuration, or no memory.
    #[error("OpenSSL failed: {0}")]
    OpenSsl(#[from] ErrorStack),
    /// The connection failed.
    #[error("the connection failed: {0}")]
    Io(#[source] io::Error),
}

impl TlsError {
    /// True if the target may take the key under another identity, or derived in another way.
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Refused(_) | Self::Hangup)
    }
}

impl From<TlsError> for io::Error {
    fn from(error: TlsError) -> Self {
        let kind = match &error {
            TlsError::TimedOut => io::ErrorKind::TimedOut,
            TlsError::Closed | TlsError::Alert(_) | TlsError::Hangup => {
                io::ErrorKind::ConnectionAborted
            }
            TlsError::Record(_) => io::ErrorKind::InvalidData,
            TlsError::Refused(_) => io::ErrorKind::PermissionDenied,
            TlsError::Io(error) => error.kind(),
            _ => io::ErrorKind::Other,
        };
        Self::new(kind, error)
    }
}
